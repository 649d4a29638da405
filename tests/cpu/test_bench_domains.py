"""benchmarks/domains.py on virtual CPU ranks, and the README's scaling section."""

import json

import pytest

from benchmarks import domains, report, scaling_report
from megamoe.domains.traffic import row_bytes
from tests.cpu.test_scaling import row


def test_one_domain_beside_two(tmp_path, capsys):
    arguments = ["--device", "cpu", "--virtual-ranks", "4", "--ranks-per-domain", "2", "--tokens", "3"]
    assert domains.main([*arguments, "--domain-tokens", "2", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("| 3 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    fixed, rounds, least = map(float, cells[5:8])
    assert fixed == pytest.approx((row_bytes(256, 2) + 512) / 1e3, abs=0.05)  # one copy a token, whatever the routing
    assert 0 < rounds == least <= fixed
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert [(r["ranks_per_domain"], r["domain_tokens"]) for r in rows] == [(4, None), (2, None), (2, 2)]
    assert all(r["ok"] and r["us"] > 0 for r in rows) and rows[0]["copies_between"] == 0 < rows[1]["copies_between"]
    assert "verdict: PASS" in said and len(scaling_report.series_of(rows)) == 3


@pytest.mark.parametrize("size, named", [("4", "several domains of 4 ranks"), ("3", "in no whole domain"), ("0", "0")])
def test_what_is_no_division_is_named(size, named, capsys):
    assert domains.main(["--device", "cpu", "--virtual-ranks", "4", "--ranks-per-domain", size]) == 2
    assert named in capsys.readouterr().err


def test_rows_that_could_not_be_kept_are_refused_beforehand(capsys):
    sizes = ["--device", "cpu", "--virtual-ranks", "4", "--ranks-per-domain", "2"]
    assert domains.main([*sizes, "--results", "/dev/null/rows"]) == 2
    shown = capsys.readouterr()
    assert "domains.py: --results: cannot write to the folder /dev/null/rows" in shown.err and not shown.out


def test_the_readme_gets_its_scaling_section(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    (results / "scaling").mkdir(parents=True)
    empty = f"{report.BEGIN}\n{report.END}\n{report.SCALING[0]}\n{report.SCALING[1]}\n"
    readme.write_text(empty)
    options = ["--readme", str(readme), "--results", str(results)]
    assert report.main(options) == 0 and "No scaling results yet" in readme.read_text()
    rows = [row(1, 80.0, tokens=16, floor=40.0), row(2, 100.0, tokens=16, floor=45.0)]
    (results / "scaling" / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert report.main([*options, "--check"]) == 1
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    text = readme.read_text()
    assert "| 2 | 2 | 16 | 4 | 100.0 | 160.0 | 80% | 89% |" in text
    drawn = (results / "scaling" / "scaling.png").is_file()
    assert ("![scaling](results/scaling/scaling.png)" in text) == drawn
    assert drawn == ("plot: " in capsys.readouterr().out)
