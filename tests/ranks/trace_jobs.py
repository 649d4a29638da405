"""What one of several CPU ranks runs in test_trace_ranks.py: ``python trace_jobs.py verb FILE | absent``. The verb runs
whole but for the call on the GPU, whose lists are written here."""

import sys

import torch
import torch.distributed as dist

import megamoe
import megamoe.__main__ as cli
from megamoe import trace_ranks, traced_call
from megamoe.ranks import init_process_group
from megamoe.trace import Record
from megamoe.trace_clock import Reading, on_host_clock
from megamoe_cuda.gather import AbsentRankError

SIZES = ("--hidden", "256", "--intermediate", "128", "--experts", "8", "--topk", "2", "--tokens", "5")


ZERO_NS = 1_800_000_000_000_000_000


def lists_of(rank: int) -> dict:
    """Rank 1 starts 0.7 us after rank 0 and has more tiles, so it takes longer."""
    zero = ZERO_NS + rank * 700
    math = [Record(zero + 2000 + 1000 * n + 200 * i, event, n) for n in range(3 + 40 * rank)
            for i, event in enumerate(("tile", "first_stage", "k_loop", "staging", "epilogue"))]  # fmt: skip
    end = math[-1].ns + 500
    return {(cta, role): some for cta in range(2) for role, some in (
        ("plan", [Record(zero + cta, "start", 0), Record(zero + 1000, "list", 0), Record(end, "end", 0)]),
        ("math0", math),
    )}  # fmt: skip


def on_gpu_clock(rank: int, lists: dict) -> dict:
    """By a clock that is `rank` days ahead and 50 ppm too fast."""
    return {key: [r._replace(ns=gpu_ns(rank, r.ns)) for r in some] for key, some in lists.items()}


def gpu_ns(rank: int, host_ns: int) -> int:
    return host_ns + rank * 86_400 * 10**9 + (host_ns - ZERO_NS) // 20_000


def traced(config, num_tokens, virtual_ranks, prequantized, *, routing, group, phase):
    rank = dist.get_rank(group)
    before, after = (Reading(at, gpu_ns(rank, at), 600) for at in (ZERO_NS - 10**6, ZERO_NS + 10**7))
    lists = on_host_clock(on_gpu_clock(rank, lists_of(rank)), before, after)
    phase("lists to rank 0")
    return traced_call.Traced(trace_ranks.gather_lists(group, lists), f"{config.weight_format}, {routing}", 1.2)


def main(job: str, *more: str) -> int:
    rank = init_process_group("gloo", timeout_s=60.0).ep_rank
    if job == "absent":
        if rank != 1:
            try:
                trace_ranks.gather_lists(dist.group.WORLD, lists_of(rank), deadline_s=1.0)
            except AbsentRankError as error:
                print(error)
        return 0
    torch.cuda.is_available = lambda: True
    megamoe.support = lambda *_, **__: type("Able", (), {"ok": True, "reasons": ()})
    traced_call.trace_call, trace_ranks.PIECE_CHARS = traced, 64
    return cli.main(["trace", *SIZES, "--weight-format", "mxfp4", "--routing", "zipf", "--out", *more])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
