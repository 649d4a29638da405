"""What a workspace of several domains holds: a workspace of each domain held here, the transport, the buffers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config import EPConfig, MoEConfig
from megamoe.domains.rows import row_format
from megamoe.domains.transport import DistTransport, LocalTransport, renew
from megamoe.exchange import CONNECT_S, connecting

OVERLAP_MIN_TOKENS = 1024
"""Tokens of a rank from which a call is cut into two micro-batches: below, reading the experts' weights twice costs
more than the exchange that would be hidden. Reasoned from HBM and network rates, not measured."""

EXCHANGE_SMS = 8
"""SMs that the persistent kernel leaves to NCCL where the two overlap, and NCCL's limit of CTAs. Without them each
could wait for SMs that the other holds, on two ranks in opposite order, until the deadline."""

NUM_BUFFERS = 2  # of each kind where micro-batches overlap: one is filled while the other is served


@dataclass(frozen=True)
class Pieces:
    """How a call is cut. tokens: most rows that one piece takes from a rank to a domain. buffers: pieces in flight."""

    tokens: int
    buffers: int


def pieces_of(ep_config: EPConfig) -> Pieces:
    """What a workspace has room for: with domain_tokens that much a round, else two halves of a large call."""
    capacity, chosen = ep_config.num_max_tokens_per_rank, ep_config.domain_tokens
    if chosen is not None:
        return Pieces(min(chosen, capacity), NUM_BUFFERS if chosen < capacity else 1)
    if capacity < OVERLAP_MIN_TOKENS:
        return Pieces(capacity, 1)
    return Pieces(max(math.ceil(capacity / 2), OVERLAP_MIN_TOKENS - 1), NUM_BUFFERS)


def domain_config(config: MoEConfig, num_domains: int) -> MoEConfig:
    """The model as one domain sees it: its share of the experts."""
    return replace(config, num_experts=config.num_experts // num_domains)


def domain_ep_config(ep_config: EPConfig, num_domains: int, ranks_per_domain: int, num_sms: int | None) -> EPConfig:
    """The configuration of a domain's own workspace: arrivals from every domain are its tokens.

    num_sms: those of the device, None on CPU.
    """
    pieces = pieces_of(ep_config)
    virtual = ep_config.virtual_ranks is not None
    if num_sms is not None and pieces.buffers > 1 and not virtual:
        num_sms = min(ep_config.num_sms or num_sms, num_sms - EXCHANGE_SMS)
    else:
        num_sms = ep_config.num_sms
    return replace(
        ep_config, num_max_tokens_per_rank=num_domains * pieces.tokens, ranks_per_domain=ranks_per_domain,
        virtual_ranks=ranks_per_domain if virtual else None, domain_tokens=None, num_sms=num_sms,
    )  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """One row of plan_memory, per rank: as layout.Placed, with all buffers of one kind together."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    writer: str
    reader: str
    where: str = "local"


def buffers_of(configs: Sequence[MoEConfig], ep_config: EPConfig, num_domains: int) -> list[Buffer]:
    """What the exchange keeps on each CUDA rank beside the domain's own workspace, sized by its largest layer."""
    pieces = pieces_of(ep_config)
    rows = pieces.buffers, num_domains, pieces.tokens
    hidden, topk = max(c.hidden for c in configs), max(c.topk for c in configs)
    words = max(row_format(c).words for c in configs)
    kinds = (
        ("domain_send", words, "i32", 4, "packing", "transport"),
        ("domain_recv", words, "i32", 4, "transport", "unpacking"),
        ("domain_x", hidden, "e4m3", 1, "unpacking", "the domain's kernel"),
        ("domain_x_sf", max(row_format(c).sf for c in configs), "f32", 4, "unpacking", "the domain's kernel"),
        ("domain_topk_idx", topk, "i32", 4, "unpacking", "the domain's kernel"),
        ("domain_topk_weights", topk, "f32", 4, "unpacking", "the domain's kernel"),
        ("domain_y", hidden, "bf16", 2, "the domain's kernel", "transport"),
        ("domain_back", hidden, "bf16", 2, "transport", "sum over domains"),
    )
    return [
        Buffer(name, (*rows, width), dtype, math.prod(rows) * width * size, writer, reader)
        for name, width, dtype, size, writer, reader in kinds
    ]


