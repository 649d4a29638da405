"""Routing within few expert groups and within few nodes."""

import math

import numpy as np
import pytest
import torch

from megamoe import plan_experts, route
from megamoe.plan import choose_replicas, nodes_per_token, popularity
from megamoe.route.node_limit import limit_nodes

NAN, INF = float("nan"), float("inf")


def by_hand(row, topk, set_of, num_kept, num_best, *, score, bias, normalize, scale):
    """One token in Python floats: (experts best first, their weights)."""
    if score == "softmax":
        total = math.fsum(math.exp(x) for x in row)
        scores = [math.exp(x) / total for x in row]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in row]
    picking = [s + b for s, b in zip(scores, bias)]
    set_score = {}
    for this in sorted(set(set_of)):
        values = sorted((p for p, s in zip(picking, set_of) if s == this), reverse=True)
        set_score[this] = sum(values[:num_best])
    kept = sorted(set_score, key=lambda s: (-set_score[s], s))[:num_kept]
    best = sorted((e for e in range(len(row)) if set_of[e] in kept), key=lambda e: (-picking[e], e))[:topk]
    weights = [scores[e] for e in best]
    total = sum(weights) if normalize else 1.0
    return best, [w / total * scale for w in weights]


def assert_same(routed, logits, *arguments, bias, **options):
    assert routed.topk_idx.dtype == torch.int32 and routed.topk_weights.dtype == torch.float32
    bias = [0.0] * logits.shape[1] if bias is None else bias.tolist()
    for row, topk_idx, topk_weights in zip(logits.tolist(), *routed):
        best, weights = by_hand(row, *arguments, bias=bias, **options)
        assert topk_idx.tolist() == best
        assert topk_weights.tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "num_groups", "topk_groups", "topk"), [
    (256, 8, 4, 8), (64, 8, 3, 6), (64, 8, 1, 8), (32, 4, 4, 5), (16, 16, 5, 5), (32, 1, None, 4),
])
@pytest.mark.parametrize(("with_bias", "normalize", "scale"), [(True, True, 2.5), (False, False, 1.0)])
def test_groups_equal_a_loop(dtype, num_experts, num_groups, topk_groups, topk, with_bias, normalize, scale):
    torch.manual_seed(num_experts + topk)
    logits = torch.randn(60, num_experts).to(dtype)
    # Wide enough that all biased scores of some groups are negative
    bias = torch.randn(num_experts) if with_bias else None
    options = dict(score="sigmoid", normalize=normalize, scale=scale, bias=bias)
    routed = route(logits, topk, num_groups=num_groups, topk_groups=topk_groups, **options)
    group_of = [e // (num_experts // num_groups) for e in range(num_experts)]
    assert_same(routed, logits, topk, group_of, topk_groups or 1, 2, **options)
    assert max(len({group_of[e] for e in row}) for row in routed.topk_idx.tolist()) <= (topk_groups or 1)
    if topk_groups and topk_groups < num_groups and num_groups < num_experts:
        assert not torch.equal(routed.topk_idx, route(logits, topk, **options).topk_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("topk", "max_nodes"), [(6, 2), (7, 3), (4, 4), (8, 7)])
def test_nodes_equal_a_loop(dtype, score, topk, max_nodes):
    torch.manual_seed(topk)
    logits = torch.randn(60, 48).to(dtype)
    # Uneven, out of order, and node 3 holds nothing
    home_node = torch.cat([torch.tensor([0, 1, 2, 4, 5, 6, 7]).repeat(5), torch.full((13,), 4)])[torch.randperm(48)]
    options = dict(score=score, normalize=topk != 7, scale=1.5, bias=0.1 * torch.randn(48) if topk == 6 else None)
    routed = limit_nodes(logits, topk, home_node, max_nodes, **options)
    assert_same(routed, logits, topk, home_node.tolist(), max_nodes, math.ceil(topk / max_nodes), **options)
    assert max(len(set(home_node[row].tolist())) for row in routed.topk_idx.long()) <= max_nodes
    unlimited = route(logits, topk, **options)
    # With no more experts than nodes allowed, the best experts are in the best nodes
    assert torch.equal(routed.topk_idx, unlimited.topk_idx) == (max_nodes == 7 or topk <= max_nodes)


def test_a_node_with_few_experts_scores_what_it_has():
    # The biased scores are below 0, so a node with one expert must not be judged by values that it does not have.
    logits, bias = torch.zeros(1, 5), torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.4])
    assert limit_nodes(logits, 1, [0, 0, 1, 1, 2], 1, score="sigmoid", bias=bias).topk_idx.tolist() == [[0]]
    picked = limit_nodes(logits, 3, [0, 0, 1, 1, 2], 2, score="sigmoid", bias=bias).topk_idx
    assert picked.tolist() == [[0, 1, 4]]


