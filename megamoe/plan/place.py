"""Copies to ranks: heaviest first, never two copies of one expert on a rank."""

import numpy as np


def place_copies(owner, weight, num_ranks, num_logical_experts, *, linked=False):
    """Put every copy on a rank: int64 [layers, num_ranks, slots per rank], the expert in each slot.

    owner: int64 [layers, num_physical_experts], the expert of each copy; weight: float of the same shape, its cost.
    Heaviest copy first, into the lightest rank that has room and does not hold the expert.
    linked=True first places the copies of replicated experts, at most their fair number a rank and each copy in a part
    of the cluster that no earlier copy has joined to this expert's ranks: load can then flow from any rank to any
    other through shared experts, which is what the choice among copies needs when the next batch differs.
    Where that runs into a dead end the layer is dealt out in turn instead (always possible: an expert has at most
    num_ranks copies).
    """
    num_layers, num_physical = owner.shape
    slots_per_rank = num_physical // num_ranks
    layer = np.arange(num_layers)
    placed = np.full((num_layers, num_ranks, slots_per_rank), -1, np.int64)
    filled = np.zeros((num_layers, num_ranks))
    count = np.zeros((num_layers, num_ranks), np.int64)
    present = np.zeros((num_layers, num_logical_experts, num_ranks), bool)
    part = np.tile(np.arange(num_ranks), (num_layers, 1))
    replicas = np.zeros((num_layers, num_logical_experts), np.int64)
    np.add.at(replicas, (layer[:, None], owner), 1)
    single = np.take_along_axis(replicas, owner, 1) == 1
    # Copies of one expert weigh the same, so a stable sort keeps them adjacent; the dealing below relies on it.
    order = np.lexsort((-weight, single & linked), axis=1)
    owner, weight, single = (np.take_along_axis(a, order, 1) for a in (owner, weight, single))
    fair = -(-(~single).sum(1) // num_ranks)[:, None]
    stuck = np.zeros(num_layers, bool)
    for step in range(num_physical):
        expert, cost = owner[:, step], weight[:, step]
        held = present[layer, expert]
        key = np.where(held | (count >= slots_per_rank), np.inf, filled)
        if linked and not single[:, step].all():
            touched = np.zeros((num_layers, num_ranks + 1), bool)
            np.put_along_axis(touched, np.where(held, part, num_ranks), True, 1)
            touched[:, num_ranks] = False
            joined = np.take_along_axis(touched, part, 1)
            avoid = ~single[:, step, None] & (joined | (count >= fair))
            preferred = np.where(avoid, np.inf, key)
            key = np.where(np.isfinite(preferred).any(1, keepdims=True), preferred, key)
        target = key.argmin(1)
        stuck |= np.isinf(key[layer, target])
        if linked:
            own = part[layer, target][:, None]
            merge = held.any(1) & ~single[:, step]
            first = part[layer, held.argmax(1)][:, None]
            part = np.where((part == own) & merge[:, None], first, part)
        placed[layer, target, np.minimum(count[layer, target], slots_per_rank - 1)] = expert
        present[layer, expert, target] = True
        count[layer, target] += 1
        filled[layer, target] += cost
    if stuck.any():
        dealt = np.argsort(owner[stuck], axis=1, kind="stable")
        placed[stuck] = deal(np.take_along_axis(owner[stuck], dealt, 1), num_ranks)
    return placed


def deal(owner, num_ranks):
    """Copies to ranks in turn, copy i to rank i mod num_ranks: int64 [layers, num_ranks, slots per rank]."""
    num_layers, num_physical = owner.shape
    return owner.reshape(num_layers, num_physical // num_ranks, num_ranks).transpose(0, 2, 1).copy()
