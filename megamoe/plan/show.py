"""What the planner promises, measured: one row a promise and case, beside the published greedy and the oracle."""

import time
from functools import partial
from itertools import pairwise

import numpy as np

from .choice import rank_rows, replica_map
from .greedy import greedy_physical_to_logical
from .load import GENERATORS, balancedness, count_load, drift, popularity, sample_topk
from .oracle import lp_rank_load, node_limited_bound
from .planner import plan_experts, update_plan
from .relabel import relabel
from .report import CASES, even_rank_load, make_load
from .simulate import chosen_rank_rows
from .tokens import choose_replicas, nodes_per_token

LAYERS_TIMED = 58  # of DeepSeek-V3 with experts


# (redundant experts, ranks) at which recorded loads are planned
TRACE_CASES = ((16, 8), (32, 32))


def promises(seeds=(1, 2), traces=()):
    """Rows (dicts) of every promise: line, case, eplb, ours, oracle, needs (text), ok (True or False).

    traces: {name: (load [steps, layers, experts], kind [steps])} of recordings (record.py, benchmarks/trace_model.py).
    Needs scipy for the oracle: ImportError without. About two minutes on one core.
    """
    for line in (same_statistics, group_limited, next_batch, recovery, recovery_curve, planning_time):
        yield from line(seeds)
    for name, (load, kind) in dict(traces).items():
        yield from recorded(name, np.asarray(load, np.float64), kind)


