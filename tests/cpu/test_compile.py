"""NVRTC on a machine without GPU: cubins, ptxas's report, cache keys, the command line."""

import errno
import subprocess
import sys
import threading

import pytest

from megamoe.builds import kernel_build
from megamoe_cuda import compile as compile_module
from megamoe_cuda import compile_apart, errors
from megamoe_cuda.__main__ import main
from megamoe_cuda.cache import Cache
from megamoe_cuda.compile import CompiledKernel, cache_key, compile_kernel, parse_log, read_sources

WGMMA = """
#pragma once
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_finish() {
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ __forceinline__ void wgmma_64x8x32(float (&d)[4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, 1, 1, 1;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
}
"""
KERNEL = """
#include "ptx/wgmma.cuh"
struct Params { float* y; unsigned long long a, b; };
extern "C" __global__ void __launch_bounds__(128) product(const __grid_constant__ Params params) {
    __shared__ int turn[STAGES];
    if (threadIdx.x < STAGES) turn[threadIdx.x] = threadIdx.x;
    __syncthreads();
    float d[4] = {0, 0, 0, 0};
    wgmma_fence();
    for (int k = 0; k < STAGES; ++k) { wgmma_64x8x32(d, params.a + 2 * k, params.b + 2 * k); BETWEEN }
    wgmma_finish();
    for (int i = 0; i < 4; ++i) params.y[threadIdx.x * 4 + i] = d[i] + turn[threadIdx.x % STAGES];
}
"""
SOURCES = {"product.cu": KERNEL, "ptx/wgmma.cuh": WGMMA}
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* y) {
    float x[40];
    #pragma unroll
    for (int i = 0; i < 40; ++i) x[i] = y[threadIdx.x + i * 1024];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 40; ++i) y[threadIdx.x + i * 1024] = x[i] * x[(i * 7 + 3) % 40] + x[39 - i];
}
"""
IGNORED = """
extern "C" __global__ void ignored(float* y) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    y[threadIdx.x] = 1.0f;
}
"""


@pytest.fixture(autouse=True)
def _needs_nvrtc_and_starts_empty(monkeypatch):
    try:
        errors.nvrtc()
    except errors.MissingLibraryError as error:
        pytest.skip(f"not run: {error}")
    monkeypatch.setattr(compile_module, "_memory", {})
    monkeypatch.delenv("MEGAMOE_DEBUG", raising=False)


def product(cache_dir, **defines) -> CompiledKernel:
    return compile_kernel("product.cu", "product", {"STAGES": 4, "BETWEEN": "", **defines}, sources=SOURCES,
                          cache_dir=cache_dir)


def compile_count(monkeypatch) -> list:
    calls, real = [], compile_module.compile_apart
    monkeypatch.setattr(compile_module, "compile_apart", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


def test_wgmma_kernel_becomes_an_elf_with_known_resources(tmp_path):
    kernel = product(tmp_path)
    assert kernel.cubin.startswith(b"\x7fELF") and b"product" in kernel.cubin
    need = kernel.resources
    assert 16 < need.registers <= 128 and need.smem_static == 16
    assert (need.spill_stores, need.spill_loads, need.stack, need.warnings) == (0, 0, 0, ())
    assert not kernel.from_cache and kernel.path.is_file()


def test_serialised_wgmma_is_reported(tmp_path):
    kernel = product(tmp_path, BETWEEN="d[0] += 1.0f;")
    assert any("serialized" in line for line in kernel.resources.losses)
    assert kernel.resources.codes


def test_ignored_setmaxnreg_is_reported(tmp_path):
    kernel = compile_kernel("a.cu", "ignored", sources={"a.cu": IGNORED}, cache_dir=tmp_path)
    assert kernel.resources.codes == ("C7508",) and len(kernel.resources.losses) == 1


def test_spills_are_counted(tmp_path):
    need = compile_kernel("a.cu", "spills", sources={"a.cu": SPILLS}, cache_dir=tmp_path).resources
    assert need.spill_stores > 0 and need.spill_loads > 0 and need.stack > 0 and need.registers == 32


def test_defines_reach_the_source_and_the_key(tmp_path):
    four, eight = product(tmp_path), product(tmp_path, STAGES=8)
    assert eight.resources.smem_static == 2 * four.resources.smem_static
    assert four.key != eight.key
    assert product(tmp_path, STAGES="4").key == four.key


def test_headers_are_found_by_their_name_under_csrc_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "intruder.cuh").write_text("#define FROM_THE_WORKING_DIRECTORY")
    with pytest.raises(errors.CompileError, match=r"intruder\.cuh"):
        compile_kernel("a.cu", "a", sources={"a.cu": '#include "intruder.cuh"\n'}, cache_dir=tmp_path)


def test_compile_error_carries_the_log(tmp_path):
    with pytest.raises(errors.CompileError, match=r"a\.cu\(2\): error: .*") as caught:
        compile_kernel("a.cu", "a", sources={"a.cu": "\nnonsense"}, cache_dir=tmp_path)
    assert caught.value.source_name == "a.cu" and "nonsense" in caught.value.log
    assert not list(tmp_path.rglob("*.kernel"))


@pytest.mark.parametrize(("arguments", "said"), [
    ({"source_name": "b.cu"}, r"source_name='b\.cu' .*a\.cu"),
    ({"entry": "b"}, r"entry='b' .*\(it has: spills\)"),
    ({"defines": {"A B": 1}}, "define 'A B' is not a C identifier"),
])
def test_wrong_arguments_are_named(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        compile_kernel(**{"source_name": "a.cu", "entry": "spills", "sources": {"a.cu": SPILLS}, "cache_dir": tmp_path,
                          **arguments})
    with pytest.raises(TypeError, match=r"define A=1\.5 must be int, bool or str, not float"):
        compile_kernel("a.cu", "spills", {"A": 1.5}, sources={"a.cu": SPILLS}, cache_dir=tmp_path)


def test_unknown_architecture_names_the_call(tmp_path):
    with pytest.raises(errors.CudaCallError, match=r"nvrtcCompileProgram .* NVRTC_ERROR_INVALID_OPTION") as caught:
        compile_kernel("a.cu", "spills", arch="sm_9", sources={"a.cu": SPILLS}, cache_dir=tmp_path)
    assert caught.value.hint


def test_second_compilation_comes_from_memory_then_from_disk(tmp_path, monkeypatch):
    calls = compile_count(monkeypatch)
    first, second = product(tmp_path), product(tmp_path)
    monkeypatch.setattr(compile_module, "_memory", {})
    third = product(tmp_path)
    assert len(calls) == 1
    assert (first.from_cache, second.from_cache, third.from_cache) == (False, True, True)
    assert first.cubin == second.cubin == third.cubin and first.resources == third.resources and first.log == third.log


def test_nvrtc_may_not_answer_from_a_cache_of_its_own(tmp_path, monkeypatch):
    """From there a cubin comes without ptxas's report (seen on a GPU: tests/gpu/test_bindings.py)."""
    seen, real = [], compile_module.compile_apart
    monkeypatch.setattr(compile_module, "compile_apart", lambda *args: seen.append(args[2]) or real(*args))
    assert product(tmp_path).resources.registers and "--no-cache" in seen[0]


