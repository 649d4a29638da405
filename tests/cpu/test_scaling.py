"""scaling.py's sizes, series and report, without timing anything; tests/ranks/test_scaling_mpi.py runs it."""

import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import prediction, scaling, scaling_report
from benchmarks.cases import load_cases
from benchmarks.inputs import make_tokens
from megamoe.domains.places import Place, check_domains, domains_of, explain, place_of
from megamoe.domains.traffic import bytes_per_token, copies_between, domains_of_tokens, row_bytes

TINY = load_cases()["tiny"]


def row(size, us, *, tokens, mode="weak", floor=None, **other):
    fields = dict(
        device="CPU x2", impl="megamoe-cpu", mode=mode, case="tiny", base_experts=8, experts="held", base_tokens=16,
        routing="uniform", protocol="wall", virtual_ranks=None, ranks_per_domain=size,
        series_per_domain=None, domain_tokens=None, max_domains=None, num_gpus=0, ep_size=size, us=us, ok=True,
        tokens_per_rank=[tokens] * size, num_tokens=tokens, num_units=size, num_experts=8, roofline_us=floor,
        roofline_fraction=None, copies_between=0.0, rel_l2=0.0, commit="c" * 40, dirty=False,
        date="2026-11-22T00:00:00Z", torch="2.13.0",
    )  # fmt: skip
    return fields | other


def test_sizes_are_powers_of_two_and_the_whole():
    assert scaling.sizes_of(None, 1) == [1]
    assert scaling.sizes_of(None, 4) == [1, 2, 4]
    assert scaling.sizes_of(None, 6) == [1, 2, 4, 6]
    assert scaling.sizes_of("4,1,4", 8) == [1, 4]
    with pytest.raises(ValueError, match=r"--sizes '9': 9 must be between 1 and the 8 ranks"):
        scaling.sizes_of("9", 8)


def test_strong_divides_the_tokens_and_scaled_experts_end_at_the_model():
    assert [scaling.tokens_at("strong", 24, size) for size in (1, 2, 4)] == [24, 12, 6]
    assert scaling.tokens_at("weak", 24, 4) == 24
    with pytest.raises(ValueError, match="--tokens 10 .* do not divide by 4"):
        scaling.tokens_at("strong", 10, 4)
    assert [scaling.case_at(TINY, size, 4, "scaled").num_experts for size in (1, 2, 4)] == [2, 4, 8]
    with pytest.raises(ValueError, match="do not divide by 3"):
        scaling.case_at(TINY, 1, 3, "scaled")


def test_efficiency_is_throughput_of_a_unit_against_the_first():
    strong = [row(1, 80.0, tokens=16, mode="strong", floor=40.0), row(4, 40.0, tokens=4, mode="strong", floor=10.0)]
    weak = [row(1, 80.0, tokens=16), row(2, 100.0, tokens=16)]
    series = scaling_report.series_of([*strong, *weak])
    by_mode = {points[0]["mode"]: points for points in series.values()}
    assert [point["efficiency"] for point in by_mode["strong"]] == [1.0, 0.5]
    assert [point["expected"] for point in by_mode["strong"]] == [1.0, 1.0]
    assert [point["efficiency"] for point in by_mode["weak"]] == pytest.approx([1.0, 0.8])
    assert [point["expected"] for point in by_mode["weak"]] == [None, None]
    virtual = [row(n, us, tokens=8, virtual_ranks=n, num_units=1) for n, us in ((1, 50.0), (4, 200.0))]
    (points,) = scaling_report.series_of(virtual).values()
    assert [point["efficiency"] for point in points] == [1.0, 1.0]  # one unit did four times the work in four times


def test_points_without_a_time_or_with_a_wrong_output_are_left_out():
    rows = [row(1, 80.0, tokens=16), row(2, None, tokens=16), row(4, 90.0, tokens=16, ok=False)]
    assert [len(points) for points in scaling_report.series_of(rows).values()] == [1]
    assert scaling_report.markdown([]) == scaling_report.EMPTY


def test_median_of_the_newest_commit():
    old = row(1, 10.0, tokens=16, commit="a" * 40, date="2026-11-21T00:00:00Z")
    (points,) = scaling_report.series_of([old, *(row(1, us, tokens=16) for us in (70.0, 90.0, 80.0))]).values()
    assert points[0]["us"] == 80.0 and points[0]["runs"] == 3


