"""A recorded load step by step: what plans, replica choice and updates would have made of it, and predicted times."""

import numpy as np

from .choice import rank_rows, replica_map
from .greedy import greedy_physical_to_logical
from .load import balancedness
from .planner import plan_experts, update_plan
from .predict import expected_active
from .relabel import relabel
from .report import even_rank_load
from .tokens import choose_replicas, nodes_per_token

SCALES = (8, 16, 32, 64, 128, 256, 512)


def replay(steps, *, num_ranks, num_nodes, num_redundant, window, budget):
    """Rows (dicts), one a window of the recording: balancedness of each step in it under plans from the window before.

    steps: float [steps, layers, experts]. window: steps a plan is made from and used for. budget: part of the slots
    that update_plan may change a window. "even": the first plan, rows split evenly; "kept": the first plan with copies
    chosen by the step's own counts; "updated": the plan updated every window, the same choice; "eplb": the greedy
    replanned every window, split evenly; moved: part of the slots.
    """
    if len(steps) < 2 * window:
        raise ValueError(f"{len(steps)} recorded steps: --window {window} needs at least {2 * window}")
    shared = dict(num_ranks=num_ranks, num_redundant_experts=num_redundant)
    plan = first = greedy = None
    rows = []
    for begin in range(0, len(steps) - window, window):
        load, later = steps[begin:begin + window].sum(0), steps[begin + window:begin + 2 * window]
        replanned = greedy_physical_to_logical(load, **shared, num_nodes=num_nodes)
        if plan is None:
            plan = first = plan_experts(load, **shared, num_nodes=num_nodes)
            moved, eplb_moved = 0.0, 0.0
        else:
            changed = update_plan(plan, load, int(budget * plan.num_physical_experts))
            moved = float(changed.moves_from(plan).mean() / plan.num_physical_experts)
            replanned = relabel(replanned, greedy, num_ranks)
            eplb_moved, plan = float((replanned != greedy).mean()), changed
        greedy = replanned
        row = {"steps": f"{begin + window}-{begin + window + len(later) - 1}"}
        row |= {"eplb": _mean([even_rank_load(greedy, num_ranks, one) for one in later]),
                "even": _mean([even_rank_load(first.physical_to_logical, num_ranks, one) for one in later]),
                "kept": _mean([chosen_rank_rows(first, one) for one in later]),
                "updated": _mean([chosen_rank_rows(plan, one) for one in later]),
                "eplb_moved": eplb_moved, "moved": moved}
        rows.append(row)
    return rows


def _mean(rank_loads):
    return float(np.mean([balancedness(one) for one in rank_loads]))


def chosen_rank_rows(plan, load, choice="balanced"):
    """Rows of each rank when copies are chosen by these counts: int64 [layers, num_ranks]."""
    count = np.rint(load).astype(np.int64)
    return np.stack([
        rank_rows(replica_map(placed, plan.num_logical_experts, plan.num_ranks, choice, load=planned), one)
        for placed, planned, one in zip(plan.physical_to_logical, plan.load, count, strict=True)])


def token_nodes(topk_idx, plan, layer=0):
    """Nodes each token touches with balanced copies, and with all of the layer's experts at their first copy: float."""
    physical = choose_replicas(topk_idx, plan.physical_to_logical[layer], num_ranks=plan.num_ranks,
                               num_nodes=plan.num_nodes)
    first = plan.logical_to_physical[layer, :, 0][topk_idx]
    return tuple(float(nodes_per_token(one, plan.num_physical_experts, plan.num_nodes).mean())
                 for one in (physical, first))


def predict(load, model, *, hidden, intermediate, topk, tokens_per_rank, num_redundant):
    """Rows (dicts), one a number of ranks: predicted us of the layer, mean over layers, without and with plans.

    load: float [layers, experts], the popularity of the experts; tokens_per_rank: of every rank in one call. Copies
    that the slots of a rank leave over are used as redundant experts. "none" is "-" where experts do not divide.
    """
    rows = []
    num_experts = load.shape[1]
    share = load / load.sum(1, keepdims=True)
    for ranks in SCALES:
        spare = -(num_experts + num_redundant) % ranks + num_redundant
        if spare > num_experts * (ranks - 1):
            continue
        total = tokens_per_rank * topk * ranks
        batch = share * total
        shared = dict(num_ranks=ranks, num_redundant_experts=spare)
        plan, greedy = plan_experts(batch, **shared), greedy_physical_to_logical(batch, **shared)
        one = dict(hidden=hidden, intermediate=intermediate)

        def layer_us(slot_rows, one=one, ranks=ranks, total=total):
            each = slot_rows.reshape(len(slot_rows), ranks, -1)
            us = model.of_rank(each.sum(2), expected_active(each, total), **one)
            return float(us.max(1).mean())

        count = np.stack([np.bincount(row, minlength=num_experts) for row in greedy])
        eplb = layer_us(np.take_along_axis(batch / count, greedy, 1))
        ours = layer_us(plan.slot_load)
        mean_rows = tokens_per_rank * topk
        active = expected_active(plan.slot_load.reshape(len(load), ranks, -1), total).mean()
        row = {"ranks": ranks, "slots": plan.num_physical_experts, "none": "-"}
        if num_experts % ranks == 0:
            row["none"] = layer_us(batch)
        rows.append(row | {"eplb": eplb, "plan": ours, "ideal": float(model.of_rank(mean_rows, active, **one))})
    return rows