STICKY = ("-Xnvvm", "-Xopt", "-Xnvvm", "-alias-set-saturation-threshold=0")  # as cuDNN gives them to NVRTC
OTHER = """
extern "C" __global__ void other(float* y, int n) { for (int i = threadIdx.x; i < n; i += 32) y[i] = expf(y[i]); }
"""


def test_what_else_compiles_in_the_process_changes_no_kernel(tmp_path):
    """NVRTC keeps options of its back end: the same compilation behind another's gives another cubin, with spills."""
    build = kernel_build(8)
    alone = compile_kernel(build.source, build.entry, build.defines, cache_dir=tmp_path / "alone")
    options = ("--gpu-architecture=sm_90a", "--std=c++20", "--ptxas-options=-v", "--no-source-include", "--no-cache",
               "-DBLOCK_TOKENS=8")  # fmt: skip
    code = f"""
from megamoe_cuda.compile import compile_kernel, read_sources
from megamoe_cuda.compile_apart import _compile
_compile("other.cu", {{"other.cu": {OTHER!r}}}, ["--gpu-architecture=sm_90a", *{STICKY!r}])
behind = compile_kernel({build.source!r}, {build.entry!r}, {build.defines!r}, cache_dir={str(tmp_path / "behind")!r})
print(behind.key, behind.cubin == _compile({build.source!r}, read_sources(), {options!r})[0])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == [alone.key, "False"], ran.stdout + ran.stderr
    _, kept = Cache(tmp_path / "behind").load(alone.key)
    assert kept == alone.cubin


DIES_WRITING = """
import json, os, sys
asked = json.load(sys.stdin.buffer)
header = json.dumps({"error": None, "log": "", "cubin_bytes": 4000})
sys.stdout.write(asked["token"] + HEADER)
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("script", "said"), [
    ("import os; os.kill(os.getpid(), 9)", "its compiler's process ended with -9"),
    ("import sys; sys.exit('noise\\n' * 90 + 'no room')", "(?s)its compiler's process ended with 1:.*no room"),
    ("import time; time.sleep(60)", r"its compiler's process did not end within 0\.5 s"),
    (DIES_WRITING.replace("HEADER", "header[:9]"), "its compiler's process ended with -9"),
    (DIES_WRITING.replace("HEADER", "header + '\\n' + 'E' * 100"), "its compiler's process ended with -9"),
])
def test_a_compiler_that_does_not_answer_is_an_error(tmp_path, monkeypatch, script, said):
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(compile_apart, "__file__", str(tmp_path / "script.py"))
    monkeypatch.setattr(compile_apart, "DEADLINE_S", 0.5 if "sleep" in script else 60.0)
    with pytest.raises(errors.CompileError, match=said):
        product(tmp_path)
    assert not list(tmp_path.rglob("*.kernel"))


