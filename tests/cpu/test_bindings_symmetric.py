"""Symmetric memory without a GPU: in-process arenas, pinned words over a stand-in driver, and NVSHMEM's collective
protocol between two real gloo ranks over a stand-in library whose heaps are shared files."""

import contextlib
import ctypes
import io
import itertools
import json
import mmap
import os
import re
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megamoe_cuda import errors, nvshmem, symmetric
from megamoe_cuda.symmetric import ALIGN, HostMemory, HostStatus, NvshmemMemory, OneGpuMemory

MIB, GIB = 1 << 20, 1 << 30
HEAP = 1 * MIB


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_host_arenas_are_aligned_apart_and_zero(num_ranks):
    with HostMemory(5000, num_ranks) as memory:
        assert len(memory.local) == len(memory.base_ptrs) == len(memory.ranks_here) == num_ranks
        for rank, (arena, address) in enumerate(zip(memory.local, memory.base_ptrs)):
            assert arena.shape == (5000,) and arena.dtype == torch.uint8 and not arena.any()
            assert arena.data_ptr() == address and address % ALIGN == 0
            arena.fill_(rank + 1)
        memory.barrier()
        for rank, address in enumerate(memory.base_ptrs):
            assert ctypes.string_at(address, 5000) == bytes([rank + 1]) * 5000
        spans = sorted((address, address + 5000) for address in memory.base_ptrs)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert memory.footprint_bytes >= 5000 * num_ranks
    assert memory.closed and not memory.local and not memory.base_ptrs


def test_bad_arguments_are_named():
    for wrong, said in ((lambda: HostMemory(0, 1), "nbytes=0"), (lambda: HostMemory(1, 0), "num_ranks=0"),
                        (lambda: OneGpuMemory(1, 1, "cpu"), "device=cpu must be a CUDA device"),
                        (lambda: HostStatus(0), "nbytes=0"), (lambda: NvshmemMemory(1), "init_process_group")):
        with pytest.raises(ValueError, match=said):
            wrong()


def test_host_status_is_one_memory_for_host_and_device(monkeypatch):
    calls, backing = [], ctypes.create_string_buffer(b"\xff" * 64, 64)

    class Fake:
        CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2
        cuMemHostAlloc = staticmethod(lambda size, flags: calls.append((size, flags)) or (0, ctypes.addressof(backing)))
        cuMemHostGetDevicePointer = staticmethod(lambda address, flags: (0, address + (1 << 40)))
        cuMemFreeHost = staticmethod(lambda address: calls.append(address) or (0,))

    monkeypatch.setattr(symmetric, "driver", lambda: Fake)
    status = HostStatus(64)
    words = status.host.view("uint32")
    assert calls == [(64, 3)] and not words.any() and status.device_ptr == ctypes.addressof(backing) + (1 << 40)
    ctypes.memmove(ctypes.addressof(backing) + 4, b"\7\0\0\0", 4)  # what a kernel's store does
    assert list(words[:3]) == [0, 7, 0]
    status.close()
    status.close()
    assert calls[1:] == [ctypes.addressof(backing)] and status.host is None

    calls.clear()
    monkeypatch.setattr(Fake, "cuMemHostGetDevicePointer", staticmethod(lambda address, flags: (1, None)))
    with pytest.raises(errors.CudaCallError, match="cuMemHostGetDevicePointer failed"):
        HostStatus(64)
    assert calls == [(64, 3), ctypes.addressof(backing)]  # given back


@pytest.mark.parametrize(("num_bytes", "granularity"), [(1, 64 * MIB), (300 * MIB, 128 * MIB), (8 * GIB, 512 * MIB)])
def test_environment_fits_the_arena(num_bytes, granularity):
    made = nvshmem.environment(num_bytes, 80 * GIB + 1)
    assert made["NVSHMEM_DISABLE_NVLS"] == "1"
    assert int(made["NVSHMEM_CUMEM_GRANULARITY"]) == granularity
    reserve = int(made["NVSHMEM_MAX_MEMORY_PER_GPU"])
    assert reserve % granularity == 0 and 80 * GIB < reserve <= 80 * GIB + granularity
    assert int(made["NVSHMEM_SYMMETRIC_SIZE"]) >= num_bytes + 64 * MIB


