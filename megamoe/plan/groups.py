"""Placement when a token may touch few nodes: expert groups stay whole on a home node, redundant slots reach across.

Every expert keeps one copy on its group's home node, so a token limited to G groups can always be served by at most G
nodes. The redundant slots may hold experts of any node: a token may use such a copy when its node is among the nodes
that the token touches anyway (or when it touches fewer than allowed). EPLB's hierarchical greedy keeps all copies on
the home node, which leaves every node with its own groups' load whatever the redundancy.
"""

import numpy as np

from .greedy import pack_heaviest_first
from .search import swap_search
from .split import fill_flows

# Estimate, chosen on sampled Zipf, lognormal and group-correlated tokens: too low wastes slots, too high plans rows
# for nodes that the tokens cannot reach.
EXCHANGE = 0.3
# Of redundant copies after they are dealt; more cost more time than they bring (58 layers: 20 ms each).
SEARCH_MOVES = 100


def reach(load, home_node, max_nodes, num_nodes):
    """Estimated part of an expert's tokens that may use a copy of it on another node, float64 [layers, num_nodes].

    load: float64 [layers, experts]; home_node: int64 [layers, experts]. A token touches max_nodes nodes, popular ones
    more often: node n is taken to be touched with probability q_n = min(1, c * rows at home on n), c such that the q_n
    sum to max_nodes. Of the tokens that miss node n, EXCHANGE are taken to be able to give up another node for it.
    """
    if num_nodes == 1:
        return np.ones((len(load), 1))
    rows = np.zeros((len(load), num_nodes))
    np.add.at(rows, (np.arange(len(load))[:, None], home_node), load)
    rows = rows / rows.max(1, keepdims=True) + 1e-9
    touched = np.zeros_like(rows)
    for _ in range(num_nodes):  # every pass caps the nodes that are always touched and shares out the rest
        certain = touched >= 1
        rest = max_nodes - certain.sum(1, keepdims=True)
        others = np.where(certain, 0.0, rows).sum(1, keepdims=True)
        touched = np.where(certain, 1.0, np.minimum(1.0, rest * rows / np.where(others > 0, others, 1.0)))
    return touched + (1 - touched) * EXCHANGE


