"""Local search: swaps of two slots between two ranks, many pairs of ranks and all layers at a time."""

import numpy as np


def incidence(placed, num_logical_experts):
    """Which rank holds which expert: bool [layers, num_ranks, num_logical_experts] of placed [layers, ranks, slots]."""
    held = np.zeros((*placed.shape[:2], num_logical_experts), bool)
    np.put_along_axis(held, placed, True, 2)
    return held


def swap_search(placed, cost, *, target, movable=None, max_rounds=60):
    """Even out rank costs by swaps; returns the new placed, int64 [layers, num_ranks, slots per rank].

    placed: the expert in each slot; cost: float [layers, num_logical_experts], cost of one copy of each expert;
    target: float [layers], a layer is finished when its largest rank is at or below it;
    movable: bool [layers, num_logical_experts], experts that may change ranks (None: all).
    A round pairs hot ranks with cold ones and makes the swap that leaves each pair most even, so no pair's maximum
    ever grows; when rounds stop helping, the hottest rank is tried against every other one.
    """
    placed = placed.copy()
    num_ranks = placed.shape[1]
    if num_ranks == 1 or placed.shape[2] == 0:
        return placed
    held = incidence(placed, cost.shape[1])
    if movable is not None:
        # An expert that is "held" everywhere is never offered to another rank.
        held |= ~movable[:, None, :]
    weight = np.take_along_axis(cost[:, None, :], placed, 2)
    rank_cost = weight.sum(2)
    active = np.flatnonzero(rank_cost.max(1) > target)
    half = num_ranks // 2
    idle = np.zeros(len(placed), np.int64)
    for step in range(max_rounds):
        if not len(active):
            break
        by_cost = np.argsort(-rank_cost[active], axis=1, kind="stable")
        hot = by_cost[:, :half]
        # Another partner every round; otherwise a pair without a useful swap would block both its ranks for good.
        cold = np.roll(by_cost[:, num_ranks - half:][:, ::-1], step if step % 2 else 0, axis=1)
        gained = _swap_pairs(active, hot, cold, placed, weight, held, rank_cost)
        idle[active] = np.where(gained, 0, idle[active] + 1)
        keep = (rank_cost[active].max(1) > target[active]) & (idle[active] < 4)
        active = active[keep]
    _polish(np.flatnonzero(rank_cost.max(1) > target), placed, weight, held, rank_cost, target, max_rounds)
    return placed


def _polish(active, placed, weight, held, rank_cost, target, max_rounds):
    """The hottest rank against all others at once, one swap a round, until a layer has none that helps."""
    num_ranks = placed.shape[1]
    for _ in range(max_rounds):
        if not len(active):
            return
        hottest = rank_cost[active].argmax(1)
        others = np.tile(np.arange(num_ranks), (len(active), 1))
        gained = _swap_pairs(active, hottest[:, None], others, placed, weight, held, rank_cost, best_only=True)
        active = active[gained & (rank_cost[active].max(1) > target[active])]


def _swap_pairs(active, hot, cold, placed, weight, held, rank_cost, *, best_only=False):
    """One swap per pair (hot[:, p], cold[:, p]) that leaves it most even; with best_only one swap per layer.

    Returns bool [len(active)], whether the layer changed. The pairs of a layer must not share a rank unless best_only.
    """
    layer = active[:, None]
    hot = np.broadcast_to(hot, cold.shape)
    hot_weight, cold_weight = weight[layer, hot], weight[layer, cold]
    hot_expert, cold_expert = placed[layer, hot], placed[layer, cold]
    gap = rank_cost[layer, hot] - rank_cost[layer, cold]
    shift = hot_weight[..., :, None] - cold_weight[..., None, :]
    left = np.abs(gap[..., None, None] - 2 * shift)
    # A rank must not receive an expert that it already has.
    left += np.where(held[layer[..., None], cold[..., None], hot_expert], np.inf, 0.0)[..., :, None]
    left += np.where(held[layer[..., None], hot[..., None], cold_expert], np.inf, 0.0)[..., None, :]
    flat = left.reshape(*left.shape[:2], -1)
    pick = flat.argmin(-1)
    best = np.take_along_axis(flat, pick[..., None], 2)[..., 0]
    if best_only:
        # What counts is the larger of the two ranks after the swap: (sum + |difference|) / 2.
        after = rank_cost[layer, hot] + rank_cost[layer, cold] + best
        pair = np.where(best < np.abs(gap), after, np.inf).argmin(1)
        useful = np.zeros(best.shape, bool)
        useful[np.arange(len(active)), pair] = True
        useful &= best < gap * (1 - 1e-9)
    else:
        useful = best < np.abs(gap) * (1 - 1e-9)
    row, pair = np.nonzero(useful)
    if len(row):
        slots = placed.shape[2]
        lay, rank_a, rank_b = active[row], hot[row, pair], cold[row, pair]
        slot_a, slot_b = np.divmod(pick[row, pair], slots)
        expert_a, expert_b = placed[lay, rank_a, slot_a], placed[lay, rank_b, slot_b]
        weight_a, weight_b = weight[lay, rank_a, slot_a], weight[lay, rank_b, slot_b]
        placed[lay, rank_a, slot_a], placed[lay, rank_b, slot_b] = expert_b, expert_a
        weight[lay, rank_a, slot_a], weight[lay, rank_b, slot_b] = weight_b, weight_a
        held[lay, rank_a, expert_a] = held[lay, rank_b, expert_b] = False
        held[lay, rank_a, expert_b] = held[lay, rank_b, expert_a] = True
        rank_cost[lay, rank_a] += weight_b - weight_a
        rank_cost[lay, rank_b] += weight_a - weight_b
    return useful.any(1)