def test_the_plot_says_what_became_of_it(tmp_path, monkeypatch):
    rows = [row(1, 80.0, tokens=16, floor=40.0), row(2, 100.0, tokens=16, floor=45.0)]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert scaling_report.plot(rows, tmp_path / "a.png").startswith("plot not drawn: matplotlib is not installed")
    monkeypatch.undo()
    assert scaling_report.plot(rows[:1], tmp_path / "a.png").startswith("plot not drawn")
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("not run: matplotlib is not installed")
    assert scaling_report.plot(rows, tmp_path / "a.png") == f"plot: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, named", [
    (["--sizes", "3"], "--sizes"), (["--case", "nope"], "nope"), (["--mode", "fast"], "--mode"),
    (["--routing", "odd"], "--routing"), (["--virtual-ranks", "0"], "--virtual-ranks 0"),
    (["--check-rows", "0"], "--check-rows 0 must be at least 1"), (["--tokens", "4,0"], "--tokens '4,0'"),
    (["--results", "/dev/null/rows"], "--results: cannot write to the folder /dev/null/rows: Not a directory"),
    (["--plot", "/nowhere/a.png"], "--plot /nowhere/a.png: cannot write to the folder /nowhere: No such file"),
    (["--report", "--markdown", "/nowhere/a.md"], "--markdown /nowhere/a.md"),
    (["--report", "--results", "/nowhere"], "--results /nowhere is no folder"),
])  # fmt: skip
def test_wrong_command_lines_are_named(arguments, named, capsys):
    defaults = ["--virtual-ranks", "2"] if "--virtual-ranks" not in arguments else []
    assert scaling.main([*defaults, "--tokens", "2", "--device", "cpu", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_virtual_ranks_write_rows_and_tables(tmp_path, capsys):
    arguments = ["--virtual-ranks", "2", "--device", "cpu", "--tokens", "4", "--mode", "strong", "--experts", "scaled"]
    assert scaling.main([*arguments, "--results", str(tmp_path), "--markdown", str(tmp_path / "t.md")]) == 0
    said = capsys.readouterr().out
    assert "rank 0: domain 0" in said and "verdict: PASS (2 points" in said
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["ep_size"], r["num_tokens"], r["num_experts"]) for r in rows] == [(1, 4, 4), (2, 2, 8)]
    assert all(r["ok"] and r["us"] > 0 and r["mode"] == "strong" for r in rows)
    assert "experts per rank held" in (tmp_path / "t.md").read_text()
    assert scaling.main(["--report", "--results", str(tmp_path)]) == 0
    assert "| 2 | 1 | 2 | 4 |" in capsys.readouterr().out


def gpu(rank, host, mine, seen, reached):
    return Place(rank, host, f"cuda:{rank}", mine, tuple(seen), tuple(reached))


