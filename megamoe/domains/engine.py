"""The engine of several domains: exchange between domains around the engine of one.

    pack -> exchange -> the domain's own dispatch ... combine -> exchange back -> sum over domains

Inside a domain, the arrivals are further tokens of the rank that received them; the domain's engine (the fused kernel,
or steps.py on CPU) neither knows nor needs to know where they came from. steps.add_domains defines the sum.

A call is cut into pieces, of which two may be under way. There are two ways to cut:

fixed    domain_tokens=None. Every rank sends each domain the same rows, `bound / pieces` of them, whatever the routing
         says; the receiver serves those that name its experts. All shapes are known to the host, nothing is read back,
         so the call can be captured into a CUDA graph and no buffer can overflow. The wire carries the worst case.
rounds   domain_tokens=c. A token's row goes to the domains that hold one of its experts and to no other: with routing
         limited to max_nodes nodes, a node a domain, at most max_nodes copies. Counts meet on the host; all ranks then
         make the same number of rounds of at most c rows from any rank to any domain. Nothing is dropped.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from megamoe.config import MoEConfig
from megamoe.domains import workspace as resources
from megamoe.domains.rows import UNUSED, RowFormat, ids_of, pack, unpack
from megamoe.domains.traffic import domains_of_tokens
from megamoe.engine import make_engine
from megamoe.errors import MegaMoEError
from megamoe.steps import ExpertWeights, RankInput, add_domains


class Filled(NamedTuple):
    """One rank's part of a piece: rows int32 [sum(sent), words] in the order of domains, and how many rows go to each
    domain and come from it."""

    rows: Tensor
    sent: list[int]
    received: list[int]


def in_order(count: int, dispatch: Callable, serve: Callable, back: Callable) -> None:
    """The order in which every rank enqueues `count` pieces: each exchange beside the experts of its neighbour.

    dispatch(k + 1) comes before serve(k), so that it can run beside it; back(k) before dispatch(k + 2), whose buffers
    it frees. The order is the same on all ranks, as collectives demand.
    """
    dispatch(0)
    for piece in range(count):
        if piece + 1 < count:
            dispatch(piece + 1)
        serve(piece)
        back(piece)


class TwoLevelEngine:
    """Behind MoELayer, like TorchEngine and FusedEngine. Lists are per rank held here."""

    repeat = None

    def __init__(self, config: MoEConfig, workspace):
        self.config, self.domains = config, workspace.domains
        self.limit = workspace.ep_config.domain_tokens
        inner = resources.domain_config(config, self.domains.num_domains)
        self.engines = [make_engine(inner, one) for one in self.domains.inner]
        self.number, workspace.num_layers = workspace.num_layers, workspace.num_layers + 1

    @property
    def wait_s(self) -> float | None:
        """Seconds in the domains' own exchanges; those between domains are not counted."""
        waits = [engine.wait_s for engine in self.engines]
        return None if None in waits else sum(waits)

    @property
    def load_count(self) -> list[tuple[Tensor, Tensor]]:
        """As TorchEngine's; a rank serves no expert of another domain."""
        counts = [pair for engine in self.engines for pair in engine.load_count]
        share = self.config.num_experts // self.domains.num_domains
        domains = [rank // self.domains.ranks_per_domain for rank in self.domains.ranks]
        return [
            (pad(logical, (domain * share, self.config.num_experts - (domain + 1) * share)), physical)
            for domain, (logical, physical) in zip(domains, counts, strict=True)
        ]

    def load_weights(self, weights: list[ExpertWeights]) -> None:
        for engine, part in zip(self.engines, self.domains.by_domain(weights), strict=True):
            engine.load_weights(part)

    @torch.no_grad()
    def forward(
        self, inputs: Sequence[RankInput], num_tokens_bound: int, outs: Sequence[Tensor | None], kind=None, stream=None
    ) -> list[Tensor]:
        self.check()
        packed = [pack(self.config, rank_input) for rank_input in inputs]
        call = self._fixed if self.limit is None else self._rounds
        results = call([rows for rows, _ in packed], packed[0][1], num_tokens_bound)
        return [y if out is None else out.copy_(y) for y, out in zip(results, outs, strict=True)]

    def share_weights(self, other: "TwoLevelEngine") -> None:
        for engine, theirs in zip(self.engines, other.engines, strict=True):
            engine.share_weights(theirs)

    def expert_tensors(self) -> list[list[Tensor]]:
        return [tensors for engine in self.engines for tensors in engine.expert_tensors()]

    def check(self) -> None:
        for engine in self.engines:
            self._in_domain(engine, engine.check)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def _fixed(self, rows: list[Tensor], form: RowFormat, bound: int) -> list[Tensor]:
        domains = self.domains
        domains.transport.start_call(self.number)
        count = 2 if bound >= resources.OVERLAP_MIN_TOKENS else 1
        size = math.ceil(bound / count)
        counts = [size] * domains.num_domains
        backs = [[] for _ in rows]

        def fill(i: int, piece: int) -> Filled:
            send = domains.take(i, "send", piece, (sum(counts), form.words), torch.int32)
            blocks, here = send.view(-1, size, form.words), rows[i][piece * size : (piece + 1) * size]
            blocks[:, : len(here)] = here
            ids_of(blocks[:, len(here) :], form).fill_(UNUSED)  # rows beyond name no expert, whatever else they hold
            return Filled(send, counts, counts)

        def keep(i: int, piece: int, back: Tensor) -> None:
            backs[i].append(back.view(domains.num_domains, size, -1))

        if bound:
            self._run(count, fill, keep, form, size)
        return [
            torch.cat([add_domains(back) for back in parts])[: len(one)] if parts else self._nothing(one, form)
            for one, parts in zip(rows, backs, strict=True)
        ]

    def _rounds(self, rows: list[Tensor], form: RowFormat, bound: int) -> list[Tensor]:
        domains, limit = self.domains, self.limit
        if rows[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(f"domain_tokens={limit} counts rows on the host; capture graphs with domain_tokens=None")
        tokens = [self._tokens_by_domain(i, one, form) for i, one in enumerate(rows)]
        totals = [[len(one) for one in by_domain] for by_domain in tokens]
        domains.transport.start_call(self.number)  # behind what may be refused on this rank alone
        coming, largest = domains.transport.meet(totals)
        count = math.ceil(largest / limit)
        backs = [[[] for _ in range(domains.num_domains)] for _ in rows]

        def part_of(total: int, piece: int) -> int:
            return min(max(total - piece * limit, 0), limit)

        def fill(i: int, piece: int) -> Filled:
            chosen = torch.cat([one[piece * limit : (piece + 1) * limit] for one in tokens[i]])
            sent, received = ([part_of(total, piece) for total in one[i]] for one in (totals, coming))
            send = domains.take(i, "send", piece, (len(chosen), form.words), torch.int32)
            return Filled(torch.index_select(rows[i], 0, chosen, out=send), sent, received)

        def keep(i: int, piece: int, back: Tensor) -> None:
            for domain, block in enumerate(back.split([part_of(total, piece) for total in totals[i]])):
                backs[i][domain].append(block.clone())  # the next piece but one takes the buffer

        if count:
            self._run(count, fill, keep, form, min(limit, math.ceil(bound / count)))
        results = []
        for one, by_domain, parts in zip(rows, tokens, backs, strict=True):
            y = self._nothing(one, form)
            total = y.float()
            for chosen, blocks in zip(by_domain, parts, strict=True):
                if len(chosen):  # distinct tokens, so that the indexed add has no order of its own
                    total[chosen] += torch.cat(blocks).float()
            results.append(total.to(y.dtype))
        return results

    def _tokens_by_domain(self, i: int, rows: Tensor, form: RowFormat) -> list[Tensor]:
        ids = ids_of(rows, form)
        bad = ((ids < UNUSED) | (ids >= self.config.num_experts)).any(1)
        touched = domains_of_tokens(ids.clamp(UNUSED, self.config.num_experts - 1), self.config.num_experts,
                                    self.domains.num_domains)  # fmt: skip
        touched, bad = touched.t().cpu(), bad.cpu()  # the one wait for the device, before anything is sent
        if bad.any():
            token = int(bad.nonzero()[0])
            raise ValueError(
                f"topk_idx of token {token} of rank {self.domains.ranks[i]} names {ids[token].tolist()}; legal are -1 "
                f"and 0 to {self.config.num_experts - 1}"
            )
        return [one.nonzero()[:, 0].to(rows.device) for one in touched]

    def _nothing(self, rows: Tensor, form: RowFormat) -> Tensor:
        return torch.zeros(len(rows), self.config.hidden, dtype=self._y_dtype(form), device=rows.device)

    def _y_dtype(self, form: RowFormat) -> torch.dtype:
        return torch.bfloat16 if self.config.has_e4m3_activations else form.x_dtype

    def _run(self, count: int, fill: Callable, keep: Callable, form: RowFormat, hint: int) -> None:
        """Exchange, serve and bring back `count` pieces. hint: tokens of a rank in one, for the choice of a tile."""
        domains, config, held = self.domains, self.config, range(len(self.domains.ranks))
        beside = domains.exchange_stream if count > 1 else None
        filled, arrived, served, events = {}, {}, {}, {}

        def exchanging():
            if beside is None:
                return nullcontext()
            beside.wait_stream(torch.cuda.current_stream(domains.device))
            return torch.cuda.stream(beside)

        def dispatch(piece: int) -> None:
            with exchanging():
                parts = filled[piece] = [fill(i, piece) for i in held]
                outs = arrived[piece] = [
                    domains.take(i, "recv", piece, (sum(part.received), form.words), torch.int32)
                    for i, part in zip(held, parts, strict=True)
                ]
                rows, sent, received = map(list, zip(*parts, strict=True))
                domains.transport.all_to_all(rows, sent, outs, received, "dispatch")
                if beside is not None:
                    events[piece] = beside.record_event()

        def serve(piece: int) -> None:
            if beside is not None:
                torch.cuda.current_stream(domains.device).wait_event(events[piece])
            inputs, ys = [], []
            for i, rank, rows in zip(held, domains.ranks, arrived[piece], strict=True):

                def take(name, shape, dtype, i=i):
                    return domains.take(i, name, piece, shape, dtype)

                domain = rank // domains.ranks_per_domain
                inputs.append(unpack(config, rows, form, domains.num_domains, domain, take))
                ys.append(take("y", (len(rows), config.hidden), self._y_dtype(form)))
            parts = zip(self.engines, domains.by_domain(inputs), domains.by_domain(ys), strict=True)
            for engine, inner_inputs, inner_ys in parts:
                self._in_domain(engine, lambda e=engine, a=inner_inputs, b=inner_ys: e.forward(a, hint, b))
            served[piece] = ys

        def back(piece: int) -> None:
            with exchanging():
                parts = filled.pop(piece)
                outs = [
                    domains.take(i, "back", piece, (sum(part.sent), config.hidden), self._y_dtype(form))
                    for i, part in zip(held, parts, strict=True)
                ]
                sent, received = [part.sent for part in parts], [part.received for part in parts]
                domains.transport.all_to_all(served.pop(piece), received, outs, sent, "combine")
                for i, out in zip(held, outs, strict=True):
                    keep(i, piece, out)

        in_order(count, dispatch, serve, back)
        if beside is not None:
            torch.cuda.current_stream(domains.device).wait_stream(beside)

    def _in_domain(self, engine, call: Callable) -> None:
        try:
            call()
        except MegaMoEError as error:
            size = self.domains.ranks_per_domain
            begin = self.domains.ranks[0] // size * size + self.engines.index(engine) * size
            told = MegaMoEError(
                f"in domain {begin // size}, of ranks {begin} to {begin + size - 1}, which it counts from 0 (and "
                f"tokens as they arrived): {error}"
            )
            told.record = error.record
            raise told from error
