"""The host's faults, on three CPU ranks over gloo. Rank 2 does what is wrong; see table.py for how rows are judged."""

import contextlib
import gc
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.engine_fused import together
from megamoe.exchange import DistExchange, Header, LocalExchange
from megamoe.ranks import init_process_group
from megamoe.steps import moe_layer
from megamoe.testing.data import Case, make_case
from megamoe.testing.faults.table import FAULTY, NUM_RANKS, Fault, Said, timed, words
from megamoe_cuda import nvshmem
from megamoe_cuda.compile import compile_kernel
from megamoe_cuda.errors import CompileError, MissingLibraryError
from megamoe_cuda.gather import gather

DEADLINE_S = 0.8
START_S = 1.5
CONFIG = MoEConfig(hidden=128, intermediate=128, num_experts=6, topk=3)
OTHER = MoEConfig(hidden=256, intermediate=128, num_experts=6, topk=2)
_groups: list = []
_load_library = nvshmem.load_library
KERNEL = {"tiny.cu": 'extern "C" __global__ void tiny(int* p) { *p = 1; }'}


def group():
    """A group of its own for each fault: gloo closes a group's connections when one of its waits runs out."""
    init_process_group("gloo", timeout_s=30.0)
    gather(dist.group.WORLD, "faults", None, 60.0)
    for old in _groups:
        dist.destroy_process_group(old)
    _groups[:] = [dist.new_group(timeout=timedelta(seconds=30))]
    return _groups[0]


def case_of(config: MoEConfig, tokens: int = 5) -> Case:
    return make_case(3, config, NUM_RANKS, tokens, "uniform")


def open_workspace(everyone, **fields) -> Workspace:
    deadlines = {"arrive_deadline_s": DEADLINE_S, "step_deadline_s": DEADLINE_S} | fields
    return Workspace([CONFIG, OTHER], EPConfig(8, **deadlines), group=everyone, device="cpu")


def make_layer(workspace: Workspace, config: MoEConfig, rank: int) -> MoELayer:
    layer = MoELayer(config, workspace)
    w = case_of(config).weights[rank]
    layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
    return layer


def call(layer: MoELayer, rank: int, tokens: int = 5) -> torch.Tensor:
    """Into an output that held numbers before."""
    i = case_of(layer.config, tokens).inputs[rank]
    layer.out = torch.ones(i.x.shape, dtype=torch.bfloat16)
    return layer(i.x, i.topk_idx, i.topk_weights, out=layer.out)


def wrong_output(layer: MoELayer, rank: int) -> str:
    expected = moe_layer(layer.config, LocalExchange(NUM_RANKS), *case_of(layer.config)[3:])[rank]
    return "" if torch.equal(call(layer, rank), expected) else "the output is not that of the specification"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def tensors() -> int:
    gc.collect()
    return sum(torch.is_tensor(thing) for thing in gc.get_objects())


def in_a_call(faulty_call, *, succeeds: bool = False, resets: bool = True):
    """A body: rank 2 runs faulty_call(workspace, layers), the others call the first layer. Afterwards all ranks reset,
    call once more, and must have given back what they took."""

    def body(rank: int) -> Said:
        everyone = group()
        before = descriptors(), tensors()
        said = _in_a_call(rank, everyone, faulty_call, succeeds, resets)
        after = descriptors(), tensors()
        if resets and any(now > then for now, then in zip(after, before)):
            return said._replace(problem=f"{said.problem} descriptors and tensors {before} before, {after} after")
        return said

    return body


def _in_a_call(rank: int, everyone, faulty_call, succeeds: bool, resets: bool) -> Said:
    workspace = open_workspace(everyone)
    layers = [make_layer(workspace, config, rank) for config in (CONFIG, OTHER)]
    problem = wrong_output(layers[0], rank)
    action = (lambda: faulty_call(workspace, layers)) if rank == FAULTY else (lambda: call(layers[0], rank))
    _, error, seconds = timed(action, MegaMoEError, ValueError)
    if isinstance(error, MegaMoEError) and rank != FAULTY:
        if not layers[0].out.isnan().all():
            problem += "a failed call left numbers in its output; "
        if timed(lambda: call(layers[0], rank), MegaMoEError)[1] is None:
            problem += "the poisoned workspace took a call; "
    elif succeeds:
        problem += wrong_output(layers[0], rank)
    gather(everyone, "faults", None, 30.0)
    if resets:
        workspace.reset()
        problem += wrong_output(layers[0], rank) or wrong_output(layers[1], rank)
    workspace.close()
    return Said(words(error), seconds, problem)


def late(seconds: float):
    def faulty(workspace, layers):
        time.sleep(seconds)
        return call(layers[0], FAULTY)

    return faulty


@contextlib.contextmanager
def replaced(target, name: str, value):
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def damaged_count(workspace, layers):
    good = Header.of

    def of(*words_):
        header = good(*words_)
        return header._replace(num_rows=header.num_rows + 1)

    with replaced(Header, "of", of):
        return call(layers[0], FAULTY)


