"""python -m megamoe layout | compile: the memory table, and the kernels' registers and spills."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from megamoe.builds import DEBUG_SPILL_BYTES, KernelBuild, kernel_build, kernel_builds


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """One kernel configuration compiled. registers: per thread at launch; spilled_bytes: loads and stores; codes: ptxas
    remarks; problem: why it may not ship, or ""."""

    name: str
    registers: int
    spilled_bytes: int
    codes: tuple[str, ...]
    cubin_bytes: int
    from_cache: bool
    problem: str

    @property
    def summary(self) -> str:
        remarks = f", remarks {' '.join(self.codes)}" if self.codes else ""
        cached = " (cached)" if self.from_cache else ""
        return (f"{self.registers} registers, {self.spilled_bytes} B spilled, cubin {self.cubin_bytes / 1024:.0f} KiB"
                f"{remarks}{cached}")


def build_reports(builds: Sequence[KernelBuild] | None = None) -> Iterator[BuildReport]:
    """Compiles configurations, by default every tile of both weight formats, without extras or plans. Needs NVRTC, no
    GPU.

    A configuration that does not compile, spills, or draws a remark on serialised wgmma or ignored setmaxnreg is
    reported with its problem; nothing is raised for it."""
    # Each is compiled by a process of its own.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(build_report, kernel_builds() if builds is None else builds)


def build_report(build: KernelBuild) -> BuildReport:
    from megamoe_cuda.compile import compile_kernel
    from megamoe_cuda.errors import CompileError

    try:
        kernel = compile_kernel(build.source, build.entry, build.defines)
    except CompileError as error:
        return BuildReport(build.name, 0, 0, (), 0, False, str(error))
    need = kernel.resources
    spilled = need.spill_stores + need.spill_loads
    budget = DEBUG_SPILL_BYTES if "DEBUG_CHECKS" in build.defines else 0
    problem = f"{spilled} B spilled" if spilled > budget else "; ".join(need.losses)
    return BuildReport(build.name, need.registers, spilled, need.codes, len(kernel.cubin), kernel.from_cache, problem)


def compile_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megamoe compile",
        description="Compiles kernels into the cache: every tile of both weight formats. Exit status 1 if one does not "
                    "compile, spills registers, or has its wgmma serialised or its setmaxnreg ignored.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--config", help="a model's config.json, or its directory: only what this model can choose")
    parser.add_argument("--ep-size", type=int, default=1, help="with --config: ranks (default 1)")
    parser.add_argument("--tokens", type=int, default=4096, help="with --config: capacity of a rank (default 4096)")
    parser.add_argument("--extras", action="store_true", help="instead, the builds for swiglu_oai, biases and shared "
                        "experts; --config knows by itself")
    parser.add_argument("--plans", action="store_true", help="instead, the builds of workspaces with room for expert "
                        "plans")
    given = parser.parse_args(argv)
    bad, said, builds = 0, "", kernel_builds(given.extras, given.plans)
    if given.config is not None:
        try:
            builds = _builds_of(given.config, given.ep_size, given.tokens, given.plans)
        except (ValueError, OSError) as error:
            print(f"compile: {error}", file=sys.stderr)
            return 2
    for build in build_reports(builds):
        bad += bool(build.problem)
        if given.json:
            print(json.dumps(dataclasses.asdict(build)), flush=True)
        else:
            # One mistake in a source is every configuration's: said once.
            text = "the same" if build.problem and build.problem == said else build.problem or build.summary
            print(f"{'✗' if build.problem else '✓'} {build.name:<28} {text}", flush=True)
            said = build.problem
    return 1 if bad else 0


def _builds_of(path: str, ep_size: int, capacity: int, plans: bool) -> list[KernelBuild]:
    from megamoe.config import EPConfig
    from megamoe.engine_fused import builds_of
    from megamoe.hf_config import moe_config_of
    from megamoe.support import support

    config = moe_config_of(path)
    report = support(config, EPConfig(capacity), ep_size=ep_size)
    if not report.ok:
        raise ValueError("; ".join(report.reasons))
    print(f"{path}: {config}", file=sys.stderr)
    return [kernel_build(block, form, extras, plans=plans)
            for form, block, extras in builds_of([config], ep_size, capacity)]


def verify_main(argv: list[str]) -> int:
    """With --model a model's own layers and tokens, else a layer with random weights."""
    with_model = any(argument.split("=")[0] == "--model" for argument in argv)
    return import_module("megamoe.integrations.verify_model" if with_model else "megamoe.verify").main(argv)


def layout_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megamoe layout",
        description="What lies where in one rank's memory: the symmetric arena, which peers address, and the local "
                    "workspace.")
    sizes = {("--hidden",): 7168, ("--intermediate",): 2048, ("--experts", "--num-experts"): 64, ("--topk",): 8,
             ("--tokens", "--num-max-tokens-per-rank"): 512, ("--ep-size",): 2}
    for names, default in sizes.items():
        parser.add_argument(*names, type=int, default=default, help=f"default {default}")
    parser.add_argument("--weight-format", choices=("fp8", "mxfp4"), default="fp8", help="default fp8")
    parser.add_argument("--json", action="store_true", help="one JSON object a region")
    parser.add_argument("--write-header", action="store_true",
                        help="write csrc/params.gen.cuh from megamoe/layout.py instead")
    given = parser.parse_args(argv)
    from megamoe import layout
    from megamoe.layout_header import render_header

    if given.write_header:
        from megamoe_cuda.compile import source_root

        header, beside = source_root() / "params.gen.cuh", Path(layout.__file__).resolve().parents[1] / "csrc"
        if header.parent.resolve() != beside:
            print(f"python -m megamoe layout: megamoe_cuda is of another tree, {header.parent}; this layout's\n"
                  f"header belongs into {beside}. PYTHONPATH=$(python3 launch/link.py) takes both\nfrom one checkout.",
                  file=sys.stderr)  # fmt: skip
            return 2
        header.write_text(render_header())
        print(f"wrote {header}")
        return 0
    from megamoe import EPConfig, MoEConfig, support

    try:
        config = MoEConfig(given.hidden, given.intermediate, given.experts, given.topk, given.weight_format)
        ep_config = EPConfig(given.tokens)
        reasons = list(support(config, ep_config, ep_size=given.ep_size).reasons)
        # Without a device `support` judges what any of them could do; the table is the kernel's.
        for name, value, limit in (("ep_size", given.ep_size, layout.MAX_EP_SIZE),
                                   ("num_max_tokens_per_rank", given.tokens, layout.MAX_TOKENS)):
            if value > limit:
                reasons.append(f"{name}={value} is above the kernel's limit; use at most {limit}")
        if reasons:
            raise ValueError("; ".join(reasons))
    except ValueError as error:
        print(f"layout: {error}", file=sys.stderr)
        return 2
    regions = layout.regions([config], ep_config, given.ep_size)
    if given.json:
        for region in regions:
            print(json.dumps(dataclasses.asdict(region)))
        return 0
    for where in ("symmetric", "local"):
        here = [region for region in regions if region.where == where]
        print(f"{where}: {sum(region.bytes for region in here) / 2**20:.1f} MiB on each rank")
        for region in here:
            shape = "x".join(map(str, region.shape))
            print(f"  {region.offset:>12}  {region.name:<16} {region.dtype + ' ' + shape:<26} {region.bytes:>12} B  "
                  f"{region.meaning}")
    return 0
