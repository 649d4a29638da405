"""bench.py's command line, gate, baseline and timing, and the whole of it on two gloo ranks."""

import json
import math
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench, gate
from benchmarks.baselines.sgl import SglMegaMoE
from benchmarks.baselines.unfused import Unfused
from benchmarks.cases import Case, load_cases, parse_cases, parse_choices, parse_tokens
from benchmarks.implementations import MegaMoE
from benchmarks.inputs import make_tokens, make_weights, pick_rows, to_bf16
from benchmarks.results import read_results
from benchmarks.timing import Meet, measure, num_routings, pick_protocol
from megamoe import MoEConfig
from megamoe.exchange import LocalExchange
from megamoe.steps import RankInput, moe_layer
from megamoe.testing.spawn import spawn_ranks

ROOT = Path(__file__).resolve().parents[2]
CASES = load_cases()
TINY, FLASH64 = CASES["tiny"], CASES["flash64"]
NOT_ROUND = Case("x", hidden=384, intermediate=256, num_experts=12, topk=3, swiglu_limit=0.5)


def test_lists_of_the_command_line():
    assert parse_tokens("0,1, 8,") == [0, 1, 8]
    assert [case.name for case in parse_cases("flash64,tiny", CASES)] == ["flash64", "tiny"]
    assert parse_choices("--baseline", "none", ("torch", "none")) == []
    for text in ("", "a", "-1", "1.5"):
        with pytest.raises(ValueError, match="--tokens"):
            parse_tokens(text)
    with pytest.raises(ValueError, match=r"'flsh64' is not in cases.toml; choose from tiny"):
        parse_cases("flsh64", CASES)
    with pytest.raises(ValueError, match="unknown: spl"):
        parse_choices("--baseline", "torch,spl", ("torch", "sgl", "none"))
    with pytest.raises(ValueError, match="--baseline"):
        parse_choices("--baseline", "torch,none", ("torch", "sgl", "none"))


