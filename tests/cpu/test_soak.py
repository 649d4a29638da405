"""A short soak on virtual ranks of the CPU: it adds up, and a bit that differs ends it."""

import json
import random

import pytest
import torch

from megamoe import MoELayer
from megamoe.engine_torch import TorchEngine
from megamoe.plan import tiles
from megamoe.testing import soak


def test_runs_add_up_against_one_digest(tmp_path):
    state = tmp_path / "state.json"
    first = soak.soak("cpu", 0.0, state, 4, 10)
    second = soak.soak("cpu", 0.0, state, 4, 10)
    assert (first["runs"], second["runs"]) == (1, 2) and second["calls"] == 20 and second["rounds"] == 2
    assert first["digest"] == second["digest"] and json.loads(state.read_text()) == second
    state.write_text(json.dumps(second | {"digest": "0" * 64}))
    with pytest.raises(AssertionError, match="digest"):
        soak.soak("cpu", 0.0, state, 4, 10)
    state.write_text(json.dumps(second | {"cases": 5}))
    with pytest.raises(ValueError, match="cases=5 there, 4 here"):
        soak.soak("cpu", 0.0, state, 4, 10)


@pytest.mark.parametrize("name, value", [
    ("SEED", soak.SEED + 1), ("CPU", soak.CPU._replace(capacity=13)), ("CPU", soak.CPU._replace(planned_capacity=13)),
    ("CPU", soak.CPU._replace(planned=soak.CPU.planned[:2])), ("ROUTINGS", ("uniform",)), ("WEIGHTS", 1),
])  # fmt: skip
def test_other_cases_do_not_add_to_a_state(tmp_path, monkeypatch, name, value):
    state = tmp_path / "state.json"
    made = soak.soak("cpu", 0.0, state, 4, 1)
    monkeypatch.setattr(soak, name, value)
    with pytest.raises(ValueError, match="is of another soak: inputs="):
        soak.soak("cpu", 0.0, state, 4, 1)
    state.write_text(json.dumps({key: made[key] for key in made if key != "inputs"}))  # as before there was MXFP4
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of another soak: inputs=None there"):
        soak.soak("cpu", 0.0, state, 4, 1)


@pytest.mark.parametrize("name, text, refused", [
    ("none/state.json", None, "is no folder that can be written to"), ("state.json", "[1]", "is no state of a soak"),
    ("state.json", '{"calls": 1', "is no state of a soak"),
    ("state.json", json.dumps({"device": "cpu", "ranks": 3}), "is of another soak: ranks=3 there, 2 here"),
])  # fmt: skip
def test_a_state_that_would_not_do_is_refused_before_the_soak(tmp_path, monkeypatch, capsys, name, text, refused):
    monkeypatch.setattr(soak, "Soak", lambda *_: pytest.fail("made its cases first"))
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--device", "cpu", "--minutes", "0", "--state", str(tmp_path / name)])
    assert f"--state {tmp_path / name}" in (said := capsys.readouterr().err) and refused in said


def test_it_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "SAID_S", 0.0)
    soak.soak("cpu", 0.0, tmp_path / "state.json", 4, 10)
    assert " of 0 s, 10 calls, no bit differs" in capsys.readouterr().err


def often(monkeypatch) -> None:
    for name, value in {"CPU": soak.CPU._replace(planned_share=0.5), "PLANNED_LOAD": 0.1, "REBALANCE": 0.5,
                        "STAGED": 1}.items():  # fmt: skip
        monkeypatch.setattr(soak, name, value)


def test_experts_move_between_calls(tmp_path, monkeypatch):
    often(monkeypatch)
    under_way = []
    real = MoELayer.forward

    def forward(self, *args, **kwargs):
        copies = int((self._engine.placement >= 0).sum()) - self.config.num_experts
        under_way.append((self.config.weight_format, copies > 0))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MoELayer, "forward", forward)
    state = soak.soak("cpu", 0.0, tmp_path / "state.json", 4, 150)
    assert state["rebalances"] > 5 and state["steps"] > state["rebalances"] and state["moved_bytes"]
    assert state["loads"] > 2 and 0 < state["mxfp4"] < state["planned"] < state["calls"]
    assert {("mxfp4", True), ("fp8", True), ("fp8", False)} <= set(under_way)  # with copies of experts, and without


def test_an_expert_that_did_not_arrive_is_found(tmp_path, monkeypatch):
    often(monkeypatch)
    real = TorchEngine.apply

    def apply(self, *args):
        for arrived in (tensor for bundles in self._staged for bundle in bundles for tensor in bundle):
            arrived.zero_()
        real(self, *args)

    monkeypatch.setattr(TorchEngine, "apply", apply)
    with pytest.raises(AssertionError, match="values differ from the first call's"):
        soak.soak("cpu", 0.0, tmp_path / "state.json", 4, 150)


def test_one_bit_is_found(tmp_path, monkeypatch):
    real, calls = MoELayer.forward, []

    def forward(self, *args, out, **kwargs):
        outs = real(self, *args, out=out, **kwargs)
        calls.append(None)
        if len(calls) > 20 and out[0].numel():
            out[0].view(torch.int16)[0, 0] ^= 1
        return outs

    monkeypatch.setattr(MoELayer, "forward", forward)
    with pytest.raises(AssertionError, match="values differ from the first call's"):
        soak.soak("cpu", 0.0, tmp_path / "state.json", 4, 60)
    assert not (tmp_path / "state.json").exists()


def test_a_gpus_cases_reach_its_kinds_of_tiles():
    sizes, num_cases, r = soak.GPU, 24, random.Random(soak.SEED)  # both soaks: two ranks
    shapes, reached = sizes.shapes + sizes.planned, {True: set(), False: set()}
    many = set()
    for number in range(soak.cases_in_all(sizes, num_cases)):
        planned, config = number >= num_cases, shapes[soak.layer_of(sizes, num_cases, number)]
        capacity = sizes.planned_capacity if planned else sizes.capacity
        drawn = soak.draw(r, 2, capacity, planned)
        assert not planned or (min(drawn.counts) and drawn.routing not in ("none", "one_expert", "few_experts"))
        if planned and max(drawn.counts) >= capacity // 2:
            many.add(config)
        bound = capacity if drawn.bound is None else drawn.bound
        reached[planned].add((config.weight_format, tiles.choose_block_tokens(config, 2, bound)))
    assert ("fp8", tiles.TOKENS_ON_M) in reached[False] and len(reached[False]) > 2
    mxfp4 = {block for weight_format, block in reached[True] if weight_format == "mxfp4"}
    assert {tiles.SPLITS_WEIGHTS, tiles.TOKENS_ON_M} < mxfp4 and min(mxfp4) <= 64, reached
    assert any(weight_format == "fp8" for weight_format, _ in reached[True])
    assert len(many) == len(sizes.planned), "each layer under plans has a call of many tokens"
