"""What the benchmark keeps and shows beside times: NVLink bytes, suites, the README's other tables, its picture."""

import json
import re
import subprocess
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench, links, picture, replicas, replicas_report, report, scaling
from benchmarks.cases import load_cases, load_suites
from benchmarks.results import append_json
from benchmarks.table import nvlink_lines
from megamoe import layout
from tests.cpu.test_bench_numbers import _row, as_json

ROOT = Path(__file__).resolve().parents[2]
CASES = load_cases()
FLASH64 = CASES["flash64"]


# --- NVLink bytes -----------------------------------------------------------------------------------------------------


def test_bytes_of_a_routing_counted_by_hand():
    # rank 0: one token with 4 experts here and 2 on rank 1, one with unused slots only; rank 1: no tokens
    idx = [torch.tensor([[0, 1, 2, 3, 40, 41], [-1, -1, -1, -1, -1, -1]]), torch.zeros(0, 6, dtype=torch.int32)]
    head, row = 4 + 4 + 2 * 6 * 8, 4096 + 32 * 4 + 4  # num_tokens, a flag, ids and weights; e4m3, sf, a flag
    assert links.sent_bytes(FLASH64, idx) == [head + row, 8 + 2 * (2 * 4096 + 4)]
    assert links.mean_sent([[1, 4], [2, 8]]) == [2, 6] and links.sent_bytes(FLASH64, idx[:1]) == [0]


def test_the_regions_are_those_that_are_counted():
    """A region that peers write and that the count does not know would make it wrong."""
    assert {region.name for region in layout.REGIONS if region.where == "symmetric"} == {
        "abort", "head_ready", "head_num_tokens", "x_ready", "combine_ready", "head_idx", "head_weights", "recv_x",
        "recv_x_sf", "combine_y", "staging",
    }  # fmt: skip


