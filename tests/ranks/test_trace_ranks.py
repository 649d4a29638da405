"""python -m megamoe trace on several ranks: rank 0 gathers every rank's lists, prints and writes; a rank that stays
away is named. On the CPU the lists are written by the test."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from megamoe.testing.spawn import spawn_ranks
from megamoe.trace import spans
from megamoe.trace_clock import Reading, Words, ask, on_host_clock
from megamoe.trace_ranks import by_rank, fewer_ctas, pack, report_ranks, unpack
from tests.ranks.trace_jobs import ZERO_NS, gpu_ns, lists_of, on_gpu_clock

JOBS = Path(__file__).with_name("trace_jobs.py")


def starts(path: Path) -> dict[int, float]:
    """Of every rank in the file, when its first span begins."""
    found = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"]] = min(event["ts"], found.get(event["pid"], event["ts"]))
    return found


def test_packed_lists_are_the_lists():
    assert unpack(pack(lists_of(1))) == lists_of(1) and unpack(pack({})) == {}


def test_what_sets_ranks_apart():
    found = by_rank([lists_of(0), lists_of(1), lists_of(0)], 1.2)
    assert (found["slowest_rank"], found["busiest_rank"]) == (1, 1)
    assert [of_rank["total_us"] for of_rank in found["ranks"]] == [5.3, 45.3, 5.3]
    assert [of_rank["start_us"] for of_rank in found["ranks"]] == [0.0, 0.7, 0.0] and found["starts_apart_us"] == 0.7
    tensor, work = found["ranks"][1]["tensor"], [3 * 0.6, 43 * 0.6, 3 * 0.6]
    assert tensor == pytest.approx(43 * 0.2) and found["ranks"][1]["row_list_us"] == 1.0
    assert [of_rank["work"] for of_rank in found["ranks"]] == pytest.approx(work)
    assert found["imbalance"] == pytest.approx(work[1] / (sum(work) / 3))
    assert found["clock_check_us"] == pytest.approx(0.3)  # rank 0's list at 1.0, rank 1's start at 0.7


@pytest.mark.parametrize("late_ns, contradict", [(2000, False), (5000, True)])
def test_a_row_list_before_a_peers_start_is_said_to_be_impossible(late_ns, contradict):
    late = {key: [r._replace(ns=r.ns + late_ns) for r in some] for key, some in lists_of(1).items()}
    found = by_rank([lists_of(0), late], 2.0)
    assert found["clock_check_us"] == pytest.approx(0.3 - late_ns / 1000)
    assert ("contradict" in report_ranks(found)) == contradict


def test_records_of_a_fast_clock_come_back_to_the_hosts():
    rank = 3
    before, after = (Reading(at, gpu_ns(rank, at), 500) for at in (ZERO_NS - 10**6, ZERO_NS + 10**7))
    gpu, host = on_gpu_clock(rank, lists_of(rank)), lists_of(rank)
    assert max(r.ns - ZERO_NS for r in gpu[0, "math0"]) > 86_400 * 10**9
    found = on_host_clock(gpu, before, after)
    assert max(abs(a.ns - b.ns) for key in host for a, b in zip(found[key], host[key], strict=True)) <= 2
    with pytest.raises(ValueError, match="not later"):
        on_host_clock(gpu, after, before)


def test_the_shortest_round_tells_the_clock():
    """A thread plays the GPU, whose clock is 7 s ahead."""
    words, stop, interval = Words(), threading.Event(), sys.getswitchinterval()

    def answer() -> None:
        while not stop.is_set() and words.asked <= 10:
            if words.asked and not words.answers[words.asked - 1]:
                words.answers[words.asked - 1] = time.monotonic_ns() + 7 * 10**9

    sys.setswitchinterval(1e-4)
    thread = threading.Thread(target=answer)
    thread.start()
    try:
        reading = ask(words, rounds=10)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert abs(reading.gpu_ns - reading.host_ns - 7 * 10**9) <= reading.error_ns + 1
    with pytest.raises(RuntimeError, match="gave 0 of 10 answers within 0.05 s"):
        ask(Words(), rounds=10, deadline_s=0.05)


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
    assert "clocks: one within 1.2 us; every row list 0.3 us or more after" in first.output
    assert "s  meeting of 2 ranks" in first.output and "s  done; seconds: start" in first.output
    assert starts(out) == {0: 0.0, 1: pytest.approx(0.7, abs=0.002)}
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
    assert 0 < found["clock_error_us"] < 50 and found["clock_check_us"] > -found["clock_error_us"]
    assert 1 <= found["imbalance"] < 2
    # The calls before brought the GPUs in step: neither waits milliseconds for the other's start
    assert all(0 < rank["row_list_us"] < rank["last_tile_end_us"] < rank["total_us"] < 5e3 for rank in found["ranks"])
    assert min(starts(out).values()) == 0 and max(starts(out).values()) < 5e3
    assert png.exists() or png.with_suffix(".picture.json").exists()
