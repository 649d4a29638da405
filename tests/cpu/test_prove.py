"""launch/prove.py without a GPU: steps share GPUs as they may, rows of several runs merge, and the page shows them."""

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import prove_report, report

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"commit": "a" * 40, "dirty": False, "device": "CPU", "num_gpus": 0, "driver": None, "torch": "2.13"}


@pytest.fixture(scope="module")
def prove():
    spec = importlib.util.spec_from_file_location("prove", ROOT / "launch" / "prove.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "launch")  # as for python launch/prove.py
        spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4])
def test_steps_are_spread_over_the_gpus(prove, num_gpus):
    gpus, lock, held, log = [f"g{i}" for i in range(num_gpus)], threading.Lock(), [], []
    pairs = [prove.Step(f"pair {i}", [], gpus=2, missing=None if num_gpus > 1 else "one GPU") for i in range(3)]
    alone = [prove.Step(f"alone {i}", [], alone=True, expected_s=i) for i in range(3)]
    light = [prove.Step(f"light {i}", [], expected_s=i) for i in range(9)]

    def run(step, places):
        shares = (prove.SHARE if step.alone or step.gpus > 1 else 1) if places else 0
        with lock:
            held.extend(places * shares)
            log.append(step.name)
            assert all(held.count(gpu) <= prove.SHARE for gpu in gpus)
            assert len(set(places)) == (0 if step.missing else step.gpus)
        time.sleep(0.002)
        with lock:
            for gpu in places * shares:
                held.remove(gpu)

    host = prove.Step("host", [], gpus=0)
    prove.spread([*light, *alone, *pairs, host], gpus, run)
    assert not held and sorted(log) == sorted(step.name for step in (*light, *alone, *pairs, host))


def test_a_step_of_two_gpus_is_not_kept_waiting_by_small_ones(prove):
    pair, light = prove.Step("pair", [], gpus=2), prove.Step("light", [])
    host, missing = prove.Step("host", [], gpus=0), prove.Step("missing", [], gpus=2, missing="why")
    assert prove.pick([pair, light], {"0": 2, "1": 1}) is None
    assert prove.pick([pair, light, host], {"0": 2, "1": 1}) == (host, [], 0)
    assert prove.pick([missing, pair], {}) == (missing, [], 0)
    assert prove.pick([pair, light], {"0": 1, "1": 2, "2": 2}) == (pair, ["1", "2"], 2)
    assert prove.pick([light], {"0": 1, "1": 2}) == (light, ["1"], 1)


def test_rows_say_what_was_run_and_what_became_of_it(prove, tmp_path):
    runner = prove.Runner(tmp_path, FACTS, 2.0)
    (tmp_path / "kept.json").write_text("{}")
    runner.run(prove.Step("good", python("print('7 findings')"), facts=lambda output: {"findings": int(output[0])},
                          files=("kept.json", "none.json")), [])  # fmt: skip
    runner.run(prove.Step("bad", python("raise SystemExit(3)")), [])
    runner.run(prove.Step("long", python("import time; time.sleep(60)")), [])
    runner.run(prove.Step("unread", python("pass"), facts=lambda _: json.loads("nonsense")), [])
    runner.run(prove.Step("seen", python("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"),
                          facts=lambda output: {"said": [output.strip()]}), ["3", "5"])  # fmt: skip
    runner.run(prove.Step("absent", python("pass"), missing="no GPU"), [])
    runner.run(prove.Step("reports", python("print('x' * 9000)"),
                          facts=lambda _: {"ok": False, "output": "the report"}), [])  # fmt: skip
    rows = {row["step"]: row for row in prove.read_rows(tmp_path)}
    assert rows["good"]["ok"] and rows["good"]["findings"] == 7 and rows["good"]["files"] == ["kept.json"]
    assert rows["good"]["commit"] == FACTS["commit"] and rows["good"]["command"].startswith("python")
    assert rows["bad"]["ok"] is False and rows["bad"]["status"] == 3 and runner.failed
    assert rows["long"]["ok"] is False and rows["long"]["status"] == "ended after 2 s" and rows["long"]["seconds"] < 20
    assert rows["unread"]["ok"] is False and "JSONDecodeError" in rows["unread"]["unread"]
    assert rows["reports"]["ok"] is False and rows["reports"]["output"].startswith("the report\n")
    assert "output" not in rows["good"] and len(rows["reports"]["output"]) < 1100
    assert rows["seen"]["said"] == ["3,5"] and rows["absent"]["ok"] is None