def test_a_node_is_judged_by_as_many_experts_as_a_token_takes_there():
    logits = torch.tensor([[3.0, 3.0, -9.0, 2.0, 2.0, 2.0]])  # the first node has the two best, the second the three
    assert limit_nodes(logits, 3, [0, 0, 0, 1, 1, 1], 1, score="sigmoid").topk_idx.tolist() == [[3, 4, 5]]


def test_groups_are_nodes_when_each_group_has_its_own():
    logits, bias = torch.randn(40, 64), 0.2 * torch.randn(64)
    options = dict(score="sigmoid", bias=bias, scale=2.5)
    grouped = route(logits, 8, num_groups=8, topk_groups=4, **options)
    limited = limit_nodes(logits, 8, torch.arange(64) // 8, 4, **options)
    assert torch.equal(grouped.topk_idx, limited.topk_idx) and torch.equal(grouped.topk_weights, limited.topk_weights)


@pytest.mark.parametrize("max_nodes", [1, 2, 3])
def test_after_replica_choice_no_token_touches_more_nodes(max_nodes):
    base = popularity("group", 1, 64, seed=max_nodes)
    plan = plan_experts(base, num_ranks=8, num_nodes=4, num_redundant_experts=16, num_groups=8,
                        max_nodes_per_token=max_nodes)
    home_node = plan.home_node[0]
    logits = torch.randn(700, 64) + torch.tensor(base[0]).log()
    for routed in (
        route(logits, 6, score="sigmoid", num_groups=8, topk_groups=max_nodes),
        limit_nodes(logits, 6, home_node, max_nodes),
    ):
        topk_idx = routed.topk_idx.numpy()
        assert max(len(set(row)) for row in home_node[topk_idx]) == max_nodes
        physical = choose_replicas(topk_idx, plan.physical_to_logical[0], num_ranks=8, num_nodes=4,
                                   home_node=home_node, max_nodes=max_nodes)
        assert (plan.physical_to_logical[0][physical] == topk_idx).all()
        assert nodes_per_token(physical, plan.num_physical_experts, 4).max() == max_nodes


def test_a_plan_without_groups_serves_by_any_node_of_each_expert():
    plan = plan_experts(popularity("zipf", 1, 48, 3), num_ranks=8, num_nodes=4, num_redundant_experts=16)
    first = plan.logical_to_physical[0, :, 0]
    home_node = first // (plan.num_physical_experts // plan.num_nodes)
    topk_idx = limit_nodes(torch.randn(500, 48), 6, home_node, 2).topk_idx.numpy()
    physical = choose_replicas(topk_idx, plan.physical_to_logical[0], num_ranks=8, num_nodes=4, home_node=home_node,
                               max_nodes=2)
    assert nodes_per_token(physical, plan.num_physical_experts, 4).max() == 2


def test_ties_go_to_the_lower_group_then_to_the_lower_expert():
    flat = route(torch.zeros(3, 32), 5, score="sigmoid", num_groups=8, topk_groups=2)
    assert flat.topk_idx.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert torch.allclose(flat.topk_weights, torch.full((3, 5), 0.2))
    # Groups of two; groups 1, 2 and 3 tie although their scores stand in different places
    logits = torch.tensor([[0.0, 0.0, 1.0, 3.0, 3.0, 1.0, 1.0, 3.0]])
    assert route(logits, 3, score="sigmoid", num_groups=4, topk_groups=2).topk_idx.tolist() == [[3, 4, 2]]
    assert limit_nodes(logits, 3, [0, 0, 3, 3, 2, 2, 1, 1], 2).topk_idx.tolist() == [[4, 7, 5]]


def test_two_good_experts_beat_one_excellent_one():
    bias = torch.tensor([0.4, -0.5, 0.0, 0.0])
    routed = route(torch.zeros(1, 4), 1, score="sigmoid", bias=bias, num_groups=2, topk_groups=1)
    assert routed.topk_idx.tolist() == [[2]]


def test_bias_picks_groups_and_experts_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 3.0, 3.5])
    routed = route(logits, 2, score="sigmoid", normalize=False, bias=bias, num_groups=2, topk_groups=1)
    assert routed.topk_idx.tolist() == [[3, 2]]
    assert torch.equal(routed.topk_weights, torch.sigmoid(torch.tensor([[-1.0, 0.0]])))


