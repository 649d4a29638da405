"""benchmarks/in_model.py on a CPU: its parts run, its gate can fail, what cannot run has a reason; its tables."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="not run: transformers is not installed")

from benchmarks import in_model, in_model_report, in_model_text, report
from benchmarks.results import append_json, read_results
from megamoe.layer import MoELayer
from megamoe.testing.spawn import spawn_ranks

ROOT = Path(__file__).resolve().parents[2]


def rows(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    file = tmp_path / "rows.jsonl"
    status = in_model.main([*arguments, "--json", str(file)])
    return status, [json.loads(line) for line in file.read_text().splitlines()]


def test_every_part_runs(tmp_path, capsys):
    arguments = "--positions", "24", "--sequence", "12", "--batches", "1,8", "--results", str(tmp_path / "in_model")
    status, found = rows(tmp_path, *arguments, "--commit", "abc-dirty")
    assert status == 0 and read_results(tmp_path / "in_model") == found
    assert all((row["commit"], row["dirty"], row["num_gpus"]) == ("abc", True, 0) for row in found)
    logits = [row for row in found if row["part"] == "logits"]
    families, formats = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"), ("fp8", "mxfp4")
    assert [(row["family"], row["weight_format"]) for row in logits] == [(f, w) for f in families for w in formats]
    for row in logits:
        assert row["positions"] == 24 and row["ok"] and 0 < row["floor_kl"] < 0.1  # on a CPU both run for all four
        assert row["served_kl"] == pytest.approx(row["floor_kl"])  # there megamoe is steps.py
    block = [row for row in found if row["part"] == "block"]
    assert len(block) == 2 * 4 * 3
    ran = {(row["implementation"], row["batch"]) for row in block if "us" in row}
    assert ran == {(name, batch) for name in in_model.IMPLEMENTATIONS for batch in (1, 8)}
    assert all(row["not_run"] for row in found if row["part"] == "overhead" or row.get("mode") in ("compiled", "graph"))
    assert len(capsys.readouterr().out.splitlines()) == len(found) + 1


def test_the_gate_holds_nothing_that_is_wrong(tmp_path, monkeypatch):
    forward = MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: forward(self, *args, **how) * 0.5)
    arguments = "--parts", "logits", "--families", "mixtral", "--formats", "fp8", "--positions", "8", "--sequence", "8"
    status, (row,) = rows(tmp_path, *arguments, "--results", str(tmp_path / "in_model"))
    assert status == 1 and not row["ok"] and row["served_kl"] > 2 * row["floor_kl"]
    assert not read_results(tmp_path / "in_model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    in_model_text.train_model(path, torch.device("cpu"), 2.0)
    return path


def text_options(trained, size: int) -> tuple[str, ...]:
    return "--parts", "text", "--bytes", str(size), "--model", str(trained)


def test_one_rank_and_two_write_the_text_of_the_trained_model(trained, tmp_path):
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in trained.iterdir()}
    file = tmp_path / "rows.jsonl"
    ran = spawn_ranks(
        [ROOT / "benchmarks/in_model.py", *text_options(trained, 12), "--formats", "fp8", "--json", file], 2
    )
    assert all(rank.returncode == 0 for rank in ran), ran[0].output
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["weight_format"], row["ranks"]) for row in found] == [("fp8", 1), ("fp8", 2)]
    for row in found:
        assert row["ok"] and row["prompts"] == 8 and row["bytes"] == 12 and 1 < row["bits_per_byte"] < 8
        assert row["same"]["steps.py"] == row["same"].get("one rank", 8) == 8  # here megamoe is steps.py
        assert 0 < row["errors"]["eager"] <= 2 * row["floor_error"] and len(row["example"]) == 32 + 12
        assert row["same"]["eager"] == 8 - sum(fork["from"] == "eager" for fork in row["forks"])


def test_a_text_that_forks_at_more_than_a_near_tie_fails(trained, tmp_path, monkeypatch):
    forward = MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: -forward(self, *args, **how))
    status, (row,) = rows(
        tmp_path, *text_options(trained, 8), "--formats", "mxfp4", "--results", str(tmp_path / "rows")
    )
    assert status == 1 and not row["ok"] and row["errors"]["eager"] > 2 * row["floor_error"]
    assert not (tmp_path / "rows").exists()


def test_a_fork_is_the_first_byte_that_differs_and_its_gap_the_references():
    logits = torch.tensor([[[0.0, 3.0, 1.0], [5.0, 2.0, 4.5]], [[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]])
    changed = logits.clone()
    changed[0, 1] = torch.tensor([4.5, 2.0, 4.75])
    ours, reference = (in_model_text.Written(x.argmax(-1), x) for x in (changed, logits))
    found = in_model_text.compare(ours, reference)
    assert found.forks == [(0, 1, 0.5)] and found.error == 0.5 / 4
    assert in_model_text.compare(reference, reference) == ([], 0.0)
    assert {len(prompt) for prompt in in_model_text.PROMPTS} == {32}


FACTS = {"device": "NVIDIA H100", "num_gpus": 1, "driver": "580", "torch": "2.11", "commit": "0" * 40, "dirty": False}


def row_of(part: str, hour: int, ranks: int = 1, **fields) -> dict:
    return {"part": part, "ranks": ranks, **fields, **FACTS, "date": f"2026-11-22T{hour:02}:00:00Z"}


def logits_of(hour: int, kl: float, **fields) -> dict:
    errors = {f"{which}_{name}": kl for which in ("served", "floor") for name in ("kl", "top1", "rel_l2")}
    row = row_of("logits", hour, family="mixtral", weight_format="mxfp4", positions=4096, kernel="run", **errors)
    return row | fields


def test_the_tables_show_the_newest_commit_and_every_part():
    block = {"mode": "graph", "batch": 8, "experts": "fp8"}
    found = [
        logits_of(1, 0.5, commit="1" * 40), logits_of(2, 0.01), logits_of(3, 0.03), logits_of(1, 0.25, ranks=2),
        row_of("overhead", 1, us_per_call=14.25, forward_us=13.0, launch_us=5.0, gpu_us=20.0, min_us=14.0),
        row_of("block", 1, implementation="megamoe", us=12.0, **block),
        row_of("block", 1, 2, implementation="megamoe", us=34.0, **block),
        row_of("block", 1, implementation="eager", not_run="it loops", **block),
    ]  # fmt: skip
    texts = {"prompts": 8, "bytes": 128, "errors": {"eager": 0.125}, "floor_error": 0.25, "max_gap": 2.0,
             "bits_per_byte": 2.5, "weight_format": "fp8"}  # fmt: skip
    fork = {"from": "eager", "prompt": 3, "position": 17, "gap": 0.75}
    found += [
        row_of("text", 1, same={"eager": 7, "steps.py": 8}, forks=[fork], **texts),
        row_of("text", 1, 2, same={"eager": 8, "steps.py": 8, "one rank": 6}, forks=[], **texts),
        row_of("text", 1, 3, not_run="3 ranks do not share 8 prompts evenly"),
    ]
    text = in_model_report.markdown(found)
    numbers = "1.25e-01 / 2.50e-01 | {} / 2.00e+00 | 2.50 |"
    assert "| 128 bytes | fp8 | 1 | 7 of 8 | 8 of 8 | - | " + numbers.format("7.50e-01") in text
    assert "| 128 bytes | fp8 | 2 | 8 of 8 | 8 of 8 | 6 of 8 | " + numbers.format("no fork") in text
    assert text == in_model_report.markdown(found[::-1])
    assert "| mixtral | mxfp4 | 1 | 4096 | 2.00e-02 / 2.00e-02 |" in text
    assert "1111" not in text and "5.00e-01" not in text
    assert "| mixtral | mxfp4 | 2 | 4096 | 2.50e-01 / 2.50e-01 |" in text
    assert "| 1 | 14.2 | 13.0 | 5.0 | 20.0 |" in text
    assert "| 8 | 8, 2 ranks |" in text and "| **megamoe**, fp8 experts, graph | 12 | 34 |" in text
    assert "Not run: eager graph: it loops." in text and "torch 2.11; driver 580; 2026-11-22." in text
    assert in_model_report.markdown([]) == in_model_report.EMPTY


def test_the_guide_is_checked_like_the_readme(tmp_path, capsys):
    readme, guide = tmp_path / "README.md", tmp_path / "GUIDE.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    guide.write_text("\n".join(("before", *report.IN_MODEL, "after\n")))
    options = ["--readme", str(readme), "--guide", str(guide), "--results", str(tmp_path)]
    assert report.main(options) == 0 and in_model_report.EMPTY in guide.read_text()
    append_json(logits_of(1, 0.5), tmp_path / "in_model")
    assert report.main([*options, "--check"]) == 1 and "GUIDE.md is stale" in capsys.readouterr().err
    assert report.main(options) == 0 and "| mixtral |" in guide.read_text() and report.main([*options, "--check"]) == 0
    guide.write_text("no markers")
    assert report.main(options) == 2 and "GUIDE.md: needs one line" in capsys.readouterr().err


def test_the_commands_of_tables_sh_are_ones_it_takes():
    command = ROOT / "launch/tables.sh", "in-model", "--print", "--results", "/x", "--commit", "abc"
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line.partition("in_model.py ")[2].split() for line in lines if "in_model.py " in line]
    assert len(ours) == 3 and sum(int(re.search(r"(\d+) s:", line)[1]) for line in lines) <= 500
    for words in ours:
        given = in_model.parser().parse_args(words)
        assert (str(given.results), given.commit) == ("/x/in_model", "abc")


@pytest.mark.parametrize("option", ["--parts", "--families", "--formats", "--batches"])
def test_a_wrong_name_ends_with_2_and_names_the_option(option, capsys):
    assert in_model.main([option, "nothing"]) == 2
    assert f"{option} 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("option, named", [("--json", "--json /dev/null/rows"), ("--results", "--results")])
def test_rows_that_could_not_be_kept_are_refused_beforehand(option, named, capsys):
    assert in_model.main([option, "/dev/null/rows"]) == 2
    shown = capsys.readouterr()
    assert f"in_model.py: {named}: cannot write to the folder" in shown.err and not shown.out
