"""Weights on the move: from the placement in force to that of a plan, a few experts a step, while the layer serves.

A rank has `num_experts / ep_size` slots and `EPConfig.num_redundant_slots_per_rank` more. A *placement* says which
expert each slot of all ranks holds, int64 [ep_size * slots], -1 = none. Every step is: send experts' weights into the
receivers' staging memory; later, between two calls on every rank, copy them into their slots and flip the map. The map
in force always describes the weights in force, so each step leaves a legal placement, and one that never comes leaves
the last.
"""

from typing import NamedTuple

import numpy as np

from megamoe.plan.choice import replica_map


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


def target_placement(current: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The plan's experts of each rank in slots: those already there stay, others go to slots that the plan frees.

    current: int64 [ep_size, slots]; wanted: int [ep_size, slots of the plan], at most `slots`. -> int64 like current.
    """
    target = np.where([np.isin(have, want) for have, want in zip(current, wanted, strict=True)], current, -1)
    for have, want in zip(target, wanted, strict=True):
        new = [expert for expert in want.tolist() if expert >= 0 and expert not in have]
        have[np.flatnonzero(have == -1)[: len(new)]] = new
    return target


def plan_steps(current: np.ndarray, target: np.ndarray, per_step: int) -> list[list[Move]]:
    """Moves in steps of at most per_step received experts a rank, every expert held somewhere after each step.

    current, target: int64 [ep_size, slots]. Deterministic: all ranks plan alike. ValueError where a cycle of experts
    that wait for each other's slots needs more than per_step on one rank.
    """
    held = current.copy()
    steps = []
    while True:
        rank, slot = np.nonzero((held != target) & (target >= 0))
        if not len(rank):
            return steps
        chosen = _legal_step(held, target, list(zip(rank.tolist(), slot.tolist(), strict=True)), per_step)
        moves = []
        for dst_rank, dst_slot in chosen:
            expert = int(target[dst_rank, dst_slot])
            holders = np.argwhere(held == expert)
            # Receivers of one expert ask its holders in turn, so that no rank sends everything.
            src_rank, src_slot = holders[(dst_rank + dst_slot) % len(holders)].tolist()
            moves.append(Move(expert, src_rank, src_slot, dst_rank, dst_slot))
        for move in moves:
            held[move.dst_rank, move.dst_slot] = move.expert
        steps.append(moves)


def _legal_step(held, target, open_slots, per_step):
    # Slots that hold nothing the plan needs go first
    copies = np.bincount(held[held >= 0], minlength=int(max(held.max(), target.max())) + 1)
    open_slots.sort(key=lambda at: (held[at] >= 0 and copies[held[at]] == 1, at))
    room = np.full(len(held), per_step)
    chosen = []
    for at in open_slots:
        if room[at[0]]:
            room[at[0]] -= 1
            chosen.append(at)
    while True:
        left = copies.copy()
        for at in chosen:
            left[target[at]] += 1
            if held[at] >= 0:
                left[held[at]] -= 1
        lost = [at for at in chosen if held[at] >= 0 and left[held[at]] == 0]
        if not lost:
            break
        chosen.remove(lost[0])
    return chosen or _cycle(held, target, open_slots, copies, per_step)


def _cycle(held, target, open_slots, copies, per_step):
    # Every open slot holds a last copy: follow one to the slot that wants it, until the chain closes
    wants = {int(target[at]): at for at in open_slots}
    chain = [open_slots[0]]
    while copies[held[chain[-1]]] == 1:
        following = wants[int(held[chain[-1]])]
        if following in chain:
            chain = chain[chain.index(following) :]
            break
        chain.append(following)
    most = max(np.bincount([at[0] for at in chain]))
    if most > per_step:
        raise ValueError(
            f"{len(chain)} experts wait for each other's slots and one rank receives {most} of them at once, more "
            f"than the {per_step} of a step; allow more a step, or leave a redundant slot free"
        )
    return chain


class Rebalance:
    """A rebalance under way; `MoELayer.rebalance` makes it. Collective: every rank makes the same steps between the
    same calls.

    step() does a part and returns whether the plan is in force; finish() does the rest at once. num_steps: calls of
    step() in all. moved_bytes: weights that all ranks receive. After an error the placement of the last step stays in
    force; a new rebalance starts from there.
    """

    def __init__(self, engine, plan_row: np.ndarray, choice: str, per_step: int, load, num_nodes: int):
        self._engine = engine
        self._args = dict(choice=choice, load=load, num_nodes=num_nodes)
        self._experts = len(load)
        # Its errors now, not half-way
        engine.check_fits(replica_map(plan_row.ravel(), self._experts, len(plan_row), **self._args))
        current = engine.placement.reshape(engine.ep_size, -1)
        self._target = target_placement(current, plan_row)
        self._steps = plan_steps(current, self._target, per_step)
        self._staged: list[Move] | None = None
        self._done = 0
        self._version = engine.placement_version
        self.finished = False
        self.num_steps = len(self._steps) + 1
        self.moved_bytes = sum(map(len, self._steps)) * engine.expert_bytes

    def step(self) -> bool:
        """Puts what was staged before in force, then stages the next experts. Enqueued on the current stream on CUDA.

        On CUDA at least one call of a layer of the workspace must lie between two steps, on every rank: it is what
        tells a rank that its peers' weights have come.
        """
        if self.finished:
            return True
        if self._version != self._engine.placement_version:
            raise RuntimeError("the placement was changed since this rebalance began; start a new one")
        if self._staged is not None or not self._steps:
            self._apply()
        if self._done < len(self._steps):
            self._engine.stage(self._steps[self._done])  # may raise: nothing is in force yet
            self._staged = self._steps[self._done]
            self._done += 1
        return self.finished

    def finish(self) -> None:
        """All remaining steps; waits for the peers between them instead of for calls."""
        while not self.step():
            self._engine.settle()

    def _apply(self) -> None:
        moves = self._staged or []
        placed = self._engine.placement.reshape(self._target.shape).copy()
        for move in moves:
            placed[move.dst_rank, move.dst_slot] = move.expert
        last = self._done == len(self._steps)
        placed = self._target if last else placed  # the last step also gives up the copies that the plan does not want
        replicas = replica_map(placed.ravel(), self._experts, len(placed), **self._args)
        self._engine.apply(moves, placed.ravel(), replicas)
        self._version, self._staged = self._engine.placement_version, None
        self.finished = last
