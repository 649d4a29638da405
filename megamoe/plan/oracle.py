"""The LP that says what is reachable; needs scipy (the test extra) and is never imported by the planner."""

from itertools import combinations

import numpy as np


def lp_rank_load(physical_to_logical, num_ranks, load):
    """Smallest possible largest rank load of one layer for a given placement, any division over copies: float.

    physical_to_logical: int [num_physical_experts]; load: [num_logical_experts].
    """
    placed = np.asarray(physical_to_logical).reshape(num_ranks, -1)
    load = np.asarray(load, np.float64)
    allowed = np.zeros((len(load), num_ranks), bool)
    for rank in range(num_ranks):
        allowed[placed[rank], rank] = True
    return lp_flows(np.zeros(num_ranks), load, allowed)


def node_limited_bound(topk_idx, physical_to_logical, num_ranks, num_nodes, max_nodes, *, steps=100):
    """No choice of copies that keeps every token within max_nodes nodes has a smaller largest rank, in rows: float.

    topk_idx: int [num_tokens, topk] without unused slots; physical_to_logical: int [num_physical_experts].
    Lagrange dual of the LP in which a token may mix sets of nodes: for any prices of the ranks that sum to 1, the sum
    over tokens of the cheapest permitted choice is such a bound. `steps` steps of multiplicative weights raise it, of
    the length that came closest in 60.
    """
    placed = np.asarray(physical_to_logical).reshape(num_ranks, -1)
    held = np.zeros((int(placed.max()) + 1, num_ranks), bool)
    held[placed, np.arange(num_ranks)[:, None]] = True
    per_node = num_ranks // num_nodes
    sets = np.array(list(combinations(range(num_nodes), max_nodes)))
    log_price, best = np.zeros(num_ranks), 0.0
    for step in range(steps):
        price = np.exp(log_price - log_price.max())
        by_node = np.where(held, price / price.sum(), np.inf).reshape(len(held), num_nodes, per_node)
        cheapest = by_node.argmin(2) + np.arange(num_nodes) * per_node
        slot_price = by_node.min(2)[topk_idx]
        total = np.stack([slot_price[..., nodes].min(2).sum(1) for nodes in sets], 1)
        best = max(best, float(total.min(1).sum()))
        nodes = sets[total.argmin(1)]
        which = np.take_along_axis(slot_price, nodes[:, None, :], 2).argmin(2)
        rank = cheapest[topk_idx, np.take_along_axis(nodes, which, 1)]
        load = np.bincount(rank.ravel(), minlength=num_ranks)
        log_price += (load / load.mean() - 1) * 3 / np.sqrt(1 + step)
    return best


def lp_flows(fixed, amount, allowed):
    """min max_r (fixed[r] + sum_f x[f, r]) with x >= 0, x = 0 where not allowed, rows of x summing to amount: float.

    fixed: [num_ranks]; amount: [flows]; allowed: bool [flows, num_ranks]. ImportError without scipy.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    flow, rank = np.nonzero(allowed)
    n, num_flows, num_ranks = len(flow), *allowed.shape
    total = float(amount.sum() + fixed.sum())
    if total == 0:
        return 0.0
    column = np.arange(n)
    equal = coo_matrix((np.ones(n), (flow, column)), shape=(num_flows, n + 1))
    below = coo_matrix((np.r_[np.ones(n), -np.ones(num_ranks)], (np.r_[rank, np.arange(num_ranks)],
                                                                np.r_[column, np.full(num_ranks, n)])))
    objective = np.zeros(n + 1)
    objective[-1] = 1.0
    solved = linprog(objective, A_ub=below.tocsr(), b_ub=-fixed / total, A_eq=equal.tocsr(), b_eq=amount / total,
                     bounds=(0, None), method="highs")
    if solved.status != 0:
        raise RuntimeError(f"linprog ended with status {solved.status}: {solved.message}")
    return float(solved.fun) * total
