"""Who holds which rank, and how rows travel between them: a list in one process, or torch.distributed.

Both classes have the same three members, which is all that dispatch and combine need:
    ep_size: int            ranks in the group
    ranks: tuple[int, ...]  ep_ranks played by this process, ascending; per-rank lists elsewhere follow this order
    all_to_all(sends, step) sends[i][dst] = tuple of tensors that ranks[i] sends to dst; all tensors of one tuple have
                            the same number of rows. Returns received[i][src] = the tuple that src sent to ranks[i].
                            step: "dispatch" or "combine", for an error's record.
"""

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.errors import ErrorRecord, MegaMoEError

Bundle = tuple[Tensor, ...]


class LocalExchange:
    """All ep_size ranks live in this process: the oracle for any rank count, and virtual ranks on CPU."""

    def __init__(self, ep_size: int):
        self.ep_size = ep_size
        self.ranks = tuple(range(ep_size))

    def all_to_all(self, sends: Sequence[Sequence[Bundle]], step: str) -> list[list[Bundle]]:
        return [[sends[src][dst] for src in self.ranks] for dst in self.ranks]


class DistExchange:
    """This process is one rank of a torch.distributed group (gloo on CPU).

    arrive_deadline_s: seconds until every rank must have entered an exchange. step_deadline_s: seconds the rows may
        take then. Past either: MegaMoEError, which names a rank that did not come.
    """

    def __init__(self, group: dist.ProcessGroup, arrive_deadline_s: float = 60.0, step_deadline_s: float = 10.0):
        self.group = group
        self.arrive_deadline_s = arrive_deadline_s
        self.step_deadline_s = step_deadline_s
        self.ep_size = dist.get_world_size(group)
        self.ep_rank = dist.get_rank(group)
        self.ranks = (self.ep_rank,)
        self._own_group = False

    def all_to_all(self, sends: Sequence[Sequence[Bundle]], step: str) -> list[list[Bundle]]:
        """MegaMoEError when a peer does not take part before the deadline."""
        (to_ranks,) = sends
        num_sent = [bundle[0].shape[0] for bundle in to_ranks]
        num_received = self._exchange_counts(num_sent, to_ranks[0][0].device, step)
        columns = zip(*to_ranks, strict=True)
        received = [self._exchange_rows(column, num_sent, num_received, step) for column in columns]
        return [list(zip(*received, strict=True))]

    def reset(self) -> None:
        """Replace the group by a new one of the same ranks, since gloo closes connections at a deadline. Collective."""
        members = dist.get_process_group_ranks(self.group)
        timeout = timedelta(seconds=max(self.arrive_deadline_s, self.step_deadline_s))
        try:
            group = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=True)
        except RuntimeError as error:
            raise self._failure(
                f"not every rank called reset() within {timeout}: {error}", "dispatch", -1, 0
            ) from error
        self.close()
        self.group, self._own_group = group, True

    def close(self) -> None:
        """Drop the group if reset() made it; the caller's stays. Twice is harmless."""
        if self._own_group:
            dist.destroy_process_group(self.group)
            self._own_group = False

    def _exchange_counts(self, num_sent: list[int], device: torch.device, step: str) -> list[int]:
        # Point to point, because a collective that times out cannot say which rank was missing
        deadline = time.monotonic() + self.arrive_deadline_s
        peers = [peer for peer in range(self.ep_size) if peer != self.ep_rank]
        sent = torch.tensor(num_sent, dtype=torch.int64, device=device)
        received = sent.clone()
        waiting_for, have = -1, 1
        try:
            # Kept until the end: dropping a send's handle cancels it
            sending = [dist.isend(sent[peer : peer + 1], group=self.group, group_dst=peer) for peer in peers]
            coming = [dist.irecv(received[peer : peer + 1], group=self.group, group_src=peer) for peer in peers]
            for waiting_for, work in zip(peers, coming, strict=True):  # noqa: B007 (the except clause tells it)
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                have += 1
            for waiting_for, work in zip(peers, sending, strict=True):  # noqa: B007
                work.wait(timedelta(seconds=self.step_deadline_s))
        except RuntimeError as error:
            text = f"rank {waiting_for} did not come within {self.arrive_deadline_s} s: {error}"
            raise self._failure(text, step, waiting_for, have) from error
        return received.tolist()

    def _exchange_rows(
        self, tensors: Sequence[Tensor], num_sent: list[int], num_received: list[int], step: str
    ) -> tuple[Tensor, ...]:
        # Bytes, because no backend carries every dtype used here (e4m3 least of all)
        first = tensors[0]
        row_shape = first.shape[1:]
        row_bytes = first.element_size() * row_shape.numel()
        flat = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])
        out = torch.empty(sum(num_received) * row_bytes, dtype=torch.uint8, device=first.device)
        out_splits, in_splits = [n * row_bytes for n in num_received], [n * row_bytes for n in num_sent]
        try:
            work = dist.all_to_all_single(out, flat, out_splits, in_splits, group=self.group, async_op=True)
            work.wait(timedelta(seconds=self.step_deadline_s))
        except RuntimeError as error:
            text = f"the rows did not arrive within {self.step_deadline_s} s: {error}"
            raise self._failure(text, step, -1, 0) from error
        return out.view(first.dtype).view(-1, *row_shape).split(num_received)

    def _failure(self, text: str, step: str, peer: int, have: int) -> MegaMoEError:
        record = ErrorRecord(self.ep_rank, -1, "exchange", step, peer, have, self.ep_size)
        return MegaMoEError(text, record)
