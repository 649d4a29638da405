"""The LP that says what is reachable; needs scipy (the test extra) and is never imported by the planner."""

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
