"""Who holds which rank, and how rows travel between them: a list in one process, or torch.distributed.

Both classes have the same members; the first three are all that dispatch and combine need:
    ep_size: int            ranks in the group
    ranks: tuple[int, ...]  ep_ranks played by this process, ascending; per-rank lists elsewhere follow this order
    all_to_all(sends, step) sends[i][dst] = tuple of tensors that ranks[i] sends to dst; all tensors of one tuple have
                            the same number of rows. Returns received[i][src] = the tuple that src sent to ranks[i].
                            step: "dispatch" or "combine", for an error's record.
    start_call(layer, num_tokens_bound)
                            a call of the workspace's layer number `layer` begins
    wait_s: float           seconds spent waiting for peers so far
"""

import contextlib
import math
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megamoe.errors import ErrorRecord, MegaMoEError, absent_ranks_named
from megamoe.layout import STEPS
from megamoe_cuda.gather import gather

Bundle = tuple[Tensor, ...]
CONNECT_S = 5.0  # at least, for connections: the machine's time, which no short deadline is meant to judge
_num_exchanges = weakref.WeakKeyDictionary()  # group -> DistExchanges made on it


def whole_ms(seconds: float) -> timedelta:
    """For a wait of gloo, which drops fractions of a millisecond: never less than asked, so that a rank that is late is
    not taken for one that left."""
    return timedelta(milliseconds=max(math.ceil(seconds * 1000), 1))


