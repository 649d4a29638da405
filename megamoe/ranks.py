"""Which rank am I, and how do ranks meet: the only reader of launcher variables."""

import hashlib
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class RankInfo(NamedTuple):
    """launcher: "torchrun", "openmpi", "pmi", "slurm" or "none" (one rank, no launcher)."""

    ep_rank: int
    ep_size: int
    local_rank: int
    launcher: str


# launcher -> variables of (rank, size, local rank); the first row whose rank variable is set wins. torchrun goes
# first: it may itself run under srun or mpirun. SLURM_STEP_NUM_TASKS, not SLURM_NTASKS: only srun sets it, a batch
# script is no rank.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", ("LOCAL_RANK",)),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    "pmi": ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID")),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
}


def rank_from_env(env: Mapping[str, str] | None = None) -> RankInfo:
    """Read the launcher's variables. ValueError names one that is missing or no number.

    env: None = os.environ. Without any launcher: rank 0 of 1.
    """
    env = os.environ if env is None else env
    for launcher, (rank_name, size_name, local_names) in _LAUNCHERS.items():
        if rank_name not in env or (launcher == "slurm" and size_name not in env):
            continue
        ep_rank, ep_size = _read(env, rank_name, launcher), _read(env, size_name, launcher)
        local_name = next((name for name in local_names if name in env), None)
        if local_name is None and ep_size > 1:
            raise ValueError(
                f"{rank_name} is set but none of {', '.join(local_names)}; set the rank's number on its host"
            )
        local_rank = _read(env, local_name, launcher) if local_name else 0
        if not 0 <= ep_rank < ep_size:
            raise ValueError(
                f"{rank_name}={ep_rank} is not below {size_name}={ep_size}; start the ranks with one launcher"
            )
        return RankInfo(ep_rank, ep_size, local_rank, launcher)
    return RankInfo(0, 1, 0, "none")


def _read(env: Mapping[str, str], name: str, launcher: str) -> int:
    if name not in env:
        raise ValueError(f"{name} is not set though other {launcher} variables are; unset those, or set it")
    try:
        return int(env[name])
    except ValueError:
        raise ValueError(f"{name}={env[name]!r} is not an integer; unset it or correct it") from None


def init_process_group(backend: str | None = None, *, timeout_s: float = 300.0) -> RankInfo:
    """Make this process one rank of the default process group, whatever launched it. Does nothing if that exists
    already.

    backend: None = "cpu:gloo,cuda:nccl" if there is a CUDA device, else "gloo".
    With CUDA, device local_rank becomes the current one. MASTER_ADDR and MASTER_PORT are used when set (torchrun sets
    them); under an MPI launcher rank 0 otherwise announces its address and a free port through mpi4py; under srun the
    first host of the step and a port derived from the job and step number are used. ValueError or ImportError says
    what is missing; TimeoutError, after timeout_s, which ranks were not started.
    """
    info = rank_from_env()
    if dist.is_initialized():
        return info
    has_cuda = torch.cuda.is_available()
    backend = backend or ("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    if has_cuda and "nccl" in backend:
        if info.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local_rank={info.local_rank}, but this host has {torch.cuda.device_count()} CUDA devices; start "
                "fewer ranks, "
                "or one rank with EPConfig(virtual_ranks=...)"
            )
        torch.cuda.set_device(info.local_rank)
    timeout = timedelta(seconds=timeout_s)
    store = _store(info, timeout)
    _call_the_roll(store, info, timeout_s)
    dist.init_process_group(backend, store=store, rank=info.ep_rank, world_size=info.ep_size, timeout=timeout)
    return info


def _call_the_roll(store: dist.Store, info: RankInfo, timeout_s: float) -> None:
    # A process group that waits for a rank cannot say which one
    keys = [f"megamoe/started/{rank}" for rank in range(info.ep_size)]
    store.set(keys[info.ep_rank], "")
    end = time.monotonic() + timeout_s
    while not store.check(keys):
        if time.monotonic() >= end:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            raise TimeoutError(
                f"rank {info.ep_rank} waited {timeout_s:g} s at start for rank {missing} of {info.ep_size}: not "
                "started, or it cannot reach this job's store; look at its own output"
            )
        time.sleep(0.02)


def _store(info: RankInfo, timeout: timedelta) -> dist.Store:
    if info.launcher == "none":
        return dist.HashStore()
    if info.launcher == "torchrun":  # which may hold the store itself
        return next(iter(dist.rendezvous("env://", info.ep_rank, info.ep_size, timeout=timeout)))[0]
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        host, port = os.environ["MASTER_ADDR"], _read(os.environ, "MASTER_PORT", info.launcher)
    elif info.launcher == "slurm":
        host, port = first_host(_slurm_hosts()), _slurm_port()
    else:
        return _store_over_mpi(info, timeout)
    return dist.TCPStore(host, port, info.ep_size, is_master=info.ep_rank == 0, timeout=timeout, wait_for_workers=False)


def _store_over_mpi(info: RankInfo, timeout: timedelta) -> dist.Store:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            f"launcher {info.launcher}: mpi4py is needed to exchange rank 0's address; pip install mpi4py, or set "
            "MASTER_ADDR "
            "and MASTER_PORT"
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (info.ep_rank, info.ep_size):
        raise ValueError(
            f"the launcher says rank {info.ep_rank} of {info.ep_size}, mpi4py says {world.rank} of {world.size}: it "
            "is built for "
            "another MPI; install mpi4py for the MPI whose mpirun you use"
        )
    one_host = len(set(world.allgather(socket.gethostname()))) == 1
    host = "127.0.0.1" if one_host else world.bcast(socket.gethostname(), root=0)
    # Port 0: the store itself finds a free one, so that no other process can take it between choice and use
    store = None
    if info.ep_rank == 0:
        store = dist.TCPStore(host, 0, info.ep_size, is_master=True, timeout=timeout, wait_for_workers=False)
    port = world.bcast(store.port if store else None, root=0)
    return store or dist.TCPStore(host, port, info.ep_size, is_master=False, timeout=timeout)


def _slurm_hosts() -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if os.environ.get(name):
            return os.environ[name]
    raise ValueError("SLURM_STEP_NODELIST is not set; set MASTER_ADDR and MASTER_PORT")


def _slurm_port() -> int:
    step = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')}"
    # All ranks must derive the same one without talking; below the range systems hand out by themselves
    return 20000 + int.from_bytes(hashlib.sha256(step.encode()).digest()[:4], "big") % 12000


def first_host(hosts: str) -> str:
    """The first host of a SLURM list: "node[03-07,12],other" -> "node03"."""
    name, bracket, ranges = hosts.partition("[")
    if not bracket or "," in name:
        return name.partition(",")[0]
    inside, _, rest = ranges.partition("]")
    first = inside.partition(",")[0].partition("-")[0]
    suffix = rest.partition(",")[0]
    return first_host(f"{name}{first}{suffix}") if "[" in suffix else f"{name}{first}{suffix}"