def test_every_rank_of_many_sends_what_the_others_receive():
    case = CASES["tiny"]
    idx = [torch.randint(-1, 8, (70, 2), generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    sent = links.sent_bytes(case, idx)
    rows = slots = 0
    for rank, one in enumerate(idx):
        for token in one.tolist():
            owners = [expert // 2 for expert in token if expert >= 0]
            rows += len(set(owners) - {rank})
            slots += sum(owner != rank for owner in owners)
    heads = 4 * 3 * (4 + 5 * 4 + 70 * 2 * 8)  # of 70 tokens: num_tokens, a flag for each 16, ids and weights
    assert sum(sent) == heads + rows * (256 + 2 * 4 + 4) + slots * (2 * 256 + 4)


def test_a_counter_that_cannot_be_read_says_why_and_stops_nothing(monkeypatch):
    counter = links.Counter(torch.device("cuda", 0))
    assert counter.reason
    values = iter(range(0, 10**6, 20 * 1500))
    monkeypatch.setattr(counter, "read", lambda: next(values))

    class Alone:
        barrier = staticmethod(lambda: None)
        gather = staticmethod(lambda value: [value])

    calls = []
    assert links.count_calls(counter, [lambda: calls.append(0)], Alone) is None and not calls
    counter.reason = None
    assert links.count_calls(counter, [lambda: calls.append(0)], Alone) == [1500]
    assert len(calls) == links.COUNTED_CALLS


def test_the_screen_names_the_bytes_of_the_largest_call():
    rows = [_row(num_tokens=n, nvlink_sent=[n * 10**6, n * 2 * 10**6], nvlink_counted=[n * 10**6, n * 2 * 10**6],
                 bytes_nvlink=n * 1.5e6) for n in (8, 2)]  # fmt: skip
    (line,) = nvlink_lines([*rows, _row(impl="unfused-fp8", num_tokens=64)])
    assert "8 tokens: MB a call sent by rank 8.0 16.0, counted by the links 8.0 16.0" in line and "rank 12.0" in line


# --- suites -----------------------------------------------------------------------------------------------------------


class _Setup:
    def __init__(self, ep_size):
        self.ep_size, self.device = ep_size, torch.device("cuda", 0)


@pytest.mark.parametrize("refused, sent", [((), 5 << 10), ((0xFFFFFFFF,), 18 * 5 << 10), ((0xFFFFFFFF, 7), None)])
def test_links_are_read_together_or_one_by_one(refused, sent, monkeypatch):
    class Library:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: uuid)

        @staticmethod
        def nvmlDeviceGetFieldValues(handle, fields):
            return [SimpleNamespace(nvmlReturn=3 * (link in refused), value=SimpleNamespace(ullVal=5))
                    for field, link in fields if field == 138]  # fmt: skip

    monkeypatch.setitem(__import__("sys").modules, "pynvml", Library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    counter = links.Counter(torch.device("cuda", 0))
    assert (counter.reason is None) == (sent is not None) and (sent is None or counter.read() == sent)


@pytest.mark.parametrize("suite", sorted(load_suites()))
def test_every_set_is_a_plan_of_that_many_gpus(suite):
    args = bench.parser().parse_args(["--suite", suite])
    plans = bench.plans_of(args, _Setup(int(re.sub(r"\D", "", suite.split("-")[0]) or 2)))
    assert len(plans) == len(load_suites()[suite]) and all(plan.cases and plan.tokens for plan in plans)


def test_the_suites_hold_what_the_tables_need():
    sets = load_suites()
    bars = ",".join(map(str, FLASH64.bar_us))
    for options in sets["ep2"]:
        assert options["case"] == "flash64,v3_64,flash256" and options["tokens"] == bars
    more = sets["ep2-more"]
    assert {"bf16"} == {options["input"] for options in more if "input" in options}
    assert {"hot", "zipf"} <= {name for options in more for name in options.get("routing", "").split(",")}
    assert any(options.get("idle_ranks") for options in more) and any(o.get("capacity") == "cell" for o in more)
    assert any(o.get("protocol") == "graph" and o["tokens"] == "2048,8192" for o in more)
    published = set(map(str, CASES["flash256"].published_us))
    uniform = [options for options in sets["ep4"] if "routing" not in options]
    assert [options.get("weight_format", "fp8") for options in uniform] == ["fp8", "mxfp4"]
    assert all(published <= set(options["tokens"].split(",")) for options in uniform)


@pytest.mark.parametrize(
    "arguments, sets, named",
    [
        (["--suite", "nope"], None, "'nope' is not in suites.toml; choose from tiny"),
        (["--suite", "tiny", "--tokens", "3"], None, "--tokens is for the sets of --suite tiny"),
        (["--suite", "x"], {"x": [{"case": "tiny"}, {"token": "3"}]}, "x, set 2: 'token' is none of case, tokens"),
        (["--suite", "x"], {"x": [{"case": "tinny"}]}, "suites.toml, x, set 1: --case 'tinny'"),
    ],
)
def test_a_wrong_suite_is_named(arguments, sets, named, monkeypatch, capsys):
    if sets:
        monkeypatch.setattr(bench.case_list, "load_suites", lambda: sets)
    assert bench.main(["--device", "cpu", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_suite_runs_all_its_sets_and_baselines_where_they_are_wanted(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert bench.main(["--suite", "tiny", "--virtual-ranks", "2", "--device", "cpu", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    names = "num_tokens", "routing", "weight_format", "own_capacity"
    assert [(row["impl"].split("-")[0], *(row[name] for name in names)) for row in rows] == [
        ("megamoe", 1, "uniform", "fp8", False), ("megamoe", 5, "uniform", "fp8", False),
        ("unfused", 5, "uniform", "fp8", False), ("megamoe", 3, "zipf", "mxfp4", True),
        ("megamoe", 3, "hot", "mxfp4", True),
    ]  # fmt: skip
    assert rows[-1]["tokens_per_rank"] == [3, 0]
    assert "\nseconds: " in (text := capsys.readouterr().out) and "experts in MXFP4" in text


@pytest.mark.parametrize("name", ["ep2", "ep4", "ep8", "tiny"])
def test_the_commands_of_tables_sh_are_ones_their_programs_take(name):
    done = subprocess.run([ROOT / "launch/tables.sh", name, "--print", "--results", "/x y", "--commit", "abc"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    seconds, known = 0, {"bench.py": bench, "scaling.py": scaling, "replicas.py": replicas}
    for line in done.stdout.splitlines():
        limit, command = re.fullmatch(r"\[tables\] (\d+) s: (.*)", line).groups()
        seconds += int(limit)
        words = command.replace("/x y", "/x_y").split()
        if words[0] == "launch/scale.sh":
            words[2:2] = ["benchmarks/scaling.py"]
        if words[0] == "python3":
            continue
        assert (ROOT / words[0]).is_file() and (name == "tiny" or words[1] == name[2:])
        given = known[Path(words[2]).name].parser().parse_args(words[3:])
        assert given.commit == "abc" and str(given.results).startswith("/x_y")
        assert getattr(given, "suite", None) in (None, *load_suites())
    assert seconds <= {"ep4": 300, "tiny": 200}.get(name, 800)


# --- README -----------------------------------------------------------------------------------------------------------


def _ep4(**changes):
    values = {"case": "flash256", "num_experts": 256, "num_tokens": 512, "tokens_per_rank": [512] * 4, "ep_size": 4,
              "num_gpus": 4, "capacity": 8192, "own_capacity": False, "us": 600.0, "nvlink_sent": [3 * 10**6] * 4,
              "nvlink_counted": None, "bytes_nvlink": 2e6, "symmetric_bytes": 519 << 20}  # fmt: skip
    return as_json(_row(**(values | changes)))


def test_four_gpus_have_a_section_after_two_with_what_others_published():
    two = as_json(_row(capacity=8192))
    text = report.render([_ep4(), two, _ep4(num_tokens=64, us=400.0)], CASES)
    first, second = re.findall(r"### .*", text)
    assert "2 x" in first and second.endswith("EP4")
    assert "| us per call, tokens per rank: | 64 | 512 |" in text
    assert "| 8 x H100, published (DeepGEMM pull request 440, one fused FP8 kernel, device time) | 352 | 431 |" in text
    assert "kernel / counted | 2 / 3 / - | 2 / 3 / - |" in text and "capacity 8192, 519 MiB symmetric a GPU\n" in text
    for other in (two, _ep4(device="NVIDIA H200"), _ep4(routing="zipf")):
        assert "published" not in report.render([other], CASES)


def test_what_is_not_the_main_table_unfolds():
    other = {"capacity": 8192, "routing": "zipf"}, {"own_capacity": True}
    rows = [as_json(_row(**changes)) for changes in ({"capacity": 8192}, *other)]
    main, *folded = report.render(rows, CASES).split("<details>")
    assert "**flash64** (4096/2048/64/6), uniform routing, workspace capacity 8192" in main
    assert [re.search(r"routing, (.*)</summary>", part)[1] for part in folded] == [
        "workspace capacity 8192", "workspace capacity as the tokens",
    ]  # fmt: skip


def test_a_section_of_several_tables_begins_with_their_times():
    changes = {"num_tokens": 8, "tokens_per_rank": [8] * 2, "capacity": 8192, "us": 122.0}
    rows = [as_json(_row(**changes)), as_json(_row(**changes, weight_format="mxfp4"))]
    overview, *folded = report.render(rows, CASES).split("<details>")
    assert "| flash64, FP8 | 122 (0.50) |\n| flash64, MXFP4 | 122 (0.50) |" in overview and len(folded) == 2


def test_a_line_shows_one_state_of_the_tree_and_the_certificate_says_which():
    clean, dirty = {"commit": "b" * 40, "date": "2026-11-23T00:00:00Z"}, {"commit": "b" * 40, "dirty": True}
    rows = [_row(us=250.0, **clean), _row(us=900.0, **dirty), _row(us=245.0, **clean)]
    text = report.render([as_json(row) for row in [*rows, _row(impl="unfused-fp8", us=480.0)]], CASES)
    assert "| 248 (245-250) |" in text and "900" not in text
    assert "aaaaaaaaaaaa (unfused-fp8, prequantized in), bbbbbbbbbbbb (megamoe, prequantized in)" in text


def test_all_cells_of_two_gpus_against_bar_and_goal():
    rows = [_row(num_tokens=n, tokens_per_rank=[n] * 2, capacity=8192, us=us) for n, us in ((1, 68.0), (8, 244 * 1.03))]
    text = report.render([as_json(row) for row in rows], CASES)
    mean = (68 / 87 * 1.03) ** 0.5
    assert f"all 2 cells, megamoe / sgl-deep-gemm 0.2.5: geometric mean {mean:.3f}, 0.782 at 1 token;" in text
    assert "at most 1.02 in 1; at the goal in 1." in text
    h200 = report.render([as_json(_row(device="NVIDIA H200", capacity=8192))], CASES)
    assert "| sgl-deep-gemm 0.2.5, recorded | 178 |" in h200 and "goal" not in h200


def test_the_older_rival_in_the_run_checks_the_machine():
    rows = [_row(capacity=8192), _row(capacity=8192, impl="sgl-deep-gemm 0.1.5.post1", us=256 * 1.01)]
    text = report.render([as_json(row) for row in rows], CASES)
    assert "day: sgl-deep-gemm 0.1.5 in the run / recorded 1.010, 1.010 to 1.010 over 1 cells." in text


def _readme(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("\n".join((report.BEGIN, report.END, *report.REPLICAS)) + "\n")
    return readme, ["--readme", str(readme), "--results", str(results)], results


def test_the_picture_is_shown_while_it_is_of_these_results(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="not run: matplotlib is missing")
    readme, options, results = _readme(tmp_path)
    append_json(_ep4(), results)
    append_json(_ep4(num_tokens=8, us=300.0), results)
    assert report.main(options) == 0 and "![time over tokens](results/times.png)" in readme.read_text()
    assert report.main([*options, "--check"]) == 0
    before = (results / "times.png").read_bytes()
    append_json(_ep4(us=610.0), results)
    assert report.main([*options, "--check"]) == 1 and (results / "times.png").read_bytes() == before
    assert report.main(options) == 0 and (results / "times.png").read_bytes() != before
    (results / "times.png").unlink()
    assert report.main([*options, "--check"]) == 1


def test_without_matplotlib_there_is_no_picture_and_no_link(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    readme, options, results = _readme(tmp_path)
    append_json(_ep4(), results)
    assert report.main(options) == 0 and "times.png" not in readme.read_text()
    assert "matplotlib is not installed" in capsys.readouterr().out and report.main([*options, "--check"]) == 0


def test_panels_hold_main_lines_of_several_gpus_with_floor_and_spread():
    rows = [_ep4(us=us, run=f"r{us}") for us in (600.0, 640.0, 610.0)]
    rows += [_ep4(routing="zipf"), _ep4(impl="unfused-fp8"), as_json(_row(num_gpus=1, virtual_ranks=2)),
             _ep4(weight_format="mxfp4", us=400.0)]  # fmt: skip
    panels = report.panels_of(rows, CASES)
    assert list(panels) == ["flash256"]
    lines = panels["flash256"]
    assert lines["H100 EP4, FP8"]["points"] == [[512, 610.0, 600.0, 640.0]] and "H100 EP4, MXFP4" in lines
    assert lines["H100 EP4, FP8, floor"]["points"][0][1] == 213.0
    assert [512, 431.0, 431.0, 431.0] in lines["8 x H100, published"]["points"]
    assert picture.digest_of(panels) == picture.digest_of(report.panels_of(rows[::-1], CASES))


def test_replicas_have_their_table(tmp_path):
    results = tmp_path / "replicas"
    options = ["--case", "tiny", "--tokens", "3", "--redundant", "4", "--virtual-ranks", "2", "--device", "cpu"]
    assert replicas.main([*options, "--results", str(results), "--commit", "abc"]) == 0
    (row,) = (json.loads(line) for file in results.glob("*.jsonl") for line in file.read_text().splitlines())
    assert row["commit"] == "abc" and row["bits_differ"] == []
    rows = [row, {**row, "tokens": 8, "none": 700.0}, {**row, "tokens": 8, "none": 900.0},
            {**row, "commit": "old", "date": "2020-01-01T00:00:00Z", "tokens": 8, "none": 1.0}]  # fmt: skip
    text = replicas_report.markdown(rows)
    assert "**tiny, FP8 experts, zipf routing, 4 redundant experts**, EP2 (virtual)" in text
    assert re.search(r"\| no room for plans \| [\d.e+]+ \| 800 \|", text) and "Commit abc;" in text
    readme, options, _ = _readme(tmp_path)
    assert report.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    assert "| plan, balanced by counts |" in readme.read_text()


def test_the_notes_of_what_is_published_are_whole():
    case = CASES["flash256"]
    assert case.published_us == {64: 352, 128: 362, 256: 381, 512: 431, 1024: 482, 2048: 764, 4096: 1376}
    for name, group in groupby(CASES.values(), key=lambda case: bool(case.bar_h200_us)):
        assert all(set(case.bar_h200_us) == set(case.bar_us) for case in group), name