@pytest.mark.parametrize("interpreter", [None, "/nonexistent/python"])
def test_an_embedded_interpreter_is_told_the_remedy(tmp_path, monkeypatch, interpreter):
    monkeypatch.setattr("multiprocessing.spawn._python_exe", interpreter)
    with pytest.raises(errors.CompileError, match=r"(?s)no process for its compiler: .*set_executable\("):
        product(tmp_path)


def test_no_room_for_a_process_asks_for_no_other_interpreter(tmp_path, monkeypatch):
    def run(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(compile_apart.subprocess, "run", run)
    with pytest.raises(errors.CompileError, match="no process for its compiler: .*temporarily") as caught:
        product(tmp_path)
    assert "set_executable" not in str(caught.value)


def test_an_interpreter_that_is_this_program_again_ends_at_once(tmp_path, monkeypatch):
    program = tmp_path / "program"
    code = "from megamoe_cuda.compile import compile_kernel as c; c('a.cu', 'a', sources={'a.cu': ''}, cache_dir='c')"
    program.write_text(f"#!/bin/sh\necho started >> '{tmp_path}/starts'\nexec {sys.executable} -c \"{code}\"\n")
    program.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("multiprocessing.spawn._python_exe", str(program))
    with pytest.raises(errors.CompileError, match=r"(?s)runs this program again .*set_executable\("):
        product(tmp_path)
    assert (tmp_path / "starts").read_text() == "started\n"


def test_an_interpreter_of_another_version_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_apart.sys, "version_info", (3, 99, 0))
    with pytest.raises(errors.CompileError, match=r"(?s)is Python 3\.1\d, this process 3\.99.*set_executable\("):
        product(tmp_path)


def test_a_package_in_the_working_directory_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "megamoe_cuda").mkdir()
    (tmp_path / "megamoe_cuda" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)
    assert product(tmp_path / "cache").cubin
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert product(tmp_path / "cache", STAGES=2).cubin


