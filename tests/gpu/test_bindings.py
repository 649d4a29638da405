"""The binding on real devices: launches, capture, status words read while a kernel runs, arenas of one and two GPUs."""

import ctypes
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megamoe_cuda.compile import compile_kernel
from megamoe_cuda.device import device_info, num_devices, peer_access
from megamoe_cuda.errors import CudaCallError
from megamoe_cuda.launch import LoadedKernel, read_symbol_u32
from megamoe_cuda.symmetric import ALIGN, HostStatus, NvshmemMemory, OneGpuMemory

SOURCE = """
struct alignas(64) Params { unsigned long long y, status; unsigned value, wait; };
extern "C" __global__ void __launch_bounds__(128) probe(const __grid_constant__ Params p) {
    extern __shared__ unsigned scratch[];
    scratch[threadIdx.x] = p.value + blockIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        reinterpret_cast<unsigned*>(p.y)[blockIdx.x] = scratch[0];
        if (p.status && blockIdx.x == 0) {
            asm volatile("st.release.sys.global.u32 [%0], %1;" :: "l"(p.status), "r"(p.value) : "memory");
            unsigned go = p.wait ? 0 : 1;
            for (long long i = 0; !go && i < 20000000ll; ++i)
                asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(go) : "l"(p.status + 4) : "memory");
        }
    }
}
"""


class Params(ctypes.Structure):
    _fields_ = (
        ("y", ctypes.c_uint64),
        ("status", ctypes.c_uint64),
        ("value", ctypes.c_uint32),
        ("wait", ctypes.c_uint32),
        ("pad", ctypes.c_uint8 * 40),
    )


@pytest.fixture(scope="module")
def probe():
    torch.zeros(1, device="cuda")  # makes the context current for the driver calls below
    torch.cuda.synchronize()
    compiled = compile_kernel("probe.cu", "probe", sources={"probe.cu": SOURCE})
    kernel = LoadedKernel(compiled.cubin, "probe", smem_bytes=200_000)
    yield kernel
    torch.cuda.synchronize()
    kernel.close()


def test_a_second_process_that_compiles_the_same_gets_ptxas_report_too(tmp_path):
    """With a driver, NVRTC could take the cubin from the driver's own cache, and would then report nothing."""
    code = (
        "import sys; from megamoe_cuda.compile import compile_kernel; "
        "print(compile_kernel('probe.cu', 'probe', sources={'probe.cu': sys.argv[1]}, cache_dir=sys.argv[2]).resources)"
    )
    source = SOURCE + f"// {time.time_ns()}"  # of no earlier run
    command = [sys.executable, "-c", code, source]
    one, two = (subprocess.check_output([*command, tmp_path / name], text=True) for name in ("one", "two"))
    assert "registers=" in one and one == two


def launch(probe, y, value, status=0, wait=0, **shape):
    params = Params(y.data_ptr(), status, value, wait)
    probe.launch(torch.cuda.current_stream().cuda_stream, y.numel(), 128, params, **shape)


@pytest.mark.parametrize("shape", [{}, {"cluster": 2}, {"cooperative": False}, {"cluster": 4, "cooperative": False}])
def test_launch_writes_what_the_struct_says(probe, shape):
    assert probe.param_bytes == ctypes.sizeof(Params) == 64
    y = torch.zeros(64, dtype=torch.int32, device="cuda")
    launch(probe, y, 100, **shape)
    assert torch.equal(y, torch.arange(100, 164, dtype=torch.int32, device="cuda"))


def test_capture_keeps_its_own_parameters(probe):
    a, b = (torch.zeros(8, dtype=torch.int32, device="cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(probe, a, 5)
    launch(probe, b, 7)
    graph.replay()
    torch.cuda.synchronize()
    assert a[0] == 5 and b[0] == 7


def test_too_many_blocks_are_refused(probe):
    with pytest.raises(ValueError, match="cannot be resident at once"):
        launch(probe, torch.zeros(probe.num_sms + 1, dtype=torch.int32, device="cuda"), 0)


def test_a_struct_of_another_length_is_refused(probe):
    with pytest.raises(ValueError, match="params has 63 bytes, probe takes 64"):
        probe.launch(torch.cuda.current_stream().cuda_stream, 1, 128, bytes(63))


def test_more_shared_memory_than_a_block_has_is_refused():
    compiled = compile_kernel("probe.cu", "probe", sources={"probe.cu": SOURCE})
    with pytest.raises(ValueError, match="smem_bytes=300000"):
        LoadedKernel(compiled.cubin, "probe", smem_bytes=300_000)


def test_a_word_of_the_cubin_is_read():
    source = 'extern "C" __device__ const unsigned answer = 4242;' + SOURCE
    compiled = compile_kernel("probe.cu", "probe", sources={"probe.cu": source})
    assert read_symbol_u32(compiled.cubin, "answer") == 4242


def test_host_reads_status_while_the_kernel_runs(probe):
    status = HostStatus(64)
    words = status.host.view("uint32")
    launch(probe, torch.zeros(1, dtype=torch.int32, device="cuda"), 77, status.device_ptr, 1)
    end = time.monotonic() + 10
    while words[0] != 77 and time.monotonic() < end:
        pass
    running = not torch.cuda.current_stream().query()
    words[1] = 1
    torch.cuda.synchronize()
    assert words[0] == 77 and running
    del words
    status.close()


def test_host_cost_of_a_launch(probe):
    y = torch.zeros(8, dtype=torch.int32, device="cuda")
    launch(probe, y, 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(500):
        launch(probe, y, 1)
    cost_us = (time.perf_counter() - start) / 500 * 1e6
    torch.cuda.synchronize()
    print(f"host cost of a cooperative launch: {cost_us:.1f} us")
    assert cost_us < 100


def test_device_and_virtual_ranks():
    info = device_info(0)
    print(info)
    assert info.cc == (9, 0) and info.cooperative and info.smem_optin > 200_000
    with OneGpuMemory(1 << 20, 4) as memory:
        assert all(p % ALIGN == 0 for p in memory.base_ptrs) and not any(bool(t.any()) for t in memory.local)
        assert [t.data_ptr() for t in memory.local] == memory.base_ptrs and len(set(memory.base_ptrs)) == 4
    with pytest.raises(CudaCallError):
        device_info(99)


def rank_main(rank: int, folder: str, port: int, backend: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    compiled = compile_kernel("probe.cu", "probe", sources={"probe.cu": SOURCE})
    found = {}
    for turn in range(2):  # the second turn: init after finalize
        first, second = NvshmemMemory(300 << 20), NvshmemMemory(1 << 20)
        kernel = LoadedKernel(compiled.cubin, "probe", smem_bytes=1024)
        params = Params(second.base_ptrs[1 - rank], 0, 1000 + rank, 0)
        kernel.launch(torch.cuda.current_stream().cuda_stream, 4, 128, params)
        second.barrier()
        found[turn] = [second.local[0][:16].view(torch.int32).tolist(), first.footprint_bytes, second.footprint_bytes]
        second.barrier()
        kernel.close()
        first.close()
        second.close()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.gpus(2)
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_peers_write_into_each_others_arena(tmp_path, backend):
    assert num_devices() >= 2 and peer_access(0, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (str(tmp_path), port, backend), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        print(found)
        assert all(turn[0] == [1000 + 1 - rank + i for i in range(4)] for turn in found.values())
