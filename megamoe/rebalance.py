"""Weights on the move: from the placement in force to that of a plan, a few experts a step, while the layer serves.

A rank has `num_experts / ep_size` slots and `EPConfig.num_redundant_slots_per_rank` more. A *placement* says which
expert each slot of all ranks holds, int64 [ep_size * slots], -1 = none. Every step is: send experts' weights into the
receivers' staging memory; later, between two calls on every rank, copy them into their slots and flip the map. The map
in force always describes the weights in force, so each step leaves a legal placement, and one that never comes leaves
the last.
"""

import hashlib
from collections import Counter
from typing import NamedTuple
from weakref import ref

import numpy as np

from megamoe.errors import absent_ranks_named
from megamoe.plan.choice import replica_map
from megamoe.plan.relabel import match_ranks


class Move(NamedTuple):
    """One expert's weights from a slot to a slot; ranks and slots within the rank."""

    expert: int
    src_rank: int
    src_slot: int
    dst_rank: int
    dst_slot: int


def default_placement(num_experts: int, ep_size: int, slots: int) -> np.ndarray:
    """Expert e on rank e // E, slot e % E (E = num_experts / ep_size), other slots empty: int64 [ep_size * slots]."""
    placed = np.full((ep_size, slots), -1, np.int64)
    local = num_experts // ep_size
    placed[:, :local] = np.arange(num_experts).reshape(ep_size, local)
    return placed.ravel()


def plan_steps(current: np.ndarray, wanted: np.ndarray, per_step: int) -> list[list[Move]]:
    """Moves in steps of at most per_step received experts a rank, every expert held somewhere after each step.

    current: int64 [ep_size, slots]; wanted: int [ep_size, at most slots], the experts of each rank in any order, -1 =
    none; every expert of current is in it somewhere, none twice on a rank. Deterministic: all ranks plan alike. Any
    per_step >= 1 reaches wanted, and each rank receives only what it lacks, once.
    """
    held, wants = current.copy(), [set(row[row >= 0].tolist()) for row in wanted]
    steps = []
    while chosen := _Step(held, wants, per_step).chosen:
        moves = []
        for expert, dst_rank, dst_slot in chosen:
            holders = np.argwhere(held == expert)
            # Receivers of one expert ask its holders in turn, so that no rank sends everything.
            src_rank, src_slot = holders[(dst_rank + dst_slot) % len(holders)].tolist()
            moves.append(Move(expert, src_rank, src_slot, dst_rank, dst_slot))
        for move in moves:
            held[move.dst_rank, move.dst_slot] = move.expert
        steps.append(moves)
    return steps


class _Step:
    """chosen: (expert, rank, slot) of one step, which happen at once; none only where nothing is missing.

    There is always one: a rank that lacks an expert and has neither an empty slot nor a copy to spare holds a last copy
    that another rank lacks. Followed from rank to rank, such copies end at a slot to spare or come back to a rank on
    the way: a cycle, in which every rank receives one expert.
    """

    def __init__(self, held, wants, per_step):
        self.after, self.wants = held.tolist(), wants
        self.copies = Counter(expert for row in self.after for expert in row)
        self.missing = [wanted - set(row) for wanted, row in zip(wants, self.after, strict=True)]
        self.room = [per_step] * len(wants)
        self.chosen = []
        found = True
        while found:
            found = False
            for rank in sorted(range(len(wants)), key=lambda rank: -len(self.missing[rank])):
                if self.room[rank] and self.missing[rank]:
                    found |= self._receive(rank)

    def _receive(self, start) -> bool:
        # Breadth first over who could take what a rank must give up: giver[rank] = (giving rank, its slot)
        giver, queue = {}, [start]
        for rank in queue:
            slot = self._slot_to_spare(rank)
            if slot is not None:
                # Of what it lacks rather a last copy: its holder can then give it up
                arrives = min(self.missing[start], key=lambda expert: (self.copies[expert], expert))
                self._pass_on(giver, rank, slot, start, arrives)
                return True
            for slot, expert in enumerate(self.after[rank]):
                if expert in self.wants[rank]:
                    continue
                for taker, missing in enumerate(self.missing):
                    if expert not in missing:
                        continue
                    if taker == start:
                        self._pass_on(giver, rank, slot, start, expert)
                        return True
                    if self.room[taker] and taker not in giver:
                        giver[taker] = rank, slot
                        queue.append(taker)
        return False

    def _slot_to_spare(self, rank):
        row, wanted = self.after[rank], self.wants[rank]
        if -1 in row:
            return row.index(-1)
        return next((s for s, expert in enumerate(row) if expert not in wanted and self.copies[expert] > 1), None)

    def _pass_on(self, giver, rank, slot, start, arrives):
        # From the end of the chain to its start, which receives what closes it or comes from outside
        while rank != start:
            before, its_slot = giver[rank]
            self._put(self.after[before][its_slot], rank, slot)
            rank, slot = before, its_slot
        self._put(arrives, start, slot)

    def _put(self, expert, rank, slot):
        self.copies[self.after[rank][slot]] -= 1
        self.copies[expert] += 1
        self.after[rank][slot] = expert
        self.missing[rank].remove(expert)
        self.room[rank] -= 1
        self.chosen.append((expert, rank, slot))