def test_protocols_follow_the_bar():
    assert [pick_protocol("auto", n, True) for n in (1, 512, 513, 2048)] == ["graph", "graph", "isolated", "isolated"]
    assert [num_routings("graph", n) for n in (1, 512, 2048)] == [5, 5, 1]
    assert pick_protocol("auto", 1, False) == "wall"
    with pytest.raises(ValueError, match="--protocol graph needs a GPU"):
        pick_protocol("graph", 1, False)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--case", "nope"], "nope"),
        (["--tokens", "x"], "--tokens"),
        (["--protocol", "graph"], "--protocol graph"),
        (["--capacity", "3"], "--capacity"),
        (["--virtual-ranks", "0"], "--virtual-ranks 0"),
        (["--idle-ranks", "1"], "--idle-ranks 1"),
        (["--check-rows", "0"], "--check-rows"),
        (["--num-sms", "-3"], "--num-sms -3"),
        (["--json", "/nowhere/bench.json"], "--json /nowhere/bench.json"),
        (["--results", "/dev/null/rows"], "--results: cannot write to the folder /dev/null/rows: Not a directory"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_names_the_option(arguments, named, capsys):
    assert bench.main(["--device", "cpu", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_ranks_that_do_not_divide_the_experts_are_not_run_and_no_success(capsys):
    assert bench.main(["--device", "cpu", "--virtual-ranks", "3", "--check-only"]) == 1
    shown = capsys.readouterr().out
    assert "not run: tiny" in shown and "ep_size=3" in shown and "verdict: FAIL" in shown


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert (
        text.count("benchmarks/bench.py") >= 5 and "torchrun --nproc-per-node 2" in text and "--virtual-ranks 2" in text
    )


# --- gate -------------------------------------------------------------------------------------------------------------


def _cpu_input(tokens) -> RankInput:
    return RankInput(tokens.x, tokens.x_sf, tokens.topk_idx, tokens.topk_weights)


@pytest.mark.parametrize("experts_at_once", [3, 96])
def test_a_subset_of_rows_gives_what_the_whole_layer_gives(experts_at_once):
    everyone = [make_tokens(NOT_ROUND, rank, n, "uniform", 0, 3, "cpu") for rank, n in ((0, 9), (1, 14))]
    weights = [make_weights(NOT_ROUND, range(6 * rank, 6 * rank + 6), 3, "cpu") for rank in range(2)]
    config = MoEConfig(384, 256, 12, 3, swiglu_limit=0.5)
    whole = moe_layer(config, LocalExchange(2), weights, [_cpu_input(tokens) for tokens in everyone])
    rows = pick_rows(14, 5, 3, "cpu")
    subset = gate.spec_rows(NOT_ROUND, everyone[1], rows, 3, quantized=True, experts_at_once=experts_at_once)
    assert len(rows) == 5 and gate.judge(whole[1], rows, subset).rel_l2 < 1e-3


def test_a_rival_that_rounds_otherwise_may_be_further_away():
    expected, rows = torch.randn(8, 4096), torch.arange(8)
    other = expected + 2.4e-2 * torch.randn(8, 4096)
    assert not gate.judge(other, rows, expected).ok
    assert gate.judge(other, rows, expected, **SglMegaMoE.limits).ok
    assert not gate.judge(expected.roll(1, 0), rows, expected, **SglMegaMoE.limits).ok


def test_the_gate_refuses_what_is_wrong():
    expected = torch.randn(8, 256)
    expected[3] = 0
    rows, good = torch.arange(8), expected.bfloat16()
    assert gate.judge(good, rows, expected).ok
    unwritten, offset, one_row, not_zero = (good.clone() for _ in range(4))
    unwritten[6, 5] = float("nan")
    offset *= 1.02
    one_row[2] *= 1.04
    not_zero[3, 0] = 1e-6
    # a row that is not compared must still have been written
    assert "1 of 8 rows unwritten" in gate.judge(unwritten, rows[:4], expected[:4]).reason
    for wrong in (offset, not_zero):
        assert not gate.judge(wrong, rows, expected).ok
    # 4 % in one row of many is below 1 % of the whole, and still refused
    many = torch.cat([expected] * 20)
    verdict = gate.judge(torch.cat([one_row] + [good] * 19), torch.arange(160), many)
    assert verdict.rel_l2 < 1e-2 and not verdict.ok


def test_verdicts_of_ranks_merge_to_the_worst():
    good, bad = gate.Verdict(True, 1e-3, 2e-3, 4, 4), gate.Verdict(False, float("nan"), 0.0, 2, 8, "unwritten")
    merged = gate.merge([good, bad])
    assert (merged.ok, merged.rows, merged.num_tokens, merged.reason) == (False, 6, 12, "unwritten")
    assert math.isnan(merged.rel_l2)


# --- baseline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("case", [TINY, NOT_ROUND], ids=lambda case: case.name)
def test_the_unfused_baseline_computes_the_layer(case, precision):
    tokens = make_tokens(case, 0, 13, "uniform", 0, 0, "cpu")
    tokens.topk_idx[2] = -1
    tokens.topk_idx[3, 0] = -1
    weights = make_weights(case, range(case.num_experts), 0, "cpu")
    weights = weights if precision == "fp8" else to_bf16(weights)
    layer = Unfused(case, weights, ep_rank=0, ep_size=1, num_tokens=16, precision=precision)
    layer.y.fill_(float("nan"))
    rows = torch.arange(13)
    expected = gate.spec_rows(case, tokens, rows, 0, quantized=precision == "fp8")
    for prequantized in (True, False)[precision == "bf16" :]:
        out = torch.full((13, case.hidden), float("nan"), dtype=torch.bfloat16)
        x, x_sf = (tokens.x, tokens.x_sf) if prequantized else (tokens.hidden_states, None)
        layer(x, x_sf, tokens.topk_idx, tokens.topk_weights, out)
        verdict = gate.judge(out, rows, expected)
        assert verdict.ok, verdict.reason
        assert not out[2].any()


# --- timing -----------------------------------------------------------------------------------------------------------


def test_the_timed_path_runs_once_more_on_poisoned_outputs():
    log = []
    timing = measure("wall", [lambda: log.append("call")], lambda: log.append("poison"), Meet(torch.device("cpu")))
    assert log[-2:] == ["poison", "call"] and log.count("call") == timing.count + 2
    assert 0 < timing.us_min <= timing.us


# --- end to end -------------------------------------------------------------------------------------------------------


class _Stand:
    """In place of torch.cuda: keeps a log, and a clock that each call moves by 7 us and each sleep by 1 ms."""

    def __init__(self, monkeypatch):
        self.log, self.now_us, self.captured, stand = [], 0.0, None, self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = stand.now_us

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class Graph:
            def replay(self):
                stand.log.append("replay")
                stand.now_us += 7.0 * len(self.calls)

            def reset(self):
                stand.log.append("reset")

        @contextmanager
        def capture(graph, stream, capture_error_mode):
            stand.captured = graph.calls = []
            yield
            stand.captured = None

        def sleep(cycles):
            stand.log.append("sleep")
            stand.now_us += cycles / 2e3

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": capture, "_sleep": sleep, "Stream": lambda device: stream,
            "stream": lambda s: nullcontext(), "current_stream": lambda device: stream,
            "synchronize": lambda device: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, routing):
        def run():
            if self.captured is not None:
                self.captured.append(routing)
            else:
                self.log.append(routing)
                self.now_us += 7.0

        return run


def test_the_graph_protocol_to_the_letter(monkeypatch):
    stand, meet = _Stand(monkeypatch), Meet(torch.device("cpu"))
    monkeypatch.setattr(meet, "on_stream", lambda: stand.log.append("collective"))
    captured = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "reset", lambda graph: captured.extend(graph.calls))
    measured = measure("graph", [stand.call(n) for n in range(5)], lambda: stand.log.append("poison"), meet)
    assert captured == [0, 1, 2, 3, 4] * 4  # 20 calls through 5 routings
    assert measured.us == pytest.approx(7.0) and measured.count == 7  # neither sleep nor collective is timed
    log = stand.log[stand.log.index("sleep") - 1 :]
    assert log[:27] == ["collective", "sleep", "replay"] * 9  # 2 warm-ups and 7
    assert log[27] == "poison" and log.count("replay") == 10


def test_the_isolated_protocol_to_the_letter(monkeypatch):
    stand, meet = _Stand(monkeypatch), Meet(torch.device("cpu"))
    monkeypatch.setattr(meet, "barrier", lambda: stand.log.append("barrier"))
    monkeypatch.setattr(torch.Tensor, "zero_", lambda flush: stand.log.append(f"write {flush.nbytes >> 20} MB"))
    measured = measure("isolated", [stand.call(0)], lambda: stand.log.append("poison"), meet)
    assert stand.log[: 4 * 33] == ["write 256 MB", "barrier", "sleep", 0] * 33
    assert measured.us == pytest.approx(7.0) and measured.count == 30
    assert stand.log[4 * 33 :] == ["poison", "barrier", 0, "barrier"]


def test_two_gloo_ranks_time_judge_and_pass(tmp_path):
    file, results = tmp_path / "out.json", tmp_path / "results"
    command = [ROOT / "benchmarks/bench.py", "--device", "cpu", "--tokens", "0,5", "--baseline", "torch,torch-bf16,sgl"]
    ranks = spawn_ranks([*command, "--json", file, "--results", results, "--commit", "abc"], 2)
    text = ranks[0].output
    assert [rank.returncode for rank in ranks] == [0, 0], text + ranks[1].output
    assert "2 ranks over gloo" in text and "verdict: PASS" in text and "against the float64 loop" in text
    assert ranks[1].output.strip() == ""  # one rank speaks
    out = json.loads(file.read_text())
    assert out["ok"] and [entry["impl"] for entry in out["not_run"]] == ["sgl"]
    assert "not installed" in out["not_run"][0]["reason"] and "not run: tiny, sgl" in text
    rows = out["rows"]
    assert [(row["impl"].split("-torch")[0], row["num_tokens"]) for row in rows] == [
        (impl, tokens) for tokens in (0, 5) for impl in ("megamoe-cpu", "unfused-fp8", "unfused-bf16")
    ]
    for row in rows:
        assert (
            row["ok"] and row["us"] > 0 and row["ep_size"] == 2 and row["protocol"] == "wall" and row["commit"] == "abc"
        )
        assert row["rows_checked"] == sum(row["tokens_per_rank"]) == 2 * row["num_tokens"]
    assert read_results(results) == rows
    asked = (
        "impl case hidden intermediate num_experts topk num_tokens capacity ep_size weight_format routing protocol "
        "input us us_min tflops rel_l2 device num_gpus driver commit dirty date"
    )
    assert set(asked.split()) <= set(rows[0])


def test_virtual_ranks_in_one_process(capsys):
    arguments = ["--device", "cpu", "--virtual-ranks", "4", "--tokens", "3", "--idle-ranks", "1", "--check-only"]
    assert bench.main([*arguments, "--routing", "zipf", "--input", "both", "--capacity", "cell"]) == 0
    text = capsys.readouterr().out
    assert "4 virtual ranks" in text and "ok 9/9 rows" in text and "verdict: PASS" in text


def test_virtual_ranks_under_a_launcher_are_refused():
    ranks = spawn_ranks([ROOT / "benchmarks/bench.py", "--device", "cpu", "--virtual-ranks", "2"], 2)
    assert {rank.returncode for rank in ranks} <= {2, None} and "drop one of the two" in ranks[0].output


def test_a_wrong_output_fails_the_run_and_is_not_timed(monkeypatch, capsys, tmp_path):
    right = MegaMoE.calls

    def calls(self, routings, num_tokens, input_kind, outs):
        def wrong(call, rank_outs):
            call()
            rank_outs[0].mul_(1.02)

        return [
            lambda call=call, rank_outs=rank_outs: wrong(call, rank_outs)
            for call, rank_outs in zip(right(self, routings, num_tokens, input_kind, outs), outs, strict=True)
        ]

    monkeypatch.setattr(MegaMoE, "calls", calls)
    file, results = tmp_path / "out.json", tmp_path / "results"
    options = ["--tokens", "2", "--baseline", "none", "--json", str(file), "--results", str(results)]
    assert bench.main(["--device", "cpu", *options]) == 1
    assert "FAILED" in (text := capsys.readouterr().out) and "verdict: FAIL" in text
    (row,) = json.loads(file.read_text())["rows"]
    assert row["us"] is None and not row["ok"] and not results.exists()


def test_a_specification_that_disagrees_with_the_float64_loop_fails_the_run(monkeypatch, capsys):
    from benchmarks import run

    def off_by_a_percent(config, weights, inputs):
        return [out.double() * 1.01 for out in moe_layer(config, LocalExchange(len(inputs)), weights, inputs)]

    monkeypatch.setattr(run, "moe_reference", off_by_a_percent)
    assert bench.main(["--device", "cpu", "--tokens", "1", "--baseline", "none", "--check-only"]) == 1
    assert "WRONG" in capsys.readouterr().out
