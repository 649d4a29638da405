"""Who gets copies: replica counts per expert, for all layers at once."""

import numpy as np


def minmax_replicas(load, num_redundant_experts, max_replicas):
    """Counts that minimise the largest load / count: int64 [layers, num_logical_experts], sum = experts + redundant.

    Giving each further copy to the largest load per copy is optimal for this objective (an apportionment by divisors).
    max_replicas caps an expert's copies: a second copy on one rank takes nothing from that rank.
    """
    num_layers, num_logical = load.shape
    layer = np.arange(num_layers)
    count = np.ones((num_layers, num_logical), np.int64)
    # A tiny floor lets experts without load take leftover copies in index order once the others are at the cap.
    per_copy = np.maximum(load, load.max(1, keepdims=True) * 1e-30 + 1e-300)
    floor = per_copy.copy()
    if max_replicas <= 1:
        return count
    for _ in range(num_redundant_experts):
        hottest = per_copy.argmax(1)
        count[layer, hottest] += 1
        now = count[layer, hottest]
        per_copy[layer, hottest] = np.where(now < max_replicas, floor[layer, hottest] / now, -1.0)
    return count


def capped_replicas(load, cap, num_redundant_experts, max_replicas, *, filler):
    """Counts that bring load / count under cap [layers], then spend what is left on second copies.

    filler: "warm" gives the leftover copies to the largest single experts (slack for the next batch), "cold" to the
    smallest (they then weigh nothing, which frees the ranks that would hold a third big copy).
    Returns (count int64 [layers, experts], ok bool [layers]); ok is False where the cap needs more copies than exist.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        count = np.ceil(np.where(load > 0, load, 1e-300) / np.maximum(cap[:, None], 1e-300) - 1e-9)
    count = np.clip(count, 1, max_replicas).astype(np.int64)
    spare = num_redundant_experts - (count - 1).sum(1)
    ok = spare >= 0
    single = count == 1
    key = np.where(single, load if filler == "warm" else -load, -np.inf)
    order = np.argsort(-key, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(load.shape[1])[None, :], 1)
    count += single & (place < spare[:, None])
    ok &= (count - 1).sum(1) == num_redundant_experts
    return count, ok


def expand(count, num_physical_experts):
    """Expert of each copy, copies adjacent, int64 [layers, num_physical_experts]; count sums to that number."""
    num_layers, num_logical = count.shape
    flat = np.repeat(np.tile(np.arange(num_logical), num_layers), count.ravel())
    return flat.reshape(num_layers, num_physical_experts)
