"""What carries rows between domains. A transport has

    all_to_all(rows, in_rows, outs, out_rows, step)
        One entry per rank held here. rows[i] [sum(in_rows[i]), W]: block d is for the rank of the same index in domain
        d; outs[i] [sum(out_rows[i]), W] gets block s from domain s. in_rows, out_rows: lists of num_domains ints that
        the host knows. Enqueued on the current stream; nothing waits for the device. step: "dispatch" or "combine".
    meet(counts)
        counts[i][d]: rows that rank i will send to domain d -> (what each domain will send to rank i, the largest
        count of any rank). On the host: waits for every rank, at most until the deadlines.
    start_call(layer)
        A call of the workspace's layer number `layer` begins. Said with all that gloo carries, so that domains which
        call different layers end by MegaMoEError; rows that NCCL carries say nothing.
    bytes_sent
        Bytes enqueued for other domains since the start.

torch.distributed carries the bytes today; benchmarks/notes/0009 says what takes its place where GPUs drive the network.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.errors import ErrorRecord, MegaMoEError
from megamoe.exchange import DistExchange

Counts = list[list[int]]


class LocalTransport:
    """All domains live in this process: virtual ranks, and the tests' oracle for any number of domains."""

    def __init__(self, num_domains: int, ranks_per_domain: int):
        self.num_domains, self.ranks_per_domain = num_domains, ranks_per_domain
        self.bytes_sent = 0

    def all_to_all(self, rows: list[Tensor], in_rows: Counts, outs: list[Tensor], out_rows: Counts, step: str) -> None:
        blocks = [one.split(counts) for one, counts in zip(rows, in_rows, strict=True)]
        for rank, (out, counts) in enumerate(zip(outs, out_rows, strict=True)):
            domain, index = divmod(rank, self.ranks_per_domain)
            for source, target in enumerate(out.split(counts)):
                block = blocks[source * self.ranks_per_domain + index][domain]
                target.copy_(block)
                self.bytes_sent += block.nbytes * (source != domain)

    def meet(self, counts: Counts) -> tuple[Counts, int]:
        size = self.ranks_per_domain
        received = [
            [counts[source * size + rank % size][rank // size] for source in range(self.num_domains)]
            for rank in range(len(counts))
        ]
        return received, max(map(max, counts))

    def start_call(self, layer: int) -> None:
        """One process cannot be in two calls."""


class DistTransport:
    """This process is one rank. rows, across: process groups of the ranks with its index, one a domain, in the order
    of domains; within: that of its own domain. CUDA rows go over `rows` (NCCL), CPU rows and counts over the others
    (gloo).

    A peer that does not come: MegaMoEError naming its domain, past the deadlines, for everything that goes through
    gloo. What NCCL carries ends by the group's timeout, through torch's watchdog, which ends the process.
    """

    def __init__(self, rows, across: dist.ProcessGroup, within: dist.ProcessGroup, arrive_s: float, step_s: float):
        self.num_domains, self.ranks_per_domain = dist.get_world_size(across), dist.get_world_size(within)
        self.domain, self.index = dist.get_rank(across), dist.get_rank(within)
        self.bytes_sent = 0
        self._rows, self._arrive_s = rows, arrive_s
        self._across, self._within = DistExchange(across, arrive_s, step_s), DistExchange(within, arrive_s, step_s)

    def rebind(self, across: dist.ProcessGroup, within: dist.ProcessGroup) -> None:
        """Go on with new groups of the same ranks for all that gloo carries."""
        renew(self._across, across)
        renew(self._within, within)

    def all_to_all(self, rows: list[Tensor], in_rows: Counts, outs: list[Tensor], out_rows: Counts, step: str) -> None:
        ((row,), (sent,), (out,), (coming,)) = rows, in_rows, outs, out_rows
        self.bytes_sent += (sum(sent) - sent[self.domain]) * row[:1].nbytes if len(row) else 0
        if row.device.type == "cuda":
            dist.all_to_all_single(out, row, coming, sent, group=self._rows)
            return
        (received,) = self._named(self._across, [[(block,) for block in row.split(sent)]], step)
        for domain, (bundle, count) in enumerate(zip(received, coming, strict=True)):
            if len(bundle[0]) != count:
                here, peer = (d * self.ranks_per_domain + self.index for d in (self.domain, domain))
                raise MegaMoEError(
                    f"domain {domain} sent {len(bundle[0])} rows where {count} were due; give every rank the same "
                    "num_tokens_bound",
                    ErrorRecord(here, -1, "exchange", step, peer, len(bundle[0]), count),
                )
        torch.cat([bundle[0] for bundle in received], out=out)

    def meet(self, counts: Counts) -> tuple[Counts, int]:
        (mine,) = counts
        largest = max(mine)
        tables = [[(torch.tensor([[count, largest]]),) for count in mine]]
        (received,) = self._named(self._across, tables, "dispatch")
        received = [bundle[0][0].tolist() for bundle in received]
        largest = max(other for _, other in received)
        if self.ranks_per_domain > 1:
            (others,) = self._within.all_to_all([[(torch.tensor([[largest]]),)] * self.ranks_per_domain], "dispatch")
            largest = max(int(bundle[0]) for bundle in others)
        return [[count for count, _ in received]], largest

    def start_call(self, layer: int) -> None:
        for exchange in (self._across, self._within):
            exchange.start_call(layer)

    def _named(self, exchange: DistExchange, sends: list, step: str) -> list:
        try:
            return exchange.all_to_all(sends, step)
        except MegaMoEError as error:
            here, peer = self.domain * self.ranks_per_domain + self.index, error.record.index
            if error.__cause__ is None:  # a header came, but of another call or layer, or damaged
                text = f"domain {peer} sent what does not fit; ranks of index {self.index}, counted by domain: {error}"
            elif peer < 0:
                text = f"rows from other domains did not arrive: {error.__cause__}"
            else:
                text = (
                    f"domain {peer} did not come within {self._arrive_s} s: no word from its rank of index "
                    f"{self.index} ({error.__cause__})"
                )
            peer = peer * self.ranks_per_domain + self.index if peer >= 0 else peer
            raise MegaMoEError(text, error.record._replace(rank=here, index=peer)) from error


def renew(exchange: DistExchange, group: dist.ProcessGroup) -> None:
    """The same object on a new group: an engine may hold it."""
    exchange.__init__(group, exchange.arrive_deadline_s, exchange.step_deadline_s)
