"""plan_experts: valid plans, at least the published greedy's balance, errors with the numbers."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from megamoe.plan import (
    CostModel,
    ExpertPlan,
    balanced_split,
    balancedness,
    greedy_physical_to_logical,
    plan_experts,
    popularity,
)
from megamoe.plan.load import GENERATORS
from megamoe.plan.oracle import lp_rank_load
from megamoe.plan.place import place_copies
from megamoe.plan.plan import invert
from megamoe.plan.replicate import minmax_replicas
from megamoe.plan.report import CASES, even_plan, even_rank_load, make_load
from megamoe.plan.split import water_fill

# Two layers, 12 experts, 16 slots, 4 groups on 2 nodes with 8 ranks: the example of the EPLB README and its answer.
README_LOAD = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
               [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
README_PLAN = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
               [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def distinct_on_each_rank(plan):
    placed = np.sort(plan.placed, axis=2)
    return not (placed[..., 1:] == placed[..., :-1]).any()


def test_greedy_gives_the_published_example():
    got = greedy_physical_to_logical(README_LOAD, num_ranks=8, num_nodes=2, num_redundant_experts=4, num_groups=4)
    assert got.tolist() == README_PLAN


def test_golden_plan_of_a_tiny_load():
    plan = plan_experts([[8, 1, 1, 1, 1, 4], [0, 0, 0, 0, 0, 0]], num_ranks=4, num_redundant_experts=2)
    assert plan.num_replicas.tolist() == [[3, 1, 1, 1, 1, 1], [2, 2, 1, 1, 1, 1]]
    # Layer 0 by hand: copies 8/3, 8/3, 8/3 and 4 take a rank each, the four ones join; the 4 ends up with one of them.
    assert plan.rank_load[0].max() == 5
    assert sorted(plan.placed[0][plan.rank_load[0].argmax()].tolist()) in ([1, 5], [2, 5], [3, 5], [4, 5])
    assert plan.bound[0] == 4 and plan.gap[0] == 0.25
    # One expert alone is more than the mean over ranks
    assert plan_experts([[8, 1, 1, 1]], num_ranks=2).bound[0] == 8
    # No load: copies adjacent, dealt to the ranks in turn.
    assert plan.placed[1].tolist() == [[0, 2], [0, 3], [1, 4], [1, 5]]
    assert plan.balancedness[1] == 1 and plan.gap[1] == 0


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_never_below_the_greedy_and_within_a_thousandth_of_the_lp(kind, case):
    experts, redundant, ranks = case
    load = make_load(kind, 2, experts, 3)
    plan = plan_experts(load, num_ranks=ranks, num_redundant_experts=redundant)
    rival = greedy_physical_to_logical(load, num_ranks=ranks, num_redundant_experts=redundant)
    assert (plan.balancedness >= balancedness(even_rank_load(rival, ranks, load)) - 1e-9).all()
    assert distinct_on_each_rank(plan)
    assert (plan.rank_load.max(1) >= plan.bound * (1 - 1e-12)).all()
    # The LP may divide an expert's rows over its copies in any way; the plan's copies share evenly.
    for layer in range(2):
        best = lp_rank_load(plan.physical_to_logical[layer], ranks, load[layer])
        assert plan.rank_load[layer].max() <= best * 1.001


def test_not_below_the_greedy_where_it_doubles_an_expert_on_a_rank():
    load = np.random.default_rng(9).multinomial(24576, np.ones(64) / 64, size=100)[94:95].astype(float)
    shared = dict(num_ranks=8, num_redundant_experts=16)
    greedy, plan = greedy_physical_to_logical(load, **shared), plan_experts(load, **shared)
    ordered = np.sort(greedy.reshape(8, -1), 1)
    assert (ordered[:, 1:] == ordered[:, :-1]).any()
    assert plan.balancedness[0] >= even_plan(greedy, plan).balancedness[0] - 1e-9


def test_hundreds_of_small_plans_are_valid():
    rng = np.random.default_rng(5)
    for _ in range(60):
        ranks, slots = int(rng.integers(1, 9)), int(rng.integers(1, 7))
        experts = int(rng.integers(max(1, slots), ranks * slots + 1))
        load = rng.lognormal(0, rng.uniform(0, 3), (9, experts)) * (rng.random((9, experts)) < rng.uniform(0.2, 1))
        plan = plan_experts(load, num_ranks=ranks, num_redundant_experts=ranks * slots - experts)
        assert distinct_on_each_rank(plan)
        assert np.allclose(plan.rank_load.sum(1), load.sum(1))
        assert (plan.rank_load.max(1) >= plan.bound * (1 - 1e-9)).all()
        for layer, expert in ((0, 0), (8, experts - 1)):
            slots_of = plan.logical_to_physical[layer, expert]
            assert (plan.physical_to_logical[layer, slots_of[slots_of >= 0]] == expert).all()
            assert (slots_of >= 0).sum() == plan.num_replicas[layer, expert]


def test_deterministic_and_independent_of_other_layers():
    load = popularity("zipf", 4, 64, 9)
    together = plan_experts(load, num_ranks=8, num_redundant_experts=8).physical_to_logical
    assert (together == plan_experts(load, num_ranks=8, num_redundant_experts=8).physical_to_logical).all()
    for layer in range(4):
        alone = plan_experts(load[layer:layer + 1], num_ranks=8, num_redundant_experts=8).physical_to_logical
        assert (alone[0] == together[layer]).all()


def test_minmax_replicas_is_optimal_on_tiny_cases():
    from itertools import product
    rng = np.random.default_rng(0)
    for _ in range(30):
        load = rng.integers(0, 50, (1, 4)).astype(float)
        spare = int(rng.integers(0, 6))
        got = minmax_replicas(load, spare, 3)
        assert got.sum() == 4 + spare and got.max() <= 3
        best = min(max(load[0] / c) for c in product((1, 2, 3), repeat=4) if sum(c) == 4 + spare)
        assert (load / got).max() == best


def test_linked_placement_joins_all_ranks():
    load = popularity("lognormal", 3, 256, 4)
    count = minmax_replicas(load, 64, 32)
    from megamoe.plan.replicate import expand
    owner = expand(count, 320)
    placed = place_copies(owner, np.take_along_axis(load / count, owner, 1), 32, 256, linked=True)
    for layer in range(3):
        part = list(range(32))
        for expert in np.flatnonzero(count[layer] > 1):
            ranks = np.flatnonzero((placed[layer] == expert).any(1))
            part = [part[ranks[0]] if p in {part[r] for r in ranks} else p for p in part]
        assert len(set(part)) == 1


def test_decode_balances_activated_experts():
    load = make_load("zipf", 4, 256, 1)
    cost = CostModel(row_us=0.1, expert_us=13.0, rows_per_step=256.0)
    plan = plan_experts(load, num_ranks=32, num_redundant_experts=32, phase="decode", cost=cost)
    rival = even_plan(greedy_physical_to_logical(load, num_ranks=32, num_redundant_experts=32), plan)
    by_rows = plan_experts(load, num_ranks=32, num_redundant_experts=32)
    assert (plan.rank_cost.max(1) <= rival.rank_cost.max(1)).all()
    assert (plan.rank_cost.max(1) < even_plan(by_rows.physical_to_logical, plan).rank_cost.max(1)).all()
    assert plan_experts(load, num_ranks=32, num_redundant_experts=32, phase="decode").cost.row_us == 0


def test_cost_fit_recovers_what_made_the_table():
    rng = np.random.default_rng(1)
    rows, active = rng.uniform(1, 4000, 20), rng.uniform(1, 32, 20)
    model = CostModel.fit(rows, active, 0.2 * rows + 12.5 * active, 1024)
    assert np.allclose([model.row_us, model.expert_us], [0.2, 12.5])
    with pytest.raises(ValueError, match="two or more"):
        CostModel.fit([1], [1], [1], 8)


def test_water_fill_levels_and_conserves():
    level = np.array([[3.0, 1.0, 2.0, 9.0]])
    got = water_fill(level, np.array([4.0]), np.array([[True, True, True, False]]))
    assert np.allclose(got, [[1 / 3, 7 / 3, 4 / 3, 0]])


def test_filled_split_comes_within_two_percent_of_the_lp_on_the_next_batch():
    load, later = make_load("lognormal", 4, 256, 1), make_load("lognormal", 4, 256, 1, drift_sigma=0.3)
    for redundant, least in ((32, 0.87), (64, 0.95)):
        plan = plan_experts(load, num_ranks=32, num_redundant_experts=redundant)
        filled = balanced_split(plan.physical_to_logical, 32, later)
        assert np.allclose(filled.sum(1), later.sum(1))
        assert balancedness(filled).mean() >= least
        for layer in range(4):
            best = lp_rank_load(plan.physical_to_logical[layer], 32, later[layer])
            assert best * (1 - 1e-6) <= filled[layer].max() <= best / 0.98


def test_layers_of_one_split_may_differ_in_how_many_experts_have_copies():
    placed = [[0, 1, 0, 2, 0, 3], [0, 1, 0, 1, 2, 3]]  # three ranks: one expert has copies, two have, none has
    load = np.array([[6.0, 3.0, 2.0, 1.0], [4.0, 4.0, 5.0, 1.0]])
    assert np.allclose(balanced_split(placed, 3, load), [[4, 4, 4], [4, 4, 6]])
    assert balanced_split([[0, 1, 2, 3]], 2, load[:1]).tolist() == [[9, 3]]


def test_plan_round_trips_through_json():
    import json
    plan = plan_experts(popularity("group", 2, 64, 1), num_ranks=8, num_nodes=4, num_groups=8, num_redundant_experts=16)
    again = ExpertPlan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert (again.physical_to_logical == plan.physical_to_logical).all() and (again.share == plan.share).all()
    assert (again.logical_to_physical == plan.logical_to_physical).all()


@pytest.mark.parametrize(("change", "message"), [
    (dict(num_ranks=7), "nearest: 6, 13"),
    (dict(num_ranks=0), "num_ranks=0"),
    (dict(num_nodes=3), "num_nodes=3 does not divide num_ranks=8"),
    (dict(num_redundant_experts=-8), "num_redundant_experts=-8"),
    (dict(num_redundant_experts=64 * 7 + 8), "can use at most 448"),
    (dict(num_groups=5), "num_groups=5 does not divide 64"),
    (dict(num_groups=4, num_nodes=8), "whole groups do not fit"),
    (dict(phase="training"), "phase='training'"),
    (dict(cost=CostModel(1, 1, 1)), "cost is for phase='decode'"),
    (dict(num_groups=8, num_nodes=4, max_nodes_per_token=5), "max_nodes_per_token=5"),
])
def test_impossible_requests_name_the_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        plan_experts(np.ones((1, 64)), **(dict(num_ranks=8, num_redundant_experts=8) | change))


@pytest.mark.parametrize(("load", "message"), [
    (np.array([[1.0, np.nan]]), r"load\[0, 1\] = nan"),
    (np.array([[1.0, -2.0]]), r"load\[0, 1\] = -2"),
    (np.array([[np.inf, 1.0]]), r"load\[0, 0\] = inf"),
    (np.ones(4), r"shape \(4,\)"),
    (np.ones((0, 4)), r"shape \(0, 4\)"),
])
def test_impossible_loads_name_the_entry(load, message):
    with pytest.raises(ValueError, match=message):
        plan_experts(load, num_ranks=2)


def test_check_rejects_broken_plans():
    plan = plan_experts(np.ones((1, 4)), num_ranks=2)
    lost = plan.physical_to_logical.copy()
    lost[0, 0] = lost[0, 1]
    with pytest.raises(ValueError, match="has no slot"):
        ExpertPlan(lost, plan.load, plan.share, 2)
    with pytest.raises(ValueError, match="do not sum to 1"):
        ExpertPlan(plan.physical_to_logical, plan.load, plan.share * 0.5, 2)
    with pytest.raises(ValueError, match="outside"):
        invert([[0, 4]], 4)
    with pytest.raises(ValueError, match=r"holds -1\.\.3, outside"):
        invert([[3, -1]], 4)
    with pytest.raises(ValueError, match="must divide"):
        ExpertPlan(plan.physical_to_logical, plan.load, plan.share, 3)
    with pytest.raises(ValueError, match=r"share \(1, 3\) and load \(1, 4\) do not fit"):
        ExpertPlan(plan.physical_to_logical, plan.load, plan.share[:, :3], 2)


def test_check_names_layer_and_slot_or_expert_of_what_is_broken():
    plan = plan_experts(np.ones((2, 8)), num_ranks=4, num_nodes=2, num_groups=4, num_redundant_experts=4)
    expert = int(plan.num_replicas[1].argmax())
    first, last = np.flatnonzero(plan.physical_to_logical[1] == expert)[[0, -1]]
    share = plan.share.copy()
    share[1, first] += share[1, last] + 0.25
    share[1, last] = -0.25
    with pytest.raises(ValueError, match=f"layer 1: slot {last} has the negative share -0.25"):
        replace(plan, share=share)
    home = plan.home_node.copy()
    home[1, 5] = 1 - home[1, 5]
    with pytest.raises(ValueError, match="layer 1: expert group 2 has no single home node"):
        replace(plan, home_node=home)
    one = plan_experts(np.ones((2, 8)), num_ranks=4, num_nodes=2, num_groups=4)
    home = one.home_node.copy()
    home[1, 4:6] = 1 - home[1, 4:6]
    with pytest.raises(ValueError, match=f"layer 1: expert 4 has no copy on its home node {home[1, 4]}"):
        replace(one, home_node=home)


def test_imports_and_plans_without_torch_or_scipy():
    code = ("import sys; sys.modules['torch'] = None; sys.modules['scipy'] = None\n"
            "from megamoe.plan import plan_experts\n"
            "print(plan_experts([[3, 1]], num_ranks=2).rank_load.tolist())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("[[3.0, 1.0]]", "[[1.0, 3.0]]")
