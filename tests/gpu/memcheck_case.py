"""Small cases of every tile size and of every kind of build for compute-sanitizer, without pytest. Exit status 1 on a
mismatch or a device error. launch/prove.py runs all four tools:

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/memcheck_case.py

--ranks virtual ranks (default 2). The default builds: every tile size, and split weight blocks where experts have
several token blocks; both orientations, the routing table counted by one CTA and by the grid, partial blocks, odd
hidden, a rank without tokens, capture and replay. The builds with -DEXTRAS, with -DPLANS and with both, of each weight
format: one tile with weights on M and one of a pair of CTAs, with fewer tokens; with plans before and after one.
Deadlines are long, since every access is instrumented.
--runs of each tile size (default 2): one is enough for racecheck, which takes the longest and looks inside a launch.
--lineinfo: reports name the source's lines.
"""

import argparse
import functools
import importlib.util
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
AHEAD, NEVER = 110, 1 << 30  # rows: so that a small case reaches the tile that decodes weights ahead, or none does


class Call(NamedTuple):
    """block: the tile that a call with this num_tokens_bound chooses, with these DECODE_AHEAD_ROWS."""

    block: int
    bound: int
    ahead: int
    routing: str
    num_tokens: list[int]


class Group(NamedTuple):
    """Calls of one layer of `config`. plans: in a workspace with room for them."""

    config: object
    plans: bool
    calls: list[Call]


def groups(ranks: int) -> list[Group]:
    """All cases; tests/cpu/test_memcheck_case.py holds them against the builds that there are."""
    from megamoe.plan import tiles

    every = [_every_tile(weight_format, ranks) for weight_format in tiles.TILES]
    for extras, plans in ((True, False), (False, True), (True, True)):
        every += [_two_tiles(weight_format, extras, plans, ranks) for weight_format in tiles.TILES]
    return every


def _smallest_bounds(config, ranks: int, ahead: int) -> dict[int, int]:
    from megamoe.plan import tiles

    bounds, tiles.DECODE_AHEAD_ROWS = {}, ahead
    for bound in range(600, 0, -1):
        bounds[tiles.choose_block_tokens(config, ranks, bound)] = bound
    return bounds