def recorded(name, steps, kind):
    """A recording: every kind of step planned and served; then each step served by the plan made from the one before.

    Layers without load in a step count as even. The second needs two steps of a kind.
    """
    for redundant, ranks in TRACE_CASES:
        shared = dict(num_ranks=ranks, num_redundant_experts=redundant)
        for one in dict.fromkeys(kind.tolist()):
            load = steps[kind == one].sum(0)
            plan, greedy = plan_experts(load, **shared), greedy_physical_to_logical(load, **shared)
            rival = balancedness(even_rank_load(greedy, ranks, load))
            lp = np.array([_lp_balancedness(plan, layer, load[layer]) for layer in range(len(load))])
            ours = plan.balancedness
            case = f"{name} {one} +{redundant}/{ranks}"
            yield _row("recorded", case, rival.min(), ours.min(), lp.min(), ">= eplb in every layer",
                       (ours >= rival - 1e-9).all())
            here = steps[kind == one]
            if len(here) < 2:
                continue
            rival, ours, lp = [], [], []
            for before, after in list(pairwise(here))[:: max(1, len(here) // 8)]:
                plan, greedy = plan_experts(before, **shared), greedy_physical_to_logical(before, **shared)
                rival.append(balancedness(even_rank_load(greedy, ranks, after)))
                ours.append(balancedness(chosen_rank_rows(plan, after)))
                lp.append([_lp_balancedness(plan, layer, rows) for layer, rows in enumerate(after)])
            rival, ours, lp = (np.array(column) for column in (rival, ours, lp))
            # Few rows a rank: an LP, and an even split, may cut a row in two; a choice cannot
            whole = after.sum(1).max() / ranks
            yield _row("recorded next", case, rival.mean(), ours.mean(), lp.mean(), "0.98 of mean LP, less a row",
                       ours.mean() >= 0.98 * lp.mean() - 1 / whole)


def _lp_balancedness(plan, layer, rows):
    largest = lp_rank_load(plan.physical_to_logical[layer], plan.num_ranks, rows)
    return rows.sum() / plan.num_ranks / largest if largest else 1.0


def same_statistics(seeds):
    """Balancedness on the planned statistics: never below the greedy, within 0.1 % of the LP of either placement."""
    for kind in GENERATORS:
        for experts, redundant, ranks in CASES:
            load = np.concatenate([make_load(kind, 1, experts, seed) for seed in seeds])
            shared = dict(num_ranks=ranks, num_redundant_experts=redundant)
            plan, greedy = plan_experts(load, **shared), greedy_physical_to_logical(load, **shared)
            rival = balancedness(even_rank_load(greedy, ranks, load))
            mean = load.sum(1) / ranks
            placements = plan.physical_to_logical, greedy
            lp = np.array([[mean[i] / lp_rank_load(one[i], ranks, load[i]) for one in placements]
                           for i in range(len(load))])
            ours = plan.balancedness
            ok = (ours >= rival - 1e-9).all() and (ours >= 0.999 * lp[:, 0]).all()
            yield _row("same statistics", f"{kind} {experts}+{redundant}/{ranks}", rival.min(), ours.min(),
                       lp.min(0)[0], ">= eplb, 0.999 of LP", ok, lp_of_eplb=lp.min(0)[1])


def group_limited(seeds):
    """256 experts in 8 groups, 4 kept, 32 ranks: at least 0.95, or 0.98 of the oracle, no token on over 4 nodes."""
    for kind in ("zipf", "lognormal", "group"):
        for nodes in (4, 8):
            for redundant in (32, 64):
                each = [_group_limited(kind, nodes, redundant, seed) for seed in seeds]
                eplb, ours, oracle, touched = (np.array(column) for column in zip(*each, strict=True))
                ok = ((ours >= 0.95) | (ours >= 0.98 * oracle)).all() and touched.max() <= 4
                yield _row("group-limited", f"{kind} {nodes} nodes +{redundant}", eplb.min(), ours.min(),
                           oracle[ours.argmin()], ">= 0.95 or 0.98 of oracle, <= 4 nodes a token", ok,
                           nodes_a_token=int(touched.max()))


def _group_limited(kind, nodes, redundant, seed):
    topk_idx = sample_topk(popularity(kind, 1, 256, seed), 4096, 8, seed + 1, num_groups=8, topk_groups=4)
    load = count_load(topk_idx, 256)
    shared = dict(num_ranks=32, num_nodes=nodes, num_redundant_experts=redundant, num_groups=8)
    plan, greedy = plan_experts(load, **shared), greedy_physical_to_logical(load, **shared)
    physical = choose_replicas(topk_idx[0], plan.physical_to_logical[0], num_ranks=32, num_nodes=nodes,
                               home_node=plan.home_node[0], max_nodes=4)
    ours = balancedness(np.bincount(physical.ravel() // plan.num_local_experts, minlength=32))
    largest = lp_rank_load(plan.physical_to_logical[0], 32, load[0])
    if nodes > 4:
        largest = max(largest, node_limited_bound(topk_idx[0], plan.physical_to_logical[0], 32, nodes, 4))
    eplb = balancedness(even_rank_load(greedy, 32, load.astype(float)))[0]
    touched = nodes_per_token(physical, plan.num_physical_experts, nodes).max()
    return eplb, float(ours), load.sum() / 32 / largest, touched


def next_batch(seeds):
    """The next batch (lognormal, drift 0.3, 32 ranks): choice of copies by its counts, 0.98 of the LP per layer."""
    for redundant, least in ((32, 0.87), (64, 0.95)):
        load = np.concatenate([make_load("lognormal", 4, 256, seed) for seed in seeds])
        later = np.concatenate([make_load("lognormal", 4, 256, seed, drift_sigma=0.3) for seed in seeds])
        shared = dict(num_ranks=32, num_redundant_experts=redundant)
        plan, greedy = plan_experts(load, **shared), greedy_physical_to_logical(load, **shared)
        maps = [replica_map(one, 256, 32, load=rows) for one, rows in zip(plan.physical_to_logical, load, strict=True)]
        ours = balancedness(np.stack([rank_rows(one, rows) for one, rows in zip(maps, later, strict=True)]))
        lp = np.array([later[i].sum() / 32 / lp_rank_load(plan.physical_to_logical[i], 32, later[i])
                       for i in range(len(later))])
        rival = balancedness(even_rank_load(greedy, 32, later))
        yield _row("next batch", f"lognormal 256+{redundant}/32", rival.mean(), ours.mean(), lp.mean(),
                   f"mean >= {least}, each >= 0.98 of LP", ours.mean() >= least and (ours >= 0.98 * lp).all())


def _drifted(sigma):
    before = np.concatenate([popularity("lognormal", 1, 256, seed) for seed in range(8)])
    after = np.concatenate([drift(before[seed:seed + 1], sigma, 100 + seed) for seed in range(8)])
    return before, after


def recovery(seeds):
    """Drift at 8 ranks, 8 seeds (0 to 7): what at most 3 % of the slots bring back; the greedy replans from scratch."""
    for sigma, least in ((0.3, 0.99), (0.6, 0.975)):
        before, after = _drifted(sigma)
        shared = dict(num_ranks=8, num_redundant_experts=32)
        plan = plan_experts(before, **shared)
        changed = update_plan(plan, after, int(0.03 * plan.num_physical_experts))
        old, fresh = greedy_physical_to_logical(before, **shared), greedy_physical_to_logical(after, **shared)
        moved = changed.moves_from(plan).max() / plan.num_physical_experts
        ours = changed.balancedness.mean()
        rival = balancedness(even_rank_load(fresh, 8, after)).mean()
        yield _row("recovery", f"drift {sigma} 256+32/8", rival, ours, None, f">= {least} with <= 3 % moved",
                   ours >= least and moved <= 0.03, moved=float(moved), eplb_moved=float((old != fresh).mean()))


def recovery_curve(seeds):
    """The same at 32 ranks for growing budgets: above what the greedy offers for that many moves, ranks relabelled."""
    before, after = _drifted(0.3)
    shared = dict(num_ranks=32, num_redundant_experts=32)
    plan, old = plan_experts(before, **shared), greedy_physical_to_logical(before, **shared)
    fresh = relabel(greedy_physical_to_logical(after, **shared), old, 32)
    rival_moves = (fresh != old).sum(1)
    for budget in (0, 2, 8, 28, 86, int(rival_moves.min())):
        ours = update_plan(plan, after, budget).balancedness
        # Fewer moves than its replan takes leave the greedy with its old plan.
        offered = np.where((rival_moves <= budget)[:, None, None], fresh[:, None], old[:, None])[:, 0]
        rival = balancedness(even_rank_load(offered, 32, after)).mean()
        yield _row("recovery curve", f"drift 0.3 256+32/32, {budget} slots", rival, ours.mean(), None, "> eplb",
                   ours.mean() > rival, eplb_moved=float(rival_moves.mean() / plan.num_physical_experts))


def planning_time(seeds):
    """58 layers on one core, ms of processor time, best of five: the plan, and an update within 3 % of the slots."""
    for experts, redundant, ranks, least in ((256, 32, 8, 250), (256, 32, 32, 250), (384, 48, 72, 500)):
        load = popularity("lognormal", LAYERS_TIMED, experts, seeds[0])
        later = drift(load, 0.3, seeds[0] + 1)
        shared = dict(num_ranks=ranks, num_redundant_experts=redundant)
        plan = plan_experts(load, **shared)
        budget = int(0.03 * (experts + redundant))
        eplb = _ms(partial(greedy_physical_to_logical, load, **shared))
        full = _ms(partial(plan_experts, load, **shared))
        update = _ms(partial(update_plan, plan, later, budget))
        yield _row("planning ms", f"full {experts}+{redundant}/{ranks}", eplb, full, None, f"<= {least}", full <= least)
        yield _row("planning ms", f"update {experts}+{redundant}/{ranks}", eplb, update, None, "<= 60", update <= 60)


def _ms(call):
    spent = []
    for _ in range(5):
        started = time.process_time()
        call()
        spent.append((time.process_time() - started) * 1e3)
    return min(spent)


def _row(line, case, eplb, ours, oracle, needs, ok, **more):
    numbers = {"eplb": float(eplb), "ours": float(ours), "oracle": "-" if oracle is None else float(oracle)}
    return {"line": line, "case": case} | numbers | {"needs": needs, "ok": bool(ok)} | more
