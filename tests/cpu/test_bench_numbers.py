"""The benchmark's numbers: cases, inputs, roofline arithmetic, result files and README tables."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cases as case_list
from benchmarks import gate, report, timing
from benchmarks.cases import Case, load_cases
from benchmarks.inputs import make_tokens, make_weights
from benchmarks.record import Row, commit_of
from benchmarks.results import append_result, as_json, read_results
from benchmarks.roofline import (
    RATES,
    count_work,
    expected_active_experts,
    expected_ranks_per_token,
    floor_us,
    mean_work,
    rates_of,
)
from megamoe import MoEConfig

ROOT = Path(__file__).resolve().parents[2]
CASES = load_cases()
TINY, FLASH64 = CASES["tiny"], CASES["flash64"]
NOT_ROUND = Case("x", hidden=384, intermediate=256, num_experts=12, topk=3, swiglu_limit=0.5)


# --- cases and command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, shape",
    [
        ("flash64", (4096, 2048, 64, 6)),
        ("v3_64", (7168, 2048, 64, 8)),
        ("flash256", (4096, 2048, 256, 6)),
        ("qwen3_235b", (4096, 1536, 128, 8)),
        ("pro", (7168, 3072, 384, 6)),
    ],
)
def test_the_cases_have_the_shapes_they_are_named_for(name, shape):
    case = CASES[name]
    assert (case.hidden, case.intermediate, case.num_experts, case.topk) == shape


def test_every_case_is_a_legal_configuration():
    for case in CASES.values():
        MoEConfig(case.hidden, case.intermediate, case.num_experts, case.topk, swiglu_limit=case.swiglu_limit)


def test_a_case_file_with_an_illegal_size_names_case_and_neighbours(tmp_path):
    file = tmp_path / "cases.toml"
    file.write_text("[bad]\nhidden = 7100\nintermediate = 128\nnum_experts = 8\ntopk = 2\n")
    with pytest.raises(ValueError, match=r"case bad: hidden=7100 .* nearest 7040, 7168"):
        load_cases(file)
    file.write_text("[bad]\nhiden = 128\nintermediate = 128\nnum_experts = 8\ntopk = 2\n")
    with pytest.raises(ValueError, match=r"case bad .*hiden"):
        load_cases(file)


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_work_of_a_routing_counted_by_hand():
    # rank 0's token: six experts of GPU 0; rank 1's: two of GPU 0 (0, 1), four of GPU 1
    idx = [torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 32, 33, 34, 35]])]
    work = count_work(FLASH64, idx, num_gpus=2)
    assert work.flops == 12 * 6 * 4096 * 2048 / 2 == 301_989_888
    assert work.flops_busiest == 8 * 6 * 4096 * 2048
    assert work.active_experts_max == 6
    assert work.weight_bytes == 6 * 25_171_968  # 3 * 4096 * 2048 * (1 + 4 / 16384)
    # rank 1's token crosses once as 4096 e4m3 + 32 scale factors, GPU 0 returns one bf16 row
    assert work.nvlink_bytes == 2 * 4096
    assert work.activation_bytes == 0
    us, bound = floor_us(work, RATES["H100"])
    assert bound == "hbm" and us == pytest.approx(50.34, abs=0.01)


def test_one_gpu_playing_two_ranks_does_the_work_of_both():
    idx = [torch.tensor([[0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 1, 32, 33, 34, -1]])]
    work = count_work(FLASH64, idx, num_gpus=1)
    assert work.flops == work.flops_busiest == 11 * 6 * 4096 * 2048
    assert (work.active_experts_max, work.nvlink_bytes) == (9, 0)


def test_prefill_is_bound_by_the_tensor_cores():
    tokens = [make_tokens(replace(FLASH64, hidden=128), rank, 8192, "uniform", 0, 0, "cpu") for rank in range(2)]
    work = count_work(FLASH64, [t.topk_idx for t in tokens], num_gpus=2)
    assert work.flops == 8192 * 6 * 6 * 4096 * 2048
    us, bound = floor_us(work, RATES["H100"])
    # 2.474e12 operations at 1400e12 a second, and a little for the busier rank
    assert bound == "tensor" and 1767 < us < 1800
    # rows of 2 * (4224 + 2112) FP8 and 4 * 4096 bf16 bytes, tokens of 4224 in and 8192 out
    assert work.activation_bytes == pytest.approx(8192 * 6 * (2 * 6336 + 16384) + 8192 * 12416, rel=0.01)
    # nearly every token crosses: 1 - C(32,6)/C(64,6); 4224 out and 8192 back
    assert work.nvlink_bytes == pytest.approx(8192 * (1 - math.comb(32, 6) / math.comb(64, 6)) * 12416, rel=0.01)


def test_closed_forms_agree_with_drawn_routings():
    case = replace(TINY, num_experts=64, topk=6)
    works = []
    for routing_idx in range(100):
        everyone = [make_tokens(case, rank, 8, "uniform", routing_idx, 0, "cpu").topk_idx for rank in range(2)]
        works.append(count_work(case, everyone, num_gpus=2))
    expected = expected_active_experts(case, ep_size=2, num_tokens=8)
    assert expected == pytest.approx(25.38, abs=0.01)  # 32 * (1 - (58 / 64) ** 16)
    # the busier of two ranks is above the mean, by less than two experts
    assert expected < mean_work(works).active_experts_max < expected + 2
    assert expected_ranks_per_token(case, 1) == 1 and expected_ranks_per_token(case, 64) == pytest.approx(6)


def test_rates_are_known_for_hopper_only():
    assert rates_of("NVIDIA H100 80GB HBM3") is RATES["H100"] and rates_of("NVIDIA H200") is RATES["H200"]
    assert rates_of("CPU x2") is None


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_any_expert_can_be_regenerated_alone():
    whole, one = make_weights(TINY, range(8), 7, "cpu"), make_weights(TINY, [5], 7, "cpu")
    for all_of, alone in zip(whole[:4], one[:4], strict=True):
        assert torch.equal(all_of[5].float(), alone[0].float())
    assert not torch.equal(whole.linear1[4].float(), one.linear1[0].float())


@pytest.mark.parametrize("routing", ["uniform", "zipf", "hot"])
def test_routings_choose_distinct_experts(routing):
    case = replace(TINY, num_experts=64, topk=6)
    tokens = make_tokens(case, 0, 2000, routing, 0, 0, "cpu")
    assert all(len(set(row)) == 6 for row in tokens.topk_idx.tolist())
    assert torch.allclose(tokens.topk_weights.sum(dim=1), torch.ones(2000))
    share = torch.bincount(tokens.topk_idx.flatten(), minlength=64).sort(descending=True).values / 2000
    if routing == "uniform":
        assert share[0] < 0.15  # 6 / 64 each
    elif routing == "zipf":
        assert share[0] > 0.6 and share[-1] < 0.03
    else:
        assert bool((tokens.topk_idx == 0).any(dim=1).all())


def test_outputs_are_of_order_one():
    tokens = make_tokens(TINY, 0, 32, "uniform", 0, 0, "cpu")
    out = gate.spec_rows(TINY, tokens, torch.arange(32), 0, quantized=True)
    assert 0.05 < out.std() < 2


# --- results and report -----------------------------------------------------------------------------------------------


def _row(**changes) -> Row:
    values = dict.fromkeys(Row.__dataclass_fields__)
    values |= {
        "impl": "megamoe", "case": "flash64", "hidden": 4096, "intermediate": 2048, "num_experts": 64, "topk": 6,
        "num_tokens": 8, "tokens_per_rank": [8, 8], "capacity": 8, "ep_size": 2, "weight_format": "fp8",
        "routing": "uniform", "protocol": "graph", "input": "prequantized", "us": 240.0, "us_min": 239.0,
        "flops": 2.4e9,
        "bytes_weights": 6.4e8, "roofline_us": 213.0, "active_experts_max": 26.4, "rel_l2": 2e-3, "ok": True,
        "run": "r0", "device": "NVIDIA H100 80GB HBM3", "num_gpus": 2, "driver": "580.1", "torch": "2.11.0",
        "commit": "a" * 40, "dirty": False, "date": "2026-11-22T00:00:00Z",
    }  # fmt: skip
    return Row(**(values | changes))


def test_rows_survive_the_file(tmp_path):
    path = append_result(_row(us=240.123456789, rel_l2=float("nan")), tmp_path)
    append_result(_row(num_tokens=1), tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3-x2-2026-11.jsonl"
    first, second = read_results(tmp_path)
    assert (first["us"], first["rel_l2"], second["num_tokens"]) == (240.123, None, 1)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"x2-2026-11.jsonl line 3"):
        read_results(tmp_path)


def test_the_report_shows_the_median_of_the_newest_commit():
    new = {"commit": "b" * 40, "dirty": True}
    rows = [as_json(_row(us=999.0))]
    for run, us in enumerate((230.0, 250.0, 241.0)):
        rows.append(as_json(_row(us=us, run=f"r{run + 1}", date=f"2026-11-23T00:0{run}:00Z", **new)))
    rows.append(as_json(_row(impl="unfused-fp8", us=480.0, run="r3", **new)))
    rows.append(as_json(_row(num_tokens=1, capacity=1, us=80.0, run="r3", **new)))
    rows.append(as_json(_row(num_tokens=32, capacity=32, us=1.0, ok=False, run="r3", **new)))
    text = report.render(rows, CASES)
    assert text == report.render(rows[::-1], CASES)
    assert "### 2 x NVIDIA H100 80GB HBM3, EP2" in text
    assert "| us per call, tokens per rank: | 1 | 8 |\n" in text  # the failed 32 is no result
    assert "| **megamoe**, prequantized in | 80.0 | 241 (230-250) |" in text
    assert "| unfused-fp8, prequantized in | - | 480 |" in text
    assert "| sgl-deep-gemm 0.2.5, recorded | 87.0 | 244 |" in text and "| goal | 68.0 | 234 |" in text
    assert "| of floor, megamoe | 266% | 88% |" in text
    assert f"geometric mean {math.sqrt(80 / 87 * 241 / 244):.3f}, worst 0.988, over 2 cells" in text
    assert "Commit bbbbbbbbbbbb with local changes" in text and "up to 3 runs a cell" in text and "999" not in text


def test_an_unusual_protocol_or_sm_count_has_its_own_line():
    rows = [as_json(_row()), as_json(_row(protocol="isolated", us=260.0)), as_json(_row(num_sms=64, us=400.0))]
    text = report.render(rows, CASES)
    assert "**megamoe**, prequantized in | 240 |" in text
    assert "prequantized in, isolated protocol | 260 |" in text and "prequantized in, 64 SMs | 400 |" in text
    assert report.GRAPH_MAX_TOKENS == timing.GRAPH_MAX_TOKENS


def test_the_bar_stands_only_where_it_was_measured():
    for other in ({"device": "NVIDIA H20"}, {"routing": "zipf"}, {"num_gpus": 1, "virtual_ranks": 2}):
        assert "0.2.5" not in report.render([as_json(_row(**other))], CASES)


def test_check_fails_on_a_stale_readme_and_passes_after_writing(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    options = ["--readme", str(readme), "--results", str(results)]
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    assert report.main([*options, "--check"]) == 1
    assert report.main(options) == 0
    assert "No results yet" in readme.read_text() and report.main([*options, "--check"]) == 0
    append_result(_row(), results)
    assert report.main([*options, "--check"]) == 1 and "No results yet" in readme.read_text()
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "flash64" in text
    readme.write_text("no markers")
    assert report.main(options) == 2 and "results:begin" in capsys.readouterr().err


def test_the_tables_of_the_readme_are_those_of_the_results():
    assert report.main(["--check"]) == 0, "run ./launch/do table"


def test_a_given_commit_is_taken_as_it_is():
    assert commit_of("abc") == ("abc", False) and commit_of("abc-dirty") == ("abc", True)


def test_the_report_runs_without_torch(tmp_path):
    import subprocess

    blocker = "import sys; sys.modules['torch'] = None; sys.argv = ['report.py', '--print']; import runpy; "
    script = blocker + f"runpy.run_path({str(ROOT / 'benchmarks/report.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_published_notes_of_the_bar_are_complete():
    for name in ("flash64", "v3_64", "flash256"):
        case = case_list.load_cases()[name]
        for times in (case.bar_us, case.goal_us, case.older_us):
            assert sorted(times) == [1, 8, 32, 128, 512, 2048, 8192]
        assert all(case.goal_us[n] < case.bar_us[n] < case.older_us[n] for n in case.bar_us)
