"""Expert copies on a GPU: the map that every launch reads, the counters it keeps, weights moved between launches."""

import math

import numpy as np
import torch

from megamoe import layout
from megamoe.config import MoEConfig
from megamoe.plan.choice import ReplicaMap, replica_map, words
from megamoe.rebalance import Move, Staging, default_placement
from megamoe_cuda.launch import copy_async


class DeviceReplicas:
    """Belongs to one layer's engine. Everything is enqueued on the current stream and keeps its address, so it may
    happen between replays of a captured graph.

    placement: int64 [ep_size * slots], the expert that each slot holds, -1 = none; placement_version changes with it,
        and with what is staged.
    counts: per rank held here int64 [num_experts + slots] on the device, rows served by expert and by slot.
    map: int32 on the device, words of csrc/sched/replica.cuh.
    """

    def __init__(self, config: MoEConfig, shared, slots: int, room: Staging):
        self.config, self.shared, self.slots, self.room = config, shared, slots, room
        self.ep_size = shared.ep_size
        self.expert_bytes = layout.expert_bytes(config)
        num_slots = slots * self.ep_size
        flows = min(config.num_experts, num_slots)
        num_words = (
            layout.REPLICA_HEADER_WORDS + config.num_experts + 1 + 2 * num_slots + 2 * flows
            + self.ep_size * config.num_experts
        )  # fmt: skip
        self.map = torch.zeros(num_words, dtype=torch.int32, device=shared.device)
        self.counts = [
            torch.zeros(config.num_experts + slots, dtype=torch.int64, device=shared.device)
            for _ in range(shared.num_ranks)
        ]
        self.placement_version = 0
        staging = next(region for region in shared.regions if region.name == "staging")
        self._staging = staging.offset
        self._pitch = math.prod(staging.shape[2:])
        self.reset()

    def reset(self) -> None:
        """The placement without a plan."""
        self.drop_staged()
        placed = default_placement(self.config.num_experts, self.ep_size, self.slots)
        self.put_in_force(placed, replica_map(placed, self.config.num_experts, self.ep_size, "static"))

    def drop_staged(self) -> None:
        """Its place is free for another layer's."""
        self.room.release(self)

    def check_fits(self, replicas: ReplicaMap) -> None:
        """ValueError where the kernel's tables are too small for this map."""
        if replicas.choice == "static":
            return
        for name, value, limit in (
            ("num_experts", replicas.num_logical_experts, layout.MAX_LOGICAL_EXPERTS),
            # Not the plan's copies: on the way to it old ones are still held
            ("slots of all ranks", self.slots * self.ep_size, layout.MAX_COPIES),
        ):
            if value > limit:
                raise ValueError(
                    f"choice={replicas.choice!r} with {name}={value}: the kernel's tables hold {limit}; use "
                    "choice='static'"
                )

    def put_in_force(self, placement: np.ndarray, replicas: ReplicaMap) -> None:
        """The map for every later launch."""
        host = torch.from_numpy(words(replicas).view(np.int32)).pin_memory()
        self.map[: len(host)].copy_(host, non_blocking=True)  # pinned: the stream, not the host, waits
        self.placement = placement
        self.placement_version += 1

    def stage(self, moves: list[Move], images: list[tuple[torch.Tensor, ...]]) -> None:
        """Push this process's experts into the receivers' staging memory."""
        self.room.take(self)
        self.placement_version += 1  # whoever staged before may not apply any more: another bank is read now
        stream = torch.cuda.current_stream(self.shared.device).cuda_stream
        first = self.shared.first_rank
        for move, place in self._places(moves):
            if not first <= move.src_rank < first + self.shared.num_ranks:
                continue
            target = self.shared.memory.base_ptrs[move.dst_rank] + place
            for tensor in images[move.src_rank - first]:
                image = tensor[move.src_slot]
                copy_async(target, image.data_ptr(), image.nbytes, stream)
                target += image.nbytes

    def apply(self, moves: list[Move], images: list[tuple[torch.Tensor, ...]]) -> None:
        """Copy what was staged for this process's ranks into its slots."""
        first = self.shared.first_rank
        for move, place in self._places(moves):
            if not first <= move.dst_rank < first + self.shared.num_ranks:
                continue
            staged = self.shared.memory.local[move.dst_rank - first][place:]
            for tensor in images[move.dst_rank - first]:
                image = tensor[move.dst_slot].view(-1)
                image.copy_(staged[: len(image)])
                staged = staged[len(image) :]
        self.room.release(self)

    def _places(self, moves):
        # (move, byte of the receiver's arena): arrivals of a rank lie side by side, in the order of the moves
        arrived = [0] * self.ep_size
        bank = self._staging + self.room.bank * self.shared.dims.num_staged_experts * self._pitch
        for move in moves:
            yield move, bank + arrived[move.dst_rank] * self._pitch
            arrived[move.dst_rank] += 1
