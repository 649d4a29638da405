"""Replica choice for a whole batch of tokens under a node limit: the numpy reference, and the simulator's."""

from itertools import combinations
from math import comb

import numpy as np

from .split import fill_flows

# With more sets of nodes than this, tokens keep their experts' home nodes (8 nodes of which 4 are allowed have 70).
MOST_SETS = 100
# Exponent that turns rank loads into prices of the node choice: 1 is the gradient of the squared loads, which settles
# short of the smallest maximum; much more jumps between ranks. 32 came closest to the bound of oracle.py.
SHARPNESS = 32


def choose_replicas(topk_idx, physical_to_logical, *, num_ranks, num_nodes, home_node=None, max_nodes=None, passes=12,
                    rounds=24):
    """Physical expert of every token slot of one layer: int64 [num_tokens, topk], -1 where topk_idx is -1.

    topk_idx: int [num_tokens, topk], logical; physical_to_logical: int [num_physical_experts], no expert twice on a
    rank. home_node: int [num_logical_experts], a node that surely holds the expert, and max_nodes: with both, no token
    touches more than max_nodes nodes. ValueError when a token's home nodes alone are more than that.
    Rows with the same expert and the same set of permitted copies are one flow; flows are water-filled over ranks by
    the batch's actual counts, then handed out in token order, so the result depends on the batch and the plan only.
    Under a node limit, `rounds` times over, a falling part of the tokens changes to the set of nodes in which the
    copies of its experts lie on the least loaded ranks (a conditional-gradient step on
    the rank loads to the power SHARPNESS + 1).
    """
    topk_idx = np.asarray(topk_idx).astype(np.int64)
    physical_to_logical = np.asarray(physical_to_logical)
    used = topk_idx >= 0
    expert = np.where(used, topk_idx, 0)
    slots = len(physical_to_logical) // num_ranks
    slot_of = np.full((int(physical_to_logical.max()) + 1, num_ranks), -1, np.int64)
    slot_of[physical_to_logical, np.arange(len(physical_to_logical)) // slots] = np.arange(len(physical_to_logical))
    held = slot_of >= 0
    ranks_per_node = num_ranks // num_nodes
    on_node = held.reshape(len(held), num_nodes, ranks_per_node).any(2)
    if home_node is None or max_nodes is None or max_nodes >= num_nodes:
        nodes = np.ones((len(topk_idx), num_nodes), bool)
    else:
        nodes = _token_nodes(expert, used, on_node, np.asarray(home_node), max_nodes)
        if comb(num_nodes, max_nodes) <= MOST_SETS:
            nodes = _spread(nodes, expert, used, held, on_node, max_nodes, rounds)
    member, amount, allowed = _flows(nodes, expert, used, held, on_node)
    flow = _pour(amount, allowed, passes)
    # Row i of a class goes to the copy whose cumulative flow it falls into: each copy is within one row of its flow.
    order = np.argsort(member, kind="stable")
    within = np.empty(len(member), np.int64)
    within[order] = np.arange(len(member)) - np.repeat(np.cumsum(amount) - amount, amount)
    rank = (flow.cumsum(1)[member] <= within[:, None] + 0.5).sum(1)
    last = num_ranks - 1 - allowed[:, ::-1].argmax(1)
    rank = np.minimum(rank, last[member])
    return np.where(used.ravel(), slot_of[expert.ravel(), rank], -1).reshape(topk_idx.shape)


def _flows(nodes, expert, used, held, on_node):
    """Rows grouped by expert and permitted nodes: (member [rows], amount [flows], allowed bool [flows, num_ranks])."""
    num_nodes = on_node.shape[1]
    permitted = (nodes[:, None, :] & on_node[expert]) @ (1 << np.arange(num_nodes))
    key = np.where(used, (expert << num_nodes) | permitted, -1).ravel()
    classes, member, amount = np.unique(key, return_inverse=True, return_counts=True)
    mask = (classes[:, None] >> np.arange(num_nodes)) & 1 > 0
    by_rank = np.repeat(mask, held.shape[1] // num_nodes, axis=1)
    allowed = held[np.maximum(classes, 0) >> num_nodes] & by_rank & (classes >= 0)[:, None]
    return member.reshape(-1), amount, allowed


def _pour(amount, allowed, passes):
    """Water-filled rows of each flow per rank, float64 [flows, num_ranks]."""
    alone = allowed.sum(1) == 1
    flow = np.where(alone[:, None], allowed * amount[:, None], 0.0)
    many = np.flatnonzero(allowed.sum(1) > 1)
    if len(many):
        flow[many] = fill_flows(flow.sum(0)[None], amount[None, many].astype(np.float64), allowed[None, many],
                                passes=passes)[0]
    return flow


def _spread(nodes, expert, used, held, on_node, max_nodes, rounds):
    """Better sets of nodes for the tokens, bool [num_tokens, num_nodes]; every set covers its token's experts."""
    num_tokens, num_nodes = nodes.shape
    sets = np.zeros((comb(num_nodes, max_nodes), num_nodes), bool)
    for row, chosen in enumerate(combinations(range(num_nodes), max_nodes)):
        sets[row, chosen] = True
    best, best_max = nodes, np.inf
    for turn in range(rounds + 1):
        _, amount, allowed = _flows(nodes, expert, used, held, on_node)
        level = _pour(amount, allowed, 3).sum(0)
        if level.max() < best_max:
            best, best_max = nodes, level.max()
        by_node = np.where(held, level, np.inf).reshape(len(held), num_nodes, -1).min(2)
        price = np.where(used[..., None], (by_node[expert] / max(level.max(), 1.0)) ** SHARPNESS, 0.0)
        cheapest, least = np.zeros(num_tokens, np.int64), np.full(num_tokens, np.inf)
        for row, chosen in enumerate(sets):
            total = price[..., chosen].min(2).sum(1)
            cheapest, least = np.where(total < least, row, cheapest), np.minimum(total, least)
        # A fixed shuffle of the token index decides who changes, so that a batch always gets the same answer.
        shuffled = (np.arange(num_tokens) * 2654435761 + turn * 40503 * 65536) % 2**32
        change = (shuffled < 2**32 / (turn + 2)) & np.isfinite(least)
        nodes = np.where(change[:, None], sets[cheapest], nodes)
    return best


def _token_nodes(expert, used, on_node, home_node, max_nodes):
    """Nodes each token may touch, bool [num_tokens, num_nodes]: the homes of its experts, then the most useful."""
    num_tokens, num_nodes = len(expert), on_node.shape[1]
    nodes = np.zeros((num_tokens, num_nodes + 1), bool)
    np.put_along_axis(nodes, np.where(used, home_node[expert], num_nodes), True, 1)
    nodes = nodes[:, :num_nodes]
    most = int(nodes.sum(1).max())
    if most > max_nodes:
        raise ValueError(f"max_nodes={max_nodes}: a token's experts have {most} home nodes; the routing must keep at "
                         f"most as many expert groups as nodes are allowed")
    useful = (on_node[expert] & used[..., None]).sum(1)
    for _ in range(max_nodes - 1):
        score = np.where(nodes, -1, useful)
        best = score.argmax(1)
        grow = (nodes.sum(1) < max_nodes) & (score[np.arange(num_tokens), best] > 0)
        nodes[grow, best[grow]] = True
    return nodes


def nodes_per_token(physical_idx, num_physical_experts, num_nodes):
    """Distinct nodes that each token touches: int64 [num_tokens]; physical_idx int [num_tokens, topk], -1 = unused."""
    physical_idx = np.asarray(physical_idx)
    node = np.where(physical_idx >= 0, physical_idx // (num_physical_experts // num_nodes), num_nodes)
    touched = np.zeros((len(physical_idx), num_nodes + 1), bool)
    np.put_along_axis(touched, node, True, 1)
    return touched[:, :num_nodes].sum(1)