def test_missing_nvshmem_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvshmem.bindings", None)
    with pytest.raises(errors.MissingLibraryError, match="pip install nvshmem4py-cu13"):
        nvshmem.load_library()


def test_real_library_has_the_calls_we_make():
    # Names and a unique id only: without a GPU, initialising and finalising 3.4.5 ends the process.
    pytest.importorskip("nvshmem.bindings", reason="not run: nvshmem4py is not installed")
    library = nvshmem.load_library()
    for name in ("malloc", "free", "ptr", "my_pe", "n_pes", "hostlib_init_attr", "hostlib_finalize", "get_uniqueid",
                 "set_attr_uniqueid_args", "InitAttr"):
        assert callable(getattr(library, name))
    assert library.init_status() == 0 and library.uniqueid()._data.nbytes == 128
    assert library.Flags.INIT_WITH_UNIQUEID == 8


class SharedLibrary:
    """NVSHMEM's host calls between processes of one machine: heap r is the file r, mapped by all. `faults` name what
    goes wrong in this process."""

    class Flags:
        INIT_WITH_UNIQUEID = 8

    def __init__(self, folder: Path, rank: int, num_ranks: int, faults: dict):
        self.rank, self.num_ranks, self.faults, self.events = rank, num_ranks, faults, []
        self.status, self.used = faults.get("already", 0), 0
        self.maps = []
        for pe in range(num_ranks):
            with open(folder / f"heap{pe}", "a+b") as file:
                file.truncate(HEAP)
                self.maps.append(mmap.mmap(file.fileno(), HEAP))
        self.bases = [ctypes.addressof(ctypes.c_char.from_buffer(heap)) for heap in self.maps]

    def uniqueid(self):
        buffer = ctypes.create_string_buffer(128)
        return SimpleNamespace(ptr=ctypes.addressof(buffer), _data=SimpleNamespace(nbytes=128, keep=buffer))

    def get_uniqueid(self, address):
        assert self.rank == 0
        ctypes.memmove(address, os.urandom(128), 128)

    def InitAttr(self):
        return SimpleNamespace(ptr=1)

    def set_attr_uniqueid_args(self, rank, num_ranks, uid, attributes):
        assert (rank, num_ranks) == (self.rank, self.num_ranks)
        self.uid = ctypes.string_at(uid, 128).hex()

    def hostlib_init_attr(self, flags, attributes):
        assert flags == 8 and os.environ["NVSHMEM_DISABLE_NVLS"] == "1"
        time.sleep(self.faults.get("init_s", 0))
        self.events.append("init")
        if self.faults.get("init", 0) >= self.events.count("init"):
            raise RuntimeError("bootstrap refused")
        self.status = 2

    def hostlib_finalize(self):
        self.events.append("finalize")
        self.status = 0

    def init_status(self):
        return self.status

    def my_pe(self):
        return self.rank

    def vendor_get_version_info(self, *addresses):
        for address, number in zip(addresses, self.faults.get("version", (3, 4, 5))):
            ctypes.c_int.from_address(address).value = number

    def n_pes(self):
        return self.num_ranks

    def malloc(self, size):
        self.events.append("malloc")
        if "malloc" in self.faults:
            return 0
        self.used += 512  # as unaligned as the real one
        address = self.bases[self.rank] + self.used
        ctypes.memset(address, 0xAA, size)
        self.used += size
        return address

    def ptr(self, address, pe):
        if self.faults.get("ptr") == "null":
            return 0
        shift = ALIGN if self.faults.get("ptr") == "elsewhere" else 0
        return self.bases[pe] + address - self.bases[self.rank] + shift

    def free(self, address):
        self.events.append("free")