def row(step: str, ok, date: str, **more) -> dict:
    return {"step": step, "ok": ok, "date": date, **FACTS, "files": [], **more}


@pytest.mark.parametrize("pattern", ["(", "no such step"])
def test_a_pattern_that_picks_nothing_is_refused(prove, tmp_path, capsys, pattern):
    with pytest.raises(SystemExit, match="2"):
        prove.main([str(tmp_path), "--only", pattern])
    assert f"--only {pattern!r}" in capsys.readouterr().err


def test_partial_runs_merge_into_one_summary(prove, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, rows in (
        (one, [row("a", True, "2026-01-02", files=["a.json"]), row("b", None, "2026-01-02", reason="no GPU")]),
        (two, [row("a", None, "2026-01-03", reason="no GPU"), row("b", False, "2026-01-01", files=["b.json"])]),
    ):
        folder.mkdir()
        prove.write_rows(folder, rows)
        for name in (name for found in rows for name in found["files"]):
            (folder / name).write_text(f'"{folder.name}"')
    assert prove.main([str(tmp_path / "all"), "--merge", str(one), str(two)]) == 0
    found = {row["step"]: row["ok"] for row in prove.read_rows(tmp_path / "all")}
    assert found == {"a": True, "b": False}  # a step that ran is not replaced by one that did not, however new
    assert (tmp_path / "all" / "b.json").read_text() == '"two"'
    prove.write_rows(two, [row("a", True, "2026-01-04", files=["new.json"])])
    (two / "new.json").write_text("1")
    prove.main([str(tmp_path / "all"), "--merge", str(two), str(one)])  # the newer one stays
    assert not (tmp_path / "all" / "a.json").exists() and (tmp_path / "all" / "new.json").exists()
    with pytest.raises(ValueError, match=r"has no summary\.json"):
        prove.main([str(tmp_path / "all"), "--merge", str(tmp_path)])
    prove.write_rows(two, [row("a", True, "2026-01-05", files=["lost.json"])])
    with pytest.raises(ValueError, match=r"has a row of 'a' without its lost\.json"):
        prove.main([str(tmp_path / "all"), "--merge", str(two)])
    assert (tmp_path / "all" / "new.json").exists()  # nothing is taken away before


def test_every_step_says_not_run_without_a_gpu(prove, tmp_path):
    for step in prove.steps(tmp_path, 1.0, "1", 0, "CPU"):
        assert (step.missing is None) == (step.gpus == 0), step.name
    for gpus in (1, 2):
        missing = [step.name for step in prove.steps(tmp_path, 1.0, "1", gpus, "H100") if step.missing]
        assert all(name.startswith("sanitizer") or gpus == 1 for name in missing)


def test_a_soak_of_other_sources_or_cases_begins_anew(prove, tmp_path, monkeypatch):
    files = ["csrc/a.cuh", *(f"megamoe/testing/{name}" for name in prove.CASES)]
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    monkeypatch.setattr(prove, "KEPT", kept)
    first = prove.soak_state(tmp_path, "virtual", "NVIDIA H100 80GB HBM3")
    (kept / first).write_text("{}")
    assert prove.soak_state(tmp_path, "virtual", "NVIDIA H100 80GB HBM3") == first and (tmp_path / first).exists()
    assert prove.soak_state(tmp_path, "virtual", "NVIDIA H200") != first
    for name in files:
        (tmp_path / name).write_text("2")
        assert prove.soak_state(tmp_path, "virtual", "NVIDIA H100 80GB HBM3") != first, name
        (tmp_path / name).write_text("1")
    assert all((ROOT / name).is_file() for name in files[1:])


def test_only_racechecks_findings_are_told_by_its_reports(prove, tmp_path):
    checks = {step.name.split()[1]: step for step in prove.steps(tmp_path, 1.0, "1", 0, "CPU") if "sanit" in step.name}
    assert set(checks) == {"memcheck", "synccheck", "racecheck", "initcheck"}
    for tool, step in checks.items():
        assert ("--error-exitcode" in step.command) == (tool != "racecheck")
        assert ("--print-limit" in step.command) == (tool == "racecheck")  # what is not displayed is not told
        assert ("--lineinfo" in step.command) == (tool == "racecheck") == (step.facts("") != prove.sanitizers.facts(""))
        assert step.facts("")["ok"] is False and step.facts("")["findings"] is None


def test_the_page_shows_every_row(tmp_path, prove):
    fault = {"side": "host", "fault": "a rank | late", "step": "dispatch", "said": {"0": "late", "1": "late"},
             "seconds": 1.5, "ok": True, "problem": ""}  # fmt: skip
    (tmp_path / "prove").mkdir()
    folder = tmp_path / "prove"
    (folder / "faults-host.jsonl").write_text(json.dumps(fault) + "\n")
    soak = {"calls": 5, "replays": 2, "rebalances": 1, "runs": 3, "seconds": 61.2, "digest": "d" * 64}
    planned = soak | {"loads": 7, "planned": 4, "mxfp4": 3, "steps": 6}
    prove.write_rows(folder, [
        row("faults, host", True, "2026-01-02", faults={"ok": 1, "wrong": 0}, files=["faults-host.jsonl"], seconds=2.0),
        row("sanitizer memcheck", True, "2026-01-02", findings=0, suppressed={"--some option": "a reason"}),
        row("sanitizer racecheck", True, "2026-01-02", findings=0, explained={
            "an order": {"reason": "by a flag", "pairs": {"a:f and b:g": 7, "a:f and b:h": 5}}}),
        row("soak", True, "2026-01-02", counted=soak), row("soak, plans", True, "2026-01-02", counted=planned),
        row("fuzz", None, "2026-01-02", reason="no GPU"),
        row("trace-8", True, "2026-01-02", total_us=123.4, exposed_us={"tensor": 7.0}, case="a case",
            files=["trace-8.png"]),
    ])  # fmt: skip
    text = prove_report.page(folder)
    for said in ("| 0, 1: late |", "0 findings", "`--some option`: a reason",
                 "0 findings, 2 pairs explained (12 hazards)", "### sanitizer racecheck: explained",
                 "| an order | by a flag | `a:f and b:g`: 7<br>`a:f and b:h`: 5 |",
                 "5 calls, 2 of them replays, 1 loads of weights; 3 runs", "no GPU",
                 "7 loads of weights; 4 calls under plans, 3 with MXFP4, 1 rebalances in 6 steps; 3 runs",
                 "![trace-8](trace-8.png)", "| 8 | 123.4 | 7.0 |", "1 ok, 0 wrong", "a" * 12 + ", 2026-01-02"):
        assert said in text, said
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    options = ["--readme", str(readme), "--results", str(tmp_path)]
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    assert (folder / "README.md").read_text() == text
    (folder / "README.md").write_text("old")
    assert report.main([*options, "--check"]) == 1


def test_the_kept_page_is_that_of_its_files():
    folder = ROOT / "benchmarks" / "results" / "prove"
    assert prove_report.write(folder, check=True), "stale: run ./launch/do table"
    for found in json.loads((folder / "summary.json").read_text()):
        for name in found["files"]:
            assert (folder / name).is_file() and (folder / name).stat().st_size < 1 << 20, name
