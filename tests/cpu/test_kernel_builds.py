"""Every kernel configuration compiles for sm_90a without loss, from parameters that are those of megamoe/layout.py.

That a CTA's shared memory stays within 227 KiB is a static_assert (csrc/config.cuh): compiling proves it.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from megamoe import MoEConfig, layout
from megamoe.builds import DEBUG_SPILL_BYTES, KernelBuild, kernel_build, kernel_builds, kernel_key
from megamoe.engine_fused import builds_of
from megamoe.layout_header import render_header
from megamoe.plan.tiles import TILES
from megamoe.verbs import layout_main
from megamoe_cuda.compile import CompiledKernel, compile_kernel, read_sources
from megamoe_cuda.errors import CompileError, MissingLibraryError, nvrtc

THREADS, REGISTERS_OF_AN_SM = 512, 65536


def compile_build(build: KernelBuild) -> CompiledKernel:
    return compile_kernel(build.source, build.entry, build.defines)


EVERY = tuple(
    build for extras in (False, True) for plans in (False, True) for build in kernel_builds(extras=extras, plans=plans)
)


@pytest.fixture(scope="module")
def compiled() -> dict[str, CompiledKernel]:
    try:
        nvrtc()
    except MissingLibraryError as error:
        pytest.skip(f"not run: {error}")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([build.name for build in EVERY], pool.map(compile_build, EVERY)))


def test_one_build_for_each_weight_format_and_tile_size():
    tiles = [block for tiles in TILES.values() for block in tiles]
    assert [build.defines["BLOCK_TOKENS"] for build in kernel_builds()] == tiles
    assert len({build.name for build in EVERY}) == len(EVERY) == 4 * len(tiles)


def test_only_layers_that_ask_for_extras_get_them():
    plain = MoEConfig(256, 128, 8, 2, swiglu_limit=7.0)
    assert kernel_key(plain, 32) == ("fp8", 32, False)
    for asked in ({"bias": True}, {"activation": "swiglu_oai"}):
        config = replace(plain, weight_format="mxfp4", **asked)
        assert kernel_key(config, 32) == ("mxfp4", 32, True)
        assert {extras for _, _, extras in builds_of([plain, config], 2, 64)} == {False, True}
    assert "EXTRAS" not in kernel_build(32).defines and kernel_build(32, extras=True).defines["EXTRAS"] == 1


def test_extras_are_read_by_their_own_builds_only(compiled):
    """Where the word enables nothing, a build with it is the default one; with it, another."""
    sources, build = read_sources(), kernel_build(32)
    text = sources["extras.cuh"]
    assert text.count("#ifdef EXTRAS") == 1
    sources["extras.cuh"] = text.replace("#ifdef EXTRAS", "#if 0")
    bare = compile_kernel(build.source, build.entry, build.defines, sources=sources)
    assert bare.cubin == compiled[build.name].cubin
    extras = kernel_build(32, extras=True)
    assert compile_kernel(extras.source, extras.entry, extras.defines, sources=sources).cubin == bare.cubin
    assert compiled[extras.name].cubin != bare.cubin


@pytest.mark.parametrize("build", EVERY, ids=lambda build: build.name)
def test_configuration_compiles_without_loss(build, compiled):
    kernel = compiled[build.name]
    need = kernel.resources
    assert (need.spill_stores, need.spill_loads, need.stack) == (0, 0, 0), kernel.log
    assert need.registers * THREADS == REGISTERS_OF_AN_SM  # setmaxnreg shares out all of them, roles.cuh
    assert need.smem_static == 0  # all of it is dynamic, and asserted
    assert not need.losses and not {"C7508", "C7510", "C7514"}.intersection(need.codes), need.warnings
    assert b"mega_moe_shared_bytes" in kernel.cubin  # the engine reads it


def test_debug_and_fault_builds_stay_within_their_budget(compiled, monkeypatch):
    """One tile of each orientation; `MEGAMOE_DEBUG=1 ./launch/do compile` shows all."""
    for block_tokens in (32, 128):
        build = kernel_build(block_tokens)
        need = compile_build(build._replace(defines=build.defines | {"FAULTS": 1})).resources
        assert need.spill_stores + need.spill_loads == 0 and not need.losses
    monkeypatch.setenv("MEGAMOE_DEBUG", "1")
    for block_tokens in (32, 128):
        build = kernel_build(block_tokens)
        assert build.defines["DEBUG_CHECKS"] == 1
        kernel = compile_build(build)
        need = kernel.resources
        assert 0 < need.spill_stores + need.spill_loads <= DEBUG_SPILL_BYTES and not need.losses
        assert b"mega_moe_region_bytes" in kernel.cubin


def test_hooks_leave_no_trace_in_the_shipped_build(compiled):
    """The cubin is that of the same sources without them."""
    sources, build = read_sources(), kernel_build(32)
    points = []
    for name, text in sources.items():
        if not name.startswith("debug/"):
            points += re.findall(r"MOE_FAULT\(l, (\w+), [\w.]+\)", text)
            sources[name] = re.sub(r"MOE_FAULT\(l, \w+, ([\w.]+)\)", r"\1", text)
    # One place each, but for h: an image is stored by one CTA, or by the two that split a weight block
    assert sorted(points) == sorted([*layout.FAULT_POINTS, "h"])
    bare = compile_kernel(build.source, build.entry, build.defines, sources=sources)
    assert bare.key != compiled[build.name].key and bare.cubin == compiled[build.name].cubin
    for word in (b"mega_moe_fault", b"mega_moe_region_bytes"):
        assert word not in bare.cubin


def test_an_illegal_tile_size_does_not_compile(compiled):
    build = kernel_build(128)
    with pytest.raises(CompileError, match="static"):
        compile_kernel(build.source, build.entry, {"BLOCK_TOKENS": 96})
    with pytest.raises(CompileError, match="static"):
        compile_kernel(build.source, build.entry, {"BLOCK_TOKENS": 112, "WEIGHT_FORMAT": "kMxfp4"})


def test_more_shared_memory_than_a_cta_has_does_not_compile(compiled):
    sources, build = read_sources(), kernel_build(64)
    text = sources["config.cuh"]
    assert text.count("/ C::kStageBytes);") == 1
    sources["config.cuh"] = text.replace("/ C::kStageBytes);", "/ C::kStageBytes + 2);")  # more stages than fit
    with pytest.raises(CompileError, match="static"):
        compile_kernel(build.source, build.entry, build.defines, sources=sources)


def test_generated_header_is_fresh():
    text = read_sources()["params.gen.cuh"]
    assert text == render_header(), "run: python -m megamoe layout --write-header"


def test_the_header_is_written_into_its_own_tree_only(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("megamoe_cuda.compile.source_root", lambda: tmp_path)
    assert layout_main(["--write-header"]) == 2 and not list(tmp_path.iterdir())
    assert f"megamoe_cuda is of another tree, {tmp_path}" in capsys.readouterr().err

