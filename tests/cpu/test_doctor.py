"""python -m megamoe: the doctor's judgement, made to fail in each way that a machine can, and the other verbs."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

import megamoe.__main__ as cli
from megamoe import EPConfig, MoEConfig, builds, doctor, plan_memory, verbs
from megamoe.doctor import Row


def state_of(rows, name) -> str:
    (row,) = [row for row in rows if row.name == name]
    return row.state


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    """torch.cuda as on a machine with two H100s without a path between them."""

    class Properties:
        name, major, minor, multi_processor_count, total_memory = "NVIDIA H100", 9, 0, 132, 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (Properties.major, Properties.minor))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: False)
    return Properties


def test_a_cpu_machine_is_healthy(no_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    status = doctor.main(["--json", "--no-compile"])
    report = json.loads(capsys.readouterr().out)
    wrong = [row for row in report["rows"] if row["state"] == "wrong"]
    assert status == 0 and report["ok"] and not wrong
    by_name = {row["name"]: row for row in report["rows"]}
    assert by_name["devices"]["state"] == "none" and by_name["devices"]["value"].startswith("not run: no GPU")
    assert by_name["two ranks in one process"]["state"] == "ok"
    assert torch.__version__ in by_name["torch"]["value"]
    sections = {row["section"] for row in report["rows"]}
    assert sections >= {"versions", "GPU", "symmetric memory", "cache", "launcher", "host compiler", "package"}


def test_the_command_exits_non_zero_and_names_the_remedy(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    ran = subprocess.run([sys.executable, "-m", "megamoe", "doctor", "--no-compile"], capture_output=True, text=True,
                         env={**os.environ, "MEGAMOE_CACHE_DIR": str(blocked / "below")})
    assert ran.returncode == 1, ran.stderr
    lines = ran.stdout.splitlines()
    (crossed,) = [number for number, line in enumerate(lines) if line.strip().startswith("✗")]
    assert "kernels" in lines[crossed]
    assert lines[crossed + 1].strip() == "remedy: set MEGAMOE_CACHE_DIR to a folder you can write"
    assert lines[-1] == "1 wrong"


OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize("env, state, words", [
    ({}, "ok", "rank 0 of 1"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "ok", "rank 1 of 2"),
    (OPENMPI, "ok", "rank 3 of 4"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "wrong", "RANK=2"),
    ({"RANK": "0"}, "wrong", "WORLD_SIZE"),
])
def test_launcher_variables_as_ranks_reads_them(env, state, words, monkeypatch):
    for name in list(os.environ):
        if name in doctor.LAUNCHER_NAMES or name.startswith(doctor.LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    rows = list(doctor.launcher_rows())
    assert rows[0].state == state and words in rows[0].value
    assert bool(rows[0].remedy) == (state == "wrong")
    shown = [row.value for row in rows if row.name == "variables"]
    assert shown == ([" ".join(f"{name}={value}" for name, value in sorted(env.items()))] if env else [])


def test_gpus_without_a_path_between_them_are_wrong(two_gpus):
    rows = list(doctor.gpu_rows())
    assert state_of(rows, "cuda:0") == state_of(rows, "cuda:1") == "ok"
    assert state_of(rows, "peer access, page copied") == "wrong"
    assert "0->1 no access" in rows[-1].value and "nvidia-smi" in rows[-1].remedy


def test_a_peer_that_changes_a_page_is_wrong(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: True)
    monkeypatch.setattr(doctor, "_page_crosses", lambda i, j: (i, j) != (1, 0))
    row = list(doctor.gpu_rows())[-1]
    assert row.state == "wrong" and row.value == "1->0 changed a page"
    monkeypatch.setattr(doctor, "_page_crosses", lambda i, j: True)
    row = list(doctor.gpu_rows())[-1]
    assert row.state == "ok" and row.value == "0: self yes; 1: yes self"


def test_a_gpu_of_another_kind_is_wrong_unless_a_hopper_one_is_there(two_gpus, monkeypatch):
    two_gpus.major = 8
    assert state_of(doctor.gpu_rows(), "cuda:0") == "wrong"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0) if i else (8, 0))
    assert [row.state for row in doctor.gpu_rows()][:2] == ["none", "ok"]


def test_what_gpus_need_is_wrong_when_missing(two_gpus, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda *names: None)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9), raising=False)
    missing = {row.name: row for row in doctor.version_rows() if row.state == "wrong"}
    assert {"cuda-bindings", "cuda-core", "nvshmem4py", "NVSHMEM host library"} <= missing.keys()
    assert all(row.remedy for row in missing.values())


def test_an_old_torch_is_wrong(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert state_of(doctor.version_rows(), "torch") == "wrong"


def test_a_section_that_breaks_is_reported(monkeypatch):
    def cache_rows():
        raise OSError("the disk is gone")
        yield

    monkeypatch.setattr(doctor, "SECTIONS", (cache_rows, doctor.package_rows))
    rows = doctor.examine(compile_kernels=False)
    assert rows[0].state == "wrong" and "the disk is gone" in rows[0].value and rows[0].remedy
    assert [row.section for row in rows[1:]] == ["package", "package"]


def test_a_library_that_is_mapped_twice_is_found(tmp_path, monkeypatch):
    maps = "".join(f"7f00-7f01 r-xp 0 08:01 1 {tmp_path}/{place}/libnccl.so.2\n" for place in "aab")
    monkeypatch.setattr(doctor.Path, "read_text", lambda self: maps)
    assert doctor.loaded_copies("libnccl.so") == [f"{tmp_path}/{place}/libnccl.so.2" for place in "ab"]


def test_kernels_are_all_built_and_a_bad_one_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    pytest.importorskip("cuda.bindings.nvrtc", reason="not run: cuda-bindings is not installed")
    sources = {"mega_moe.cu": 'extern "C" __global__ void mega_moe(float* p) { *p = BLOCK_TOKENS; }'}
    monkeypatch.setattr("megamoe_cuda.compile.read_sources", lambda: sources)
    reports = list(verbs.build_reports())
    assert [report.name for report in reports] == [build.name for build in builds.kernel_builds()]
    assert not any(report.problem for report in reports) and all(report.registers > 0 for report in reports)
    assert verbs.compile_main([]) == 0
    for options in (["--plans"], ["--extras"], ["--extras", "--plans"]):
        capsys.readouterr()
        assert verbs.compile_main(["--json", *options]) == 0
        names = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
        chosen = builds.kernel_builds(extras="--extras" in options, plans="--plans" in options)
        assert names == [build.name for build in chosen]

    sources["mega_moe.cu"] = sources["mega_moe.cu"].replace("*p", "*q")
    assert all("does not compile" in report.problem for report in verbs.build_reports())
    capsys.readouterr()
    assert verbs.compile_main(["--json"]) == 1
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == [r.name for r in reports]
    assert {row.state for row in doctor.kernel_rows()} == {"wrong"}

    # 64 live values in the 32 registers that two blocks of 1024 threads leave.
    sources["mega_moe.cu"] = """extern "C" __global__ void __launch_bounds__(1024, 2) mega_moe(float* p) {
        float a[64];
        #pragma unroll
        for (int i = 0; i < 64; ++i) a[i] = p[i * 1024 + threadIdx.x];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = a[i] * a[63 - i]; }"""
    assert all(report.problem == f"{report.spilled_bytes} B spilled" for report in verbs.build_reports())


@pytest.mark.parametrize(("option", "value", "text"), [
    ("--hidden", "100", "hidden=100 must be a multiple of 128"),
    ("--num-experts", "7", "num_experts=7 cannot be spread evenly over ep_size=2"),
    ("--ep-size", "99", "nearest ep_size 64"),
    ("--ep-size", "64", "ep_size=64 is above the kernel's limit"),
    ("--tokens", "0", "num_max_tokens_per_rank=0 must be at least 1"),
    ("--num-max-tokens-per-rank", "999999999", "num_max_tokens_per_rank=999999999 is above the kernel's limit"),
])  # fmt: skip
def test_layout_of_sizes_that_cannot_run_is_refused(option, value, text, capsys):
    assert verbs.layout_main([option, value]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("layout: ") and text in said.err and not said.out


def test_layout_takes_the_short_and_the_long_names(capsys):
    assert verbs.layout_main(["--json", "--experts", "32", "--tokens", "64"]) == 0
    short = capsys.readouterr().out
    assert verbs.layout_main(["--json", "--num-experts", "32", "--num-max-tokens-per-rank", "64"]) == 0
    assert capsys.readouterr().out == short != ""


def test_render_puts_the_remedy_on_the_next_line():
    text = doctor.render([Row("a", "x", "ok", "1"), Row("a", "y", "wrong", "2", "do z"), Row("b", "w", "none", "3")])
    assert [line.split()[0] for line in text.splitlines() if line] == ["a", "✓", "✗", "remedy:", "b", "–", "1"]


def test_usage_names_every_verb_and_unknown_ones_are_refused(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)
    assert cli.main(["bench"]) == 2
    assert "./launch/do bench" in capsys.readouterr().err


def test_layout_adds_up(capsys):
    assert cli.main(["layout", "--json", "--ep-size", "4"]) == 0
    regions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for where in ("symmetric", "local"):
        here = [region for region in regions if region["where"] == where]
        assert here and all(a["offset"] + a["bytes"] <= b["offset"] for a, b in pairwise(here))
    assert cli.main(["layout"]) == 0 and regions[0]["name"] in capsys.readouterr().out


def test_layout_is_that_of_the_weight_format(capsys):
    config, local = {"hidden": 4096, "intermediate": 2048, "num_experts": 64, "topk": 6}, {}
    for name in ("fp8", "mxfp4"):
        assert cli.main(["layout", "--json", "--weight-format", name, "--hidden", "4096", "--experts", "64",
                         "--topk", "6", "--tokens", "8192"]) == 0  # fmt: skip
        regions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        local[name] = sum(region["bytes"] for region in regions if region["where"] == "local")
        wanted = plan_memory(MoEConfig(**config, weight_format=name), EPConfig(8192), 2).local_bytes
        assert 0 <= wanted - local[name] < 1024 * len(regions)  # which counts alignment too
    assert local["mxfp4"] > 2 * local["fp8"]


@pytest.mark.parametrize("arguments", [["layout"], ["plan", "--generate", "zipf", "--experts", "64", "--layers", "16"]])
def test_a_reader_that_leaves_is_no_traceback(arguments):
    command = [sys.executable, "-u", "-m", "megamoe", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1 and not said