def place_grouped(load, *, num_ranks, num_nodes, num_redundant_experts, num_groups, max_nodes):
    """(placed int64 [layers, num_ranks, slots], flow float64 [layers, experts, num_ranks], home_node int64 [layers,
    experts]).

    load: float64 [layers, num_logical_experts]. flow is the rows of each expert that each rank is planned to take.
    """
    num_layers, num_logical = load.shape
    slots = (num_logical + num_redundant_experts) // num_ranks
    ranks_per_node = num_ranks // num_nodes
    home_rank = _home_ranks(load, num_ranks, num_nodes, num_groups)
    home_node = home_rank // ranks_per_node
    layer = np.arange(num_layers)
    held = np.zeros((num_layers, num_logical, num_ranks), bool)
    np.put_along_axis(held, home_rank[..., None], True, 2)
    placed = np.full((num_layers, num_ranks, slots), -1, np.int64)
    count = np.zeros((num_layers, num_ranks), np.int64)
    for expert in range(num_logical):
        rank = home_rank[:, expert]
        placed[layer, rank, count[layer, rank]] = expert
        count[layer, rank] += 1
    flow = np.where(held, load[..., None], 0.0)
    level = flow.sum(1)
    node_of = np.arange(num_ranks) // ranks_per_node
    part = reach(load, home_node, max_nodes, num_nodes)
    for step in range(num_redundant_experts):
        rank, chosen = _add_copy(placed, count < slots, held, flow, level, load, home_node, node_of, part)
        placed[layer, rank, count[layer, rank]] = chosen
        count[layer, rank] += 1
        # Greedy transfers go stale as copies accumulate; pouring again costs more than a step, hence not every time.
        if step % 8 == 7 or step == num_redundant_experts - 1:
            passes = 8 if step == num_redundant_experts - 1 else 2
            flow = planned_flow(held, load, home_node, node_of, part, passes=passes)
            level = flow.sum(1)
    if num_redundant_experts:
        placed, flow = _retarget(placed, load, home_node, SEARCH_MOVES, num_nodes=num_nodes, max_nodes=max_nodes,
                                 unevenness=_high_norm, rest=num_redundant_experts // 2)
    return placed, flow, home_node


def _high_norm(level):
    return ((level / level.mean(1, keepdims=True)) ** 24).sum(1)


def planned_flow(held, load, home_node, node_of, part, *, passes=8):
    """Rows of each expert per rank, float64 [layers, experts, num_ranks], with only the reachable part crossing nodes.

    held: bool [layers, experts, num_ranks]; home_node: int [layers, experts]; node_of: int [num_ranks];
    part: float64 [layers, num_nodes] of reach().
    """
    num_nodes = part.shape[1]
    at_home = held & (home_node[..., None] == node_of)
    copies = held.sum(2)
    single = np.where((copies == 1)[..., None], held * load[..., None], 0.0)
    num_flows = int((copies > 1).sum(1).max())
    if not num_flows:
        return single
    which = np.argsort(copies <= 1, axis=1, kind="stable")[:, :num_flows]
    amount = np.take_along_axis(np.where(copies > 1, load, 0.0), which, 1)
    anywhere = np.take_along_axis(held, which[..., None], 1)
    bound = np.take_along_axis(at_home, which[..., None], 1)
    crossing = np.zeros((*which.shape, num_nodes), bool)
    for node in range(num_nodes):
        crossing[..., node] = (anywhere & ~bound)[..., node_of == node].any(2)
    free = 1 - np.where(crossing, 1 - part[:, None, :], 1.0).prod(2)
    # Each expert is two flows: the tokens that can use any copy, and those that must stay on the home node.
    both = fill_flows(single.sum(1), np.concatenate([amount * free, amount * (1 - free)], 1),
                      np.concatenate([anywhere, bound], 1), passes=passes)
    poured = both[:, :num_flows] + both[:, num_flows:]
    np.put_along_axis(single, which[..., None], np.take_along_axis(single, which[..., None], 1) + poured, 1)
    return single


def update_grouped(placed, load, home_node, move_budget, *, num_nodes, max_nodes):
    """The same after drift, home copies left alone: (placed, flow) with at most move_budget changed slots a layer."""
    return _retarget(placed, load, home_node, move_budget, num_nodes=num_nodes, max_nodes=max_nodes,
                     unevenness=lambda level: level.max(1), rest=0)


def _retarget(placed, load, home_node, moves, *, num_nodes, max_nodes, unevenness, rest):
    """Redundant copies given to other experts: (placed, flow), the most even state on the way.

    Each move takes the redundant copy that costs least to lose, on a cold rank, and makes it the copy there that
    relieves the hottest rank most; it then stays for `rest` moves. unevenness: of float64 [layers, num_ranks].
    """
    num_layers, num_logical = load.shape
    num_ranks, slots = placed.shape[1:]
    layer = np.arange(num_layers)
    node_of = np.arange(num_ranks) // (num_ranks // num_nodes)
    placed = placed.copy()
    held = np.zeros((num_layers, num_logical, num_ranks), bool)
    held[layer[:, None, None], placed, np.arange(num_ranks)[:, None]] = True
    part = reach(load, home_node, max_nodes, num_nodes)

    def pour(passes):
        return planned_flow(held, load, home_node, node_of, part, passes=passes)

    flow = pour(8)
    best, best_flow, least = placed.copy(), flow.copy(), unevenness(flow.sum(1))
    free_again = np.zeros((num_layers, num_ranks * slots), np.int64)
    for move in range(moves):
        level = flow.sum(1)
        at_home = (held & (home_node[..., None] == node_of)).sum(2)
        expert = placed.reshape(num_layers, -1)
        rank_of = np.arange(num_ranks * slots) // slots
        # The last copy on the home node is what keeps the node limit; it never moves.
        needed = (home_node[layer[:, None], expert] == node_of[rank_of]) & (at_home[layer[:, None], expert] == 1)
        price = level[:, rank_of] + flow[layer[:, None], expert, rank_of]
        price = np.where(needed | (free_again > move), np.inf, price)
        slot = price.argmin(1)
        if not np.isfinite(price[layer, slot]).all():
            break
        rank, old = slot // slots, expert[layer, slot]
        lost = flow[layer, old, rank]
        held[layer, old, rank] = False
        flow[layer, old, rank] = 0.0
        level[layer, rank] -= lost
        room = np.arange(num_ranks) == rank[:, None]
        placed[layer, rank, slot % slots] = -1
        _, chosen = _add_copy(placed, room, held, flow, level, load, home_node, node_of, part)
        placed[layer, rank, slot % slots] = chosen
        free_again[layer, slot] = move + rest
        flow = pour(4)
        now = unevenness(flow.sum(1))
        better = now < least * (1 - 1e-12)
        best[better], best_flow[better], least[better] = placed[better], flow[better], now[better]
    return best, best_flow


def _home_ranks(load, num_ranks, num_nodes, num_groups):
    """Rank of each expert's home copy, int64 [layers, experts]: groups to nodes, then experts to the node's ranks."""
    num_layers, num_logical = load.shape
    group_size = num_logical // num_groups
    group_load = load.reshape(num_layers, num_groups, group_size).sum(-1)
    node, position = pack_heaviest_first(group_load, num_nodes)
    groups = np.empty((num_layers, num_nodes, num_groups // num_nodes), np.int64)
    groups[np.arange(num_layers)[:, None], node, position] = np.arange(num_groups)
    groups = swap_search(groups, group_load, target=group_load.sum(1) / num_nodes)
    expert = (groups[..., None] * group_size + np.arange(group_size)).reshape(num_layers * num_nodes, -1)
    node_load = load[np.repeat(np.arange(num_layers), num_nodes)[:, None], expert]
    ranks_per_node = num_ranks // num_nodes
    # Pad with weightless experts so that every rank takes the same number of home copies, give or take one.
    pad = -expert.shape[1] % ranks_per_node
    rank, _ = pack_heaviest_first(np.pad(node_load, ((0, 0), (0, pad))), ranks_per_node)
    rank = rank[:, :expert.shape[1]].reshape(num_layers, num_nodes, -1)
    rank += (np.arange(num_nodes) * ranks_per_node)[:, None]
    home = np.empty((num_layers, num_logical), np.int64)
    np.put_along_axis(home, expert.reshape(num_layers, -1), rank.reshape(num_layers, -1), 1)
    return home


def _add_copy(placed, room, held, flow, level, load, home_node, node_of, part):
    """One more copy per layer: the expert of the hottest rank and the rank with room that relieve it most.

    room: bool [layers, num_ranks]. Updates held, flow and level and returns (rank, expert), int64 [layers] each; the
    caller writes the slot.
    """
    num_layers, num_ranks, _ = placed.shape
    layer = np.arange(num_layers)
    hot = level.argmax(1)
    expert = placed[layer, hot]
    filled = expert >= 0
    expert = np.where(filled, expert, 0)
    moving = np.minimum(flow[layer[:, None], expert, hot[:, None]][..., None],
                        (level[layer, hot][:, None] - level)[:, None, :] / 2)
    limit = np.where(home_node[layer[:, None], expert][..., None] == node_of, 1.0, part[:, node_of][:, None, :])
    moving = np.minimum(moving, limit * load[layer[:, None], expert][..., None])
    legal = filled[..., None] & ~held[layer[:, None], expert] & room[:, None, :]
    gain = np.where(legal, moving, -np.inf).reshape(num_layers, -1)
    pick = gain.argmax(1)
    best = gain[layer, pick]
    which, rank = np.divmod(pick, num_ranks)
    chosen = expert[layer, which]
    # The hottest rank may have no legal partner: then the lightest rank with room takes the largest expert it lacks.
    stuck = ~np.isfinite(best)
    spare = np.where(room, level, np.inf).argmin(1)
    lacking = np.where(held[layer, :, spare], -1.0, load).argmax(1)
    rank, chosen = np.where(stuck, spare, rank), np.where(stuck, lacking, chosen)
    amount = np.where(stuck, 0.0, np.maximum(best, 0.0))
    held[layer, chosen, rank] = True
    flow[layer, chosen, rank] += amount
    flow[layer, chosen, hot] -= amount
    level[layer, rank] += amount
    level[layer, hot] -= amount
    return rank, chosen
