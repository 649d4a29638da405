"""The three ways a call is timed. On GPUs the two protocols under which the bar in cases.toml was taken; on CPUs a wall
clock.

graph     one CUDA graph of 20 calls that cycle through the routings, replayed 7 times after 2 warm-ups, each replay
          after a collective and an on-stream sleep; us = median over replays of the replay's time / 20, then the
          maximum over ranks
isolated  256 MB written to flush L2, barrier, on-stream sleep of about 1 ms, event, call, event; median of 30, then the
          maximum over ranks
wall      barrier, call; median of up to 30 calls by the host's clock, then the maximum over ranks
A sleep on the stream lets every rank's host finish enqueueing before any rank's device starts, so that launch cost and
skew stay outside.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

PROTOCOLS = ("graph", "isolated", "wall")
GRAPH_CALLS, GRAPH_REPLAYS, GRAPH_WARMUPS = 20, 7, 2
ISOLATED_CALLS, ISOLATED_WARMUPS = 30, 3
FLUSH_BYTES = 256 << 20
SLEEP_CYCLES = 2_000_000  # about 1 ms at 1.98 GHz
GRAPH_MAX_TOKENS = 512
NUM_ROUTINGS = 5
WALL_SECONDS = 1.0


@dataclass(frozen=True)
class Timing:
    """us: median, us_min: fastest, both the maximum over ranks; count: calls or replays behind them."""

    protocol: str
    us: float
    us_min: float
    count: int


def pick_protocol(asked: str, num_tokens: int, is_cuda: bool) -> str:
    """'auto' -> graph up to 512 tokens per rank, isolated above; wall without a GPU. ValueError where the machine
    cannot do what is asked."""
    if not is_cuda:
        if asked not in ("auto", "wall"):
            raise ValueError(
                f"--protocol {asked} needs a GPU and none is visible; use --protocol auto (wall clock on CPU)"
            )
        return "wall"
    if asked == "auto":
        return "graph" if num_tokens <= GRAPH_MAX_TOKENS else "isolated"
    return asked


def num_routings(protocol: str, num_tokens: int) -> int:
    """Routings a graph cycles through: 5, or 1 above 512 tokens; the other protocols time one."""
    return NUM_ROUTINGS if protocol == "graph" and num_tokens <= GRAPH_MAX_TOKENS else 1


class Meet:
    """What ranks do together: collectives on the stream, barriers, a maximum over ranks. Without a process group all
    are trivial."""

    def __init__(self, device: torch.device, group=None):
        self.device, self.group = device, group
        self.ranks = dist.get_world_size(group) if dist.is_initialized() else 1
        self._token = torch.zeros(1, device=device)

    def barrier(self) -> None:
        """All ranks have come this far, and so have their devices."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.on_stream()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def on_stream(self) -> None:
        """A collective enqueued on the current stream (blocking on CPU)."""
        if self.ranks > 1:
            dist.all_reduce(self._token, group=self.group)

    def max(self, values: list[float]) -> list[float]:
        """Element-wise maximum over ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather(self, value) -> list:
        """One picklable object of every rank, in rank order."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values


Call = Callable[[], object]


def measure(protocol: str, calls: list[Call], poison: Call, meet: Meet) -> Timing:
    """Time the calls (one a routing) by the protocol, then poison the outputs and run the timed path once more, for the
    gate to see."""
    times = {"graph": _graph, "isolated": _isolated, "wall": _wall}[protocol](calls, poison, meet)
    us, us_min = meet.max([statistics.median(times), min(times)])
    return Timing(protocol, us, us_min, len(times))


def _graph(calls: list[Call], poison: Call, meet: Meet) -> list[float]:
    stream = torch.cuda.Stream(meet.device)
    torch.cuda.synchronize(meet.device)  # a workspace refuses a second stream while the first may run
    with torch.cuda.stream(stream):
        for call in calls * 2:
            call()
    meet.barrier()
    graph = torch.cuda.CUDAGraph()
    # thread_local: the collective library's watchdog thread may touch the runtime while this thread captures
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for index in range(GRAPH_CALLS):
            calls[index % len(calls)]()
    meet.barrier()
    times = []
    for _ in range(GRAPH_WARMUPS + GRAPH_REPLAYS):
        meet.on_stream()
        times.append(_timed_us(graph.replay, meet.device) / GRAPH_CALLS)
    poison()
    meet.barrier()
    graph.replay()
    meet.barrier()
    graph.reset()
    return times[GRAPH_WARMUPS:]


def _isolated(calls: list[Call], poison: Call, meet: Meet) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=meet.device)
    times = []
    for index in range(ISOLATED_WARMUPS + ISOLATED_CALLS):
        flush.zero_()
        meet.barrier()
        times.append(_timed_us(calls[index % len(calls)], meet.device))
    _once(calls, poison, meet)
    return times[ISOLATED_WARMUPS:]


def _wall(calls: list[Call], poison: Call, meet: Meet) -> list[float]:
    def timed(index: int) -> float:
        meet.barrier()
        begin = time.perf_counter()
        calls[index % len(calls)]()
        if meet.device.type == "cuda":
            torch.cuda.synchronize(meet.device)
        return (time.perf_counter() - begin) * 1e6

    (first_us,) = meet.max([timed(0)])
    # the same number on every rank, since a call is collective
    count = int(min(30, max(3, WALL_SECONDS * 1e6 / max(first_us, 1.0))))
    times = [timed(index) for index in range(count)]
    _once(calls, poison, meet)
    return times


def _once(calls: list[Call], poison: Call, meet: Meet) -> None:
    poison()
    meet.barrier()
    for call in calls:
        call()
    meet.barrier()


def _timed_us(call: Call, device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) * 1e3
