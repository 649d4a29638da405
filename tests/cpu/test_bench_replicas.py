"""benchmarks/replicas.py on CPU ranks: its bits are checked there too, its times mean nothing."""

import json

from benchmarks.replicas import main


def test_every_choice_and_every_step_keeps_the_bits(tmp_path, capsys):
    out = tmp_path / "replicas.json"
    assert main(["--case", "tiny", "--tokens", "5", "--redundant", "4", "--virtual-ranks", "2", "--device", "cpu",
                 "--json", str(out)]) == 0  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"]
    assert row["bits_differ"] == [] and row["moved_mb"] > 0 and row["balanced"] > 0
    assert row["planned_balancedness"] >= row["balancedness_without"]
    assert "bits_differ []" in capsys.readouterr().out
