"""What one of two ranks with a GPU each runs in test_domains_gpu: two domains of one rank, NCCL between them.
``python domain_gpu_jobs.py``. Lines as of gpu_jobs.py."""

import os
import time
import traceback

import torch
import torch.distributed as dist

from megamoe import EPConfig, MoELayer, Workspace
from megamoe.domains import workspace as resources
from megamoe.exchange import LocalExchange
from megamoe.ranks import init_process_group
from megamoe.steps import moe_layer
from megamoe.testing.data import make_case
from tests.gpu import oracle
from tests.ranks.gpu_jobs import LARGE, SMALL, call, load, poisoned, report, same, settle


def opened(capacity: int, limit: int | None = None) -> Workspace:
    ep_config = EPConfig(capacity, None, 20.0, 20.0, ranks_per_domain=1, domain_tokens=limit)
    return Workspace([LARGE, SMALL], ep_config)


def judge(layer: MoELayer, case, rank: int, bound: int | None = None) -> None:
    first = call(layer, case, rank, poisoned(case, rank), bound).clone()
    second = call(layer, case, rank, poisoned(case, rank), bound)
    settle(layer)
    assert same(first, second), "two runs differ"
    expected = moe_layer(case.config, LocalExchange(2), case.weights, case.inputs, num_domains=2)[rank]
    result = oracle.compare(case.config, [second], [expected])
    assert result.ok, result.text


def random_cases(rank: int, limit: int | None) -> str:
    with opened(256, limit) as workspace:
        layers = {config: MoELayer(config, workspace) for config in (LARGE, SMALL)}
        for seed in range(24):
            config = (LARGE, SMALL)[seed % 2]
            counts = [(37 * seed + 91 * r) % 257 for r in range(2)]
            case = make_case(seed, config, 2, counts, oracle.ROUTINGS[seed % 7], "cuda", prequantized=seed % 3 == 0)
            load(layers[config], case, rank)
            judge(layers[config], case, rank, max(counts))
    return "24 cases"


def fixed(rank: int) -> str:
    return random_cases(rank, None)


def rounds(rank: int) -> str:
    return random_cases(rank, 50)


def overlapped(rank: int) -> str:
    """Two micro-batches on two streams, NCCL beside the kernel."""
    resources.OVERLAP_MIN_TOKENS = 64
    with opened(2048) as workspace:
        assert workspace.domains.exchange_stream is not None
        with MoELayer(LARGE, workspace) as layer:
            for seed, count in enumerate((2048, 65, 1000)):
                case = make_case(seed, LARGE, 2, [count, count - 7], "uniform", "cuda", prequantized=True)
                load(layer, case, rank)
                judge(layer, case, rank, count)
            out = poisoned(case, rank)
            first = call(layer, case, rank, out).clone()
            for _ in range(200):
                call(layer, case, rank, out)
            settle(layer)
            assert same(first, out)
    return "3 cases, 200 calls back to back"


def graph_replay(rank: int) -> str:
    for min_tokens in (1 << 20, 16):
        resources.OVERLAP_MIN_TOKENS = min_tokens
        static = make_case(3, LARGE, 2, 48, "uniform", "cuda")
        with opened(48) as workspace, MoELayer(LARGE, workspace) as layer:
            load(layer, static, rank)
            out, graph = poisoned(static, rank), torch.cuda.CUDAGraph()
            call(layer, static, rank, out)
            settle(layer)
            dist.barrier()
            # thread_local: NCCL's watchdog thread may touch the runtime while this thread captures
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call(layer, static, rank, out)
            for seed, routing in enumerate(("uniform", "holes", "none", "duplicates")):
                other = make_case(70 + seed, LARGE, 2, 48, routing, "cuda")
                for mine, theirs in zip(static.inputs, other.inputs):
                    mine.x.copy_(theirs.x)
                    mine.topk_idx.copy_(theirs.topk_idx)
                    mine.topk_weights.copy_(theirs.topk_weights)
                out.fill_(float("nan"))
                for _ in range(5):
                    graph.replay()
                settle(layer)
                expected = moe_layer(LARGE, LocalExchange(2), static.weights, static.inputs, num_domains=2)[rank]
                result = oracle.compare(LARGE, [out], [expected])
                assert result.ok, f"{routing}: {result.text}"
            graph.reset()
            dist.barrier()
    return "4 routings, 5 replays each, with one piece and with two"


JOBS = (fixed, rounds, overlapped, graph_replay)


def main() -> None:
    torch.set_num_threads(2)
    info = init_process_group("cpu:gloo,cuda:nccl", timeout_s=120.0)
    for job in JOBS:
        begin = time.monotonic()
        try:
            text, ok = job(info.ep_rank), True
        except Exception:
            text, ok = traceback.format_exc(), False
        report(job=job.__name__, ok=ok, text=text, seconds=time.monotonic() - begin)
        if not ok:
            os._exit(1)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
