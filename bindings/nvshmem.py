"""The process's one NVSHMEM session: initialised by unique id over a torch process group, counted, finalised last.

Raw `nvshmem.bindings`, not `nvshmem.core`: the core tracks every buffer and raises from the garbage collector, counts
references to peers wrongly for the own rank, and its finalize frees what others still use. Only host calls are needed:
the kernel gets peer addresses as numbers and holds no NVSHMEM device code.

Collective throughout: every rank of the group makes the same calls in the same order. A stage that failed anywhere is
known everywhere before anybody goes on (`agree`), so the healthy ranks raise too instead of hanging. NVSHMEM's own
collective calls have no deadline: the ranks meet in front of each (`gather`), which a missing one does not pass.
An init that lasts is told (`told`); malloc, free and finalize of nvshmem4py 0.4.1 hold the interpreter, so that no
thread could tell of them.
"""

import ctypes
import os
import threading

import torch
import torch.distributed as dist

from .errors import MissingLibraryError
from .gather import agree, gather, told

INIT_ATTEMPTS = 3  # bootstrap sockets of jobs that share a host collide now and then
_INITIALIZED = 2  # nvshmemx_init_status; below it, 3.4.5's finalize ends the whole process with status 255
_MIB = 1 << 20

_lock = threading.Lock()
_session: "Session | None" = None
_members: tuple[int, ...] | None = None  # NVSHMEM keeps the first init's ranks for the life of the process


class Session:
    """NVSHMEM as initialised; `rank` and `num_ranks` are its PEs, equal to the group's ranks."""

    def __init__(self, library, group, rank: int, num_ranks: int, owned: bool, deadline_s: float):
        self.library, self.group, self.rank, self.num_ranks = library, group, rank, num_ranks
        self.deadline_s = deadline_s
        self.owned = owned  # False: another library of this process had initialised it, and will finalize it
        self.users = 0

    def malloc(self, num_bytes: int) -> int:
        """Collective; the same size everywhere. Address on the symmetric heap, not zeroed; RuntimeError on all ranks
        when it failed on one."""
        address, problem = 0, None
        gather(self.group, "nvshmem_malloc", None, self.deadline_s)  # which itself waits for all, and for ever
        try:
            address = self.library.malloc(num_bytes)
        except Exception as error:
            problem = f"nvshmem_malloc({num_bytes}) raised {error}"
        if problem is None and not address:
            problem = f"nvshmem_malloc({num_bytes}) returned null"
        agree(
            self.group,
            problem,
            "allocating symmetric memory failed",
            "free device memory or lower the capacity; where NVSHMEM runs without CUDA VMM, set "
            "NVSHMEM_SYMMETRIC_SIZE to the sum of all workspaces before the first",
            step="nvshmem_malloc done",
            deadline_s=self.deadline_s,
        )
        return address

    def peer_address(self, address: int, rank: int) -> int:
        """The address here of what `address` is on `rank`; 0 when it is out of reach of loads and stores."""
        return address if rank == self.rank else self.library.ptr(address, rank)

    def free(self, address: int) -> None:
        """Collective, and in the same order on every rank."""
        self.library.free(address)

    def release(self) -> None:
        """Collective. The last user's release finalizes NVSHMEM, if it was initialised here."""
        global _session
        with _lock:
            self.users -= 1
            if self.users:
                return
            _session = None
            if self.owned and self.library.init_status() >= _INITIALIZED:
                self.library.hostlib_finalize()


def acquire(group, num_bytes: int, memory_bytes: int, deadline_s: float) -> Session:
    """Collective over `group`: joins the process's session, or initialises NVSHMEM with the group's ranks as PEs.

    The device must be current and in use before. num_bytes: the first arena's size; memory_bytes: the GPU's; both only
    size NVSHMEM's own reservations. deadline_s: seconds that any rank may be late. ValueError when the session was made
    by other ranks; RuntimeError, on all ranks, when a rank failed or has another version; MissingLibraryError naming
    the packages; AbsentRankError.
    """
    global _session, _members
    members = tuple(dist.get_process_group_ranks(group))
    with _lock:
        if _members is not None and members != _members:
            raise ValueError(
                f"group has ranks {list(members)}, but this process initialised NVSHMEM with ranks "
                f"{list(_members)}, and it keeps its ranks for life: use one group for all workspaces"
            )
        if _session is None:
            library, problem, version = None, None, ""
            try:
                library = load_library()
                version = version_of(library)
            except MissingLibraryError as error:
                problem = str(error)
            same = "install the same packages for every rank"
            what = "NVSHMEM is missing"
            agree(group, problem, what, same, MissingLibraryError, step="NVSHMEM", deadline_s=deadline_s)
            versions = gather(group, "NVSHMEM version", version, deadline_s)
            if len(set(versions)) > 1:
                found = ", ".join(f"rank {rank} has {its}" for rank, its in enumerate(versions))
                raise RuntimeError(f"NVSHMEM's version differs between the ranks: {found}\n  remedy: {same}")
            _session = _initialize(library, group, num_bytes, memory_bytes, deadline_s)
            _members = members
        _session.users += 1
        return _session


