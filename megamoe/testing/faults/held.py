"""What a process holds, counted before a fault and after it: what is more afterwards was not given back."""

import gc
import os
from typing import NamedTuple

import torch

from megamoe_cuda import nvshmem

DRIVER_SLACK = 4 << 20
"""Bytes that the driver may take for itself between two counts: two of the pieces in which it asks for memory."""


class Held(NamedTuple):
    """descriptors: open files and sockets. arenas: symmetric memories on NVSHMEM's heap, whose pages stay mapped when
    they are freed. torch_bytes: of live tensors. driver_bytes: of this GPU, all that torch has not asked for: kernels,
    NVSHMEM's heap, and what other processes hold, so that nobody else may use the GPU meanwhile."""

    descriptors: int
    arenas: int
    torch_bytes: int
    driver_bytes: int


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def held() -> Held:
    """Of this process and the current GPU, after its work is done and what nobody refers to is let go."""
    torch.cuda.synchronize()
    gc.collect()
    free, total = torch.cuda.mem_get_info()
    arenas = 0 if nvshmem._session is None else nvshmem._session.users
    return Held(descriptors(), arenas, torch.cuda.memory_allocated(), total - free - torch.cuda.memory_reserved())


def not_given_back(before: Held, after: Held) -> str:
    """A text for Said.problem; empty if there is no more after than before."""
    slack, more = Held(0, 0, 0, DRIVER_SLACK), {}
    for name, now, then, spare in zip(Held._fields, after, before, slack):
        if now > then + spare:
            more[name] = now - then
    return "".join(f"{count} {name.replace('_', ' ')} were not given back; " for name, count in more.items())
