"""Where does a stage's time go? Times the kernel against textual variants of itself, in one process on one GPU.

    python -m megamoe.variants variants.txt --tokens 1024,16384 --block-tokens 128

A file of variants has one block each; "base" is always there. Every replacement must match, or nothing is run:

    == no gather
    gemm/gather_tokens.cuh
    --- for (u32 i = 0; i < kSteps; ++i) {
    +++ for (u32 i = 0; i < 0; ++i) {

A variant that leaves work out gives wrong outputs and right times: what that work costs (benchmarks/notes/0002). One
rank, uniform routing, prequantized input. Without a GPU the variants are only compiled, and the table says so.
"""

import argparse
from pathlib import Path

import torch

from megamoe.builds import kernel_build, kernel_key
from megamoe_cuda.compile import CompiledKernel, compile_kernel, read_sources

Replacement = tuple[str, str, str]  # file under csrc, old text, new text


def parse_variants(text: str) -> dict[str, list[Replacement]]:
    """Name -> replacements. ValueError with the line that does not fit the form above."""
    variants: dict[str, list[Replacement]] = {"base": []}
    name = file = old = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("== "):
            name, file, old = line[3:].strip(), None, None
            variants[name] = []
        elif line.startswith("--- ") and name and file and old is None:
            old = line[4:]
        elif line.startswith("+++") and old is not None:
            variants[name].append((file, old, line[4:]))
            old = None
        elif line.strip() and name and old is None:
            file = line.strip()
        elif line.strip():
            raise ValueError(f"line {number}: {line!r} does not fit; see python -m megamoe.variants --help")
    return variants


def changed_sources(replacements: list[Replacement]) -> dict[str, str]:
    """csrc with the replacements made. ValueError for a file or a text that is not there."""
    sources = dict(read_sources())
    for file, old, new in replacements:
        if old not in sources.get(file, ""):
            raise ValueError(f"{file} does not hold {old!r}; take the text from csrc/{file}")
        sources[file] = sources[file].replace(old, new)
    return sources


def build(variants: dict[str, list[Replacement]], block_tokens: int) -> dict[str, CompiledKernel]:
    source = {
        name: changed_sources(replacements) for name, replacements in variants.items()
    }  # all, before any is built
    kernel = kernel_build(block_tokens)
    return {name: compile_kernel(kernel.source, kernel.entry, kernel.defines, sources=s) for name, s in source.items()}


def time_variants(kernels: dict[str, CompiledKernel], given: argparse.Namespace) -> None:
    from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
    from megamoe.plan import tiles
    from megamoe.testing.data import make_input, make_weights
    from megamoe_cuda.launch import LoadedKernel, read_symbol_u32

    config = MoEConfig(given.hidden, given.intermediate, given.experts, given.topk)
    weights = make_weights(0, config, 1, 0, "cuda")
    tiles.choose_block_tokens = lambda *_: given.block_tokens
    for tokens in given.tokens:
        with Workspace(config, EPConfig(tokens), device="cuda") as workspace, MoELayer(config, workspace) as layer:
            layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf)
            inputs = [make_input(seed, config, 0, tokens, "uniform", "cuda", prequantized=True) for seed in range(2)]
            out = torch.empty(tokens, config.hidden, dtype=torch.bfloat16, device="cuda")

            def call(i, layer=layer, inputs=inputs, out=out):
                layer((inputs[i].x, inputs[i].x_sf), inputs[i].topk_idx, inputs[i].topk_weights, out=out)

            for name, kernel in kernels.items():
                shared_bytes = read_symbol_u32(kernel.cubin, "mega_moe_shared_bytes")
                loaded = LoadedKernel(kernel.cubin, kernel.entry, shared_bytes)
                workspace.fused.kernels[kernel_key(config, given.block_tokens)] = loaded
                print(
                    f"{tokens:8d} tokens  {name:32} {median_us(call, 5 if tokens > 2000 else 20):9.1f} us", flush=True
                )
                layer.check()


def median_us(call, calls: int, repeats: int = 3) -> float:
    for i in range(2):
        call(i)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)  # the host runs ahead, so that launches do not show
        begin.record()
        for i in range(calls):
            call(i % 2)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return sorted(times)[repeats // 2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the variants")
    parser.add_argument("--tokens", type=lambda s: [int(n) for n in s.split(",")], default=[16384])
    parser.add_argument("--block-tokens", type=int, default=128, help="tile to build: 8, 16, 32, 64 or 128")
    for name, size in (("hidden", 4096), ("intermediate", 2048), ("experts", 32), ("topk", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    given = parser.parse_args(argv)
    kernels = build(parse_variants(given.file.read_text()), given.block_tokens)
    for name, kernel in kernels.items():
        r = kernel.resources
        print(f"{name:32} {r.registers} registers, {r.spill_stores + r.spill_loads} B spilled")
    if not torch.cuda.is_available():
        print("times not run: no GPU")
        return 3
    time_variants(kernels, given)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
