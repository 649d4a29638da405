"""plan_experts and update_plan: check the request, try the few replica counts that can be best, keep the best."""

import numpy as np

from .cost import default_cost, slot_cost
from .greedy import greedy_physical_to_logical
from .groups import place_grouped, update_grouped
from .place import deal, place_copies
from .plan import ExpertPlan, invert
from .replicate import capped_replicas, expand, minmax_replicas
from .search import swap_search
from .split import even_split
from .update import update_placement

# A layer this close to its bound is finished: the swaps of a round cannot be told apart below it.
TOLERANCE = 1e-5
# Layers further than this from their bound also try other replica counts.
RETRY = 1e-3
# Where between the smallest possible hottest copy (0) and a whole rank's load (1) the other counts cut copies off.
# Rounds of search that other replica counts get before the best of them is searched to the end.
TRIAL_ROUNDS = 6
# Searches for other local optima, costs first taken wrong by up to 1 %, where the published greedy is more even but
# puts two copies of an expert on one rank.
SHAKES = 8
CUTS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


def plan_experts(load, *, num_ranks, num_nodes=1, num_redundant_experts=0, num_groups=1, phase="prefill", cost=None,
                 max_nodes_per_token=None):
    """Place experts and redundant copies on ranks so that the most loaded rank has as little as possible.

    load: [layers, num_logical_experts], rows per expert, any real dtype, finite and >= 0.
    num_ranks must divide num_logical_experts + num_redundant_experts, num_nodes must divide num_ranks.
    num_groups > 1 with num_nodes > 1: the routing keeps few expert groups per token; each group gets a home node and
        redundant slots may reach across nodes (groups.py). num_nodes must divide num_groups.
    phase: "prefill" balances rows, "decode" the expected activated experts (cost.py); cost: a CostModel for "decode".
    max_nodes_per_token: with groups, nodes a token may touch; None: num_groups / 2, at most num_nodes (DeepSeek-V3
        keeps 4 of 8 groups).
    Deterministic. A layer without any load is dealt round robin: first the experts 0, 1, 2, ... that get a second copy.
    ValueError, with the numbers, for everything that cannot be planned.
    """
    load = check_load(load)
    num_layers, num_logical = load.shape
    cost = _check_topology(num_logical, num_ranks, num_nodes, num_redundant_experts, num_groups, phase, cost,
                           max_nodes_per_token)
    # Which expert serves which row decides nothing while there is no load: plan as if all were equal.
    empty = load.sum(1) == 0
    weight = np.where(empty[:, None], 1.0, load)
    shared = dict(num_ranks=num_ranks, num_nodes=num_nodes, num_groups=num_groups, phase=phase, cost=cost)
    if num_groups > 1 and num_nodes > 1:
        max_nodes = max_nodes_per_token or min(num_nodes, max(1, num_groups // 2))
        placed, flow, home = place_grouped(weight, num_ranks=num_ranks, num_nodes=num_nodes, num_groups=num_groups,
                                           num_redundant_experts=num_redundant_experts, max_nodes=max_nodes)
        return _with_flow(placed, load, flow, home, max_nodes, shared)
    placed = _best_placement(weight, num_ranks, num_redundant_experts, cost)
    if cost is None:
        placed = _not_below_greedy(placed, weight, num_ranks, num_redundant_experts)
    if empty.any():
        placed[empty] = _round_robin(num_logical, num_redundant_experts, num_ranks)
    return _with_even_split(placed, load, shared)


def update_plan(plan, load, move_budget):
    """The plan changed for new load by at most move_budget slots a layer; never worse than the old plan.

    plan: ExpertPlan; load: [layers, num_logical_experts] as for plan_experts; move_budget: int >= 0, slots whose
    expert may change, per layer. Slots that keep their expert keep their index, so only the changed ones need weights.
    Layers without load keep their placement. With expert groups only redundant copies move, homes stay.
    """
    load = check_load(load)
    if load.shape != plan.load.shape:
        raise ValueError(f"load {load.shape}: the plan is for {plan.num_layers} layers of {plan.num_logical_experts} "
                         f"logical experts; plan again for another model")
    if isinstance(move_budget, bool) or not isinstance(move_budget, (int, np.integer)) or move_budget < 0:
        raise ValueError(f"move_budget={move_budget!r}: slots per layer, an int >= 0")
    weight = np.where(load.sum(1, keepdims=True) == 0, 1.0, load)
    placed = plan.placed.astype(np.int64)
    shared = dict(num_ranks=plan.num_ranks, num_nodes=plan.num_nodes, num_groups=plan.num_groups, phase=plan.phase,
                  cost=plan.cost)
    if plan.home_node is not None:
        new, flow = update_grouped(placed, weight, plan.home_node.astype(np.int64), int(move_budget),
                                   num_nodes=plan.num_nodes, max_nodes=plan.max_nodes_per_token)
        return _with_flow(new, load, flow, plan.home_node, plan.max_nodes_per_token, shared)
    cost = plan.cost
    new = placed.copy()
    busy = np.flatnonzero(load.sum(1) > 0)
    if len(busy):
        def cost_of(rows, count):
            return rows / count if cost is None else cost.copy_cost(rows / count, rows.sum(1, keepdims=True))
        new[busy] = update_placement(placed[busy], weight[busy], cost_of, int(move_budget))
    return _with_even_split(new, load, shared)


def check_load(load):
    """load as float64 [layers, num_logical_experts]; ValueError when it is not finite, not >= 0 or not 2-D."""
    load = np.asarray(load, np.float64)
    if load.ndim != 2 or 0 in load.shape:
        raise ValueError(f"load has shape {load.shape}: expected [layers, num_logical_experts], both >= 1")
    bad = ~np.isfinite(load) | (load < 0)
    if bad.any():
        layer, expert = np.argwhere(bad)[0]
        raise ValueError(f"load[{layer}, {expert}] = {load[layer, expert]}: rows must be finite and >= 0 "
                         f"({int(bad.sum())} such entries)")
    return load


def _check_topology(num_logical, num_ranks, num_nodes, num_redundant, num_groups, phase, cost, max_nodes):
    for name, value, least in (("num_ranks", num_ranks, 1), ("num_nodes", num_nodes, 1), ("num_groups", num_groups, 1),
                               ("num_redundant_experts", num_redundant, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}={value!r}: an int >= {least} is needed")
    physical = num_logical + num_redundant
    if physical % num_ranks:
        lower = num_redundant - physical % num_ranks
        nearest = [n for n in (lower, lower + num_ranks) if n >= 0]
        raise ValueError(f"num_redundant_experts={num_redundant}: {num_logical} + {num_redundant} = {physical} slots "
                         f"do not divide over {num_ranks} ranks; nearest: {', '.join(map(str, nearest))}")
    if num_ranks % num_nodes:
        raise ValueError(f"num_nodes={num_nodes} does not divide num_ranks={num_ranks}")
    if num_redundant > num_logical * (num_ranks - 1):
        raise ValueError(f"num_redundant_experts={num_redundant}: {num_logical} experts on {num_ranks} ranks can use "
                         f"at most {num_logical * (num_ranks - 1)} (one copy per expert and rank)")
    if num_logical % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide {num_logical} logical experts")
    if num_groups > 1 and num_nodes > 1 and num_groups % num_nodes:
        raise ValueError(f"num_groups={num_groups} on num_nodes={num_nodes}: whole groups do not fit; use a number of "
                         f"nodes that divides the groups, or num_groups=1 to place without a node limit")
    if max_nodes is not None and not 1 <= max_nodes <= num_nodes:
        raise ValueError(f"max_nodes_per_token={max_nodes}: between 1 and num_nodes={num_nodes}")
    standard = default_cost(phase, num_logical)
    if cost is not None and phase == "prefill":
        raise ValueError("cost is for phase='decode'; 'prefill' balances rows")
    return standard if cost is None else cost


def _best_placement(load, num_ranks, num_redundant, cost):
    """Placement with the smallest largest rank cost among a few replica counts: int64 [layers, ranks, slots]."""
    count = minmax_replicas(load, num_redundant, num_ranks)
    best, best_max, bound, filled = _place(load, count, num_ranks, cost)
    if not num_redundant:
        return best
    changed = np.zeros(len(load), bool)
    smallest = (load / count).max(1)
    whole = np.maximum(load.sum(1) / num_ranks, smallest)
    # Other counts could lower that bound too, but only by making the hottest copies hotter: not worth their time.
    enough = np.maximum(_good_enough(load, bound, num_ranks), filled * (1 + RETRY))
    filler = "warm" if cost is None else "cold"
    for cut in CUTS:
        # Rows: the bound holds for every choice of counts. Activated experts: each choice has its own.
        again = np.arange(len(load))
        if cost is None:
            again = np.flatnonzero(best_max > enough)
        if not len(again):
            break
        cap = smallest[again] * (1 - cut) + whole[again] * cut
        other, ok = capped_replicas(load[again], cap, num_redundant, num_ranks, filler=filler)
        again, other = again[ok], other[ok]
        if not len(again):
            continue
        placed, largest, _, _ = _place(load[again], other, num_ranks, cost, max_rounds=TRIAL_ROUNDS)
        better = largest < best_max[again] * (1 - 1e-9)
        best[again[better]], best_max[again[better]] = placed[better], largest[better]
        changed[again[better]] = True
    if changed.any():
        which = np.flatnonzero(changed)
        count = invert(best[which].reshape(len(which), -1), load.shape[1])[0]
        each = slot_cost(cost, load[which] / count, load[which].sum(1))
        best[which] = swap_search(best[which], each, target=bound[which] * (1 + TOLERANCE))
    return best


def _good_enough(load, bound, num_ranks):
    """Largest rank cost at which other replica counts are not tried, float64 [layers].

    Whole rows: a rank without a shared expert holds a whole number of them, so the next one above the mean is as good
    as the bound; without this a layer of few rows would try everything for the sake of a fraction of a row.
    """
    whole = (load == np.round(load)).all(1)
    return np.maximum(bound * (1 + RETRY), np.where(whole, np.ceil(load.sum(1) / num_ranks), 0.0))


def _filled_bound(weight, num_ranks):
    """No placement of copies weight [layers, slots] has a smaller largest rank, float64 [layers]: every slot is filled.

    The k hottest copies lie on at most k ranks, whose other slots hold at least the lightest copies; max over k.
    """
    slots = weight.shape[1] // num_ranks
    k = np.arange(1, num_ranks + 1)
    heavy = -np.sort(-weight, axis=1).cumsum(1)
    light = heavy[:, -1:] - np.pad(heavy, ((0, 0), (1, 0)))[:, slots * num_ranks - k * (slots - 1)]
    return ((heavy[:, k - 1] + light) / k).max(1)


def _not_below_greedy(placed, load, num_ranks, num_redundant):
    """placed, with layers in which the published greedy is more even searched further, or else taken from it."""
    rival = greedy_physical_to_logical(load, num_ranks=num_ranks, num_redundant_experts=num_redundant)
    rival = rival.reshape(placed.shape)

    def largest(one, rows):
        each = rows / invert(one.reshape(len(one), -1), rows.shape[1])[0]
        return np.take_along_axis(each[:, None, :], one, 2).sum(2).max(1), each

    aim = largest(rival, load)[0]
    behind = np.flatnonzero(largest(placed, load)[0] > aim * (1 + 1e-12))
    if len(behind):
        placed[behind] = swap_search(placed[behind], largest(placed[behind], load[behind])[1], target=aim[behind])
        still = behind[largest(placed[behind], load[behind])[0] > aim[behind] * (1 + 1e-12)]
        ordered = np.sort(rival[still], axis=2)
        # The greedy may put two copies of an expert on one rank; such a plan is not taken.
        still = still[~(ordered[..., 1:] == ordered[..., :-1]).any((1, 2))]
        placed[still] = rival[still]
        for attempt in range(SHAKES):
            behind = behind[largest(placed[behind], load[behind])[0] > aim[behind] * (1 + 1e-12)]
            if not len(behind):
                break
            each = largest(placed[behind], load[behind])[1]
            shaken = each * (1 + 0.01 * np.random.default_rng(attempt).random(each.shape))
            other = swap_search(placed[behind], shaken, target=np.zeros(len(behind)), max_rounds=TRIAL_ROUNDS)
            other = swap_search(other, each, target=aim[behind])
            better = largest(other, load[behind])[0] < largest(placed[behind], load[behind])[0]
            placed[behind[better]] = other[better]
    return placed


def _place(load, count, num_ranks, cost, *, max_rounds=60):
    """Place copies, linked first, and search: (placed, largest rank cost, bound, bound with every slot filled).

    The last three float64 [layers].
    """
    num_logical = load.shape[1]
    each = slot_cost(cost, load / count, load.sum(1))
    owner = expand(count, int(count[0].sum()))
    weight = np.take_along_axis(each, owner, 1)
    bound = np.maximum(weight.sum(1) / num_ranks, each.max(1))
    filled = np.maximum(bound, _filled_bound(weight, num_ranks))
    goal = np.where(filled > bound, filled * (1 + RETRY), bound * (1 + TOLERANCE))

    def largest(placed):
        return np.take_along_axis(each[:, None, :], placed, 2).sum(2).max(1)

    placed = place_copies(owner, weight, num_ranks, num_logical, linked=True)
    # Single experts first: moving only them keeps the links; the last step may then trade links for evenness.
    placed = swap_search(placed, each, target=goal, movable=count == 1, max_rounds=max_rounds)
    placed = swap_search(placed, each, target=filled * (1 + RETRY), max_rounds=max_rounds)
    worst = largest(placed)
    again = np.flatnonzero(worst > _good_enough(load if cost is None else each, filled, num_ranks))
    if len(again):
        plain = place_copies(owner[again], weight[again], num_ranks, num_logical)
        plain = swap_search(plain, each[again], target=goal[again], max_rounds=max_rounds)
        plain_worst = np.take_along_axis(each[again][:, None, :], plain, 2).sum(2).max(1)
        better = plain_worst < worst[again] * (1 - 1e-9)
        placed[again[better]], worst[again[better]] = plain[better], plain_worst[better]
    return placed, worst, bound, filled


def _round_robin(num_logical, num_redundant, num_ranks):
    """Slots of a layer without load, int64 [num_ranks, slots per rank]: copies adjacent, dealt to the ranks in turn."""
    extra, some = divmod(num_redundant, num_logical)
    count = np.full((1, num_logical), 1 + extra)
    count[0, :some] += 1
    return deal(expand(count, num_logical + num_redundant), num_ranks)[0]


def _with_even_split(placed, load, shared):
    mapping = placed.reshape(len(placed), -1).astype(np.int32)
    replicas, to_physical = invert(mapping, load.shape[1])
    return ExpertPlan(mapping, load, even_split(replicas, to_physical, mapping.shape[1]), **shared)


def _with_flow(placed, load, flow, home, max_nodes, shared):
    num_layers, num_ranks, slots = placed.shape
    mapping = placed.reshape(num_layers, -1)
    rank = np.arange(num_ranks * slots) // slots
    rows = flow[np.arange(num_layers)[:, None], mapping, rank]
    total = np.zeros(load.shape)
    np.add.at(total, (np.arange(num_layers)[:, None], mapping), rows)
    # An expert without rows still needs a share: its copies split evenly.
    replicas, to_physical = invert(mapping, load.shape[1])
    even = even_split(replicas, to_physical, mapping.shape[1])
    own = np.take_along_axis(total, mapping, 1)
    share = np.where(own > 0, rows / np.where(own > 0, own, 1.0), even)
    return ExpertPlan(mapping.astype(np.int32), load, share, **shared, home_node=np.asarray(home, np.int32),
                      max_nodes_per_token=max_nodes)