def rows_at_combine(change):
    """change(send) -> what happens to rank 2's rows on their way back."""

    def faulty(workspace, layers):
        real = DistExchange._point_to_point

        def point_to_point(self, sends, receives, deadline_s, step, fault):
            if step == "combine" and fault == "did not send its rows":
                sends = change(sends)
            return real(self, sends, receives, deadline_s, step, fault)

        with replaced(DistExchange, "_point_to_point", point_to_point):
            return call(layers[0], FAULTY)

    return faulty


def delayed(sends):
    time.sleep(DEADLINE_S / 2)
    return sends


def closed_early(workspace, layers):
    workspace.close()
    return call(layers[0], FAULTY)


def at_workspace(rank: int) -> Said:
    everyone = group()
    if rank == FAULTY:
        time.sleep(DEADLINE_S + 0.4)
    _, error, seconds = timed(lambda: open_workspace(everyone), MegaMoEError)
    gather(everyone, "faults", None, 30.0)
    open_workspace(everyone).close()  # and then they meet
    return Said(words(error), seconds)


def at_reset(rank: int) -> Said:
    everyone = group()
    workspace = open_workspace(everyone)
    error, seconds = None, 0.0
    if rank != FAULTY:
        _, error, seconds = timed(workspace.reset, MegaMoEError)
    gather(everyone, "faults", None, 30.0)
    workspace.reset()
    workspace.close()
    return Said(words(error), seconds)


def other_configuration(rank: int) -> Said:
    everyone, own_s = group(), 9.0 if rank == FAULTY else 8.0
    _, error, seconds = timed(lambda: open_workspace(everyone, step_deadline_s=own_s), ValueError)
    return Said(words(error), seconds)


def preparing(action):
    """A body: rank 2 runs action where ranks prepare alone, compile and allocate, before they meet again."""

    def body(rank: int) -> Said | str:
        everyone = group()

        def prepare():
            with together(everyone, DEADLINE_S):
                if rank == FAULTY:
                    action()

        try:
            _, error, seconds = timed(prepare, MegaMoEError, CompileError, RuntimeError)
        except MissingLibraryError as missing:
            return str(missing)
        return Said(words(error), seconds)

    return body


def broken_source():
    compile_kernel("tiny.cu", "tiny", sources={"tiny.cu": "this is no kernel"})


def nvshmem_of(library_of_rank2):
    """A body: all ranks begin NVSHMEM; rank 2 finds another library than the rest."""

    def body(rank: int) -> Said:
        everyone = group()

        def version(*addresses, numbers=(3, 8, 0) if rank == FAULTY else (3, 4, 5)):
            for address, number in zip(addresses, numbers):
                nvshmem.ctypes.c_int.from_address(address).value = number

        fake = SimpleNamespace(vendor_get_version_info=version)
        with replaced(nvshmem, "load_library", lambda: fake):
            if rank == FAULTY and library_of_rank2 == "missing":
                nvshmem.load_library = _load_library
                sys.modules["nvshmem.bindings"] = None
            try:
                acquire = lambda: nvshmem.acquire(everyone, 1 << 20, 1 << 30, DEADLINE_S)  # noqa: E731
                _, error, seconds = timed(acquire, RuntimeError, MissingLibraryError)
            finally:
                sys.modules.pop("nvshmem.bindings", None)
        return Said(words(error), seconds)

    return body


def in_the_cache(spoil):
    """A body: rank 2 compiles a kernel into a cache that spoil(entry) has spoiled; the result must be as good."""

    def body(rank: int) -> Said | str:
        everyone = group()
        answer = Said("no error", 0.0)
        if rank == FAULTY:
            with tempfile.TemporaryDirectory() as folder:
                answer = _compile_spoiled(Path(folder), spoil)
        gather(everyone, "faults", None, 60.0)
        return answer

    return body


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


def dies(where: str):
    """A body: rank 2 ends without a word, before the workspace, or before, during or after a call."""

    def body(rank: int) -> Said:
        everyone = group()
        leave = lambda *_: os._exit(9)  # noqa: E731
        if rank == FAULTY and where == "workspace":
            leave()
        workspace, error, seconds = timed(lambda: open_workspace(everyone), MegaMoEError)
        if where == "workspace":
            return Said(words(error), seconds)
        layer = make_layer(workspace, CONFIG, rank)
        if where == "after":
            call(layer, rank)
        if rank == FAULTY:
            if where == "during":
                rows_at_combine(leave)(workspace, [layer])
            leave()
        _, error, seconds = timed(lambda: call(layer, rank), MegaMoEError)
        workspace.close()
        return Said(words(error), seconds, "" if layer.out.isnan().all() else "a failed call left numbers")

    return body


