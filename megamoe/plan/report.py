"""Figures of a plan beside its rival: rows of plain numbers, and their tables."""

import time

import numpy as np

from .greedy import greedy_physical_to_logical
from .load import balancedness, count_load, drift, popularity, sample_topk
from .plan import ExpertPlan, invert
from .planner import plan_experts, update_plan
from .relabel import relabel
from .split import balanced_split, even_split

# (logical experts, redundant experts, ranks) of the published comparisons; topk 8, 16384 tokens a layer.
CASES = ((256, 32, 8), (256, 32, 32), (256, 64, 32), (384, 48, 72), (128, 16, 16))


def even_rank_load(physical_to_logical, num_ranks, load):
    """Rank loads when every copy takes the same part: float64 [layers, num_ranks]."""
    mapping = np.asarray(physical_to_logical, np.int64)
    count = np.stack([np.bincount(one, minlength=load.shape[1]) for one in mapping])
    copy = np.take_along_axis(load / count, mapping, 1)
    return copy.reshape(len(load), num_ranks, -1).sum(2)


def even_plan(physical_to_logical, like):
    """An ExpertPlan of this mapping with even shares and the load, ranks and cost of the plan `like`."""
    mapping = np.asarray(physical_to_logical, np.int32)
    share = even_split(*invert(mapping, like.num_logical_experts), mapping.shape[1])
    return ExpertPlan(mapping, like.load, share, like.num_ranks, like.num_nodes, phase=like.phase, cost=like.cost)


def make_load(kind, num_layers, num_experts, seed, *, drift_sigma=0.0, num_tokens=16384, topk=8):
    """Rows per expert of sampled tokens, float64 [layers, experts]; with drift_sigma, of the popularity drifted."""
    base = popularity(kind, num_layers, num_experts, seed)
    if drift_sigma:
        base = drift(base, drift_sigma, seed + 1000)
    sample_seed = seed + (3000 if drift_sigma else 2000)
    return count_load(sample_topk(base, num_tokens, topk, sample_seed), num_experts).astype(np.float64)


def compare(kind, num_experts, num_redundant, num_ranks, *, num_layers=8, seed=1, drift_sigma=0.3, budget=0.03):
    """One row: the greedy and this planner on the same loads, then on drifted ones. Values are means over layers.

    "none", "eplb", "plan": balancedness on the planned statistics without redundancy, of the published greedy and of
    plan_experts; "next_*": on the next batch, "even" split or "filled" by actual counts; "update" and "update_moved":
    update_plan within `budget` of all slots; "replan_moved": part of the slots the greedy's fresh plan changes, its
    ranks relabelled first; "ms": plan_experts for these layers.
    """
    load = make_load(kind, num_layers, num_experts, seed)
    later = make_load(kind, num_layers, num_experts, seed, drift_sigma=drift_sigma)
    shared = dict(num_ranks=num_ranks, num_redundant_experts=num_redundant)
    greedy = greedy_physical_to_logical(load, **shared)
    started = time.perf_counter()
    plan = plan_experts(load, **shared)
    spent_ms = (time.perf_counter() - started) * 1e3
    changed = update_plan(plan, later, int(budget * plan.num_physical_experts))
    again = relabel(greedy_physical_to_logical(later, **shared), greedy, num_ranks)
    row = {"load": kind, "experts": num_experts, "redundant": num_redundant, "ranks": num_ranks}
    if num_experts % num_ranks == 0:
        row["none"] = balancedness(load.reshape(num_layers, num_ranks, -1).sum(2)).mean()
    row |= {
        "eplb": balancedness(even_rank_load(greedy, num_ranks, load)).mean(),
        "plan": plan.balancedness.mean(),
        "worst_margin": (plan.balancedness - balancedness(even_rank_load(greedy, num_ranks, load))).min(),
        "gap": plan.gap.max(),
        "next_eplb_even": balancedness(even_rank_load(greedy, num_ranks, later)).mean(),
        "next_eplb_filled": balancedness(balanced_split(greedy, num_ranks, later)).mean(),
        "next_plan_filled": balancedness(balanced_split(plan.physical_to_logical, num_ranks, later)).mean(),
        "update": changed.balancedness.mean(),
        "update_moved": changed.moves_from(plan).mean() / plan.num_physical_experts,
        "replan_moved": (again != greedy).mean(),
        "ms": spent_ms,
    }
    return {name: value if isinstance(value, str | int) else float(value) for name, value in row.items()}


def table(rows):
    """The rows (dicts) as text, columns in the order of first appearance, floats with four digits, "-" where absent."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = [names] + [[_cell(row.get(name, "-")) for name in names] for row in rows]
    width = [max(len(line[i]) for line in text) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, width, strict=True)) for line in text)


def picture(before, after, *, width=40):
    """Load per rank as bars, before and after, scaled to the largest of both; each float [num_ranks]."""
    largest = max(float(np.max(before)), float(np.max(after)), 1e-300)
    lines = [f"{'rank':>4}  {'before':<{width}}  after"]
    for rank, (a, b) in enumerate(zip(before, after, strict=True)):
        lines.append(f"{rank:>4}  {'#' * round(width * a / largest):<{width}}  {'#' * round(width * b / largest)}")
    return "\n".join(lines)


def _cell(value):
    return f"{value:.4f}" if isinstance(value, float) else str(value)
