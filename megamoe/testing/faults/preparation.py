"""The host's faults outside of calls: ranks start, meet, compile, allocate and begin NVSHMEM. Rank 2 does what is
wrong."""

import contextlib
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

from megamoe import MegaMoEError
from megamoe.engine_fused import together
from megamoe.ranks import init_process_group
from megamoe.testing.faults.host_ranks import DEADLINE_S, PATIENT_S, START_S, all_live, open_workspace, replaced
from megamoe.testing.faults.table import FAULTY, Said, timed, words
from megamoe_cuda import nvshmem
from megamoe_cuda.compile import compile_kernel
from megamoe_cuda.errors import CompileError, MissingLibraryError
from megamoe_cuda.gather import gather

_load_library = nvshmem.load_library
KERNEL = {"tiny.cu": 'extern "C" __global__ void tiny(int* p) { *p = 1; }'}


@all_live
def at_workspace(rank: int, everyone) -> Said:
    if rank == FAULTY:
        time.sleep(DEADLINE_S + 0.4)
    _, error, seconds = timed(lambda: open_workspace(everyone), MegaMoEError)
    gather(everyone, "faults", None, 30.0)
    open_workspace(everyone).close()  # and then they meet
    return Said(words(error), seconds)


@all_live
def at_reset(rank: int, everyone) -> Said:
    workspace = open_workspace(everyone)
    error, seconds = None, 0.0
    if rank != FAULTY:
        _, error, seconds = timed(workspace.reset, MegaMoEError)
    gather(everyone, "faults", None, 30.0)
    workspace.reset()
    workspace.close()
    return Said(words(error), seconds)


@all_live
def other_configuration(rank: int, everyone) -> Said:
    fields = {"arrive_deadline_s": PATIENT_S, "step_deadline_s": 9.0 if rank == FAULTY else 8.0}
    _, error, seconds = timed(lambda: open_workspace(everyone, **fields), ValueError)
    return Said(words(error), seconds)


def preparing(action):
    """A body: rank 2 runs action where ranks prepare alone, compile and allocate, before they meet again."""

    def body(rank: int, everyone) -> Said | str:
        def prepare():
            with together(everyone, DEADLINE_S):
                if rank == FAULTY:
                    action()

        try:
            _, error, seconds = timed(prepare, MegaMoEError, CompileError, RuntimeError)
        except MissingLibraryError as missing:
            return str(missing)
        return Said(words(error), seconds)

    return all_live(body)


def broken_source():
    compile_kernel("tiny.cu", "tiny", sources={"tiny.cu": "this is no kernel"})


def nvshmem_of(library_of_rank2):
    """A body: all ranks begin NVSHMEM; rank 2 finds another library than the rest."""

    def body(rank: int, everyone) -> Said:
        def version(*addresses, numbers=(3, 8, 0) if rank == FAULTY else (3, 4, 5)):
            for address, number in zip(addresses, numbers):
                nvshmem.ctypes.c_int.from_address(address).value = number

        fake = SimpleNamespace(vendor_get_version_info=version)
        with replaced(nvshmem, "load_library", lambda: fake):
            if rank == FAULTY and library_of_rank2 == "missing":
                nvshmem.load_library = _load_library
                sys.modules["nvshmem.bindings"] = None
            try:
                acquire = lambda: nvshmem.acquire(everyone, 1 << 20, 1 << 30, PATIENT_S)  # noqa: E731
                _, error, seconds = timed(acquire, RuntimeError, MissingLibraryError)
            finally:
                sys.modules.pop("nvshmem.bindings", None)
        return Said(words(error), seconds)

    return all_live(body)


def in_the_cache(spoil):
    """A body: rank 2 compiles a kernel into a cache that spoil(entry) has spoiled; the result must be as good."""

    def body(rank: int, everyone) -> Said | str:
        answer = Said("no error", 0.0)
        if rank == FAULTY:
            with tempfile.TemporaryDirectory() as folder:
                answer = _compile_spoiled(Path(folder), spoil)
        gather(everyone, "faults", None, 60.0)
        return answer

    return all_live(body)


def _compile_spoiled(folder: Path, spoil) -> Said | str:
    from megamoe_cuda import compile as compiler

    def fresh(name: str):
        compiler._memory.clear()
        return compile_kernel("tiny.cu", "tiny", sources=KERNEL, cache_dir=folder / name)

    try:
        good = fresh("good")
    except MissingLibraryError as missing:
        return str(missing)
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        cache = folder / ("good" if spoil(good.path, stack) else "full")
        again = fresh(cache.name)
    problem = "" if again.cubin == good.cubin and not again.from_cache else "the kernel is not the compiled one"
    if cache.name == "full" and any((cache / "kernels").iterdir()):
        problem += "; a part of a file was left behind"
    return Said("; ".join(str(warning.message) for warning in caught), time.monotonic() - begin, problem)


def truncated(path: Path, stack) -> bool:
    path.write_bytes(path.read_bytes()[:-100])
    return True


def foreign(path: Path, stack) -> bool:
    path.write_bytes(b"\x7fELF a cubin from elsewhere")
    return True


def full_disk(path: Path, stack) -> bool:
    # The kernel refuses to let any file of this process grow, as a full disk does
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    stack.callback(lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, limits), signal.signal(signal.SIGXFSZ, handler)))
    return False


def never_started(rank: int) -> Said:
    _, error, seconds = timed(lambda: init_process_group("gloo", timeout_s=START_S), TimeoutError)
    return Said(words(error), seconds)