def _every_tile(weight_format: str, ranks: int) -> Group:
    from megamoe import MoEConfig
    from megamoe.plan import tiles

    config = MoEConfig(hidden=384, intermediate=256, num_experts=6, topk=3, weight_format=weight_format)
    bounds = _smallest_bounds(config, ranks, AHEAD)
    calls = [(block, bound, AHEAD, "holes") for block, bound in sorted(bounds.items())]
    if tiles.SPLITS_WEIGHTS in bounds:  # of a full block every chunk is multiplied, of the rest behind it not all
        calls.append((tiles.SPLITS_WEIGHTS, 230, NEVER, "zipf"))
    counts = [[call[1], 0 if number % 2 else call[1] // 3] for number, call in enumerate(calls)]
    return Group(config, False, [Call(*call, _of(ranks, few)) for call, few in zip(calls, counts)])


def _two_tiles(weight_format: str, extras: bool, plans: bool, ranks: int) -> Group:
    """The largest tile with weights on M, and the smallest of a pair that this weight format has for itself."""
    from megamoe import MoEConfig
    from megamoe.plan import tiles

    config = MoEConfig(hidden=128, intermediate=256, num_experts=2 * ranks, topk=2, weight_format=weight_format)
    if extras:  # shared experts and room for plans are not for one workspace
        config = replace(config, activation="swiglu_oai", bias=True, swiglu_limit=7.0,
                         num_shared_experts=0 if plans else 1)  # fmt: skip
    bounds = _smallest_bounds(config, ranks, NEVER)
    pair = next(block for block in sorted(bounds, reverse=True) if tiles.in_expert_order(block))
    alone = max(block for block in bounds if not tiles.in_expert_order(block))
    return Group(config, plans, [Call(block, bounds[block], NEVER, routing, _of(ranks, [bounds[block] // 3, 7]))
                                 for block, routing in ((alone, "zipf"), (pair, "holes"))])  # fmt: skip


def _of(ranks: int, num_tokens: list[int]) -> list[int]:
    return num_tokens[:ranks] + [1] * (ranks - 2)


def keys_of(group: Group) -> list[tuple[str, int, bool]]:
    """kernel_key of every kernel that the group's calls choose."""
    from megamoe.builds import kernel_key

    return sorted({kernel_key(group.config, call.block) for call in group.calls})


def use_checkout() -> None:
    spec = importlib.util.spec_from_file_location("megamoe_launch_link", ROOT / "launch" / "link.py")
    link = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(link)
    sys.path[:0] = [str(link.link_packages()), str(ROOT)]


def use_line_info() -> None:
    """For all kernels that workspaces of this process compile. Their instructions stay the same."""
    from megamoe import engine_fused

    engine_fused.compile_kernel = functools.partial(engine_fused.compile_kernel, lineinfo=True)


def compile_all(every: list[Group]) -> None:
    """Into the compiler's memory, side by side; a workspace by itself would compile those of its tiles, a few at once,
    and also tiles that are not called."""
    from megamoe import engine_fused

    wanted = [(*key, group.plans) for group in every for key in keys_of(group)]
    with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda build: engine_fused._compiled(*build), wanted))


def judged(layer, case, call: Call, what: str) -> tuple[bool, object]:
    """One call against the specification. -> (right, outputs)"""
    import torch

    from tests.gpu import oracle

    begin = time.monotonic()
    outs = oracle.run_layer(layer, case, call.bound)
    torch.cuda.synchronize()
    layer.check()
    result = oracle.compare(case.config, outs, oracle.spec(case))
    print(f"{what}, tiles of {call.block}:", call.num_tokens, result.text, f"{time.monotonic() - begin:.1f} s",
          flush=True)  # fmt: skip
    return result.ok, outs


def moved(layer, case, call: Call, what: str, outs, choice: str) -> bool:
    """The same call under a plan, by other copies where there are several ranks."""
    import torch

    from megamoe import plan_experts
    from megamoe.plan import popularity
    from tests.gpu import oracle

    ranks, experts = case.ep_size, case.config.num_experts
    plan = plan_experts(popularity("zipf", 1, experts, 1), num_ranks=ranks, num_redundant_experts=ranks * (ranks > 1))
    layer.load_plan(plan, choice=choice)
    again = oracle.run_layer(layer, case, call.bound)
    torch.cuda.synchronize()
    layer.check()
    same = torch.equal(oracle.bits(again), oracle.bits(outs))
    print(f"{what}, {choice}, tiles of {call.block}:", "the same bits" if same else "OTHER BITS", flush=True)
    return same


def replayed(layer, case, call: Call, outs) -> bool:
    import torch

    from tests.gpu import oracle

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        oracle.call(layer, case, call.bound, outs)
    graph.replay()
    torch.cuda.synchronize()
    layer.check()
    result = oracle.compare(case.config, outs, oracle.spec(case))
    print("replayed", result.text, flush=True)
    return result.ok


def check(group: Group, ranks: int, runs: int) -> int:
    """-> calls that came out wrong"""
    from megamoe import EPConfig, MoELayer, Workspace, engine_fused
    from megamoe.builds import needs_extras
    from megamoe.layout import CHOICES
    from megamoe.plan import tiles
    from megamoe.testing.data import make_case
    from tests.gpu import oracle

    config, wrong = group.config, 0
    plain = not (group.plans or needs_extras(config))
    what = config.weight_format + ", extras" * needs_extras(config) + ", plans" * group.plans
    room = {"num_redundant_slots_per_rank": 1, "num_staged_experts": 1} if group.plans else {}
    ep_config = EPConfig(max(call.bound for call in group.calls), virtual_ranks=ranks, arrive_deadline_s=300.0,
                         step_deadline_s=300.0, num_sms=8, **room)  # fmt: skip
    engine_fused.builds_of = lambda *_: keys_of(group)
    tiles.DECODE_AHEAD_ROWS = group.calls[0].ahead
    with Workspace(config, ep_config, device="cuda") as workspace, MoELayer(config, workspace) as layer:
        for number, call in enumerate(group.calls):
            tiles.DECODE_AHEAD_ROWS = call.ahead
            assert tiles.choose_block_tokens(config, ranks, call.bound) == call.block, call
            case = make_case(1, config, ranks, call.num_tokens, call.routing, "cuda", prequantized=number % 2 == 0)
            oracle.load(layer, case)
            for _ in range(runs if plain else 1):
                ok, outs = judged(layer, case, call, what)
                wrong += not ok
            if group.plans:
                wrong += not moved(layer, case, call, what, outs, CHOICES[number + 1])
        if plain:
            wrong += not replayed(layer, case, call, outs)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    parser.add_argument("--runs", type=int, default=2, help="of each tile size; default %(default)s")
    parser.add_argument("--lineinfo", action="store_true")
    given = parser.parse_args()
    if given.runs < 1:
        parser.error(f"--runs {given.runs}: at least 1, or nothing is checked")
    use_checkout()
    if given.lineinfo:
        use_line_info()
    begin = time.monotonic()
    every = groups(given.ranks)
    compile_all(every)
    print(f"compiled after {time.monotonic() - begin:.1f} s", flush=True)
    wrong = sum([check(group, given.ranks, given.runs) for group in every])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
