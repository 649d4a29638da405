"""Number a fresh plan's ranks and slots so that as many slots as possible keep the expert they already hold."""

import numpy as np


def relabel(physical_to_logical, current, num_ranks):
    """physical_to_logical with ranks, and slots within ranks, renamed to match current: int64 [layers, physical].

    Both arguments int [layers, num_physical_experts]. Ranks are matched greedily by the number of shared experts, then
    pairs of ranks trade names while that helps; the published greedy needs this before its moves can be compared.
    """
    new = np.asarray(physical_to_logical, np.int64).reshape(len(current), num_ranks, -1)
    old = np.asarray(current, np.int64).reshape(len(current), num_ranks, -1)
    num_logical = int(max(new.max(), old.max())) + 1
    result = np.empty_like(new)
    for layer in range(len(new)):
        have, want = _counts(old[layer], num_logical), _counts(new[layer], num_logical)
        shared = np.minimum(have[:, None, :], want[None, :, :]).sum(2)
        source = _match(shared)
        for rank in range(num_ranks):
            result[layer, rank] = _keep_slots(new[layer, source[rank]], old[layer, rank])
    return result.reshape(len(new), -1)


def match_ranks(current, wanted, num_nodes=1):
    """Which rank of a plan each rank takes over so that few experts move: int64 [num_ranks].

    current, wanted: int [num_ranks, slots], -1 = none; their slots may differ. Ranks of a node stay together: ranks are
    matched within pairs of nodes, then nodes. Where nothing is gained every rank keeps its own.
    """
    num_ranks = len(current)
    num_logical = int(max(current.max(), wanted.max())) + 1
    have, want = (_counts(placed + 1, num_logical + 1)[:, 1:] for placed in (current, wanted))
    shared = np.minimum(have[:, None, :], want[None, :, :]).sum(2)
    per_node = num_ranks // num_nodes
    within = shared.reshape(num_nodes, per_node, num_nodes, per_node).swapaxes(1, 2)
    source = np.array([[_match(pair) for pair in row] for row in within])
    kept = np.take_along_axis(within, source[..., None], 3).sum((2, 3))
    nodes = _match(kept)
    taken = source[np.arange(num_nodes), nodes] + per_node * nodes[:, None]
    own = np.arange(num_ranks)
    return taken.ravel() if kept[np.arange(num_nodes), nodes].sum() > np.trace(shared) else own


def _counts(placed, num_logical):
    return np.stack([np.bincount(one, minlength=num_logical) for one in placed])


def _match(shared):
    """Which new rank each old rank takes over, int64 [num_ranks], from shared[old, new] experts."""
    num_ranks = len(shared)
    source = np.full(num_ranks, -1)
    taken = np.zeros(num_ranks, bool)
    for flat in np.argsort(-shared, axis=None, kind="stable"):
        old, new = divmod(int(flat), num_ranks)
        if source[old] < 0 and not taken[new]:
            source[old], taken[new] = new, True
    while True:
        now = shared[np.arange(num_ranks), source]
        swapped = shared[:, source] + shared[:, source].T - now[:, None] - now[None, :]
        if swapped.max() <= 0:
            return source
        a, b = divmod(int(swapped.argmax()), num_ranks)
        source[a], source[b] = source[b], source[a]


def _keep_slots(wanted, current):
    """wanted reordered so that experts already in current keep their slot."""
    left = list(wanted)
    kept = np.full(len(current), -1)
    for slot, expert in enumerate(current):
        if expert in left:
            left.remove(expert)
            kept[slot] = expert
    kept[kept < 0] = left
    return kept