NAMES_2 = rf"dispatch: rank 2 did not come within {DEADLINE_S} s"
LEFT_2 = r"step {0}: rank 2 (left|did not \w+)|the first to give up was rank \d at {0}: rank 2"
FAULTS = (
    Fault("a rank comes late, within the deadline", "dispatch", in_a_call(late(DEADLINE_S / 2), succeeds=True),
          "no error", "no error", DEADLINE_S),
    Fault("a rank comes after the deadline", "dispatch", in_a_call(late(DEADLINE_S + 0.4)),
          NAMES_2, r"the first to give up was rank [01] at dispatch: rank 2 did not come", DEADLINE_S),
    Fault("a rank makes no call", "dispatch", in_a_call(lambda workspace, layers: None),
          NAMES_2, "no error", DEADLINE_S),
    Fault("a rank calls another layer", "dispatch", in_a_call(lambda workspace, layers: call(layers[1], FAULTY)),
          "rank 2 is in dispatch of call 2, layer 1.*this rank in dispatch of call 2, layer 0",
          "rank 0 is in dispatch of call 2, layer 0", DEADLINE_S),
    Fault("a rank has more tokens than the capacity", "dispatch",
          in_a_call(lambda workspace, layers: call(layers[0], FAULTY, 9)),
          NAMES_2, r"ValueError: hidden_states has 9 tokens, above num_max_tokens_per_rank=8", DEADLINE_S),
    Fault("a count is damaged on its way", "dispatch", in_a_call(damaged_count),
          "step dispatch: the header from rank 2 is damaged", None, DEADLINE_S),
    Fault("rows are lost on their way back", "combine", in_a_call(rows_at_combine(lambda sends: {})),
          LEFT_2.format("combine"), None, DEADLINE_S),
    Fault("rows are slow, within the deadline", "combine", in_a_call(rows_at_combine(delayed), succeeds=True),
          "no error", "no error", DEADLINE_S),
    Fault("a rank comes late to the workspace", "places", at_workspace,
          rf"role host step places: rank [01] waited {DEADLINE_S} s at places for rank 2", "rank 0.*and rank 1",
          DEADLINE_S),
    Fault("a rank has another configuration", "workspace", other_configuration,
          *["ep_config.step_deadline_s differs between ranks: 8.0 on rank 0, 9.0 on rank 2"] * 2, DEADLINE_S),
    Fault("a rank does not come to reset()", "reset", at_reset,
          rf"role host step reset: rank [01] waited {DEADLINE_S} s at reset for rank 2, which was last seen at faults",
          "no error", DEADLINE_S),
    Fault("compilation fails on one rank", "preparation", preparing(broken_source),
          "step preparation: rank 2 could not prepare its workspace: CompileError", "CompileError", 30.0),
    Fault("compilation takes longer than the deadline", "preparation", preparing(lambda: time.sleep(3 * DEADLINE_S)),
          "no error", "no error", 4 * DEADLINE_S),
    Fault("memory runs out on one rank", "preparation", preparing(lambda: torch.empty(1 << 60)),
          "step preparation: rank 2 could not prepare its workspace: RuntimeError.*memory", "RuntimeError",
          DEADLINE_S),
    Fault("NVSHMEM is missing on one rank", "NVSHMEM", nvshmem_of("missing"),
          *["MissingLibraryError: NVSHMEM is missing: rank 2: nvshmem4py is not installed: pip install"] * 2,
          DEADLINE_S),
    Fault("NVSHMEM has another version on one rank", "NVSHMEM", nvshmem_of("newer"),
          *["version differs between the ranks: rank 0 has 3.4.5, rank 1 has 3.4.5, rank 2 has 3.8.0"] * 2, DEADLINE_S),
    Fault("the disk under the cache is full", "compilation", in_the_cache(full_disk),
          "no error", "cannot be used .*too large.*Set MEGAMOE_CACHE_DIR", 30.0),
    Fault("a cubin in the cache is cut short", "compilation", in_the_cache(truncated),
          "no error", "refused and compiled again: its digest does not match", 30.0),
    Fault("a cubin in the cache is from elsewhere", "compilation", in_the_cache(foreign),
          "no error", "refused and compiled again: it is not a kernel cache entry", 30.0),
    Fault("a rank closes its workspace early", "dispatch", in_a_call(closed_early, resets=False),
          NAMES_2, "MegaMoEError: the workspace is closed", DEADLINE_S),
    Fault("a rank is never started", "start", never_started,
          r"TimeoutError: rank [01] waited 1\.5 s at start for rank 2 of 3", None, START_S, True, NUM_RANKS, (0, 1)),
    Fault("a rank dies before its workspace", "places", dies("workspace"),
          rf"step places: rank [01] waited {DEADLINE_S} s at places for rank 2", None, DEADLINE_S, True),
    Fault("a rank dies before a call", "dispatch", dies("before"),
          LEFT_2.format("dispatch"), None, DEADLINE_S, True),
    Fault("a rank dies during a call", "combine", dies("during"), LEFT_2.format("combine"), None, DEADLINE_S, True),
    Fault("a rank dies after a call", "dispatch", dies("after"), LEFT_2.format("dispatch"), None, DEADLINE_S, True),
)  # fmt: skip
