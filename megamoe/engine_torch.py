"""The CPU engine: steps.py on the ranks held here."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megamoe.config import MoEConfig
from megamoe.errors import MegaMoEError
from megamoe.plan.choice import ReplicaMap
from megamoe.rebalance import Move, default_placement
from megamoe.route.replica import choose_replicas
from megamoe.steps import ExpertWeights, RankInput, moe_layer


class TorchEngine:
    """Holds the weights and runs the specification. The layer has validated everything; nothing is checked again.

    placement: int64 [ep_size * slots], the expert that each slot holds, -1 = none; placement_version changes with it,
        and with what is staged.
    load_count: per rank held here (logical int64 [num_experts], physical int64 [slots]), rows served so far.
    """

    repeat = None

    def __init__(self, config: MoEConfig, workspace):
        self.config = config
        self.exchange, self.room = workspace.exchange, workspace.staging
        self.ep_size = workspace.ep_size
        self.slots = workspace.ep_config.num_slots(config, self.ep_size)
        self.placement = default_placement(config.num_experts, self.ep_size, self.slots)
        self.placement_version = 0
        self.number, workspace.num_layers = workspace.num_layers, workspace.num_layers + 1
        self.wait_s = 0.0
        self.weights: list[ExpertWeights] | None = None
        self._loaded_by: TorchEngine | None = None
        self._replicas: ReplicaMap | None = None
        self._staged: list[tuple[Tensor, ...]] = []
        self.load_count = [
            (torch.zeros(config.num_experts, dtype=torch.int64), torch.zeros(self.slots, dtype=torch.int64))
            for _ in self.exchange.ranks
        ]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights and scale factors."""
        return sum(t[0].nbytes for t in self.weights[0] if t is not None)

    def load_weights(self, weights: list[ExpertWeights]) -> None:
        """weights: one per rank held here. Copied: in place from the second time on, so that addresses stay.

        The placement is the default one again.
        """
        if self.weights is None:
            shared = self.config.num_shared_experts
            self.weights = [
                ExpertWeights(*(None if t is None else t.new_empty(self.slots + shared, *t.shape[1:]) for t in rank))
                for rank in weights
            ]
        for mine, theirs in zip(self.weights, weights, strict=True):
            for target, source in zip(mine, theirs, strict=True):
                if target is not None:
                    target[: len(source)].copy_(source)
        self.placement = default_placement(self.config.num_experts, self.ep_size, self.slots)
        self.placement_version += 1
        self._replicas, self._staged = None, []
        self.room.release(self)

    def check_fits(self, replicas: ReplicaMap) -> None:
        """Any map does."""

    def stage(self, moves: list[Move]) -> None:
        """Fetch the moved experts' weights; they wait until apply(). MegaMoEError if a peer does not come."""
        self.room.take(self)
        self._staged = []
        self.placement_version += 1  # whoever staged before may not apply any more
        sends = [
            [
                tuple(t[_slots(m.src_slot for m in moves if (m.src_rank, m.dst_rank) == (rank, dst))]
                      for t in _bytes(weights))
                for dst in range(self.ep_size)
            ]
            for rank, weights in zip(self.exchange.ranks, self.weights, strict=True)
        ]  # fmt: skip
        try:
            self._staged = self.exchange.all_to_all(sends, "dispatch")
        except MegaMoEError:
            self.room.release(self)
            raise

    def apply(self, moves: list[Move], placement: np.ndarray, replicas: ReplicaMap) -> None:
        """Put staged weights into their slots and the map in force, between two calls."""
        staged, self._staged = self._staged, []
        for rank, weights, bundles in zip(self.exchange.ranks, self.weights, staged, strict=False):
            for src, bundle in enumerate(bundles):
                slots = _slots(m.dst_slot for m in moves if (m.src_rank, m.dst_rank) == (src, rank))
                for target, source in zip(_bytes(weights), bundle, strict=True):
                    target[slots] = source
        self.placement, self._replicas = placement, replicas
        self.placement_version += 1
        self.room.release(self)

    def settle(self) -> None:
        """Nothing to wait for: stage() has received everything."""

    @torch.no_grad()
    def forward(
        self, inputs: Sequence[RankInput], num_tokens_bound: int, outs: Sequence[Tensor | None], kind=None, stream=None
    ) -> list[Tensor]:
        """num_tokens_bound chooses nothing here, since the torch exchange sends exact counts; but it must be equal."""
        waited = self.exchange.wait_s
        self.exchange.start_call(self.number, num_tokens_bound)
        try:
            results = self._serve(inputs)
        finally:
            self.wait_s += self.exchange.wait_s - waited
        return [y if out is None else out.copy_(y) for y, out in zip(results, outs, strict=True)]

    def _serve(self, inputs: list[RankInput]) -> list[Tensor]:
        loaded = self._loaded_by or self
        config = replace(self.config, num_experts=self.slots * self.ep_size)
        topk_idx = [_used(i) for i in inputs]
        if loaded._replicas is not None:
            topk_idx = choose_replicas(self.exchange, loaded._replicas, topk_idx)
        elif self.slots * self.ep_size != self.config.num_experts:
            local = self.config.num_local_experts(self.ep_size)
            topk_idx = [torch.where(idx >= 0, idx // local * self.slots + idx % local, -1) for idx in topk_idx]
        trace = {}
        slots = [i._replace(topk_idx=idx) for i, idx in zip(inputs, topk_idx, strict=True)]
        results = moe_layer(config, self.exchange, self.weights, slots, trace=trace)
        placement = torch.from_numpy(loaded.placement.reshape(self.ep_size, -1))
        for rank, (logical, physical) in zip(self.exchange.ranks, self.load_count, strict=True):
            rows, held = torch.tensor(trace[rank]["rows"].num_rows)[: self.slots], placement[rank]
            physical += rows
            logical.index_add_(0, held[held >= 0], rows[held >= 0])
        return results

    def share_weights(self, other: "TorchEngine") -> None:
        """Use what `other` has loaded, now and later, where it is placed; rows served are counted for each."""
        self.weights, self._loaded_by = other.weights, other._loaded_by or other

    def expert_tensors(self) -> list[list[Tensor]]:
        """Per rank what it was loaded with, tensors with slots along the first dimension."""
        return [[t for t in rank if t is not None] for rank in self.weights]

    def check(self) -> None:
        """Nothing is pending: every error of the torch path is raised by forward itself."""

    def close(self) -> None:
        self.weights = self._loaded_by = None
        self.room.release(self)


def _used(rank_input: RankInput) -> Tensor:
    # Ids of the tokens that take part, -1 for those from num_tokens on: they must not count as load
    idx = rank_input.topk_idx.long()
    if rank_input.num_tokens is None:
        return idx
    n = int(rank_input.num_tokens)
    return torch.where(torch.arange(len(idx), device=idx.device)[:, None] < n, idx, -1)


def _slots(slots) -> Tensor:
    return torch.tensor(list(slots), dtype=torch.int64)


def _bytes(weights: ExpertWeights) -> list[Tensor]:
    # e4m3 tensors are moved as bytes: indexing does not know the dtype everywhere
    return [t.view(torch.uint8) if t.element_size() == 1 else t for t in weights if t is not None]
