"""python -m megamoe trace on the GPU: every role of every CTA notes its tiles, in time's order."""

import json
import time
from itertools import pairwise

import pytest

import megamoe.__main__ as cli
from megamoe import MoEConfig, trace
from megamoe.trace_clock import GpuClock
from megamoe.traced_call import trace_call


@pytest.mark.parametrize("num_tokens", [8, 300], ids=["weights on M", "tokens on M"])
def test_every_role_leaves_its_tiles(num_tokens):
    config = MoEConfig(hidden=512, intermediate=256, num_experts=8, topk=4)
    lists_of_ranks, words, clock_error_us = trace_call(config, num_tokens, 2, True)
    assert "untraced call" in words and len(lists_of_ranks) == 2 and clock_error_us is None
    for lists in lists_of_ranks:
        assert all(a.ns <= b.ns for some in lists.values() for a, b in pairwise(some))
        ctas = {cta for cta, _ in lists}
        num_tiles = {}
        for cta in ctas:
            assert [r.event for r in lists[cta, "plan"]] == ["start", "list", "end"]
            assert [r.event for r in lists[cta, "exchange"]] == ["pushed", "combined"]
            for role, end in (("weights", "k_loop"), ("tokens", "k_loop"), ("math0", "epilogue"),
                              ("math1", "epilogue"), ("store", "stored")):  # fmt: skip
                some = lists.get((cta, role), [])
                tiles = [r.tile for r in some if r.event == "tile"]
                assert tiles == list(range(len(tiles))) == [r.tile for r in some if r.event == end], role
                num_tiles[cta, role] = len(tiles)
            assert len({num_tiles[cta, role] for role in ("weights", "tokens", "math0", "math1", "store")}) == 1
        assert sum(num_tiles[cta, "math0"] for cta in ctas) > 0
    found = trace.summary(lists_of_ranks)
    assert 0 < found["combined_us"] <= found["total_us"] < 1e6 and not found["full_lists"]


def test_the_verb(tmp_path, capsys):
    out = tmp_path / "small.trace.json"
    sizes = ["--hidden", "256", "--intermediate", "128", "--experts", "8", "--topk", "2", "--tokens", "5"]
    assert cli.main(["trace", *sizes, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roles"]["math0"]["spans"]
    assert json.loads(out.read_text())["traceEvents"]


def test_another_weight_format_and_routing(tmp_path, capsys):
    out = tmp_path / "small.trace.json"
    sizes = ["--hidden", "512", "--intermediate", "256", "--experts", "8", "--topk", "2", "--tokens", "40"]
    more = ["--weight-format", "mxfp4", "--routing", "zipf", "--virtual-ranks", "2", "--out", str(out)]
    assert cli.main(["trace", *sizes, *more]) == 0
    said = capsys.readouterr().out
    assert "mxfp4 weights, prequantized input, zipf routing" in said and "slowest rank" not in said
    assert {event["pid"] for event in json.loads(out.read_text())["traceEvents"]} == {0, 1}


def test_the_gpus_clock_is_told_within_microseconds():
    with GpuClock() as clock:
        readings = []
        for _ in range(5):
            readings.append(clock.read())
            time.sleep(0.05)
    print([reading.error_ns for reading in readings])
    assert all(0 < reading.error_ns < 20_000 for reading in readings)
    for a, b in pairwise(readings):
        drift = (b.gpu_ns - a.gpu_ns) - (b.host_ns - a.host_ns)
        assert abs(drift) < a.error_ns + b.error_ns + 5e-4 * (b.host_ns - a.host_ns), drift
