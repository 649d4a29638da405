"""How an expert's rows are divided over its copies: the numpy reference of the choice made in the dispatch."""

import numpy as np


def even_split(num_replicas, logical_to_physical, num_physical_experts):
    """Share of its expert that each slot takes when every copy takes the same: float64 [layers, physical]."""
    share = np.zeros((len(num_replicas), num_physical_experts + 1))
    each = np.broadcast_to((1.0 / num_replicas)[..., None], logical_to_physical.shape)
    # Padding (-1) writes the extra last column, which is cut off.
    np.put_along_axis(share, logical_to_physical.reshape(len(share), -1), each.reshape(len(share), -1), 1)
    return share[:, :-1]


def water_fill(level, amount, allowed):
    """Pour amount onto the allowed columns of level so that the lowest rise first to one common height.

    level: float64 [n, num_ranks]; amount: float64 [n]; allowed: bool [n, num_ranks], at least one True a row.
    Returns float64 [n, num_ranks], what each column receives (rows sum to amount).
    """
    rows = np.arange(len(level))
    masked = np.where(allowed, level, np.inf)
    ordered = np.sort(masked, axis=1)
    width = np.arange(1, level.shape[1] + 1)
    finite = np.where(np.isfinite(ordered), ordered, 0.0)
    height = (finite.cumsum(1) + amount[:, None]) / width
    # The last column that still lies below the common height of the columns up to it.
    wet = np.isfinite(ordered) & (ordered <= height)
    last = np.where(wet, width, 0).max(1) - 1
    surface = height[rows, np.maximum(last, 0)]
    return np.where(allowed, np.maximum(surface[:, None] - np.where(allowed, level, 0.0), 0.0), 0.0)


def fill_flows(fixed, amount, allowed, *, passes=12):
    """Divide many flows over ranks by water-filling, heaviest first, `passes` times over.

    fixed: float64 [layers, num_ranks] load that cannot move; amount: float64 [layers, flows]; allowed: bool
    [layers, flows, num_ranks]. Returns float64 [layers, flows, num_ranks].
    Every pass takes one flow back and pours it again. That is block descent on the sum of squared rank loads, whose
    minimum also has the smallest possible maximum, so passes trade time for the distance to the LP optimum.
    """
    num_layers, num_flows = amount.shape
    layer = np.arange(num_layers)
    flow = np.zeros(allowed.shape)
    level = fixed.astype(np.float64).copy()
    order = np.argsort(-amount, axis=1, kind="stable")
    for _ in range(passes):
        for position in range(num_flows):
            which = order[:, position]
            level -= flow[layer, which]
            poured = water_fill(level, amount[layer, which], allowed[layer, which])
            flow[layer, which] = poured
            level += poured
    return flow


def balanced_split(physical_to_logical, num_ranks, load, *, passes=12):
    """Rank loads when the copies share by the batch's actual counts: float64 [layers, num_ranks].

    physical_to_logical: int [layers, num_physical_experts]; load: [layers, num_logical_experts], this batch's counts.
    """
    load = np.asarray(load, np.float64)
    num_layers, num_logical = load.shape
    placed = np.asarray(physical_to_logical).reshape(num_layers, num_ranks, -1)
    held = np.zeros((num_layers, num_ranks, num_logical), bool)
    np.put_along_axis(held, placed, True, 2)
    held = held.transpose(0, 2, 1)
    copies = held.sum(2)
    fixed = np.einsum("le,ler->lr", np.where(copies == 1, load, 0.0), held)
    # Only replicated experts can flow; the widest layer sets the number of columns, the others pour nothing there.
    num_flows = int((copies > 1).sum(1).max())
    if not num_flows:
        return fixed
    which = np.argsort(copies <= 1, axis=1, kind="stable")[:, :num_flows]
    allowed = np.take_along_axis(held, which[..., None], 1)
    amount = np.take_along_axis(np.where(copies > 1, load, 0.0), which, 1)
    return fixed + fill_flows(fixed, amount, allowed, passes=passes).sum(1)
