"""One value of every rank to every rank, within a deadline: how host code waits for its peers, and the only way.

Through the process group's store instead of a collective: a collective waits as long as the group was told at its
creation (half an hour by default), cannot say which rank is missing, and leaves gloo's connections closed when it gives
up. A rank that is busy with something long that its peers must not count, such as a compilation, says so (`busy`).
"""

import contextlib
import json
import sys
import threading
import time
import weakref

import torch.distributed as dist
from torch.distributed import distributed_c10d

DEADLINE_S = 60.0
HEARTBEAT_S = 0.5
_completed = weakref.WeakKeyDictionary()  # group -> {step: gathers that came to their end}


class AbsentRankError(RuntimeError):
    """rank waited for the ranks `absent` at `step` until the deadline passed."""

    def __init__(self, message: str, rank: int, absent: tuple[int, ...], step: str, num_ranks: int):
        super().__init__(message)
        self.rank, self.absent, self.step, self.num_ranks = rank, absent, step, num_ranks


def gather(group, step: str, value=None, deadline_s: float = DEADLINE_S, *, reader: int | None = None) -> list:
    """`value` of every rank of `group`, by rank. Collective; also a barrier.

    step: a word that names the place, equal on all ranks. value: what JSON carries, up to 8 MiB. deadline_s: seconds
    until every rank must have come; it starts again while a missing rank says that it is busy. reader: the only rank
    that fetches the values, where they are large; the others get an empty list. None: all do.
    AbsentRankError, on all ranks that had come, names the missing ones and where each was last seen. Who comes after
    that waits for the others' next call of the same step.
    """
    store = distributed_c10d._get_process_group_store(group)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    counts = _completed.setdefault(group, {})
    begin = time.monotonic()
    try:
        number = counts.get(step, 0)
        while store.check([_key(step, number, "end")]):  # a round without this rank: it can only have been given up
            number += 1
        keys = [_key(step, number, peer) for peer in range(num_ranks)]
        counts[step] = number + 1
        store.set(f"megamoe/at/{rank}", f"{step} {number}")
        store.set(keys[rank], json.dumps(value))
        absent = _wait(store, keys, _key(step, number, "end"), begin, deadline_s)
        end = json.dumps([absent, _story(store, rank, step, absent, time.monotonic() - begin)])
        # The first to see everybody, or to give up, decides for all
        absent, story = json.loads(store.compare_set(_key(step, number, "end"), "", end))
        if not absent:
            values = [json.loads(store.get(key)) for key in keys] if reader in (None, rank) else []
            if number:  # every rank has come here, so nobody still reads the round before
                store.delete_key(_key(step, number - 1, rank))
            return values
    except dist.DistNetworkError as error:
        raise AbsentRankError(
            f"rank {rank} at {step}: the store of the process group is gone, and with it the process that held it "
            f"(rank 0, or the launcher): {str(error).splitlines()[0]}",
            rank, (0,), step, num_ranks,
        ) from error  # fmt: skip
    raise AbsentRankError(story, rank, tuple(absent), step, num_ranks)


def agree(
    group,
    problem: str | None,
    what: str,
    remedy: str,
    kind: type[Exception] = RuntimeError,
    *,
    step: str = "agree",
    deadline_s: float = DEADLINE_S,
) -> None:
    """Collective: `kind` on every rank when any rank brought a problem, naming those ranks."""
    problems = gather(group, step, problem, deadline_s)
    lines = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
    if lines:
        raise kind(f"{what}: " + "; ".join(lines) + f"\n  remedy: {remedy}")


@contextlib.contextmanager
def busy(group, deadline_s: float = DEADLINE_S):
    """While inside, peers that wait for this rank in `gather`, with this deadline, do not count the time. group: None
    does nothing."""
    if group is None or dist.get_world_size(group) == 1:
        yield
        return
    store, key = distributed_c10d._get_process_group_store(group), f"megamoe/busy/{dist.get_rank(group)}"

    def beat(done: threading.Event) -> None:
        number = 0
        with contextlib.suppress(RuntimeError):  # the store is gone: the next gather says so
            while not done.is_set():
                store.set(key, str(number))
                number += 1
                done.wait(min(HEARTBEAT_S, deadline_s / 5))

    with _beside(beat, "megamoe-busy"):
        yield


@contextlib.contextmanager
def told(group, call: str, deadline_s: float = DEADLINE_S):
    """Around a library's collective call, which waits for its peers without end and cannot be given up: a line on
    stderr for each deadline_s that it lasts, naming the call and where each peer was last seen. Only of a call that
    releases the interpreter's lock."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    store = distributed_c10d._get_process_group_store(group)
    begin = time.monotonic()

    def tell(done: threading.Event) -> None:
        while not done.wait(deadline_s):
            try:
                seen = ", ".join(f"rank {peer} {_last_seen(store, peer)}" for peer in range(num_ranks) if peer != rank)
            except RuntimeError as error:
                seen = f"the store of the process group is gone: {str(error).splitlines()[0]}"
            print(
                f"megamoe: rank {rank} is in {call} for {time.monotonic() - begin:.1f} s, which has no deadline and "
                f"waits for all ranks: {seen}\n  remedy: if a rank has died there, stop the job: its launcher can",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    with _beside(tell, "megamoe-told"):
        yield


@contextlib.contextmanager
def _beside(work, name: str):
    """While inside, work(done) runs in a thread; it ends soon after the event `done` is set."""
    done = threading.Event()
    thread = threading.Thread(target=work, args=(done,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _key(step: str, number: int, rank: int | str) -> str:
    return f"megamoe/{step}/{number}/{rank}"


def _wait(store, keys: list[str], end: str, begin: float, deadline_s: float) -> list[int]:
    """The ranks that had not come when the deadline passed, or when another rank ended the round."""
    beats: dict[int, bytes] = {}
    pause = 0.0005
    # Asked for, not waited for: each wait that runs out would write two warnings to stderr
    while not store.check(keys):
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        for rank in absent:
            key = f"megamoe/busy/{rank}"
            beat = store.get(key) if store.check([key]) else b""
            if beat != beats.setdefault(rank, beat):
                beats[rank], begin = beat, time.monotonic()
        if absent and (time.monotonic() >= begin + deadline_s or store.check([end])):
            return absent
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return []


def _story(store, rank: int, step: str, absent: list[int], seconds: float) -> str:
    seen = " and ".join(f"rank {peer}, which {_last_seen(store, peer)}" for peer in absent)
    return f"rank {rank} waited {seconds:.1f} s at {step} for {seen}"


def _last_seen(store, rank: int) -> str:
    key = f"megamoe/at/{rank}"
    if not store.check([key]):
        return "was not seen yet"
    step, _, number = store.get(key).decode().rpartition(" ")
    return f"was last seen at {step}, its number {int(number) + 1}"
