"""One arena of equal size per rank, and every rank's address of every arena; also pinned host memory for status words.

SymmetricMemory   what all kinds share
NvshmemMemory     one process a GPU; peers by NVLink or PCIe through NVSHMEM's host library
OneGpuMemory      several virtual ranks of one process on one GPU
HostMemory        the same on the CPU, for tests
HostStatus        words that the device writes and the host reads without synchronising
"""

import ctypes
import socket
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.distributed as dist

from . import nvshmem as session
from .errors import check, driver
from .gather import DEADLINE_S, AbsentRankError, agree, gather

ALIGN = 1024  # of every arena's base, bytes


class SymmetricMemory(ABC):
    """base_ptrs: address of each rank's arena as seen from this process. local: uint8 [nbytes] tensors over the arenas
    held here, in the order of `ranks_here`. nbytes: of one arena, as asked. footprint_bytes: device or host memory this
    process gave for it. Arenas start zeroed. Context manager: leaving by an exception abandons instead of closing."""

    def __init__(self, nbytes: int, ranks_here: range, device: torch.device):
        if nbytes < 1:
            raise ValueError(f"nbytes={nbytes} must be at least 1")
        self.nbytes, self.ranks_here, self.device = nbytes, ranks_here, device
        self.base_ptrs: list[int] = []
        self.local: list[torch.Tensor] = []
        self.footprint_bytes = 0
        self.closed = False

    @abstractmethod
    def barrier(self) -> None:
        """Waits for this process's work on the device, then for all ranks'."""

    def close(self) -> None:
        """Collective where the memory is: stop launching and destroy graphs that hold its addresses before. May be
        called twice."""
        self.abandon()

    def abandon(self) -> None:
        """Lets go without a word to the peers, who may be gone: on the way out of an exception a collective call would
        hang and hide it. NVSHMEM memory stays allocated until the process ends."""
        self.closed = True
        self.base_ptrs, self.local = [], []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.abandon() if kind else self.close()


class _InProcessMemory(SymmetricMemory):
    # Every rank its own allocation, each starting at another distance from its allocation's start: code that takes one
    # rank's address for another's, or runs past an end, must not work by luck.
    def __init__(self, nbytes: int, num_ranks: int, device: torch.device):
        if num_ranks < 1:
            raise ValueError(f"num_ranks={num_ranks} must be at least 1")
        super().__init__(nbytes, range(num_ranks), device)
        for rank in range(num_ranks):
            whole = torch.zeros(nbytes + (rank + 2) * ALIGN, dtype=torch.uint8, device=device)
            start = -whole.data_ptr() % ALIGN + rank * ALIGN
            self.local.append(whole[start : start + nbytes])
            self.base_ptrs.append(whole.data_ptr() + start)
            self.footprint_bytes += whole.numel()


class OneGpuMemory(_InProcessMemory):
    """num_ranks virtual ranks of this process, each with an allocation of its own on `device`."""

    def __init__(self, nbytes: int, num_ranks: int, device: torch.device | str | int = "cuda"):
        device = _cuda_device(device)
        super().__init__(nbytes, num_ranks, device)
        self.barrier()  # zeroed before any stream uses it

    def barrier(self) -> None:
        _synchronize(self.device)


class HostMemory(_InProcessMemory):
    """num_ranks arenas in host memory."""

    def __init__(self, nbytes: int, num_ranks: int):
        super().__init__(nbytes, num_ranks, torch.device("cpu"))

    def barrier(self) -> None:
        pass


