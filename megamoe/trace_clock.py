"""The times of several GPUs on one clock, their host's.

A GPU's clock (PTX globaltimer) has a zero and a rate of its own. One thread on the GPU (csrc/debug/clock.cu) answers
numbers that the host writes with its time. The answer lies between the host's times before and after, so that half the
shortest of many rounds bounds the error (F. Cristian, Probabilistic clock synchronization, 1989): about a microsecond
over PCIe. Two readings around what was traced give the rate as well.
"""

import ctypes
import time
from typing import NamedTuple

from megamoe.trace import Lists

ROUNDS = 400  # some 3 us each
DEADLINE_S = 5.0  # of all rounds together


class Reading(NamedTuple):
    """One moment on both clocks, in nanoseconds: the host's CLOCK_MONOTONIC, the GPU's globaltimer, and by how much at
    most they are apart from being the same moment."""

    host_ns: int
    gpu_ns: int
    error_ns: int


class Words(ctypes.Structure):
    """What host and GPU write to each other, each on cache lines of its own."""

    _fields_ = (("asked", ctypes.c_uint32), ("apart", ctypes.c_uint32 * 31), ("answers", ctypes.c_uint64 * ROUNDS))


class Params(ctypes.Structure):
    """ClockParams of csrc/debug/clock.cu."""

    _fields_ = (("asked", ctypes.c_uint64), ("answers", ctypes.c_uint64), ("deadline_ns", ctypes.c_uint64),
                ("rounds", ctypes.c_uint32))  # fmt: skip


def compile_clock():
    """-> megamoe_cuda.compile.CompiledKernel; needs no GPU."""
    from megamoe_cuda.compile import compile_kernel

    return compile_kernel("debug/clock.cu", "clock_answers")


def ask(words: Words, rounds: int = ROUNDS, deadline_s: float = DEADLINE_S) -> Reading:
    """The host's side of the rounds, of which it keeps the shortest. RuntimeError without an answer in time."""
    now, answers = time.monotonic_ns, words.answers
    end, best = now() + int(deadline_s * 1e9), None
    for n in range(rounds):
        before = now()
        words.asked = n + 1
        while not answers[n]:
            if now() > end:
                raise RuntimeError(f"the GPU's clock gave {n} of {rounds} answers within {deadline_s:g} s; python -m "
                                   "megamoe doctor says what this GPU lacks")  # fmt: skip
        after = now()
        if best is None or after - before < best[0]:
            best = after - before, (before + after) // 2, answers[n]
    length, host_ns, gpu_ns = best
    return Reading(host_ns, gpu_ns, -(-length // 2))


class GpuClock:
    """The current device's clock. Context manager; made and read by a process without work on its current stream."""

    def __init__(self):
        from megamoe_cuda.launch import LoadedKernel
        from megamoe_cuda.symmetric import HostStatus

        kernel = compile_clock()
        self._memory = HostStatus(ctypes.sizeof(Words))
        try:
            self._kernel = LoadedKernel(kernel.cubin, kernel.entry)
        except Exception:
            self._memory.close()
            raise
        base = self._memory.device_ptr
        self._params = Params(base + Words.asked.offset, base + Words.answers.offset, int(DEADLINE_S * 1e9), ROUNDS)

    def read(self) -> Reading:
        import torch

        self._memory.host[:] = 0
        self._kernel.launch(torch.cuda.current_stream().cuda_stream, 1, 1, self._params, cooperative=False)
        try:
            return ask(Words.from_buffer(self._memory.host))
        finally:
            torch.cuda.synchronize()

    def __enter__(self) -> "GpuClock":
        return self

    def __exit__(self, *exception) -> None:
        self._memory.close()
        self._kernel.close()


def on_host_clock(lists: Lists, before: Reading, after: Reading) -> Lists:
    """The records' nanoseconds by the host's clock, between two readings. ValueError for readings in another order."""
    host_ns, gpu_ns = after.host_ns - before.host_ns, after.gpu_ns - before.gpu_ns
    if host_ns <= 0 or gpu_ns <= 0:
        raise ValueError(f"after={after} is not later than before={before} on both clocks")
    return {
        key: [r._replace(ns=before.host_ns + (r.ns - before.gpu_ns) * host_ns // gpu_ns) for r in some]
        for key, some in lists.items()
    }
