"""update_plan: few moves, never worse, and what the published greedy's replan moves instead."""

from collections import Counter

import numpy as np
import pytest

from megamoe.plan import balancedness, drift, greedy_physical_to_logical, plan_experts, popularity, update_plan
from megamoe.plan.relabel import relabel
from megamoe.plan.report import even_rank_load


def drifted(sigma, num_experts=256, seeds=range(8)):
    before = np.concatenate([popularity("lognormal", 1, num_experts, seed) for seed in seeds])
    after = np.concatenate([drift(before[i:i + 1], sigma, 100 + seed) for i, seed in enumerate(seeds)])
    return before, after


@pytest.mark.parametrize(("sigma", "least"), [(0.3, 0.99), (0.6, 0.975)])
def test_three_percent_of_slots_restore_balance_at_8_ranks(sigma, least):
    before, after = drifted(sigma)
    plan = plan_experts(before, num_ranks=8, num_redundant_experts=32)
    budget = int(0.03 * plan.num_physical_experts)
    changed = update_plan(plan, after, budget)
    assert (changed.moves_from(plan) <= budget).all()
    assert changed.balancedness.mean() >= least
    fresh = greedy_physical_to_logical(after, num_ranks=8, num_redundant_experts=32)
    assert (fresh != greedy_physical_to_logical(before, num_ranks=8, num_redundant_experts=32)).mean() > 0.7


@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_more_budget_is_never_worse_at_32_ranks_and_passes_the_replan(sigma):
    before, after = drifted(sigma)
    shared = dict(num_ranks=32, num_redundant_experts=32)
    plan = plan_experts(before, **shared)
    old = greedy_physical_to_logical(before, **shared)
    fresh = relabel(greedy_physical_to_logical(after, **shared), old, 32)
    rival, rival_moves = balancedness(even_rank_load(fresh, 32, after)), (fresh != old).sum(1)
    last = np.zeros(8)
    for budget in (0, 2, 8, 28, 86, int(rival_moves.min())):
        changed = update_plan(plan, after, budget)
        assert (changed.moves_from(plan) <= budget).all()
        assert (changed.balancedness >= last - 1e-12).all()
        last = changed.balancedness
    # Below the replan's moves the greedy has only its old plan to offer.
    assert last.mean() >= rival.mean()
    assert update_plan(plan, after, 28).balancedness.mean() > balancedness(even_rank_load(old, 32, after)).mean()


def test_no_budget_and_no_drift_change_nothing():
    load = popularity("zipf", 2, 64, 1)
    plan = plan_experts(load, num_ranks=8, num_redundant_experts=8)
    assert not update_plan(plan, drift(load, 0.5, 2), 0).moves_from(plan).any()
    again = update_plan(plan, load, 8)
    assert (again.rank_cost.max(1) <= plan.rank_cost.max(1) * (1 + 1e-12)).all()
    silent = update_plan(plan, np.zeros_like(load), 8)
    assert not silent.moves_from(plan).any()


def test_update_keeps_experts_distinct_on_a_rank_and_every_expert_placed():
    rng = np.random.default_rng(3)
    for seed in range(20):
        load = rng.lognormal(0, 1.5, (4, 24))
        plan = plan_experts(load, num_ranks=4, num_redundant_experts=8)
        changed = update_plan(plan, rng.permuted(load, axis=1), 10)
        placed = np.sort(changed.placed, axis=2)
        assert not (placed[..., 1:] == placed[..., :-1]).any(), seed
        assert (changed.moves_from(plan) <= 10).all()


def test_decode_and_grouped_plans_update_too():
    load = popularity("lognormal", 2, 64, 1)
    later = drift(load, 0.5, 2)
    decode = plan_experts(load, num_ranks=8, num_redundant_experts=8, phase="decode")
    assert (update_plan(decode, later, 6).rank_cost.max(1) <= update_plan(decode, later, 0).rank_cost.max(1)).all()
    grouped = plan_experts(load, num_ranks=8, num_nodes=4, num_groups=8, num_redundant_experts=16)
    changed = update_plan(grouped, later, 6)
    assert (changed.moves_from(grouped) <= 6).all() and (changed.home_node == grouped.home_node).all()
    assert (changed.rank_load.max(1) <= update_plan(grouped, later, 0).rank_load.max(1) * (1 + 1e-12)).all()


def test_bad_updates_name_the_numbers():
    plan = plan_experts(np.ones((2, 8)), num_ranks=4)
    with pytest.raises(ValueError, match=r"load \(1, 8\)"):
        update_plan(plan, np.ones((1, 8)), 2)
    with pytest.raises(ValueError, match="move_budget=-1"):
        update_plan(plan, np.ones((2, 8)), -1)
    with pytest.raises(ValueError, match=r"move_budget=0\.03"):
        update_plan(plan, np.ones((2, 8)), 0.03)
    with pytest.raises(ValueError, match="different topologies"):
        plan.moves_from(plan_experts(np.ones((2, 8)), num_ranks=2))


def test_relabel_only_renames():
    before, after = drifted(0.3, seeds=range(2))
    old = greedy_physical_to_logical(before, num_ranks=8, num_redundant_experts=32)
    new = greedy_physical_to_logical(after, num_ranks=8, num_redundant_experts=32)
    named = relabel(new, old, 8)
    for layer in range(2):
        ranks = {tuple(sorted(one)) for one in new[layer].reshape(8, -1).tolist()}
        assert ranks == {tuple(sorted(one)) for one in named[layer].reshape(8, -1).tolist()}
    assert (named != old).sum() < (new != old).sum()
    # Within a rank every expert that stays keeps its slot
    for have, want in zip(old.reshape(-1, 36), named.reshape(-1, 36), strict=True):
        stays = sum((Counter(have.tolist()) & Counter(want.tolist())).values())
        assert (have == want).sum() == stays
