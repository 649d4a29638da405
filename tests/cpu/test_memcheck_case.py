"""tests/gpu/memcheck_case.py: its cases reach every kind of build; on CPU ranks, what it runs is right, or found."""

import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch

from megamoe import MoELayer, Workspace, engine_fused
from megamoe.builds import kernel_build, kernel_builds
from megamoe.plan import tiles
from megamoe.testing import data

PATH = Path(__file__).resolve().parents[1] / "gpu" / "memcheck_case.py"
RANKS = (1, 2)  # launch/sanitizers.py


@pytest.fixture
def case(monkeypatch):
    spec = importlib.util.spec_from_file_location("memcheck_case", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(tiles, "DECODE_AHEAD_ROWS", tiles.DECODE_AHEAD_ROWS)  # put back at the end, both
    monkeypatch.setattr(engine_fused, "builds_of", engine_fused.builds_of)
    return module


def reached(case, ranks: int) -> list:
    """KernelBuild of every kernel that the list's calls choose."""
    return [kernel_build(block, form, extras, plans=group.plans)
            for group in case.groups(ranks) for form, block, extras in case.keys_of(group)]  # fmt: skip


@pytest.mark.parametrize("ranks", RANKS)
def test_every_kind_of_build_is_reached(case, ranks):
    found = reached(case, ranks)
    names = {build.name for build in found}
    assert len(names) == len(found)  # compiled once
    for extras, plans in product((False, True), repeat=2):
        builds = {build.name for build in kernel_builds(extras, plans)}
        assert builds, "a kind without builds"
        mine = [build.defines for build in found if build.name in builds]
        if not (extras or plans):
            assert builds <= names
        for weight_format in tiles.TILES:
            blocks = [defines["BLOCK_TOKENS"] for defines in mine
                      if (defines.get("WEIGHT_FORMAT") == "kMxfp4") is (weight_format == "mxfp4")]  # fmt: skip
            assert {tiles.in_expert_order(block) for block in blocks} == {False, True}, (extras, plans, weight_format)
    assert names <= {build.name for e, p in product((False, True), repeat=2) for build in kernel_builds(e, p)}


@pytest.mark.parametrize("ranks", RANKS)
def test_calls_choose_the_tile_they_are_listed_under(case, ranks):
    every = case.groups(ranks)
    for group in every:
        for call in group.calls:
            tiles.DECODE_AHEAD_ROWS = call.ahead
            assert tiles.choose_block_tokens(group.config, ranks, call.bound) == call.block
            assert len(call.num_tokens) == ranks and max(call.num_tokens) <= call.bound
    extra = [group.config for group in every if engine_fused.needs_extras(group.config)]
    assert any(config.num_shared_experts for config in extra)
    assert all(config.bias and config.activation == "swiglu_oai" for config in extra)


@pytest.fixture
def on_cpu(case, monkeypatch):
    """Makes check() run on the CPU's engine, without graphs."""
    made = data.make_case
    monkeypatch.setattr(data, "make_case", lambda *args, **kw: made(*[a for a in args if a != "cuda"], **kw))
    monkeypatch.setattr("megamoe.Workspace", lambda *args, device, **kw: Workspace(*args, device="cpu", **kw))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(case, "replayed", lambda layer, case, call, outs: True)
    return case


@pytest.mark.parametrize("ranks", RANKS)
def test_small_cases_are_right_and_say_so(on_cpu, ranks, capsys):
    every = [group for group in on_cpu.groups(ranks) if len(group.calls) == 2]
    assert len(every) == 6
    assert [on_cpu.check(group, ranks, 2) for group in every] == [0] * 6
    said = capsys.readouterr().out
    assert said.count("tiles of 192") == 5 and said.count("the same bits") == 8  # three calls, and two under plans
    for what in ("fp8, extras, tiles", "mxfp4, plans, balanced", "fp8, extras, plans, min_active"):
        assert what in said, said


def test_wrong_calls_are_counted(on_cpu, monkeypatch):
    real, calls = MoELayer.forward, []

    def forward(self, *args, out, **kwargs):
        outs = real(self, *args, out=out, **kwargs)
        calls.append(None)
        if len(calls) % 2 == 0:
            out[0][0] = 1.0  # of each pair of calls the one under the plan
        return outs

    monkeypatch.setattr(MoELayer, "forward", forward)
    group = next(group for group in on_cpu.groups(2) if group.plans)
    assert on_cpu.check(group, 2, 1) == 2 and len(calls) == 4