def test_an_expert_that_is_out_is_never_picked_whatever_the_bias():
    # Expert 5 is switched off like 0, 1, 2, which come first, but its group is kept and theirs is not.
    bias = torch.tensor([-INF, -INF, -INF, 0.0, 0.0, -INF, -5.0, -5.0, -5.0])
    options = dict(score="sigmoid", bias=bias)
    grouped = route(torch.zeros(2, 9), 3, num_groups=3, topk_groups=1, **options)
    assert grouped.topk_idx.tolist() == [[3, 4, 5]] * 2
    limited = limit_nodes(torch.zeros(2, 9), 6, [4, 4, 4, 0, 0, 0, 2, 2, 2], 2, **options)
    assert limited.topk_idx.tolist() == [[3, 4, 6, 7, 8, 5]] * 2
    # Negative biased scores of a kept group stay above everything that is out.
    bias = torch.tensor([-9.0, -9.0, -2.0, -2.0, -1.0, -9.0])
    picked = route(torch.zeros(1, 6), 2, score="sigmoid", bias=bias, num_groups=3, topk_groups=1).topk_idx
    assert picked.tolist() == [[2, 3]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_bad_logit_stays_in_its_token_and_its_ids_stay_legal(score, poison):
    clean = torch.randn(4, 16)
    logits = clean.clone()
    logits[2, 5] = poison
    home_node = torch.tensor([0, 1, 2, 3]).repeat(4)
    others = torch.tensor([0, 1, 3])
    for router, set_of in (
        (lambda x: route(x, 3, score=score, num_groups=4, topk_groups=2), torch.arange(16) // 4),
        (lambda x: limit_nodes(x, 3, home_node, 2, score=score), home_node),
    ):
        expected, got = router(clean), router(logits)
        assert torch.equal(got.topk_idx[others], expected.topk_idx[others])
        assert torch.equal(got.topk_weights[others], expected.topk_weights[others])
        ids = got.topk_idx[2].tolist()
        assert len(set(ids)) == 3 and set(ids) <= set(range(16))
        assert len(set(set_of[ids].tolist())) <= 2
        if score == "sigmoid":
            assert (5 in ids) == (poison != -INF)
            assert got.topk_weights[2].isnan().any() == math.isnan(poison)


def test_no_tokens():
    for routed in (
        route(torch.empty(0, 8), 2, score="sigmoid", num_groups=4, topk_groups=2),
        limit_nodes(torch.empty(0, 8), 2, np.arange(8) // 2, 2),
    ):
        assert routed.topk_idx.shape == (0, 2) and routed.topk_idx.dtype == torch.int32
        assert routed.topk_weights.shape == (0, 2) and routed.topk_weights.dtype == torch.float32


@pytest.mark.parametrize(("topk", "options", "text"), [
    (2, dict(num_groups=3, topk_groups=1), "num_groups=3 must divide the 8 experts"),
    (2, dict(num_groups=0), "num_groups=0 must divide the 8 experts"),
    (2, dict(num_groups=4), "topk_groups=None must be between 1 and num_groups=4"),
    (2, dict(num_groups=4, topk_groups=0), "topk_groups=0 must be between 1 and num_groups=4"),
    (2, dict(num_groups=4, topk_groups=5), "topk_groups=5 must be between 1 and num_groups=4"),
    (2, dict(topk_groups=2), "topk_groups=2 must be between 1 and num_groups=1"),
    (5, dict(num_groups=4, topk_groups=2), "topk=5 is more than the 4 experts of topk_groups=2; keep more groups"),
])
def test_bad_groups(topk, options, text):
    with pytest.raises(ValueError) as raised:
        route(torch.zeros(2, 8), topk, **options)
    assert text in str(raised.value)


@pytest.mark.parametrize(("topk", "home_node", "max_nodes", "text"), [
    (2, [0, 0, 1], 1, "home_node has shape (3,), dtype torch.int64; pass int32 or int64 [num_experts] = [4]"),
    (2, [0.0, 0.0, 1.0, 1.0], 1, "dtype torch.float32; pass int32 or int64"),
    (2, [0, 0, -1, 1], 1, "home_node[2]=-1 must be a node id >= 0"),
    (2, [0, 0, 1, 1], 0, "max_nodes=0 must be at least 1"),
    (2, [0, 0, 0, 1], 1, "max_nodes=1: the 1 smallest nodes hold 1 experts, fewer than topk=2"),
    (5, [0, 0, 1, 1], 2, "topk=5 must be between 1 and the 4 experts"),
])
def test_bad_nodes(topk, home_node, max_nodes, text):
    with pytest.raises(ValueError) as raised:
        limit_nodes(torch.zeros(2, 4), topk, home_node, max_nodes)
    assert text in str(raised.value)
