"""Layer times fitted to measured calls, a recording replayed, and the verb that shows both."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cases import load_cases
from benchmarks.inputs import make_tokens
from benchmarks.roofline import count_work
from megamoe.plan import cli, count_load, drift, popularity, sample_topk
from megamoe.plan.cli import main
from megamoe.plan.predict import (
    LayerTime,
    busiest_flop,
    error_by_kind,
    expected_active,
    fit_measured,
    kind_of,
    read_measured,
    relative_error,
)  # fmt: skip
from megamoe.plan.report import fit_text
from megamoe.plan.show import recorded
from megamoe.plan.simulate import predict, replay

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RESULTS, SCALING = (sorted(folder.glob("*.jsonl")) for folder in (FOLDER, FOLDER / "scaling"))
ROW = {"impl": "megamoe", "ok": True, "us": 1.0, "case": "a", "hidden": 256, "intermediate": 128, "num_experts": 8,
       "topk": 2, "num_tokens": 8, "tokens_per_rank": [8, 8], "capacity": 8, "ep_size": 2, "num_gpus": 2, "flops": 1.0,
       "bytes_weights": 1.0, "bytes_activations": 0.0, "weight_format": "fp8", "input": "prequantized",
       "routing": "uniform", "protocol": "graph", "commit": "new", "dirty": False, "date": "2",
       "device": "NVIDIA H100"}  # fmt: skip


def test_fit_recovers_what_made_the_table():
    true = LayerTime(30.0, 3.0, 700.0, 2.0)
    rng = np.random.default_rng(0)
    weights, flop = 10 ** rng.uniform(8, 9.7, 40), 10 ** rng.uniform(8, 13, 40)
    got = LayerTime.fit(np.stack([weights, flop, true.us(weights, flop)], 1))
    assert np.allclose([got.overhead_us, got.weight_tbs, got.tflops, got.p], [30, 3, 700, 2], rtol=2e-2)
    with pytest.raises(ValueError, match="8 or more"):
        LayerTime.fit([[1, 1, 1]])


def test_fit_to_the_shipped_results_is_near_them_and_near_calls_it_has_not_seen():
    fitted, checked = read_measured(RESULTS), read_measured(SCALING)
    model = fit_measured(fitted)
    lines = error_by_kind(model, fitted, checked)
    assert sum(line["calls"] for line in lines[:-1]) == len(fitted) + len(checked)
    found = {(line["calls of"], line["in the fit"]): line for line in lines}
    for kind in ("EP1", "virtual 2", "virtual 4", "virtual 8"):
        assert float(found[kind, "no"]["worst"].strip("%")) < 20 and (kind, "yes") not in found
    error = relative_error(model, fitted)
    assert np.sqrt((error**2).mean()) < 0.075 and np.abs(error).max() < 0.35
    for case in {row["case"] for row in fitted}:  # it does not hang on single cases
        of_case = [row["case"] == case for row in fitted]
        others, left_out = ([row for row, is_of in zip(fitted, of_case, strict=True) if is_of == here]
                            for here in (False, True))  # fmt: skip
        error[of_case] = relative_error(fit_measured(others), left_out)
    rms = np.sqrt((error**2).mean())
    assert rms < 0.075 and found["all, by case", "other cases"]["rms"] == f"{rms:.1%}"
    assert 1 < model.weight_tbs < 3.4 and 300 < model.tflops < 1979  # what an H100 has


def test_error_is_stated_for_each_kind_of_call():
    def call(ep_size, num_gpus, weights, us, case="a"):
        return ROW | {"ep_size": ep_size, "num_gpus": num_gpus, "tokens_per_rank": [8] * ep_size, "case": case,
                      "bytes_weights": weights * 1e6, "flops": 1.0, "us": us}  # fmt: skip

    model = LayerTime(10.0, 1.0, 1000.0, 2.0)  # so 10 us + 1 us a MB
    fitted = [call(2, 2, 90, 100), call(2, 2, 90, 125), call(16, 16, 40, 50)]
    checked = [call(8, 1, 190, 100), call(1, 1, 40, 40), call(2, 2, 40, 50)]
    lines = error_by_kind(model, fitted, checked)
    assert [(line["calls of"], line["in the fit"], line["calls"], line["rms"], line["worst"]) for line in lines] == [
        ("EP2", "yes", 2, "14.1%", "-20.0%"), ("EP16", "yes", 1, "0.0%", "+0.0%"), ("EP1", "no", 1, "25.0%", "+25.0%"),
        ("EP2", "no", 1, "0.0%", "+0.0%"), ("virtual 8", "no", 1, "100.0%", "+100.0%")]  # fmt: skip
    text = fit_text(model, fitted, checked)
    assert text.startswith("fit: 10.0 us") and all(line["worst call"] in text for line in lines)
    # A case is predicted from the other one alone, whose calls take twice as long
    fast, slow = ([call(2, 2, mb, us * (10 + mb), case) for mb in range(1, 20)] for case, us in (("a", 1), ("b", 2)))
    *_, left_out = error_by_kind(model, fast + slow)
    assert [line["calls of"] for line in error_by_kind(model, fast + slow[:5])] == ["EP2"]  # 5 calls make no fit
    assert left_out["calls"] == 38 and float(left_out["worst"].strip("%")) == pytest.approx(100, abs=5)


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
def test_flop_of_the_busiest_gpu_is_the_rooflines(num_gpus):
    case = load_cases()["flash64"]
    topk_idx = [make_tokens(replace(case, hidden=128), rank, 512, "zipf", 0, 1, "cpu").topk_idx for rank in range(4)]
    work = count_work(case, topk_idx, num_gpus)
    assert work.activation_bytes and (num_gpus == 1 or work.flops_busiest > 1.1 * work.flops)
    row = ROW | {"hidden": case.hidden, "intermediate": case.intermediate, "tokens_per_rank": [512] * 4, "ep_size": 4,
                 "num_gpus": num_gpus, "flops": work.flops, "bytes_activations": work.activation_bytes}  # fmt: skip
    assert busiest_flop(row) == pytest.approx(work.flops_busiest, rel=1e-9)
    assert busiest_flop(row | {"bytes_activations": 0.0}) == work.flops
    # One GPU for all ranks, as with virtual ones: the work of all of them
    one = count_work(case, topk_idx, 1)
    assert one.flops == num_gpus * work.flops and one.weight_bytes >= work.weight_bytes


def test_of_a_cell_the_median_of_the_newest_commit_counts(tmp_path):
    lines = [ROW | {"us": 5.0}, ROW | {"us": 9.0, "date": "3"}, ROW | {"us": 6.0},
             ROW | {"us": 1.0, "commit": "old", "date": "1"}, ROW | {"us": 1.0, "dirty": True, "date": "1"},
             ROW | {"us": 7.0, "tokens_per_rank": [16, 0]}, ROW | {"us": 8.0, "ep_size": 2, "num_gpus": 1}]  # fmt: skip
    others = [ROW | one for one in (
        {"impl": "other"}, {"ok": False}, {"us": None}, {"num_gpus": 0}, {"input": "bf16"}, {"weight_format": "mxfp4"},
        {"ranks_per_domain": 1}, {"device": "NVIDIA H200"})]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines + others)))
    found = read_measured([tmp_path / "a.jsonl"])
    assert [(one["us"], kind_of(one)) for one in found] == [(6.0, "EP2"), (7.0, "EP2"), (8.0, "virtual 2")]
    assert [one["device"] for one in read_measured([tmp_path / "a.jsonl"], "H200")] == ["NVIDIA H200"]
    (tmp_path / "b.jsonl").write_text(json.dumps({"impl": "megamoe", "ok": True}))
    with pytest.raises(ValueError, match=r"b\.jsonl: a row without 'us'"):
        read_measured([tmp_path / "b.jsonl"])


def test_expected_active_counts_copies_that_get_a_row():
    rows = np.array([[[1000.0, 0.0], [1e-9, 1.0]]])
    active = expected_active(rows, 1e6)
    assert np.allclose(active, [[1, 1]], atol=1e-3)


def test_replay_and_prediction_favour_plans_on_skewed_load():
    base = popularity("zipf", 2, 32, 1)
    steps = []
    for step in range(12):
        base = drift(base, 0.1, 50 + step)
        steps.append([np.bincount(one.ravel(), minlength=32) for one in sample_topk(base, 512, 4, step)])
    steps = np.array(steps, float)
    rows = replay(steps, num_ranks=8, num_nodes=1, num_redundant=8, window=3, budget=0.1)
    assert len(rows) == 3 and all(row["moved"] <= 0.1 for row in rows)
    assert np.mean([row["updated"] for row in rows]) > np.mean([row["eplb"] for row in rows])
    with pytest.raises(ValueError, match="--window 7 needs at least 14"):
        replay(steps, num_ranks=8, num_nodes=1, num_redundant=8, window=7, budget=0.1)
    model = LayerTime(30.0, 3.0, 700.0, 2.0)
    for row in predict(steps.sum(0), model, hidden=1024, intermediate=512, topk=4, tokens_per_rank=512,
                       num_redundant=8):
        assert row["plan"] <= row["eplb"] * 1.001 and (row["none"] == "-" or row["plan"] < row["none"])


def test_verb_simulates_a_recording(tmp_path, capsys):
    topk_idx = sample_topk(popularity("zipf", 2, 16, 1), 400, 2, 1)
    steps = np.array([[np.bincount(one[i::8].ravel(), minlength=16) for one in topk_idx] for i in range(8)])
    np.savez(tmp_path / "trace.npz", load=steps, prefill_text=topk_idx.astype(np.uint8))
    arguments = [str(tmp_path / "trace.npz"), "--ranks", "4", "--nodes", "2", "--redundant", "4", "--simulate",
                 "--tokens", "64"]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "nodes a token of prefill_text" in out and "updated" in out
    fitted, checked = read_measured(RESULTS), read_measured(SCALING)
    stated = fit_text(fit_measured(fitted), fitted, checked)
    assert stated in out and "virtual 8" in stated
    assert f"\n{stated}\n" in (FOLDER.parents[1] / "README.md").read_text()
    picture = tmp_path / "load.png"
    if find_spec("matplotlib"):
        assert main([*arguments, "--png", str(picture)]) == 0 and picture.stat().st_size > 1000
    else:  # said before anything is computed
        assert main([*arguments, "--png", str(picture)]) == 2 and "matplotlib" in capsys.readouterr().err
    (tmp_path / "few.jsonl").write_text(json.dumps(ROW))
    assert main([*arguments, "--measured", str(tmp_path / "few.jsonl")]) == 2
    assert "8 or more" in capsys.readouterr().err
    assert main([str(tmp_path / "trace.npz"), "--ranks", "4", "--redundant", "4", "--phase", "decode"]) == 0
    assert "bound in us" in capsys.readouterr().out


def test_verb_simulates_the_shipped_recording_unless_told_otherwise(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "CHECKOUT", tmp_path)
    measured = ["--measured", *map(str, RESULTS)]
    assert main(["--simulate", *measured]) == 2 and "give either" in capsys.readouterr().err
    (tmp_path / "benchmarks" / "traces").mkdir(parents=True)
    path = tmp_path / "benchmarks" / "traces" / "made.npz"
    np.savez(path, load=np.random.default_rng(0).integers(1, 99, (8, 1, 16)))
    assert main(["--simulate", "--ranks", "4", *measured]) == 0
    assert capsys.readouterr().out.startswith(f"{path}\n1 layers, 16 experts")


def test_recordings_are_planned_and_served_as_promised():
    base, steps = popularity("lognormal", 2, 64, 3), []
    for step in range(4):
        steps.append(count_load(sample_topk(base, 2000, 6, step, burst_tokens=250, burst_sigma=0.7), 64))
    rows = list(recorded("made", np.array(steps, float), np.array(["a", "b", "b", "b"])))
    assert [row["line"] for row in rows] == ["recorded", "recorded", "recorded next"] * 2
    assert all(row["ok"] is True for row in rows), rows


@pytest.mark.parametrize(("arguments", "said"), [
    (["--generate", "zipf", "--experts", "-4"], "--experts -4"),
    (["--generate", "zipf", "--layers", "0"], "--layers 0"),
    (["--generate", "hot", "--experts", "4"], "num_experts=4"), (["--simulate", "--window", "0"], "--window 0"),
    (["--generate", "group", "--experts", "12"], "num_experts=12"),
    (["--simulate", "--tokens", "8", "0"], "--tokens 8 0"),
    ([__file__], "is neither .npy nor .npz"),
])  # fmt: skip
def test_what_cannot_be_planned_is_said_in_one_line(capsys, arguments, said):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("plan: ") and said in shown.err and shown.err.count("\n") == 1 and not shown.out
