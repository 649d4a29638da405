"""How much memory a load of experts takes at its highest, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="not run: no /proc to read peak memory from"
)
PROGRAM = """
import sys, torch
from megamoe.checkpoint import Checkpoint, load_experts
from megamoe.config import MoEConfig

def status_bytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

torch.set_num_threads(1)
checkpoint = Checkpoint(sys.argv[1])
sizes = tuple(map(int, sys.argv[3].split(","))) if sys.argv[3] else None
for weight_format in sys.argv[2].split(","):
    config = MoEConfig(1024, 1024, 16, 2, weight_format=weight_format)
    load_experts(checkpoint, 0, range(1), config=config, sizes=sizes)  # code is paged in
    before = status_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # VmHWM starts again from here
    weights = load_experts(checkpoint, 0, range(8), config=config, sizes=sizes)
    print(status_bytes("VmHWM") - before, sum(t.nbytes for t in weights if t is not None))
    del weights
"""


def peaks(folder: Path, formats: tuple[str, ...], sizes: tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """(peak, bytes of the loaded weights) for each format: 8 of the 16 experts in `folder`, 1024 x 1024. sizes: as
    load_experts has it."""
    # A fixed threshold: freed blocks go back at once, so that resident memory is what is in use
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROGRAM, str(folder), ",".join(formats), ",".join(map(str, sizes or ()))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == len(formats)
    for weight_format, (peak, local) in zip(formats, found, strict=True):
        print(f"{weight_format}: peak {peak / 2**20:.1f} MiB, local weights {local / 2**20:.1f} MiB, an expert 6.0 MiB")
    return found
