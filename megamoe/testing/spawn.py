"""N ranks on one machine without a launcher: a script started N times with the variables torchrun would set."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist


class RankResult(NamedTuple):
    """returncode: None if the rank was ended because of the time limit or another rank's failure."""

    ep_rank: int
    returncode: int | None
    output: str


def launcher_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank of this machine whose store, held by the launcher, listens on `port`."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def spawn_ranks(
    command: Sequence[str | os.PathLike],
    num_ranks: int,
    *,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[RankResult]:
    """Run ``python *command`` as num_ranks gloo-capable ranks; stdout and stderr of each come back together.

    env: variables to add. After a rank fails the others get 15 s to report their own side of it, which a busy machine
        may need; nothing outlives the call.
    """
    # The store lives here and not in rank 0: its port is known to be free, and it outlasts a rank that dies
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=timeout_s))
    shared = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}") for rank in range(num_ranks)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                with log.open("w") as out:
                    rank_env = {**shared, **launcher_variables(rank, num_ranks, store.port)}
                    arguments = [sys.executable, *map(str, command)]
                    processes.append(subprocess.Popen(arguments, stdout=out, stderr=subprocess.STDOUT, env=rank_env))
            _wait(processes, time.monotonic() + timeout_s)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return [RankResult(rank, codes[rank], log.read_text()) for rank, log in enumerate(logs)]


def _wait(processes: list[subprocess.Popen], deadline: float) -> None:
    failed = False
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        if not failed and any(process.poll() for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + 15.0)
        time.sleep(0.02)