@contextlib.contextmanager
def connecting(group: dist.ProcessGroup, timeout: timedelta):
    """Around what makes connections between all ranks of a group within a timeout: ends when every rank has made its
    own, since one that is through and closes would break those that others still make. MegaMoEError on all if one
    cannot."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = str(error)
    with absent_ranks_named():
        problems = gather(group, "connections", problem, 2 * max(timeout.total_seconds(), CONNECT_S))
    unable = {rank: theirs for rank, theirs in enumerate(problems) if theirs is not None}
    if unable:
        have = len(problems) - len(unable)
        record = ErrorRecord(dist.get_rank(group), -1, "host", "connections", min(unable), have, len(problems))
        lines = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in unable.items())
        raise MegaMoEError(f"ranks could not connect within {timeout}: {lines}", record)


class LocalExchange:
    """All ep_size ranks live in this process: the oracle for any rank count, and virtual ranks on CPU."""

    wait_s = 0.0

    def __init__(self, ep_size: int):
        self.ep_size = ep_size
        self.ranks = tuple(range(ep_size))

    def all_to_all(self, sends: Sequence[Sequence[Bundle]], step: str) -> list[list[Bundle]]:
        return [[sends[src][dst] for src in self.ranks] for dst in self.ranks]

    def start_call(self, layer: int, num_tokens_bound: int) -> None:
        """One process cannot be in two calls."""


class Header(NamedTuple):
    """What a rank says to each peer before its rows. The words add up to zero, so that a changed one is noticed."""

    call: int  # of this workspace, counted since its last reset
    layer: int  # number of the layer on this workspace
    bound: int  # num_tokens_bound
    step: int  # index in STEPS
    num_rows: int
    row_bytes: int  # of one row, all its tensors together
    check: int

    @classmethod
    def of(cls, *words: int) -> "Header":
        return cls(*words, -sum(words))

    def __str__(self) -> str:
        step = STEPS[self.step] if self.step < len(STEPS) else self.step
        bound = f", num_tokens_bound {self.bound}" if self.bound >= 0 else ""
        return f"{step} of call {self.call}, layer {self.layer}{bound}, rows of {self.row_bytes} bytes"


class DistExchange:
    """This process is one rank of a torch.distributed group (gloo on CPU).

    arrive_deadline_s: seconds until every rank must have entered an exchange. step_deadline_s: seconds the rows may
        take then. Past either, or when a peer is gone, or in another call or layer: MegaMoEError, which names the peer.
    """

    def __init__(self, group: dist.ProcessGroup, arrive_deadline_s: float = 60.0, step_deadline_s: float = 10.0):
        self.group = group
        self.arrive_deadline_s = arrive_deadline_s
        self.step_deadline_s = step_deadline_s
        self.ep_size = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)
        self.ranks = (self.ep_rank,)
        self._peers = [peer for peer in range(self.ep_size) if peer != self.ep_rank]
        self._store = distributed_c10d._get_process_group_store(group)
        self._call, self._layer, self._bound, self._resets = 0, 0, -1, 0
        self._number = _num_exchanges[group] = _num_exchanges.get(group, 0) + 1  # on this group; equal on all ranks
        self._connections = group  # until a reset
        self.wait_s = 0.0

    def start_call(self, layer: int, num_tokens_bound: int = -1) -> None:
        self._call, self._layer, self._bound = self._call + 1, layer, num_tokens_bound

    def all_to_all(self, sends: Sequence[Sequence[Bundle]], step: str) -> list[list[Bundle]]:
        """MegaMoEError when a peer does not take part before the deadline."""
        (to_ranks,) = sends
        received = self._exchange_headers(to_ranks, step)
        return [self._exchange_rows(to_ranks, [header.num_rows for header in received], step)]

    def reset(self) -> None:
        """Connect anew, since gloo closes connections at a deadline. Collective: every rank must be on its way here."""
        self._resets += 1
        # Not dist.new_group: it forgets the name of a group that is gone, and finds its addresses under it again
        store = dist.PrefixStore(f"megamoe/exchange/{self._number}/{self._resets}", self._store)
        timeout = timedelta(seconds=max(self.arrive_deadline_s, self.step_deadline_s, CONNECT_S))
        with connecting(self.group, timeout):
            self._connections = dist.ProcessGroupGloo(store, self.ep_rank, self.ep_size, timeout)
        self._call, self._layer, self._bound = 0, 0, -1  # a rank may have been refused before its call began

    def close(self) -> None:
        """Drop the connections that reset() made; the group is the caller's. Twice is harmless."""
        self._connections = self.group

    def _exchange_headers(self, to_ranks: Sequence[Bundle], step: str) -> list[Header]:
        row_bytes = sum(t.element_size() * t.shape[1:].numel() for t in to_ranks[0])
        mine = [
            Header.of(self._call, self._layer, self._bound, STEPS.index(step), bundle[0].shape[0], row_bytes)
            for bundle in to_ranks
        ]
        device = to_ranks[0][0].device
        sends = {peer: torch.tensor(mine[peer], dtype=torch.int64, device=device) for peer in self._peers}
        receives = {peer: torch.empty(len(Header._fields), dtype=torch.int64, device=device) for peer in self._peers}
        self._point_to_point(sends, receives, self.arrive_deadline_s, step, "did not come")
        for peer, words in receives.items():
            mine[peer] = self._checked(Header(*words.tolist()), mine[peer], peer, step)
        return mine

    def _checked(self, theirs: Header, mine: Header, peer: int, step: str) -> Header:
        if sum(theirs) or theirs.num_rows < 0:
            raise self._failure(f"the header from rank {peer} is damaged: {list(theirs)}", step, peer, 0)
        for name in ("call", "layer", "bound", "step", "row_bytes"):
            have, want = getattr(theirs, name), getattr(mine, name)
            if have != want:
                rule = "make the same calls in one order" if name != "bound" else "pass the same num_tokens_bound"
                text = f"rank {peer} is in {theirs}, this rank in {mine}: all ranks {rule}"
                raise self._failure(text, step, peer, have, want)
        return theirs

    def _exchange_rows(self, to_ranks: Sequence[Bundle], num_received: list[int], step: str) -> list[Bundle]:
        # Bytes, because no backend carries every dtype used here (e4m3 least of all)
        first, me = to_ranks[0], self.ep_rank
        row_bytes = [t.element_size() * t.shape[1:].numel() for t in first]
        device = first[0].device
        sends = {
            peer: torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in to_ranks[peer]])
            for peer in self._peers
            if to_ranks[peer][0].shape[0]
        }
        receives = {
            peer: torch.empty(num_received[peer] * sum(row_bytes), dtype=torch.uint8, device=device)
            for peer in self._peers
            if num_received[peer]
        }
        self._point_to_point(sends, receives, self.step_deadline_s, step, "did not send its rows")
        bundles = []
        for src in range(self.ep_size):
            if src == me or src not in receives:
                bundles.append(to_ranks[me] if src == me else tuple(t[:0] for t in first))
                continue
            columns = receives[src].split([num_received[src] * width for width in row_bytes])
            # Cloned: a view as another dtype must start at a multiple of its size
            bundles.append(tuple(c.clone().view(t.dtype).view(-1, *t.shape[1:]) for c, t in zip(columns, first)))
        return bundles

    def _point_to_point(self, sends: dict, receives: dict, deadline_s: float, step: str, fault: str) -> None:
        # Not a collective: one that times out cannot say which rank was missing
        begin, have, peer = time.monotonic(), 1, -1
        since = begin  # of the wait under way, which may last deadline_s
        try:
            sending, coming = {}, {}  # kept until the end: dropping a send's handle cancels it
            for peer, data in sends.items():
                sending[peer] = self._connections.send([data], peer, 0)
            for peer, data in receives.items():
                coming[peer] = self._connections.recv([data], peer, 0)
            for peer, work in coming.items():  # noqa: B007 (the except clause tells it)
                work.wait(whole_ms(since + deadline_s - time.monotonic()))
                have += 1
            since, deadline_s, fault = time.monotonic(), self.step_deadline_s, "did not take what was sent"
            for peer, work in sending.items():  # noqa: B007
                work.wait(whole_ms(since + deadline_s - time.monotonic()))
        except RuntimeError as error:
            late, seconds = time.monotonic() - since >= deadline_s, time.monotonic() - begin
            text = f"rank {peer} {fault} within {deadline_s} s" if late else f"rank {peer} left after {seconds:.1f} s"
            cause = str(error).partition("] ")[2].partition(". ")[0] or str(error)  # without gloo's place and advice
            raise self._failure(f"{text}: {cause}", step, peer, have) from error
        finally:
            self.wait_s += time.monotonic() - begin

    def _failure(self, text: str, step: str, peer: int, have: int, want: int | None = None) -> MegaMoEError:
        record = ErrorRecord(self.ep_rank, -1, "exchange", step, peer, have, self.ep_size if want is None else want)
        return MegaMoEError(text + self._first_story(text, step), record)

    def _first_story(self, text: str, step: str) -> str:
        # A rank that gives up takes others with it, who see only that it left: the first one's words go to all
        mine = f"rank {self.ep_rank} at {step}: {text}"
        with contextlib.suppress(RuntimeError):  # the store may be gone with the process that held it
            first = self._store.compare_set(f"megamoe/lost/{self._number}/{self._resets}", "", mine).decode()
            if first != mine:
                return f"; the first to give up was {first}"
        return ""
