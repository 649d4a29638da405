"""benchmarks/replicas.py on CPU ranks: its bits are checked there too, its times mean nothing."""

import json

import pytest

from benchmarks.replicas import main


def test_every_choice_and_every_step_keeps_the_bits(tmp_path, capsys):
    out = tmp_path / "replicas.json"
    assert main(["--case", "tiny", "--tokens", "5", "--redundant", "4", "--virtual-ranks", "2", "--device", "cpu",
                 "--json", str(out)]) == 0  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"]
    assert row["bits_differ"] == [] and row["moved_mb"] > 0 and row["balanced"] > 0
    assert row["planned_balancedness"] >= row["balancedness_without"]
    assert "bits_differ []" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (["--virtual-ranks", "1"], "num_redundant_experts=8"), (["--virtual-ranks", "3"], "3 ranks"),
    (["--case", "nope"], "--case 'nope'"), (["--tokens", "x"], "--tokens 'x'"),
    (["--json", "/nowhere/rows.json"], "--json /nowhere/rows.json: cannot write"),
    (["--results", "/dev/null/rows"], "--results: cannot write to the folder /dev/null/rows"),
])  # fmt: skip
def test_a_wrong_command_line_ends_with_2_and_says_why(arguments, said, capsys):
    assert main(["--case", "tiny", "--device", "cpu", "--virtual-ranks", "2", *arguments]) == 2
    assert said in capsys.readouterr().err
