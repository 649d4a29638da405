"""One small case of every tile size for compute-sanitizer, and one of split weight blocks where experts have several
token blocks; without pytest. Exit status 1 on a mismatch or a device error. launch/prove.py runs all four tools:

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python tests/gpu/memcheck_case.py

--ranks virtual ranks (default 2), both orientations, the routing table counted by one CTA and by the grid, partial
blocks, odd hidden, a rank without tokens, capture and replay. Deadlines are long, since every access is instrumented.
--runs of each tile size (default 2): one is enough for racecheck, which takes the longest and looks inside a launch.
--lineinfo: reports name the source's lines.
"""

import argparse
import functools
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def use_checkout() -> None:
    spec = importlib.util.spec_from_file_location("megamoe_launch_link", ROOT / "launch" / "link.py")
    link = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(link)
    sys.path[:0] = [str(link.link_packages()), str(ROOT)]


def use_line_info() -> None:
    """For all kernels that workspaces of this process compile. Their instructions stay the same."""
    from megamoe import engine_fused

    engine_fused.compile_kernel = functools.partial(engine_fused.compile_kernel, lineinfo=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2, help="default %(default)s")
    parser.add_argument("--runs", type=int, default=2, help="of each tile size; default %(default)s")
    parser.add_argument("--lineinfo", action="store_true")
    given = parser.parse_args()
    ranks = given.ranks
    if given.runs < 1:
        parser.error(f"--runs {given.runs}: at least 1, or nothing is checked")
    use_checkout()
    if given.lineinfo:
        use_line_info()
    import torch

    from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
    from megamoe.plan import tiles
    from megamoe.testing.data import make_case
    from tests.gpu import oracle

    wrong = 0
    ahead, never = 110, 1 << 30  # rows: so that a small case reaches that tile
    for weight_format in tiles.TILES:
        config = MoEConfig(hidden=384, intermediate=256, num_experts=6, topk=3, weight_format=weight_format)
        bounds, tiles.DECODE_AHEAD_ROWS = {}, ahead
        for bound in range(600, 0, -1):  # the smallest of each tile size
            bounds[tiles.choose_block_tokens(config, ranks, bound)] = bound
        assert set(bounds) == set(tiles.TILES[weight_format]), bounds
        cases = [(block, bound, ahead, "holes") for block, bound in sorted(bounds.items())]
        if tiles.SPLITS_WEIGHTS in bounds:  # of a full block every chunk is multiplied, of the rest behind it not all
            cases.append((tiles.SPLITS_WEIGHTS, 230, never, "zipf"))
        capacity = max(bound for _, bound, *_ in cases)
        ep_config = EPConfig(capacity, virtual_ranks=ranks, arrive_deadline_s=300.0, step_deadline_s=300.0, num_sms=8)
        with Workspace(config, ep_config, device="cuda") as workspace, MoELayer(config, workspace) as layer:
            for number, (block, bound, tiles.DECODE_AHEAD_ROWS, routing) in enumerate(cases):
                assert tiles.choose_block_tokens(config, ranks, bound) == block, (block, bound)
                num_tokens = [bound, 0 if number % 2 else bound // 3][:ranks] + [1] * (ranks - 2)
                case = make_case(1, config, ranks, num_tokens, routing, "cuda", prequantized=number % 2 == 0)
                oracle.load(layer, case)
                for _ in range(given.runs):
                    outs = oracle.run_layer(layer, case, bound)
                    torch.cuda.synchronize()
                    layer.check()
                    result = oracle.compare(config, outs, oracle.spec(case))
                    wrong += not result.ok
                    print(f"{weight_format}, tiles of {block}:", num_tokens, result.text, flush=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                oracle.call(layer, case, bound, outs)
            graph.replay()
            torch.cuda.synchronize()
            layer.check()
            result = oracle.compare(config, outs, oracle.spec(case))
            wrong += not result.ok
            print("replayed", result.text, flush=True)
            del graph
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
