"""Recover balance with few moved slots: the best swap or re-targeted copy at a time, for all layers at once."""

import numpy as np

from .search import incidence

# Ranks looked at as partners of the hottest one in a swap.
PARTNERS = 4


def update_placement(placed, load, cost_of, move_budget):
    """The placement after at most move_budget changed slots a layer: int64 [layers, num_ranks, slots per rank].

    placed: the expert in each slot now; load: float64 [layers, num_logical_experts], the new statistics;
    cost_of(load, count): cost of one copy, same shape as load.
    Greedy on the drop of the sum of squared rank costs per moved slot, over two kinds of change that involve the
    hottest rank: swap one of its slots with a slot elsewhere (two moves), or re-target a redundant copy (one move):
    either a copy anywhere becomes one of the hottest rank's experts, or one on the hottest rank becomes another expert.
    The state with the smallest largest rank on the way is returned, so no layer gets worse.
    """
    placed = placed.copy()
    num_layers, num_logical = load.shape
    state = _State(placed, load, cost_of)
    best, best_max = placed.copy(), state.rank_cost.max(1)
    spent = np.zeros(num_layers, np.int64)
    active = np.arange(num_layers)
    while len(active) and move_budget > 0:
        swap_gain, swap = _best_swap(state, active)
        copy_gain, copy = _best_retarget(state, active)
        swap_gain = np.where(spent[active] + 2 <= move_budget, swap_gain / 2, -np.inf)
        copy_gain = np.where(spent[active] + 1 <= move_budget, copy_gain, -np.inf)
        by_swap = swap_gain >= copy_gain
        useful = np.maximum(swap_gain, copy_gain) > state.tiny[active]
        state.swap(active[useful & by_swap], *(part[useful & by_swap] for part in swap))
        state.retarget(active[useful & ~by_swap], *(part[useful & ~by_swap] for part in copy))
        spent[active] += np.where(useful, np.where(by_swap, 2, 1), 0)
        state.refresh(active[useful])
        largest = state.rank_cost.max(1)
        better = largest < best_max * (1 - 1e-12)
        best[better], best_max[better] = placed[better], largest[better]
        active = active[useful & (spent[active] < move_budget)]
    return best


class _State:
    """What the moves need, per layer: who holds what, copies, cost of a copy now and with one more or less."""

    def __init__(self, placed, load, cost_of):
        self.placed, self.load, self.cost_of = placed, load, cost_of
        self.held = incidence(placed, load.shape[1])
        self.count = self.held.sum(1)
        self.cost, self.more, self.less = (np.zeros(load.shape) for _ in range(3))
        self.rank_cost = np.zeros(placed.shape[:2])
        self.refresh(np.arange(len(load)))
        self.tiny = 1e-14 * self.rank_cost.sum(1) ** 2

    def refresh(self, layers):
        """Recompute costs of these layers from count and placed."""
        load, count = self.load[layers], self.count[layers]
        self.cost[layers] = self.cost_of(load, count)
        self.more[layers] = self.cost_of(load, count + 1)
        self.less[layers] = self.cost_of(load, np.maximum(count - 1, 1))
        flat = self.placed[layers].reshape(len(layers), self.placed[0].size)
        self.rank_cost[layers] = np.take_along_axis(self.cost[layers], flat, 1).reshape(
            len(layers), *self.placed.shape[1:]).sum(2)

    def swap(self, layers, rank_a, slot_a, rank_b, slot_b):
        """Exchange two slots a layer."""
        a, b = self.placed[layers, rank_a, slot_a], self.placed[layers, rank_b, slot_b]
        self.placed[layers, rank_a, slot_a], self.placed[layers, rank_b, slot_b] = b, a
        self.held[layers, rank_a, a] = self.held[layers, rank_b, b] = False
        self.held[layers, rank_a, b] = self.held[layers, rank_b, a] = True

    def retarget(self, layers, rank, slot, expert):
        """Make one redundant copy a layer a copy of another expert."""
        old = self.placed[layers, rank, slot]
        self.placed[layers, rank, slot] = expert
        self.held[layers, rank, old], self.held[layers, rank, expert] = False, True
        self.count[layers, old] -= 1
        self.count[layers, expert] += 1