def load_library():
    """nvshmem.bindings with the host library loaded. MissingLibraryError names what to install."""
    try:
        import nvshmem.bindings as library
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError as error:
        raise MissingLibraryError(
            "nvshmem4py is not installed: pip install nvshmem4py-cu13==0.4.1 (--no-deps keeps torch's NVSHMEM library)"
        ) from error
    try:
        load_nvidia_dynamic_lib("nvshmem_host")
    except Exception as error:
        raise MissingLibraryError(
            "libnvshmem_host.so.3 was not found: pip install nvidia-nvshmem-cu13, in the version "
            "that this torch pins (3.4.5 for torch 2.11)"
        ) from error
    return library


def version_of(library) -> str:
    """Of the host library, e.g. "3.4.5"."""
    numbers = [ctypes.c_int() for _ in range(3)]
    library.vendor_get_version_info(*map(ctypes.addressof, numbers))
    return ".".join(str(number.value) for number in numbers)


def environment(num_bytes: int, memory_bytes: int) -> dict[str, str]:
    """What NVSHMEM reads at its first init, as far as the defaults do not suit; variables that are set stay.

    Its heap grows by NVSHMEM_CUMEM_GRANULARITY, 512 MiB by default, a power of two: a quarter of the arena wastes less.
    It reserves NVSHMEM_MAX_MEMORY_PER_GPU of address space for every rank, 128 GiB by default, whose mapping fails on
    some machines: no arena exceeds the GPU. NVSHMEM_SYMMETRIC_SIZE counts only where CUDA VMM is off. Multicast stays
    off: the kernel is unicast, and creating multicast objects fails in many containers.
    """
    granularity = 64 * _MIB
    while granularity < min(num_bytes // 4, 512 * _MIB):
        granularity *= 2
    reserve = max(memory_bytes, 2 * num_bytes)
    return {
        "NVSHMEM_DISABLE_NVLS": "1",
        "NVSHMEM_CUMEM_GRANULARITY": str(granularity),
        "NVSHMEM_MAX_MEMORY_PER_GPU": str(-(-reserve // granularity) * granularity),
        "NVSHMEM_SYMMETRIC_SIZE": str(max(1024 * _MIB, num_bytes + 64 * _MIB)),
    }


def _initialize(library, group, num_bytes: int, memory_bytes: int, deadline_s: float) -> Session:
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    present = library.init_status() >= _INITIALIZED
    if any(gather(group, "NVSHMEM status", present, deadline_s)):
        mine = (library.my_pe(), library.n_pes()) if present else None
        problem = (
            None
            if mine == (rank, num_ranks)
            else (
                "NVSHMEM is not initialised here"
                if mine is None
                else f"NVSHMEM was initialised as PE {mine[0]} of {mine[1]}, the group's rank is {rank} of {num_ranks}"
            )
        )
        agree(
            group,
            problem,
            "another library initialised NVSHMEM with other ranks",
            "make the workspace before it, or give both the same group",
            step="NVSHMEM ranks",
            deadline_s=deadline_s,
        )
        return Session(library, group, rank, num_ranks, False, deadline_s)

    for name, value in environment(num_bytes, memory_bytes).items():
        os.environ.setdefault(name, value)
    for attempt in range(1, INIT_ATTEMPTS + 1):
        problem = _try_init(library, group, rank, num_ranks, deadline_s)
        try:
            agree(
                group,
                problem,
                f"NVSHMEM did not initialise in {attempt} attempts",
                "NVSHMEM_DEBUG=INFO tells more; NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME picks the network interface",
                step="NVSHMEM init",
                deadline_s=deadline_s,
            )
            break
        except RuntimeError:
            # A rank that came through must go back, or its next init would be counted instead of performed.
            if library.init_status() >= _INITIALIZED:
                library.hostlib_finalize()
            if attempt == INIT_ATTEMPTS:
                raise
    return Session(library, group, rank, num_ranks, True, deadline_s)


def _try_init(library, group, rank: int, num_ranks: int, deadline_s: float) -> str | None:
    """One init with a new unique id, 128 bytes made by rank 0. What went wrong here, or None."""
    uid, made, problem = library.uniqueid(), None, None
    size = uid._data.nbytes
    if rank == 0:
        try:
            library.get_uniqueid(uid.ptr)
            made = ctypes.string_at(uid.ptr, size).hex()
        except Exception as error:
            problem = f"nvshmemx_get_uniqueid raised {error}"
    made = gather(group, "NVSHMEM id", made, deadline_s)[0]
    if made is None:
        return problem  # rank 0 reports for all
    ctypes.memmove(uid.ptr, bytes.fromhex(made), size)
    try:
        attributes = library.InitAttr()
        library.set_attr_uniqueid_args(rank, num_ranks, uid.ptr, attributes.ptr)
        with told(group, "nvshmem_init", deadline_s):
            library.hostlib_init_attr(library.Flags.INIT_WITH_UNIQUEID, attributes.ptr)
    except Exception as error:
        return f"nvshmemx_hostlib_init_attr raised {error}"
    return None


def first_touch(device: torch.device) -> None:
    """Makes `device` current and its context exist: NVSHMEM initialised before that binds to no device."""
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