class Domains:
    """Made by Workspace when its ranks are more than one domain. Collective, like Workspace.

    num_domains, ranks_per_domain; ranks: the ep ranks held here; inner: a Workspace for each domain held here;
    transport; pieces. Consecutive ranks are a domain; rank r has index r % ranks_per_domain in it.
    """

    def __init__(self, workspace, ranks_per_domain: int):
        ep_config, self.device = workspace.ep_config, workspace.device
        self.ranks_per_domain, self.num_domains = ranks_per_domain, workspace.ep_size // ranks_per_domain
        self.virtual = ep_config.virtual_ranks is not None
        self.ranks = tuple(range(workspace.ep_size)) if self.virtual else (workspace.ep_rank,)
        self.pieces = pieces_of(ep_config)
        self._groups: list[dist.ProcessGroup] = []
        if self.virtual:
            self.transport = LocalTransport(self.num_domains, ranks_per_domain)
            within = workspace.group
        else:
            self._everyone = workspace.group
            self._timeout = timedelta(seconds=ep_config.arrive_deadline_s + ep_config.step_deadline_s)
            with connecting(self._everyone, self._timeout):
                within, rows = meet_within, meet_across = self._connect(self.device)
                if workspace.is_cuda and ep_config.domain_tokens is not None:
                    # A missed deadline breaks gloo's connections: counts get some that nothing else depends on
                    meet_within, meet_across = self._connect(torch.device("cpu"))
            deadlines = ep_config.arrive_deadline_s, ep_config.step_deadline_s
            self.transport = DistTransport(rows, meet_across, meet_within, *deadlines)
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count if workspace.is_cuda else None
        configs = [domain_config(config, self.num_domains) for config in workspace.moe_configs]
        inner = domain_ep_config(ep_config, self.num_domains, ranks_per_domain, num_sms)
        here = self.num_domains if self.virtual else 1
        self.inner = [type(workspace)(configs, inner, group=within, device=self.device) for _ in range(here)]
        self._storage: list[dict[str, list[Tensor]]] = []
        if workspace.is_cuda:
            self._storage = [self._allocate(workspace) for _ in self.ranks]
        overlap = workspace.is_cuda and not self.virtual and self.pieces.buffers > 1
        self.exchange_stream = torch.cuda.Stream(self.device) if overlap else None
        self._first_exchange()

    def _connect(self, device: torch.device) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Groups of this rank's domain, and of the ranks with its index. Every rank takes part in making every group,
        in one order: torch names groups by counting, and a name that two ranks count differently never meets."""
        size, mine = self.ranks_per_domain, self.ranks[0]
        everyone = range(size * self.num_domains)
        within, across = None, None
        for ranks in [*_runs(everyone, size), *(everyone[index::size] for index in range(size))]:
            group = _new_group(list(ranks), device, self._timeout)
            if mine in ranks:
                within, across = (group, across) if within is None else (within, group)
        self._groups += [within, across]
        return within, across

    def _allocate(self, workspace) -> dict[str, list[Tensor]]:
        buffers = buffers_of(workspace.moe_configs, workspace.ep_config, self.num_domains)
        return {
            buffer.name: list(torch.empty(buffer.shape[0], buffer.bytes // buffer.shape[0], dtype=torch.uint8,
                                          device=self.device))
            for buffer in buffers
        }  # fmt: skip

    def _first_exchange(self) -> None:
        # NCCL connects at its first exchange, which must not be inside a graph
        if not self.virtual and self.device.type == "cuda":
            row = torch.zeros(self.num_domains, 1, dtype=torch.int32, device=self.device)
            ones = [[1] * self.num_domains]
            self.transport.all_to_all([row], ones, [torch.empty_like(row)], ones, "dispatch")
            torch.cuda.synchronize(self.device)
            self.transport.bytes_sent = 0

    def take(self, i: int, name: str, piece: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the i-th rank held here: on CUDA a part of the buffer for this piece, at the same
        address in every call of the same shape; on CPU a new one."""
        if not self._storage:
            return torch.empty(shape, dtype=dtype, device=self.device)
        flat = self._storage[i][f"domain_{name}"][piece % self.pieces.buffers]
        return flat[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def by_domain(self, per_rank: Sequence) -> list[list]:
        """Per rank held here -> per domain held here."""
        size = self.ranks_per_domain if self.virtual else 1
        return [[per_rank[i] for i in run] for run in _runs(range(len(per_rank)), size)]

    def reset(self) -> None:
        """Collective over all ranks of all domains. MegaMoEError if one does not come."""
        if not self.virtual:  # gloo closes its connections at a missed deadline
            with connecting(self._everyone, self._timeout):
                within, across = self._connect(torch.device("cpu"))
            self.transport.rebind(across, within)
        for inner in self.inner:
            if inner.is_cuda or self.virtual:
                inner.reset()
            elif self.ranks_per_domain > 1:
                renew(inner.exchange, within)

    def close(self) -> None:
        """Collective on CUDA, like Workspace.close."""
        for inner in self.inner:
            inner.close()
        self._drop_groups()
        self._storage = []

    def abandon(self) -> None:
        """As Workspace.abandon; the process should end."""
        for inner in self.inner:
            inner.abandon()
        self._storage = []

    def _drop_groups(self) -> None:
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []


def _runs(ranks: range, size: int) -> list[range]:
    return [ranks[begin : begin + size] for begin in range(0, len(ranks), size)]


def _new_group(ranks: list[int], device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    if device.type != "cuda":  # connects at once, within the timeout
        return dist.new_group(ranks, timeout=max(timeout, timedelta(seconds=CONNECT_S)), backend="gloo")
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas, options._timeout = EXCHANGE_SMS, timeout
    return dist.new_group(ranks, timeout=timeout, backend="cpu:gloo,cuda:nccl", pg_options=options)
