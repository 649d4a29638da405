"""benchmarks/in_model.py on a CPU: its parts run, its gate can fail, and what cannot run has a reason."""

import json

import pytest

pytest.importorskip("transformers", reason="not run: transformers is not installed")

from benchmarks import in_model
from megamoe.layer import MoELayer


def rows(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    file = tmp_path / "rows.jsonl"
    status = in_model.main([*arguments, "--json", str(file)])
    return status, [json.loads(line) for line in file.read_text().splitlines()]


def test_every_part_runs(tmp_path, capsys):
    status, found = rows(tmp_path, "--positions", "24", "--sequence", "12", "--batches", "1,8")
    assert status == 0
    logits = [row for row in found if row["part"] == "logits"]
    assert [row["family"] for row in logits] == ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]
    for row in logits:
        assert row["positions"] == 24 and row["ok"] and 0 < row["floor_kl"] < 0.1  # on a CPU fp8 runs for all four
        assert row["served_kl"] == pytest.approx(row["floor_kl"])  # there megamoe is steps.py
    block = [row for row in found if row["part"] == "block"]
    assert len(block) == 2 * 4 * 3
    ran = {(row["implementation"], row["batch"]) for row in block if "us" in row}
    assert ran == {(name, batch) for name in in_model.IMPLEMENTATIONS for batch in (1, 8)}
    assert all(row["not_run"] for row in found if row["part"] == "overhead" or row.get("mode") in ("compiled", "graph"))
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_the_gate_holds_nothing_that_is_wrong(tmp_path, monkeypatch):
    forward = MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: forward(self, *args, **how) * 0.5)
    arguments = "--parts", "logits", "--families", "mixtral", "--positions", "12", "--sequence", "12"
    status, (row,) = rows(tmp_path, *arguments)
    assert status == 1 and not row["ok"] and row["served_kl"] > 2 * row["floor_kl"]