class Staging:
    """Room for weights on the move, one for all layers of a workspace: whose they are, and in which of two banks.

    Two banks: a peer may not have emptied the one of the step before, whichever layer's that was, but the call since
    then, in which it took part, came after it had emptied the one before that.
    """

    def __init__(self):
        self._owner, self.bank = None, 0

    def take(self, engine) -> None:
        """For weights of this engine, in the other bank. RuntimeError while another's are there."""
        owner = self._owner and self._owner()  # None also where that engine is gone
        if owner not in (None, engine):
            raise RuntimeError(
                "weights of another layer of the workspace are on the move; finish its rebalance, or load its weights, "
                "before this one begins"
            )
        self._owner, self.bank = ref(engine), self.bank ^ 1

    def release(self, engine) -> None:
        """What was staged is in force, or not wanted any more."""
        if self._owner is not None and self._owner() is engine:
            self._owner = None

    def clear(self) -> None:
        """The same on all ranks again: a step may have failed on one rank only. What is under way there has ended."""
        owner = self._owner and self._owner()
        if owner is not None:
            owner.placement_version += 1
        self._owner, self.bank = None, 0


def experts_a_step(most: int, max_bytes: int | None, expert_bytes: int) -> int:
    """Experts that a rank receives in a step of a rebalance. most: that it has staging memory for."""
    if most < 1:
        raise ValueError("num_staged_experts=0: no memory to receive an expert in; set EPConfig.num_staged_experts=1")
    if max_bytes is None:
        return most
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes={max_bytes!r} has type {type(max_bytes).__name__}; pass an int, or None")
    if max_bytes < expert_bytes:
        raise ValueError(f"max_bytes={max_bytes}: no room for one expert a step; pass {expert_bytes} or more")
    return min(most, max_bytes // expert_bytes)


def _digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(numbers, np.float64)).hexdigest()[:16]


class Rebalance:
    """A rebalance under way; `MoELayer.rebalance` makes it. Collective: every rank makes the same steps between the
    same calls. One layer of a workspace at a time: the room for weights on the move is shared.

    step() does a part and returns whether the plan is in force; finish() does the rest at once. num_steps: calls of
    step() in all. moved_bytes: weights that all ranks receive. After an error the placement of the last step stays in
    force; a new rebalance starts from there. digests: of placement, plan and load, for ranks to compare.
    """

    def __init__(self, engine, plan_row: np.ndarray, choice: str, per_step: int, load, num_nodes: int):
        self._engine = engine
        self._args = dict(choice=choice, load=load, num_nodes=num_nodes)
        self._experts = len(load)
        # Its errors now, not half-way
        engine.check_fits(replica_map(plan_row.ravel(), self._experts, len(plan_row), **self._args))
        current = engine.placement.reshape(engine.ep_size, -1)
        self.digests = _digest(current), _digest(plan_row), _digest(load)
        self._wanted = plan_row[match_ranks(current, plan_row, num_nodes)]
        self._steps = plan_steps(current, self._wanted, per_step)
        self._staged: list[Move] | None = None
        self._done = 0
        self._version = engine.placement_version
        self.finished = False
        self.num_steps = len(self._steps) + 1
        self.moved_bytes = sum(map(len, self._steps)) * engine.expert_bytes

    def step(self) -> bool:
        """Puts what was staged before in force, then stages the next experts. Enqueued on the current stream on CUDA.

        On CUDA at least one call of a layer of the workspace must lie between two steps, also of different layers, on
        every rank: it is what tells a rank that its peers' weights have come, and that they have emptied a bank.
        RuntimeError where what was staged is old, or another layer's weights are on the move.
        """
        if self.finished:
            return True
        if self._version != self._engine.placement_version:
            raise RuntimeError("weights were loaded or moved since this rebalance's last step; start a new one")
        if self._staged is not None or not self._steps:
            self._apply()
        if self._done < len(self._steps):
            self._engine.stage(self._steps[self._done])  # may raise: nothing is in force yet
            self._staged, self._version = self._steps[self._done], self._engine.placement_version
            self._done += 1
        return self.finished

    def finish(self) -> None:
        """All remaining steps; waits for the peers before and between them instead of for calls. MegaMoEError names a
        rank that does not come."""
        with absent_ranks_named():
            self._engine.settle()
            while not self.step():
                self._engine.settle()

    def _apply(self) -> None:
        moves = self._staged or []
        placed = self._engine.placement.reshape(len(self._wanted), -1).copy()
        for move in moves:
            placed[move.dst_rank, move.dst_slot] = move.expert
        last = self._done == len(self._steps)
        if last:  # it also gives up the copies that the plan does not want
            wanted = [np.isin(have, want) for have, want in zip(placed, self._wanted, strict=True)]
            placed = np.where(wanted, placed, -1)
        replicas = replica_map(placed.ravel(), self._experts, len(placed), **self._args)
        self._engine.apply(moves, placed.ravel(), replicas)
        self._version, self._staged = self._engine.placement_version, None
        self.finished = last