class NvshmemMemory(SymmetricMemory):
    """This rank's arena on NVSHMEM's symmetric heap and the mapped addresses of the peers'. Collective over `group`
    (default: torch.distributed's), one process a GPU.

    deadline_s: seconds that a rank may be late at any step of making, resetting and closing; AbsentRankError past it.
    Errors come up on all ranks: ValueError for sizes that differ or ranks that share a GPU, RuntimeError naming the
    pairs without a load/store path or the rank where NVSHMEM failed, MissingLibraryError naming the packages.
    """

    def __init__(
        self, nbytes: int, group=None, device: torch.device | str | int = "cuda", deadline_s: float = DEADLINE_S
    ):
        if not dist.is_initialized():
            raise ValueError(
                "group: NvshmemMemory needs torch.distributed: call init_process_group, or use "
                "OneGpuMemory for one process"
            )
        device = _cuda_device(device)
        group = group or dist.group.WORLD
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        super().__init__(nbytes, range(rank, rank + 1), device)
        self.group, self.deadline_s = group, deadline_s
        session.first_touch(device)
        _check_peers_differ(group, nbytes, device, deadline_s)
        free_before, memory_bytes = torch.cuda.mem_get_info(device)
        self._session = session.acquire(group, nbytes + ALIGN, memory_bytes, deadline_s)
        try:
            self._allocated = self._session.malloc(nbytes + ALIGN)
        except AbsentRankError:
            raise  # releasing is collective as well
        except Exception:
            self._session.release()
            raise
        # The same distance on all ranks: the heaps start at multiples of far more than ALIGN.
        base = self._allocated + -self._allocated % ALIGN
        self.base_ptrs = [self._session.peer_address(base, peer) for peer in range(num_ranks)]
        self.footprint_bytes = free_before - torch.cuda.mem_get_info(device)[0]
        try:
            self._check_reachable()
            self._check_marks(rank)
        except AbsentRankError:
            self.abandon()  # a rank is gone: nothing collective works any more
            raise
        except Exception:  # the same on all ranks, so what is collective still works
            self._free()
            raise

    def barrier(self) -> None:
        _synchronize(self.device)
        gather(self.group, "arena", None, self.deadline_s)

    def close(self) -> None:
        if self.closed:
            return
        self.barrier()  # nobody still writes into a peer's arena
        self._free()

    def _free(self) -> None:
        self.abandon()
        self._session.free(self._allocated)
        self._session.release()

    def _check_reachable(self) -> None:
        unreachable = [peer for peer, address in enumerate(self.base_ptrs) if not address]
        agree(
            self.group,
            f"no load/store path to rank {_listed(unreachable)}" if unreachable else None,
            "ranks cannot reach each other's memory (nvshmem_ptr is null)",
            "the GPUs need NVLink or PCIe peer access within one host: see nvidia-smi topo -p2p rw, and leave "
            "NVSHMEM_DISABLE_P2P unset",
            step="peer addresses",
            deadline_s=self.deadline_s,
        )

    def _check_marks(self, rank: int) -> None:
        # Every rank writes a mark, every rank reads all of them through the mapped addresses. It also catches heaps
        # that went out of step (a rank abandoned an arena that the others freed): equal offsets would be a lie.
        size = min(8, self.nbytes)
        problem = None
        try:
            self.local = [_device_view(self.base_ptrs[rank], self.nbytes, self.device)]
            self.local[0].zero_()
            self.local[0][:size] = rank % 255 + 1
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.barrier()
        if problem is None:
            try:
                wrong = [
                    peer
                    for peer, address in enumerate(self.base_ptrs)
                    if _read_device(address, size) != bytes([peer % 255 + 1]) * size
                ]
                problem = f"reads other bytes than rank {_listed(wrong)} wrote" if wrong else None
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        agree(
            self.group,
            problem,
            "the symmetric memory does not work",
            "if an earlier workspace of this process was abandoned after an error, restart all ranks; else run "
            "the doctor on this machine",
            step="marks",
            deadline_s=self.deadline_s,
        )
        self.local[0][:size] = 0
        self.barrier()


class HostStatus:
    """`nbytes` of page-locked host memory that the device writes through `device_ptr` and the host reads at any time.

    host: uint8 [nbytes] numpy view, zeroed; each read is a load from memory, so a kernel's store with system scope is
    seen while it runs. From the driver rather than torch's pinned allocator: that one hands freed blocks to the next
    caller, while a kernel past its deadline may still be writing its report. A device must be current.
    close() frees it: let go of views of `host` before.
    """

    def __init__(self, nbytes: int):
        if nbytes < 1:
            raise ValueError(f"nbytes={nbytes} must be at least 1")
        cuda = driver()
        self.nbytes = nbytes
        flags = cuda.CU_MEMHOSTALLOC_PORTABLE | cuda.CU_MEMHOSTALLOC_DEVICEMAP
        self._address = int(check(cuda.cuMemHostAlloc(nbytes, flags), "cuMemHostAlloc"))
        try:
            self.device_ptr = int(check(cuda.cuMemHostGetDevicePointer(self._address, 0), "cuMemHostGetDevicePointer"))
        except Exception:
            cuda.cuMemFreeHost(self._address)
            raise
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self._address))
        self.host[:] = 0

    def close(self) -> None:
        if self._address:
            address, self._address, self.host, self.device_ptr = self._address, 0, None, 0
            check(driver().cuMemFreeHost(address), "cuMemFreeHost")


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _cuda_device(device: torch.device | str | int) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device={device} must be a CUDA device; HostMemory is the CPU's")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _check_peers_differ(group, nbytes: int, device: torch.device, deadline_s: float) -> None:
    everyone = gather(group, "arena size", (nbytes, *_device_identity(device)), deadline_s)
    sizes = [size for size, *_ in everyone]
    if len(set(sizes)) > 1:
        raise ValueError(
            "nbytes differs between the ranks: "
            + ", ".join(f"rank {rank} asks {size}" for rank, size in enumerate(sizes))
        )
    owners: dict = {}
    for rank, (_, *identity) in enumerate(everyone):
        identity = tuple(identity)
        if identity in owners:
            raise ValueError(
                f"device: ranks {owners[identity]} and {rank} share GPU {identity[1]} of {identity[0]}; "
                "give each process its own (torch.cuda.set_device(local_rank)), or run virtual ranks in "
                "one process"
            )
        owners[identity] = rank


def _device_identity(device: torch.device) -> tuple[str, str]:
    return socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)


def _synchronize(device: torch.device) -> None:
    torch.cuda.synchronize(device)


class _CudaArray:
    def __init__(self, address: int, nbytes: int):
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def _device_view(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes] over memory that torch does not own."""
    view = torch.as_tensor(_CudaArray(address, nbytes), device=device)
    if view.data_ptr() != address:
        raise RuntimeError(
            f"torch copied the arena instead of viewing it: it takes {address:#x} for memory of another "
            f"device than {device}"
        )
    return view


def _read_device(address: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    check(driver().cuMemcpyDtoH(data, address, nbytes), "cuMemcpyDtoH")
    return bytes(data)
