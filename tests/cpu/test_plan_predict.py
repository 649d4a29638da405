"""Layer times fitted to measured calls, a recording replayed, and the verb that shows both."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from megamoe.plan import cli, count_load, drift, popularity, sample_topk
from megamoe.plan.cli import main
from megamoe.plan.predict import LayerTime, expected_active, fit_measured, read_measured
from megamoe.plan.show import recorded
from megamoe.plan.simulate import predict, replay

RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.jsonl"))


def test_fit_recovers_what_made_the_table():
    true = LayerTime(30.0, 3.0, 700.0, 2.0)
    rng = np.random.default_rng(0)
    weights, flop = 10 ** rng.uniform(8, 9.7, 40), 10 ** rng.uniform(8, 13, 40)
    got = LayerTime.fit(np.stack([weights, flop, true.us(weights, flop)], 1))
    assert np.allclose([got.overhead_us, got.weight_tbs, got.tflops, got.p], [30, 3, 700, 2], rtol=2e-2)
    with pytest.raises(ValueError, match="8 or more"):
        LayerTime.fit([[1, 1, 1]])


def test_fit_to_the_shipped_results_is_near_them():
    model, error = fit_measured(read_measured(RESULTS))
    assert np.sqrt((error**2).mean()) < 0.1 and np.abs(error).max() < 0.3
    assert 1 < model.weight_tbs < 3.4 and 300 < model.tflops < 1979  # what an H100 has


def test_of_a_cell_measured_twice_the_newest_counts(tmp_path):
    row = {"impl": "megamoe", "ok": True, "bytes_weights": 1, "flops": 1, "case": "a", "num_tokens": 8}
    lines = [row | {"us": 5, "date": "2026-11-22"}, row | {"us": 9, "date": "2026-11-21"},
             row | {"us": 7, "num_tokens": 1}, row | {"us": 1, "impl": "other"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sorted(one["us"] for one in read_measured([tmp_path / "a.jsonl"])) == [5, 7]


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
    assert "nodes a token of prefill_text" in out and "error rms" in out and "updated" in out
    picture = tmp_path / "load.png"
    if find_spec("matplotlib"):
        assert main([*arguments, "--png", str(picture)]) == 0 and picture.stat().st_size > 1000
    else:  # said before anything is computed
        assert main([*arguments, "--png", str(picture)]) == 2 and "matplotlib" in capsys.readouterr().err
    (tmp_path / "few.jsonl").write_text(json.dumps({"impl": "megamoe", "ok": True, "us": 1, "bytes_weights": 1,
                                                    "flops": 1}))  # fmt: skip
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
