#!/usr/bin/env python3
"""Time every tile size of both weight formats on one GPU: where should the engine switch, and what does a format bring?

    python benchmarks/tiles.py --tokens 2,16,64,256,1024,4096,16384 --formats fp8,mxfp4

One rank, uniform routing, prequantized input, a CUDA graph of eight calls with a routing each. "TB/s" counts the weight
images of the experts that a routing names, once. "*": the tile that the engine would take.
Tiles of less than a 32nd of an expert's mean rows are left out. Without a GPU nothing is run: exit status 3.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace  # noqa: E402
from megamoe.builds import kernel_build, kernel_key  # noqa: E402
from megamoe.plan import tiles  # noqa: E402
from megamoe.testing.data import make_input, make_weights  # noqa: E402
from megamoe_cuda.compile import compile_kernel  # noqa: E402
from megamoe_cuda.launch import LoadedKernel, read_symbol_u32  # noqa: E402

ROUTINGS = 8


def every_call_takes(block: int):
    return mock.patch.object(tiles, "choose_block_tokens", lambda *_: block)


def time_tile(layer: MoELayer, block: int, inputs: list, out: torch.Tensor) -> float:
    """Microseconds a call with tiles of `block` tokens: a CUDA graph of one call a routing, median of nine replays."""
    key, kernels = kernel_key(layer.config, block), layer.workspace.fused.kernels
    if key not in kernels:
        build = kernel_build(block, layer.config.weight_format)
        cubin = compile_kernel(build.source, build.entry, build.defines).cubin
        shared_bytes = read_symbol_u32(cubin, "mega_moe_shared_bytes")
        kernels[key] = LoadedKernel(cubin, build.entry, shared_bytes)

    def call_all() -> None:
        for at in inputs:
            layer((at.x, at.x_sf), at.topk_idx, at.topk_weights, out=out)

    layer.workspace.fused.cuts[layer.config].clear()  # what it has chosen for this bound before
    with every_call_takes(block):
        call_all()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call_all()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(inputs))
    layer.check()
    return sorted(times)[len(times) // 2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda s: [int(n) for n in s.split(",")], default=[2, 16, 64, 256, 1024, 4096])
    parser.add_argument("--formats", type=lambda s: s.split(","), default=list(tiles.TILES))
    for name, size in (("hidden", 4096), ("intermediate", 2048), ("experts", 32), ("topk", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("times not run: no GPU")
        return 3
    best = {}  # (tokens, weight format) -> (us, tile)
    for weight_format in given.formats:
        config = MoEConfig(given.hidden, given.intermediate, given.experts, given.topk, weight_format)
        w = make_weights(0, config, 1, 0, "cuda")
        for tokens in given.tokens:
            every = tiles.TILES[weight_format]
            # What a workspace holds depends on them; decoded images on the last.
            all_reachable = mock.patch.object(tiles, "reachable_tiles", lambda *_, every=every: every)
            with every_call_takes(every[-1]), all_reachable:
                workspace = Workspace(config, EPConfig(tokens), device="cuda")
            with workspace, MoELayer(config, workspace) as layer:
                layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
                expert_bytes = sum(t.numel() / config.num_experts for t in layer._engine.images[0])
                inputs = [make_input(i, config, 0, tokens, "uniform", "cuda", prequantized=True)
                          for i in range(ROUTINGS)]  # fmt: skip
                active = sum(len(i.topk_idx.unique()) for i in inputs) / ROUTINGS
                out = torch.empty(tokens, config.hidden, dtype=torch.bfloat16, device="cuda")
                rows = tokens * config.topk / config.num_experts
                chosen = tiles.choose_block_tokens(config, 1, tokens)
                for block in every:
                    if rows > 32 * block:
                        continue
                    us = time_tile(layer, block, inputs, out)
                    best[tokens, weight_format] = min((us, block), best.get((tokens, weight_format), (us, block)))
                    rate, flops = active * expert_bytes / us / 1e6, 6e-6 * rows * config.num_experts * config.hidden
                    print(f"{weight_format:6} {tokens:6d} tokens  tile {block:3d}{'*' if block == chosen else ' '} "
                          f"{us:9.1f} us  {rate:5.2f} TB/s  {flops * config.intermediate / us:7.1f} TFLOPS  "
                          f"{active:4.1f} experts", flush=True)  # fmt: skip
    print(f"{'tokens':>8}" + "".join(f"{f'{name}, us (best tile)':>26}" for name in given.formats) + "   last / first")
    for tokens in given.tokens:
        times = [best[tokens, name] for name in given.formats]
        print(f"{tokens:8d}" + "".join(f"{us:19.1f} ({block:4d})" for us, block in times)
              + f"{times[-1][0] / times[0][0]:15.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
