"""Placement and replica choice under a node limit; generators; the command."""

import json
from itertools import pairwise

import numpy as np
import pytest

from megamoe.plan import (
    balancedness,
    choose_replicas,
    count_load,
    drift,
    greedy_physical_to_logical,
    nodes_per_token,
    plan_experts,
    popularity,
    sample_topk,
    show,
)
from megamoe.plan.cli import main
from megamoe.plan.load import GENERATORS
from megamoe.plan.oracle import lp_rank_load, node_limited_bound
from megamoe.plan.report import even_rank_load


def chosen_load(plan, topk_idx, max_nodes):
    physical = choose_replicas(topk_idx, plan.physical_to_logical[0], num_ranks=plan.num_ranks,
                               num_nodes=plan.num_nodes, home_node=plan.home_node[0], max_nodes=max_nodes)
    assert (plan.physical_to_logical[0][physical] == topk_idx).all()
    assert nodes_per_token(physical, plan.num_physical_experts, plan.num_nodes).max() <= max_nodes
    return np.bincount(physical.ravel() // plan.num_local_experts, minlength=plan.num_ranks)


@pytest.mark.parametrize("kind", ["zipf", "lognormal"])
@pytest.mark.parametrize("num_nodes", [4, 8])
@pytest.mark.parametrize("redundant", [32, 64])
def test_group_limited_routing_is_balanced_within_the_node_limit(kind, num_nodes, redundant):
    topk_idx = sample_topk(popularity(kind, 1, 256, 1), 4096, 8, 2, num_groups=8, topk_groups=4)
    load = count_load(topk_idx, 256)
    shared = dict(num_ranks=32, num_nodes=num_nodes, num_redundant_experts=redundant, num_groups=8)
    plan = plan_experts(load, **shared)
    got = balancedness(chosen_load(plan, topk_idx[0], 4))
    # Without a node limit the LP bounds what any choice among these copies reaches.
    best = load.sum() / 32 / lp_rank_load(plan.physical_to_logical[0], 32, load[0])
    assert got >= 0.95 or got >= 0.98 * best
    rival = balancedness(even_rank_load(greedy_physical_to_logical(load, **shared), 32, load.astype(float)))[0]
    assert got > rival


def test_the_oracle_bounds_what_the_choice_reaches_under_the_node_limit():
    topk_idx = sample_topk(popularity("group", 1, 64, 3), 1000, 6, 4, num_groups=8, topk_groups=3)
    plan = plan_experts(count_load(topk_idx, 64), num_ranks=16, num_nodes=8, num_groups=8, num_redundant_experts=32,
                        max_nodes_per_token=3)
    got = chosen_load(plan, topk_idx[0], 3).max()
    bound = node_limited_bound(topk_idx[0], plan.physical_to_logical[0], 16, 8, 3)
    assert bound <= got <= bound / 0.9
    assert bound > topk_idx.size / 16


@pytest.mark.parametrize("line", [show.next_batch, show.recovery, show.recovery_curve])
def test_promises_hold(line):
    rows = list(line((1,)))
    assert rows and all(row["ok"] is True for row in rows), rows


def test_node_limit_holds_for_a_batch_the_plan_never_saw():
    base = popularity("group", 1, 64, 3)
    plan = plan_experts(base, num_ranks=16, num_nodes=8, num_groups=8, num_redundant_experts=32)
    later = sample_topk(drift(base, 0.6, 4), 1500, 6, 5, num_groups=8, topk_groups=3)
    chosen_load(plan, later[0], 3)
    with pytest.raises(ValueError, match="max_nodes=2: a token's experts have 3 home nodes"):
        chosen_load(plan, later[0], 2)


def test_choice_skips_unused_slots_and_splits_a_copied_expert_by_the_batch():
    # Ranks hold {0, 1}, {0, 2}: all rows of 1 on rank 0, so expert 0 goes to rank 1 until both are level.
    topk_idx = np.array([[1, -1]] * 4 + [[0, -1]] * 6)
    got = choose_replicas(topk_idx, [0, 1, 0, 2], num_ranks=2, num_nodes=1)
    assert got.tolist() == [[1, -1]] * 4 + [[0, -1]] + [[2, -1]] * 5
    assert choose_replicas(np.full((3, 2), -1), [0, 1, 0, 2], num_ranks=2, num_nodes=1).tolist() == [[-1, -1]] * 3
    assert choose_replicas(np.empty((0, 2), int), [0, 1, 0, 2], num_ranks=2, num_nodes=1).shape == (0, 2)


@pytest.mark.parametrize("kind", GENERATORS)
def test_sampled_tokens_hold_distinct_experts_and_follow_popularity(kind):
    base = popularity(kind, 2, 64, 7)
    assert np.allclose(base.mean(1), 1)
    topk_idx = sample_topk(base, 3000, 6, 8)
    ordered = np.sort(topk_idx, axis=2)
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    load = count_load(topk_idx, 64)
    assert (load.sum(1) == 3000 * 6).all() and load.max() <= 3000
    if kind not in ("uniform", "bursts"):
        assert np.corrcoef(base.ravel(), load.ravel())[0, 1] > 0.8
    assert (topk_idx == sample_topk(base, 3000, 6, 8)).all()


def test_group_limited_sampling_keeps_few_groups():
    topk_idx = sample_topk(popularity("zipf", 1, 64, 1), 500, 6, 2, num_groups=8, topk_groups=3)[0]
    assert max(len(set(row // 8)) for row in topk_idx) <= 3


def test_bursts_make_neighbouring_tokens_alike():
    base = popularity("uniform", 1, 64, 1)

    def overlap(**burst):
        topk_idx = sample_topk(base, 2000, 6, 2, **burst)[0]
        return np.mean([len(set(a) & set(b)) for a, b in pairwise(topk_idx)])

    assert overlap(burst_tokens=100, burst_sigma=1.5) > 1.5 * overlap()


def test_command_prints_a_table_and_json(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", load=np.arange(3 * 2 * 16).reshape(3, 2, 16))
    np.savez(tmp_path / "b.npz", load=popularity("zipf", 2, 16, 1))
    arguments = [str(tmp_path / "a.npz"), "--ranks", "4", "--redundant", "4", "--then", str(tmp_path / "b.npz"),
                 "--budget", "0.2"]
    assert main(arguments) == 0
    assert "20 slots, 5 on each of 4 ranks" in capsys.readouterr().out
    assert main([*arguments, "--json", "--out", str(tmp_path / "plan.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["layers"]) == 2 and 0 < report["then"]["moved"] <= 0.2
    assert json.loads((tmp_path / "plan.json").read_text()) == report["plan"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--generate", "zipf", "--ranks", "7"], "256 slots do not divide over 7 ranks"),
    ([], "give either a file"),
    (["absent.npz"], "absent.npz"),
])
def test_command_ends_with_one_line_for_bad_input(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
