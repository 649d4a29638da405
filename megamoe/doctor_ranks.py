"""python -m megamoe doctor --ranks, started on every rank by the launcher: what differs between their environments, and
how fast they reach each other, by the memory that a workspace would use."""

import hashlib
import os
import platform
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megamoe.doctor import Row, driver_row, version_of
from megamoe.ranks import init_process_group
from megamoe_cuda.compile import read_sources
from megamoe_cuda.gather import gather

SECTION = "between ranks"
START_S, DEADLINE_S = 120.0, 60.0
PING_BYTES, PINGS = 64 << 20, 8
# Variables that change what a library does; values are shown only where they differ.
PREFIXES = ("CUDA_", "MEGAMOE_DEBUG", "NCCL_", "NVSHMEM_", "TORCH_")
OWN = {"CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"}  # may differ from rank to rank


def fingerprint() -> dict[str, str]:
    """What must be equal on all ranks for them to run one program the same way."""
    sources = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in sorted(read_sources().items())).encode())
    found = {
        "python": platform.python_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda),
        "numpy": str(version_of("numpy")), "cuda-bindings": str(version_of("cuda-bindings")),
        "NVRTC": str(version_of("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13")),
        "nvshmem4py": str(version_of("nvshmem4py-cu13")), "NVSHMEM": str(version_of("nvidia-nvshmem-cu13")),
        "megamoe": str(version_of("megamoe")), "device sources": sources.hexdigest()[:12],
    }  # fmt: skip
    if torch.cuda.is_available():
        of = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"driver": driver_row(1).value}
        found |= {"GPU": f"{of.name}, {of.multi_processor_count} SMs, {of.total_memory >> 20} MiB"}
    found |= {name: value for name, value in os.environ.items() if name.startswith(PREFIXES) and name not in OWN}
    return found


def differences(everyone: list[dict[str, str]]) -> list[str]:
    """One line for each entry that is not the same on all ranks."""
    lines = []
    for name in sorted(set().union(*everyone)):
        values = [found.get(name, "unset") for found in everyone]
        if len(set(values)) > 1:
            lines.append(f"{name}: " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values)))
    return lines


def rank_rows() -> Iterator[Row]:
    """Collective. One rank alone gives a row that says so."""
    info = init_process_group(timeout_s=START_S)
    if info.ep_size == 1:
        yield Row(SECTION, "ranks", "none", "not run: one rank; start doctor --ranks by torchrun, mpirun or srun")
        return
    group = dist.group.WORLD
    everyone = gather(group, "fingerprint", fingerprint(), DEADLINE_S)
    found = differences(everyone)
    digest = hashlib.sha256(repr(sorted(everyone[0].items())).encode()).hexdigest()[:12]
    yield Row(SECTION, "environment", "wrong" if found else "ok",
              "; ".join(found) if found else f"{digest}, the same on {info.ep_size} ranks, {len(everyone[0])} entries",
              "give every rank the same packages and variables" if found else "")  # fmt: skip
    times = []
    for _ in range(PINGS):
        begin = time.perf_counter()
        gather(group, "ping", None, DEADLINE_S)
        times.append(time.perf_counter() - begin)
    yield Row(SECTION, "meeting", "ok", f"{min(times) * 1e6:.0f} us for all ranks to meet on the host, best of {PINGS}")
    yield from _bandwidth(group, info)
    dist.destroy_process_group()


def _bandwidth(group, info) -> Iterator[Row]:
    on_gpu = torch.cuda.is_available()
    mine = (_gpu_gbs if on_gpu else _gloo_gbs)(group, info)
    everyone = gather(group, "bandwidth", mine, DEADLINE_S)
    texts = [f"{src}->{dst} {gbs:.1f}" for src, row in enumerate(everyone) for dst, gbs in row]
    name = "copies to peers, GB/s" if on_gpu else "gloo, GB/s"
    rates = [gbs for row in everyone for _, gbs in row]
    slow = on_gpu and min(rates) < max(rates) / 2
    yield Row(SECTION, name, "wrong" if slow else "ok", ", ".join(texts),
              "some pairs are much slower: nvidia-smi topo -m shows which links they have" if slow else "")  # fmt: skip


def _gpu_gbs(group, info) -> list[tuple[int, float]]:
    """[(peer, GB/s)] of copies into each peer's arena, one pair at a time."""
    from megamoe_cuda.errors import check, driver
    from megamoe_cuda.symmetric import NvshmemMemory

    device = torch.device("cuda", torch.cuda.current_device())
    found = []
    with NvshmemMemory(PING_BYTES, group, device, DEADLINE_S) as memory:
        source = torch.empty(PING_BYTES, dtype=torch.uint8, device=device)
        for src in range(info.ep_size):
            for dst in (dst for dst in range(info.ep_size) if dst != src):
                memory.barrier()
                if src != info.ep_rank:
                    continue
                cuda, stream = driver(), torch.cuda.current_stream().cuda_stream
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for number in range(1 + PINGS):  # the first is for the mapping
                    if number == 1:
                        begin.record()
                    copied = cuda.cuMemcpyDtoDAsync(memory.base_ptrs[dst], source.data_ptr(), PING_BYTES, stream)
                    check(copied, "cuMemcpyDtoDAsync")
                end.record()
                torch.cuda.synchronize()
                found.append((dst, PINGS * PING_BYTES / begin.elapsed_time(end) / 1e6))
        memory.barrier()
    return found


def _gloo_gbs(group, info) -> list[tuple[int, float]]:
    data, found = torch.zeros(PING_BYTES // 8, dtype=torch.uint8), []
    for src in range(info.ep_size):
        for dst in (dst for dst in range(info.ep_size) if dst != src):
            gather(group, "pair", None, DEADLINE_S)
            begin = time.perf_counter()
            if src == info.ep_rank:
                dist.send(data, dst)
                dist.recv(data[:1], dst)
                found.append((dst, data.numel() / (time.perf_counter() - begin) / 1e9))
            elif dst == info.ep_rank:
                dist.recv(data, src)
                dist.send(data[:1], src)
    return found