def test_domains_are_hosts_unless_a_gpu_is_out_of_reach():
    cpu = [Place(rank, "abc"[rank], "cpu", "", (), ()) for rank in range(3)]
    assert domains_of(cpu) == [0, 0, 0]
    two_hosts = [gpu(r, "ab"[r // 2], f"g{r}", [f"g{r}"], [f"g{r}"]) for r in range(4)]
    assert domains_of(two_hosts) == [0, 0, 1, 1] and check_domains([0, 0, 1, 1]) == 2
    apart = [gpu(r, "a", f"g{r}", ["g0", "g1"], [f"g{r}"]) for r in range(2)]
    assert domains_of(apart) == [0, 1] and check_domains([0, 1]) == 1
    assert "rank 2: domain 1, host b" in explain(two_hosts, [0, 0, 1, 1])
    near = [gpu(r, "a", f"g{r}", ["g0", "g1"], ["g0", "g1"]) for r in range(2)]
    assert domains_of(near) == [0, 0]
    for blind in range(2):  # one way is not enough
        assert domains_of([place._replace(reached=(f"g{r}",)) if r == blind else place
                           for r, place in enumerate(near)]) == [0, 1]  # fmt: skip
    assert domains_of([near[0], cpu[1]]) == domains_of([cpu[0], near[1]]) == [0, 1]


def test_a_rank_says_which_gpus_it_sees_and_which_its_own_reaches(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: f"H{i}")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda i: SimpleNamespace(uuid=f"g{i}"))
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda mine, i: (mine, i) in {(1, 2), (2, 0)})
    for device, own, reached in (("cuda:1", 1, ("g1", "g2")), ("cuda", 2, ("g0", "g2"))):
        place = place_of(5, torch.device(device))
        assert (place.rank, *place[2:]) == (5, f"cuda:{own} H{own}", f"g{own}", ("g0", "g1", "g2"), reached)
    for device in ("cpu", "cuda:3"):  # the last of them does not exist
        assert place_of(5, torch.device(device))[2:] == (device, "", (), ())


def test_domains_must_be_equal_runs_of_neighbours():
    with pytest.raises(ValueError, match=r"domain 1 has 1 ranks \[3\], domain 0 has 3: \[0, 1, 2\]"):
        check_domains([0, 0, 0, 1])
    with pytest.raises(ValueError, match=r"domain 0 has ranks \[0, 2\].*number the ranks host by host"):
        check_domains([0, 1, 0, 1])


def test_copies_between_domains_are_counted_once_a_domain():
    idx = torch.tensor([[0, 1, 7], [4, 5, -1], [-1, -1, -1]])
    assert domains_of_tokens(idx, 8, 2).tolist() == [[True, True], [False, True], [False, False]]
    # rank 0 is in domain 0: token 0 crosses once, token 1 once; rank 1 in domain 1: token 0 crosses once
    assert copies_between([idx, idx], 8, 1) == 3 / 6
    assert copies_between([idx, idx], 8, 2) == 0.0
    assert row_bytes(256, 3) == 256 + 8 + 24 and bytes_per_token(2.0, 256, 3) == 2 * (288 + 512)


def test_routing_within_few_domains_is_held():
    tokens = make_tokens(replace(TINY, num_experts=16, topk=4), 0, 300, "2of8", 0, 0, "cpu")
    assert int(domains_of_tokens(tokens.topk_idx, 16, 8).sum(1).max()) == 2
    with pytest.raises(ValueError, match="such as 2of4"):
        make_tokens(TINY, 0, 1, "2of", 0, 0, "cpu")


def test_domains_of_two_scale_as_a_series(tmp_path, capsys):
    arguments = ["--virtual-ranks", "4", "--device", "cpu", "--tokens", "3", "--mode", "weak", "--max-domains", "1"]
    assert scaling.main([*arguments, "--ranks-per-domain", "2", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["ep_size"], r["ranks_per_domain"], r["routing"]) for r in rows] == [
        (1, 1, "uniform"), (2, 2, "uniform"), (4, 2, "uniform")
    ]  # fmt: skip
    assert [r["copies_between"] for r in rows[:2]] == [0, 0] and 0 < rows[2]["copies_between"] <= 1
    assert all(r["ok"] for r in rows) and len(scaling_report.series_of(rows)) == 1
    assert "domains of 2, at most 1 domains a token" in capsys.readouterr().out


def test_what_one_start_cannot_measure_is_said():
    setup = SimpleNamespace(ranks_per_domain=2, ep_size=8, virtual_ranks=None, device=torch.device("cpu"))
    assert scaling.why_not(setup, 2) is None and scaling.why_not(setup, 8) is None
    assert "several domains need all ranks" in scaling.why_not(setup, 4)
    assert "--ranks-per-domain 2 does not divide 3" in scaling.why_not(setup, 3)
    gpus = SimpleNamespace(ranks_per_domain=None, ep_size=8, virtual_ranks=None, device=torch.device("cuda"))
    assert scaling.why_not(gpus, 1) is None and "launch/scale.sh" in scaling.why_not(gpus, 4)


def test_prediction_counts_copies_bytes_and_cost():
    small = replace(TINY, num_experts=32, topk=4)
    one, two = (prediction.predict(small, ranks, 128) for ranks in (8, 16))
    assert (one.domains, one.copies, one.exchange_us) == (1, 0.0, 0.0)
    assert (two.domains, two.slots_per_rank) == (2, 2) and 0.8 < two.copies <= 1.0
    assert two.bytes_between == bytes_per_token(two.copies, small.hidden, small.topk)
    assert two.exchange_us == pytest.approx(128 * two.bytes_between / 45e9 * 1e6)
    assert two.layer_us == two.experts_us + two.exchange_us and two.overlapped_us < two.layer_us
    cost = prediction.cost_model(small, 16 * 128 * 4)
    mean = cost.row_us * 128 * 4 + cost.expert_us * 2  # 512 rows a rank, both of its experts active
    assert two.experts_us == pytest.approx(mean / two.balance, rel=1e-3)


@pytest.mark.parametrize("ranks", [256, 512])
def test_prediction_reaches_64_domains_within_the_node_limit(ranks):
    at = prediction.predict(load_cases()["v3"], ranks, 128)
    assert at.domains == ranks // 8 and at.most_domains == prediction.MAX_DOMAINS
    assert 3.0 < at.copies < 4.0 and 0.5 < at.balance <= 1.0


def test_measured_points_stand_beside_the_predicted():
    gpus = row(2, 123.0, tokens=128, case="v3", num_gpus=2, impl="megamoe")
    rows = [gpus, {**gpus, "us": 9.0, "num_gpus": 0}, {**gpus, "us": 9.0, "impl": "unfused-fp8"}]
    rows.append({**rows[0], "us": 9.0, "weight_format": "mxfp4"})
    assert prediction.measured_us(rows, "v3", 2, 128) == 123.0
    assert prediction.measured_us(rows, "v3", 4, 128) is None