def test_words_around_the_answer_do_no_harm(tmp_path, monkeypatch):
    script = f"""
import runpy
print("hello", flush=True)
runpy.run_path({compile_apart.__file__!r}, run_name="__main__")
print("good-bye")
"""
    (tmp_path / "script.py").write_text(script)
    cubin = product(tmp_path / "plain").cubin
    monkeypatch.setattr(compile_module, "_memory", {})
    monkeypatch.setattr(compile_apart, "__file__", str(tmp_path / "script.py"))
    assert product(tmp_path / "around").cubin == cubin


def test_key_depends_on_every_input(monkeypatch):
    def key(source_name="a.cu", entry="a", flags=("-DA=1",), sources=None):
        return cache_key(source_name, entry, flags, sources or {"a.cu": "x", "b.cuh": "y"})

    keys = [key(), key(source_name="b.cuh"), key(entry="b"), key(flags=("-DA=2",)), key(flags=("-DA=1", "-DB=1")),
            key(sources={"a.cu": "x", "b.cuh": "z"}), key(sources={"a.cu": "x", "c.cuh": "y"}),
            key(sources={"a.cu": "xb.cuh", "": "y"})]
    monkeypatch.setattr(compile_module, "nvrtc_identity", lambda: "13.9")
    assert len({*keys, key()}) == len(keys) + 1


def test_threads_compile_side_by_side(tmp_path):
    made = {}
    threads = [threading.Thread(target=lambda stages=stages: made.update({stages: product(tmp_path, STAGES=stages)}))
               for stages in (2, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {stages: kernel.resources.smem_static for stages, kernel in made.items()} == {2: 8, 4: 16, 8: 32}


def test_log_of_two_entries_is_read_for_the_right_one():
    log = "\n".join(
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        f"ptxas         .     {n} bytes stack frame, {n + 1} bytes spill stores, {n + 2} bytes spill loads\n"
        f"ptxas info    : Used {n + 3} registers, used 1 barriers{smem}" for name, n, smem in
        (("one", 0, ""), ("two", 100, ", 64 bytes smem, 400 bytes cmem[0]")))
    one, two = parse_log(log, "one"), parse_log(log, "two")
    assert (one.stack, one.spill_stores, one.spill_loads, one.registers, one.smem_static) == (0, 1, 2, 3, 0)
    assert (two.stack, two.spill_stores, two.spill_loads, two.registers, two.smem_static) == (100, 101, 102, 103, 64)
    with pytest.raises(ValueError, match="cannot read registers from ptxas's report"):
        parse_log(log.replace("Used", "Takes"), "one")


def test_shipped_sources_are_named_relative_to_csrc():
    names = read_sources()
    assert all(not name.startswith("/") and "\\" not in name for name in names)
    assert any(name.endswith(".cu") for name in names)


def test_debug_level_prints_and_refuses_nonsense(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MEGAMOE_DEBUG", "1")
    product(tmp_path)
    assert "product.cu: compiled in" in capfd.readouterr().err
    monkeypatch.setenv("MEGAMOE_DEBUG", "loud")
    with pytest.raises(ValueError, match="MEGAMOE_DEBUG='loud' must be 0, 1, 2 or 3"):
        product(tmp_path, STAGES=2)


def test_command_line(tmp_path, monkeypatch, capsys):
    for name, text in (("ignored.cu", IGNORED), ("spills.cu", SPILLS)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compile_module, "source_root", lambda: tmp_path)
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["ignored.cu", "--cubin-out", str(tmp_path / "cubin")]) == 0
    assert (tmp_path / "cubin").read_bytes().startswith(b"\x7fELF")
    assert "remarks: C7508" in capsys.readouterr().out
    assert main(["ignored.cu", "--strict"]) == main(["spills.cu", "--strict", "--no-cache"]) == 2
    assert main(["ignored.cu", "--entry", "other"]) == 1
    assert "entry='other'" in capsys.readouterr().err


def test_importing_loads_no_cuda_library():
    code = ("import sys; from megamoe_cuda import cache, compile, device, errors, launch; "
            "sys.exit(any(name.startswith(('torch', 'cuda', 'nvshmem')) for name in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
