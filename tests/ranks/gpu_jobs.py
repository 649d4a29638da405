"""What one of two or more ranks with a GPU each runs in test_ep_gpu: ``python gpu_jobs.py``. One line of JSON a job:
{"job", "ok", "text", "seconds"}. A job that raises is reported and ends the process: the peers may not be in step.

Every rank makes all ranks' weights and inputs from the seed, computes the specification for all alone, and compares
its own rows.
"""

import json
import os
import re
import sys
import time
import traceback
from dataclasses import replace

import torch
import torch.distributed as dist

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, plan_experts
from megamoe.plan import popularity, tiles
from megamoe.ranks import init_process_group, rank_from_env
from megamoe.testing.data import Case, make_case
from tests.gpu import oracle

NUM_RANKS = rank_from_env().ep_size
CAPACITY = 256
LARGE = MoEConfig(hidden=2048, intermediate=1024, num_experts=16, topk=6)
SMALL = MoEConfig(hidden=384, intermediate=640, num_experts=3 * NUM_RANKS, topk=3, swiglu_limit=1.0)
SHAPES = tuple({oracle.draw(seed, (NUM_RANKS,)).config for seed in range(16)}) + (LARGE, SMALL)
NUM_RANDOM = 72


def counts(even: int, odd: int) -> list[int]:
    """Tokens of each rank: ranks of even number and of odd number differ."""
    return [odd if rank % 2 else even for rank in range(NUM_RANKS)]


def load(layer: MoELayer, case: Case, rank: int) -> None:
    w = case.weights[rank]
    layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)


def call(layer: MoELayer, case: Case, rank: int, out: torch.Tensor, bound: int | None = None) -> torch.Tensor:
    i = case.inputs[rank]
    x = i.x if i.x_sf is None else (i.x, i.x_sf)
    return layer(x, i.topk_idx, i.topk_weights, num_tokens=i.num_tokens, num_tokens_bound=bound, out=out)


def poisoned(case: Case, rank: int) -> torch.Tensor:
    return torch.full(case.inputs[rank].x.shape, float("nan"), dtype=torch.bfloat16, device="cuda")


def judge(case: Case, rank: int, y: torch.Tensor):
    """Collective: the whole output is all ranks' rows, as it is with virtual ranks."""
    outs = [y.cpu() if r == rank else torch.empty(i.x.shape, dtype=y.dtype) for r, i in enumerate(case.inputs)]
    for r, out in enumerate(outs):
        dist.broadcast(out.view(torch.uint8), r)
    return oracle.compare(case.config, [out.cuda() for out in outs], oracle.spec(case))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(oracle.bits([a]), oracle.bits([b]))


def settle(layer: MoELayer) -> None:
    torch.cuda.synchronize()
    layer.check()


def random_cases(workspace: Workspace, rank: int) -> str:
    """Random routing, counts, dtypes and bounds; each call twice, the second bitwise the first."""
    worst, ran = 0.0, 0
    for seed in range(NUM_RANDOM):
        plan = oracle.draw(1000 + seed, (NUM_RANKS,))
        plan = plan._replace(config=sorted(SHAPES, key=str)[seed % len(SHAPES)])
        case = oracle.build(plan)
        with MoELayer(plan.config, workspace) as layer:
            load(layer, case, rank)
            first = call(layer, case, rank, poisoned(case, rank), plan.bound).clone()
            second = call(layer, case, rank, poisoned(case, rank), plan.bound)
            settle(layer)
            result = judge(case, rank, second)
            assert result.ok, f"{result.text}\n{plan}"
            assert same(first, second), f"two runs differ\n{plan}"
            worst, ran = max(worst, result.worst_row), ran + 1
    return f"{ran} cases, worst row {worst:.2e}"


def back_to_back(workspace: Workspace, rank: int) -> str:
    case = make_case(1, LARGE, NUM_RANKS, counts(32, 17), "uniform", "cuda", prequantized=True)
    with MoELayer(LARGE, workspace) as layer:
        load(layer, case, rank)
        out, first = poisoned(case, rank), call(layer, case, rank, poisoned(case, rank)).clone()
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for number in range(2000):
            if number % 100 == 0:
                out.fill_(float("nan"))
            call(layer, case, rank, out)
            if number % 20 == 0:
                wrong += (oracle.bits([out]) != oracle.bits([first])).sum()
        wrong += (oracle.bits([out]) != oracle.bits([first])).sum()
        settle(layer)
        assert int(wrong) == 0, f"{int(wrong)} values differ from the first call's"
        result = judge(case, rank, out)
        assert result.ok, result.text
    return "2000 calls, bitwise the same"


