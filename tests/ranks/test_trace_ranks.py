"""python -m megamoe trace on several ranks: rank 0 gathers every rank's lists, prints and writes; a rank that stays
away is named. On the CPU the lists are written by the test."""

import json
from pathlib import Path

import pytest

from megamoe.testing.spawn import spawn_ranks
from megamoe.trace import spans
from megamoe.trace_ranks import by_rank, fewer_ctas, pack, unpack
from tests.ranks.trace_jobs import lists_of

JOBS = Path(__file__).with_name("trace_jobs.py")


def starts(path: Path) -> dict[int, float]:
    """Of every rank in the file, when its first span begins."""
    found = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"]] = min(event["ts"], found.get(event["pid"], event["ts"]))
    return found


def test_packed_lists_are_the_lists_from_their_own_zero():
    lists = lists_of(1)
    zero = min(some[0].ns for some in lists.values())
    assert unpack(pack(lists)) == {key: [r._replace(ns=r.ns - zero) for r in some] for key, some in lists.items()}
    assert unpack(pack({})) == {}


def test_what_sets_ranks_apart_is_by_their_own_clocks():
    found = by_rank([lists_of(0), lists_of(1), lists_of(0)])
    assert (found["slowest_rank"], found["busiest_rank"]) == (1, 1)
    assert [of_rank["total_us"] for of_rank in found["ranks"]] == [5.3, 45.3, 5.3]
    assert found["ranks"][1]["tensor"] == pytest.approx(43 * 0.2) and found["ranks"][1]["row_list_us"] == 1.0


def test_a_file_too_large_keeps_every_nth_cta_of_all_ranks():
    lists_of_ranks = [lists_of(0), lists_of(1)]
    assert fewer_ctas(lists_of_ranks) == (lists_of_ranks, 1)
    kept, every = fewer_ctas(lists_of_ranks, 300)
    assert every == 2 and [{cta for cta, _ in lists} for lists in kept] == [{0}, {0}]


def test_rank_0_writes_one_file_of_all_ranks(tmp_path):
    out = tmp_path / "x.trace.json"
    first, second = spawn_ranks([JOBS, "verb", out], 2, timeout_s=100)
    assert (first.returncode, second.returncode) == (0, 0), first.output + second.output
    assert not second.output
    assert "slowest rank: 1, 45.3 us" in first.output and "mxfp4, zipf\n" in first.output
    assert starts(out) == {0: 0.0, 1: 0.0}
    events = [event for event in json.loads(out.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == sum(len(spans(rank, lists_of(rank))) for rank in range(2))


def test_a_rank_that_stays_away_is_named():
    for result in spawn_ranks([JOBS, "absent"], 3, timeout_s=100):
        expected = "" if result.ep_rank == 1 else "at trace for rank 1"
        assert result.returncode == 0 and expected in result.output, result.output


@pytest.mark.gpus(2)
@pytest.mark.parametrize("weight_format, routing", [("fp8", "uniform"), ("mxfp4", "zipf")])
def test_two_gpus(weight_format, routing, tmp_path):
    out, png = tmp_path / "x.trace.json", tmp_path / "x.png"
    sizes = ["--hidden", "512", "--intermediate", "256", "--experts", "16", "--topk", "4", "--tokens", "300"]
    more = ["--weight-format", weight_format, "--routing", routing, "--json", "--out", out, "--png", png]
    first, second = spawn_ranks(["-m", "megamoe", "trace", *sizes, *more], 2, timeout_s=300)
    assert (first.returncode, second.returncode) == (0, 0), first.output + second.output
    assert '"case"' not in second.output
    found = json.loads(next(line for line in first.output.splitlines() if line.startswith('{"case"')))
    assert f"{weight_format} weights" in found["case"] and f"{routing} routing" in found["case"]
    assert len(found["ranks"]) == 2 and found["slowest_rank"] in (0, 1) and not found["full_lists"]
    # The calls before brought the GPUs in step: neither waits milliseconds for the other's start
    assert all(0 < rank["row_list_us"] < rank["last_tile_end_us"] < rank["total_us"] < 5e3 for rank in found["ranks"])
    assert starts(out) == {0: 0.0, 1: 0.0}
    assert png.exists() or png.with_suffix(".picture.json").exists()