def _best_swap(state, active):
    """Largest drop of the squared sum by one swap of the hottest rank: (gain, (rank, slot, rank, slot)).

    Partners are the PARTNERS coldest ranks: the gain grows with the gap, and looking at every rank costs more than it
    finds.
    """
    rank_cost, cost = state.rank_cost[active], state.cost[active]
    num_layers, num_ranks = rank_cost.shape
    slots = state.placed.shape[2]
    layer = np.arange(num_layers)
    hot = rank_cost.argmax(1)
    cold = np.argsort(rank_cost, axis=1, kind="stable")[:, :PARTNERS]
    mine = state.placed[active, hot]
    theirs = state.placed[active[:, None], cold].reshape(num_layers, -1)
    out = np.take_along_axis(cost, mine, 1)
    # A large stand-in cost rules out what may not move without another pass over all pairs.
    bar = 1e3 * rank_cost.sum(1)[:, None]
    back = np.where(state.held[active[:, None], hot[:, None], theirs], bar, np.take_along_axis(cost, theirs, 1))
    gap = np.repeat(rank_cost[layer, hot][:, None] - np.take_along_axis(rank_cost, cold, 1), slots, axis=1)
    shift = out[:, :, None] - back[:, None, :]
    gain = (gap[:, None, :] - shift) * shift
    foreign = state.held[active[:, None, None], cold[:, None, :], mine[:, :, None]]
    row, a, b = np.nonzero(foreign)
    gain.reshape(num_layers, len(mine[0]), cold.shape[1], slots)[row, a, b] = -np.inf
    gain = gain.reshape(num_layers, -1)
    pick = gain.argmax(1)
    slot_a, other = np.divmod(pick, theirs.shape[1])
    return 2 * gain[layer, pick], (hot, slot_a, cold[layer, other // slots], other % slots)


def _best_retarget(state, active):
    """Largest drop of the squared sum by re-targeting one redundant copy: (gain, (rank, slot, expert)).

    The change is quadratic in the moved costs; the overlap of the two experts' ranks is left out (second order).
    """
    placed, rank_cost, count = state.placed[active], state.rank_cost[active], state.count[active]
    cost, more, less, held = state.cost[active], state.more[active], state.less[active], state.held[active]
    num_layers, num_ranks, slots = placed.shape
    layer = np.arange(num_layers)
    hot = rank_cost.argmax(1)
    flat = placed.reshape(num_layers, -1)
    # Costs of the ranks that hold an expert, summed over its copies: cheaper than a product with held
    where = layer[:, None] * cost.shape[1] + flat
    level_sum = np.bincount(where.ravel(), np.repeat(rank_cost, slots), cost.size).reshape(cost.shape)
    rise, fall = less - cost, cost - more
    removable = np.take_along_axis(count, flat, 1) > 1
    width = int(removable.sum(1).max())
    if not width:
        return np.full(num_layers, -np.inf), tuple(np.zeros(num_layers, np.int64) for _ in range(3))
    redundant = np.argsort(~removable, axis=1, kind="stable")[:, :width]
    on_hot = hot[:, None] * slots + np.arange(slots)
    mine = np.take_along_axis(removable, on_hot, 1)
    few = np.argsort(~mine, axis=1, kind="stable")[:, :max(int(mine.sum(1).max()), 1)]
    on_hot = np.take_along_axis(on_hot, few, 1)
    every = np.broadcast_to(np.arange(cost.shape[1]), cost.shape)
    found = []
    for slot, expert in ((redundant, placed[layer, hot]), (on_hot, every)):
        old, rank = np.take_along_axis(flat, slot, 1), slot // slots
        here = np.take_along_axis(rank_cost, rank, 1)
        pick = np.take_along_axis
        out_rise, out_cost, out_count = pick(rise, old, 1), pick(cost, old, 1), pick(count, old, 1)
        in_fall, in_more, in_count = pick(fall, expert, 1), pick(more, expert, 1), pick(count, expert, 1)
        step = in_more[:, None, :] - out_cost[:, :, None]
        change = step * (2 * here[:, :, None] + step)
        change += (2 * out_rise * (pick(level_sum, old, 1) - here) + out_rise**2 * (out_count - 1))[:, :, None]
        change += (in_fall**2 * in_count - 2 * in_fall * pick(level_sum, expert, 1))[:, None, :]
        illegal = held[layer[:, None, None], rank[:, :, None], expert[:, None, :]]
        illegal |= ~pick(removable, slot, 1)[:, :, None]
        gain = np.where(illegal, -np.inf, -change).reshape(num_layers, -1)
        best = gain.argmax(1)
        which, new = np.divmod(best, expert.shape[1])
        chosen = slot[layer, which]
        found.append((gain[layer, best], chosen // slots, chosen % slots, expert[layer, new]))
    first = found[0][0] >= found[1][0]
    gain, *move = (np.where(first, a, b) for a, b in zip(*found, strict=True))
    return gain, tuple(move)