def uneven_pace(workspace: Workspace, rank: int) -> str:
    """Now one rank is late, now the other: a rank one call ahead must not disturb the slower one."""
    cases = [make_case(seed, LARGE, NUM_RANKS, counts(40, 24), "uniform", "cuda") for seed in (1, 2)]
    cases[1] = cases[1]._replace(weights=cases[0].weights)
    with MoELayer(LARGE, workspace) as layer:
        load(layer, cases[0], rank)
        expected = [call(layer, case, rank, poisoned(case, rank)).clone() for case in cases]
        settle(layer)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for number in range(200):
            if (number // 3 + rank) % 2:
                torch.cuda._sleep(200_000)  # some 100 us
            out = call(layer, cases[number % 2], rank, poisoned(cases[0], rank))
            wrong += (oracle.bits([out]) != oracle.bits([expected[number % 2]])).sum()
        settle(layer)
        assert int(wrong) == 0, f"{int(wrong)} values differ"
        for case, y in zip(cases, expected):
            result = judge(case, rank, y)
            assert result.ok, result.text
    return "200 calls in uneven pace"


def graph_replay(workspace: Workspace, rank: int) -> str:
    static = make_case(3, LARGE, NUM_RANKS, counts(20, 33), "uniform", "cuda")
    num_tokens = [torch.zeros(1, dtype=torch.int32, device="cuda") for _ in static.inputs]
    static = static._replace(inputs=[i._replace(num_tokens=n) for i, n in zip(static.inputs, num_tokens)])
    out, graph = poisoned(static, rank), torch.cuda.CUDAGraph()
    with MoELayer(LARGE, workspace) as layer:
        load(layer, static, rank)
        call(layer, static, rank, out)
        settle(layer)
        with torch.cuda.graph(graph):
            call(layer, static, rank, out)
        for seed, (routing, sizes) in enumerate(zip(("uniform", "holes", "zipf", "none", "duplicates"),
                                                     ((20, 33), (0, 33), (7, 1), (20, 0), (0, 0)))):  # fmt: skip
            other = make_case(50 + seed, LARGE, NUM_RANKS, counts(20, 33), routing, "cuda")
            for mine, theirs, count in zip(static.inputs, other.inputs, counts(*sizes)):
                mine.x.copy_(theirs.x)
                mine.topk_idx.copy_(theirs.topk_idx)
                mine.topk_weights.copy_(theirs.topk_weights)
                mine.num_tokens.fill_(count)
            out.fill_(float("nan"))
            for _ in range(5):
                graph.replay()
            settle(layer)
            result = judge(static, rank, out)
            assert result.ok, f"{routing} {sizes}: {result.text}"
        del graph
    return "5 routings and counts, 5 replays each"


def layers_take_turns(workspace: Workspace, rank: int) -> str:
    layers = [MoELayer(config, workspace) for config in (LARGE, SMALL)]
    cases = [make_case(7, config, NUM_RANKS, counts(50, 64), "duplicates", "cuda") for config in (LARGE, SMALL)]
    for layer, case in zip(layers, cases):
        load(layer, case, rank)
    first = [call(layer, case, rank, poisoned(case, rank)).clone() for layer, case in zip(layers, cases)]
    for _ in range(100):
        outs = [call(layer, case, rank, poisoned(case, rank)) for layer, case in zip(layers, cases)]
    for layer, case, a, b in zip(layers, cases, first, outs):
        settle(layer)
        result = judge(case, rank, b)
        assert result.ok and same(a, b), result.text
        layer.close()
    return "two layers, 100 turns"


def absent_rank(workspace: Workspace, rank: int) -> str:
    """The last rank stays away from one call: the others end at their deadline naming it; reset() mends all."""
    absent = NUM_RANKS - 1
    case = make_case(9, SMALL, NUM_RANKS, 30, "uniform", "cuda")
    with Workspace(SMALL, EPConfig(30, arrive_deadline_s=1.0, step_deadline_s=1.0)) as short:
        with MoELayer(SMALL, short) as layer:
            load(layer, case, rank)
            call(layer, case, rank, poisoned(case, rank))
            settle(layer)
            dist.barrier()
            out, begin = torch.zeros(30, SMALL.hidden, dtype=torch.bfloat16, device="cuda"), time.monotonic()
            if rank != absent:
                call(layer, case, rank, out)
                error = caught(layer)
                seconds = time.monotonic() - begin
                record = error.record
                if "was ended by rank" not in str(error):  # the deadlines of several ranks pass at the same time
                    said = (record.rank, record.role, record.step, record.index)
                    assert said == (rank, "plan", "dispatch", absent), str(error)
                    assert f"no routing table from rank {absent}" in str(error), str(error)
                assert seconds < 3.0, (str(error), seconds)
            dist.barrier()
            if rank == absent:  # too late: it learns who gave up, and waits for nobody
                call(layer, case, rank, out)
                error = caught(layer)
                seconds = time.monotonic() - begin
                assert "was ended by rank" in str(error), str(error)
            assert bool(out.isnan().all()), "a lost call left numbers in its output"
            try:
                call(layer, case, rank, out)
                raise AssertionError("the poisoned workspace took a call")
            except MegaMoEError as refused:
                assert "workspace.reset()" in str(refused)
            short.reset()
            for _ in range(3):
                out = call(layer, case, rank, poisoned(case, rank))
            settle(layer)
            result = judge(case, rank, out)
            assert result.ok, result.text
    with MoELayer(SMALL, workspace) as layer:  # the other workspace never noticed
        load(layer, case, rank)
        out = call(layer, case, rank, poisoned(case, rank))
        settle(layer)
        assert judge(case, rank, out).ok
    return str(error)


def caught(layer: MoELayer) -> MegaMoEError:
    torch.cuda.synchronize()
    try:
        layer.check()
    except MegaMoEError as error:
        return error
    raise AssertionError("check() did not raise")


def live_rebalance(workspace: Workspace, rank: int) -> str:
    """Weights travel over NVLink between replays of a graph, ranks in uneven pace: the bits stay."""
    case, done = make_case(5, LARGE, NUM_RANKS, counts(60, 33), "zipf", "cuda"), 0
    ep_config = EPConfig(64, num_redundant_slots_per_rank=4, num_staged_experts=2)
    with Workspace(LARGE, ep_config) as roomy, MoELayer(LARGE, roomy) as layer:
        load(layer, case, rank)
        out, first = poisoned(case, rank), call(layer, case, rank, poisoned(case, rank)).clone()
        result = judge(case, rank, first)
        assert result.ok, result.text
        settle(layer)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(layer, case, rank, out)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for seed, choice in enumerate(("balanced", "min_active", "static", "balanced")):
            load_of_step = popularity("lognormal", 1, 16, seed)
            plan = plan_experts(load_of_step, num_ranks=NUM_RANKS, num_redundant_experts=4 * NUM_RANKS)
            rebalance, finished = layer.rebalance(plan, choice=choice), False
            while not finished:
                finished = rebalance.step()
                out.fill_(float("nan"))
                for number in range(3):
                    if (number + rank) % 2:
                        torch.cuda._sleep(200_000)
                    graph.replay()
                wrong += (oracle.bits([out]) != oracle.bits([first])).sum()
                done += 1
        settle(layer)
        assert int(wrong) == 0, f"{int(wrong)} values differ"
        del graph
    return f"4 plans, {done} steps, bitwise the same"


def different_configurations(workspace: Workspace, rank: int) -> str:
    """Named on both ranks, before any symmetric memory is taken."""
    try:
        Workspace(SMALL, EPConfig(30 + rank))
    except ValueError as error:
        assert "num_max_tokens_per_rank differs between ranks: 30 on rank 0, 31 on rank 1" in str(error), str(error)
        return str(error)
    raise AssertionError("ranks of different capacity were accepted")


def judged_twice(layer: MoELayer, case, rank: int):
    """Loads the case's weights; two calls, the second of them right, and bit for bit the first."""
    load(layer, case, rank)
    first = call(layer, case, rank, poisoned(case, rank)).clone()
    second = call(layer, case, rank, poisoned(case, rank))
    settle(layer)
    result = judge(case, rank, second)
    assert result.ok and same(first, second), result.text
    return result


def weights_split_in_pairs(_: Workspace, rank: int) -> str:
    """MXFP4 with many rows, none of them enough to decode weights ahead."""
    shipped, tiles.DECODE_AHEAD_ROWS = tiles.DECODE_AHEAD_ROWS, 1 << 30
    config = replace(LARGE, weight_format="mxfp4")
    case = make_case(6, config, NUM_RANKS, counts(CAPACITY, 190), "zipf", "cuda")
    assert tiles.choose_block_tokens(config, NUM_RANKS, CAPACITY) == tiles.SPLITS_WEIGHTS
    with Workspace(config, EPConfig(CAPACITY)) as own, MoELayer(config, own) as layer:
        result = judged_twice(layer, case, rank)
    tiles.DECODE_AHEAD_ROWS = shipped
    return f"worst row {result.worst_row:.2e}"


def weights_decoded_ahead(_: Workspace, rank: int) -> str:
    """MXFP4 with many rows; and ranks whose bounds ask for rows in different orders of K are told so."""
    shipped, tiles.DECODE_AHEAD_ROWS = tiles.DECODE_AHEAD_ROWS, 128
    config = replace(LARGE, weight_format="mxfp4")
    case = make_case(7, config, NUM_RANKS, counts(CAPACITY, 190), "uniform", "cuda")
    few = make_case(8, config, NUM_RANKS, 16, "uniform", "cuda")._replace(weights=case.weights)
    blocks = [tiles.choose_block_tokens(config, NUM_RANKS, bound) for bound in (16, CAPACITY)]
    assert blocks[0] < blocks[1] == tiles.TOKENS_ON_M, blocks
    with Workspace(config, EPConfig(CAPACITY, arrive_deadline_s=5.0, step_deadline_s=5.0)) as own:
        with MoELayer(config, own) as layer:
            result = judged_twice(layer, case, rank)
            out = call(layer, few, rank, poisoned(few, rank), CAPACITY if rank == 0 else 16)
            error = caught(layer)
            assert re.search("another num_tokens_bound|was ended by rank", str(error)), str(error)
            assert bool(out.isnan().all()), "a lost call left numbers in its output"
            own.reset()
            for bound in (16, CAPACITY):
                out = call(layer, few, rank, poisoned(few, rank), bound)
                settle(layer)
                assert judge(few, rank, out).ok, bound
    tiles.DECODE_AHEAD_ROWS = shipped
    return f"worst row {result.worst_row:.2e}; {error}"


def refused_rank(workspace: Workspace, rank: int) -> str:
    """The last rank's call is refused and it resets at once, while the others' launches have yet to begin."""
    case = make_case(9, SMALL, NUM_RANKS, 30, "uniform", "cuda")
    ep_config, text = EPConfig(30, arrive_deadline_s=1.0, step_deadline_s=1.0), ""
    with Workspace(SMALL, ep_config) as short, MoELayer(SMALL, short) as layer:
        load(layer, case, rank)
        dist.barrier()
        if rank == NUM_RANKS - 1:
            try:
                layer(torch.zeros(31, SMALL.hidden, dtype=torch.bfloat16, device="cuda"), *case.inputs[rank][2:4])
            except ValueError as refused:
                text = str(refused)
        else:
            torch.cuda._sleep(700_000_000)  # cycles: some 0.4 s
            call(layer, case, rank, poisoned(case, rank))
        begin = time.monotonic()
        short.reset()
        seconds = time.monotonic() - begin
        out = call(layer, case, rank, poisoned(case, rank))
        settle(layer)
        assert judge(case, rank, out).ok
        assert rank != NUM_RANKS - 1 or text.startswith("hidden_states has 31 tokens"), text
        assert seconds > 1.1, seconds  # the launches began after the reset did
    return f"reset() took {seconds:.1f} s"


JOBS = (random_cases, back_to_back, uneven_pace, graph_replay, layers_take_turns, live_rebalance,
        different_configurations, weights_split_in_pairs, weights_decoded_ahead, absent_rank, refused_rank)  # fmt: skip


def report(**fields) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(2)
    info = init_process_group("cpu:gloo,cuda:nccl", timeout_s=120.0)
    begin = time.monotonic()
    # One workspace for all: NVSHMEM starts once, and every job meets the flags that the jobs before left
    configs = sorted(SHAPES, key=str)
    with Workspace(configs, EPConfig(CAPACITY, arrive_deadline_s=20.0, step_deadline_s=20.0)) as workspace:
        report(job="workspace", ok=True, text=type(workspace.fused.memory).__name__, seconds=time.monotonic() - begin)
        for job in JOBS:
            begin = time.monotonic()
            try:
                text, ok = job(workspace, info.ep_rank), True
            except Exception:
                text, ok = traceback.format_exc(), False
            report(job=job.__name__, ok=ok, text=text, seconds=time.monotonic() - begin)
            if not ok:
                os._exit(1)  # closing the workspace is collective, and the peer may be anywhere
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