def on_the_host(library: SharedLibrary, gpu: int) -> None:
    """Replaces what touches a device in this process; all of the collective protocol stays."""
    nvshmem._session = nvshmem._members = None
    nvshmem.load_library = lambda: library
    nvshmem.first_touch = lambda device: None
    torch.cuda.mem_get_info = lambda device: (80 * GIB, 80 * GIB)
    symmetric._device_identity = lambda device: ("host", f"gpu{gpu}")
    symmetric._synchronize = lambda device: None
    symmetric._device_view = lambda address, nbytes, device: torch.frombuffer(
        (ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)
    symmetric._read_device = ctypes.string_at


def use_twice(rank: int, library: SharedLibrary) -> dict:
    first, second = NvshmemMemory(3000, device="cuda:0"), NvshmemMemory(2000, device="cuda:0")
    zero = not first.local[0].any() and not second.local[0].any()
    first.local[0].fill_(10 + rank)
    first.barrier()
    seen = [ctypes.string_at(first.base_ptrs[peer], 3000) == bytes([10 + peer]) * 3000 for peer in range(2)]
    aligned = all(address % ALIGN == 0 for address in first.base_ptrs + second.base_ptrs)
    own = first.local[0].data_ptr() == first.base_ptrs[rank] and list(first.ranks_here) == [rank]
    first.barrier()
    first.close()
    first.close()
    second.close()
    return {"zero": zero, "seen": all(seen), "aligned": aligned, "own": own}


def close_then_again(rank: int, library: SharedLibrary) -> dict:
    for _ in range(2):
        NvshmemMemory(100, device="cuda:0").close()
    return {}


def fail_inside(rank: int, library: SharedLibrary) -> dict:
    try:
        with NvshmemMemory(100, device="cuda:0"):
            raise KeyError("of the user")
    except KeyError as error:
        return {"raised": str(error)}


def slow_init(rank: int, library: SharedLibrary) -> dict:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        NvshmemMemory(100, device="cuda:0", deadline_s=0.4).close()
    return {"said": said.getvalue()}


def other_group(rank: int, library: SharedLibrary) -> dict:
    alone = dist.new_group([0]), dist.new_group([1])
    with NvshmemMemory(100, device="cuda:0"):
        NvshmemMemory(100, group=alone[rank], device="cuda:0")
    return {}


def sizes_differ(rank: int, library: SharedLibrary) -> dict:
    NvshmemMemory(100 + rank, device="cuda:0")
    return {}


# name: (what runs, faults of rank 0, faults of rank 1)
SCENARIOS = {
    "twice": (use_twice, {}, {}),
    "again": (close_then_again, {}, {}),
    "retry": (close_then_again, {}, {"init": 1}),
    "never": (close_then_again, {"init": 9}, {}),
    "null": (close_then_again, {}, {"ptr": "null"}),
    "elsewhere": (close_then_again, {"ptr": "elsewhere"}, {}),
    "slow": (slow_init, {"init_s": 1.0}, {"init_s": 1.0}),
    "full": (close_then_again, {}, {"malloc": True}),
    "user": (fail_inside, {}, {}),
    "sizes": (sizes_differ, {}, {}),
    "shared": (close_then_again, {"gpu": 0}, {"gpu": 0}),
    "adopted": (close_then_again, {"already": 2}, {"already": 2}),
    "foreign": (close_then_again, {"already": 2}, {}),
    "group": (other_group, {}, {}),
    "version": (close_then_again, {}, {"version": (3, 8, 0)}),
}


def rank_main(rank: int, folder: str, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name, (body, *faults) in SCENARIOS.items():
        library = SharedLibrary(Path(folder), rank, 2, faults[rank])
        on_the_host(library, faults[rank].get("gpu", rank))
        try:
            result = body(rank, library)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        results[name] = {**result, "events": library.events, "uid": getattr(library, "uid", None)}
        dist.barrier()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("heaps")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (str(folder), port), nprocs=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_peers_see_each_others_arena_and_two_workspaces_share_one_session(ranks):
    for rank in ranks:
        found = rank["twice"]
        assert found == {"zero": True, "seen": True, "aligned": True, "own": True, "uid": found["uid"],
                         "events": ["init", "malloc", "malloc", "free", "free", "finalize"]}
    assert ranks[0]["twice"]["uid"] == ranks[1]["twice"]["uid"]


def test_a_session_can_follow_another(ranks):
    assert all(rank["again"]["events"] == ["init", "malloc", "free", "finalize"] * 2 for rank in ranks)


def test_a_failed_init_is_repeated_by_all(ranks):
    once = ["init", "malloc", "free", "finalize"]
    assert ranks[0]["retry"]["events"] == ["init", "finalize", *once, *once]
    assert ranks[1]["retry"]["events"] == ["init", *once, *once]
    assert ranks[0]["retry"]["uid"] == ranks[1]["retry"]["uid"]


@pytest.mark.parametrize(("name", "said"), [
    ("never", "RuntimeError: NVSHMEM did not initialise in 3 attempts: rank 0: .*bootstrap refused"),
    ("null", r"RuntimeError: ranks cannot .*\(nvshmem_ptr is null\): rank 1: no load/store path to rank 0\n.*NVLink"),
    ("elsewhere", "RuntimeError: the symmetric memory does not work: rank 0: reads other bytes than rank 1 wrote\n"),
    ("full", r"RuntimeError: allocating symmetric memory failed: rank 1: nvshmem_malloc\(1124\) returned null\n"),
    ("sizes", "ValueError: nbytes differs between the ranks: rank 0 asks 100, rank 1 asks 101"),
    ("shared", "ValueError: device: ranks 0 and 1 share GPU gpu0 of host"),
    ("foreign", "RuntimeError: another library .*: rank 1: NVSHMEM is not initialised here"),
    ("version", "RuntimeError: NVSHMEM's version differs .*: rank 0 has 3.4.5, rank 1 has 3.8.0\n.*the same packages"),
    ("group", r"ValueError: group has ranks \[[01]\], but this process initialised NVSHMEM with ranks \[0, 1\]"),
])
def test_one_ranks_trouble_is_every_ranks_error(ranks, name, said):
    for rank in ranks:
        assert re.match(said, rank[name].get("error", "nothing was raised")), rank[name]


def test_what_was_begun_is_undone_after_an_error(ranks):
    for name in ("null", "elsewhere"):
        assert all(rank[name]["events"] == ["init", "malloc", "free", "finalize"] for rank in ranks)
    assert all(rank["full"]["events"] == ["init", "malloc", "finalize"] for rank in ranks)
    assert ranks[0]["never"]["events"] == ["init"] * 3 and ranks[1]["never"]["events"] == ["init", "finalize"] * 3
    assert all(rank[name]["events"] == [] for name in ("sizes", "shared", "foreign") for rank in ranks)


def test_who_is_long_in_a_call_without_deadline_says_so(ranks):
    for rank, found in enumerate(ranks):
        line = (rf"megamoe: rank {rank} is in nvshmem_init for 0\.[4-9] s, which has no deadline and waits for all "
                rf"ranks: rank {1 - rank} was last seen at NVSHMEM id, its number")
        assert re.search(line, found["slow"]["said"]) and found["slow"]["said"].count("megamoe:") == 2, found["slow"]
        assert "remedy: " in found["slow"]["said"] and found["slow"]["events"] == ["init", "malloc", "free", "finalize"]


def test_an_exception_of_the_user_makes_no_collective_call(ranks):
    assert all(rank["user"]["raised"] == "'of the user'" for rank in ranks)
    assert all(rank["user"]["events"] == ["init", "malloc"] for rank in ranks)


def test_a_foreign_session_is_used_and_left_alone(ranks):
    assert all(rank["adopted"]["events"] == ["malloc", "free"] * 2 for rank in ranks)
