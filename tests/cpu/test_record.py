"""The recorder: counts per step and layer, saved for the planner."""

import numpy as np
import pytest
import torch

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, plan_experts
from megamoe.plan.cli import read_load
from megamoe.record import Recorder, main


def test_recorder_keeps_what_each_step_was_asked_for(tmp_path):
    config = MoEConfig(128, 128, 8, 2)
    workspace = Workspace(config, EPConfig(16, 2), device="cpu")
    layers = {name: MoELayer(config, workspace) for name in ("a", "b")}
    for layer in layers.values():
        layer.load_weights([torch.randn(4, 256, 128)] * 2, [torch.randn(4, 128, 128)] * 2)
    layers["b"].load_plan(plan_experts(np.arange(8.0)[None], num_ranks=2))
    recorder, wanted = Recorder(layers), []
    for n in (5, 0, 16):
        idx = [torch.randint(-1, 8, (n, 2)) for _ in range(2)]
        for layer in layers.values():
            layer([torch.randn(n, 128).bfloat16()] * 2, idx, [torch.ones(n, 2)] * 2)
        used = torch.cat(idx).flatten()
        wanted.append(np.bincount(used[used >= 0], minlength=8))
        recorder.step("decode" if n < 16 else "prefill")
    recorder.save(tmp_path / "load.npz")
    data = np.load(tmp_path / "load.npz")
    assert data["load"].shape == (3, 2, 8) and data["kind"].tolist() == ["decode", "decode", "prefill"]
    assert (data["load"] == np.array(wanted)[:, None]).all() and data["layer"].tolist() == ["a", "b"]
    assert (read_load(tmp_path / "load.npz") == np.sum(wanted, 0)).all()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--out", "/nowhere/load.npz"], "--out /nowhere/load.npz"), (["--out", "load.npz", "--prompt", ""], "--prompt ''"),
    (["--out", "load.npz", "--model", "tiny-nothing"], "--model tiny-nothing: no such folder"),
])  # fmt: skip
def test_verb_refuses_in_its_own_name_before_a_model_runs(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"python -m megamoe record: error: {said}" in capsys.readouterr().err


def test_verb_records_a_model(tmp_path, capsys):
    assert main(["--model", "tiny-mixtral", "--prompt", "To be", "--prompt", "or not", "--max-new-tokens", "3",
                 "--out", str(tmp_path / "tiny")]) == 0  # fmt: skip
    data = np.load(tmp_path / "tiny.npz")
    assert data["kind"].tolist().count("prefill") == 2 and "steps of" in capsys.readouterr().out
    rows = data["load"].sum(2)
    assert (rows == rows[:, :1]).all() and rows.min() > 0
