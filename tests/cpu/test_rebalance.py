"""Plans on a layer: the same bits under any plan, choice and step of a rebalance; a failed step leaves the old plan."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, plan_experts, update_plan
from megamoe.layout import CHOICES
from megamoe.plan import drift, popularity
from megamoe.plan.relabel import match_ranks
from megamoe.rebalance import default_placement, plan_steps
from megamoe.testing.data import make_case
from megamoe_cuda.gather import AbsentRankError

CONFIG = MoEConfig(hidden=256, intermediate=128, num_experts=12, topk=3)
RANKS, SPARE = 4, 2


def make_layer(config=CONFIG, spare=SPARE, routing="zipf"):
    ep_config = EPConfig(64, RANKS, num_redundant_slots_per_rank=spare)
    layer = MoELayer(config, Workspace(config, ep_config, device="cpu"))
    case = make_case(3, config, RANKS, [40, 0, 17, 64], routing)
    load(layer, case)
    return layer, case


def load(layer, case):
    names = "linear1", "linear1_sf", "linear2", "linear2_sf", "linear1_bias", "linear2_bias"
    columns = dict(zip(names, map(list, zip(*case.weights))))
    layer.load_weights(**{name: column for name, column in columns.items() if column[0] is not None})


def run(layer, case):
    x, _, topk_idx, topk_weights, _ = (list(column) for column in zip(*case.inputs))
    return torch.cat(layer(x, topk_idx, topk_weights))


def make_plan(kind="zipf", seed=1, redundant=8):
    return plan_experts(popularity(kind, 2, 12, seed), num_ranks=RANKS, num_redundant_experts=redundant)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("redundant", [0, 4, 8])
def test_the_output_does_not_depend_on_the_plan(choice, redundant):
    layer, case = make_layer()
    expected = run(layer, case)
    layer.load_plan(make_plan(redundant=redundant), plan_layer=1, choice=choice)
    assert torch.equal(run(layer, case), expected)
    layer.load_plan(make_plan("lognormal", redundant=redundant), choice=choice)
    assert torch.equal(run(layer, case), expected)
    load(layer, case)  # the default placement again
    assert torch.equal(run(layer, case), expected)


def test_bf16_layers_take_plans_too():
    layer, case = make_layer(MoEConfig(256, 128, 12, 3, weight_format="bf16"))
    expected = run(layer, case)
    layer.load_plan(make_plan())
    torch.testing.assert_close(run(layer, case), expected)


def test_mxfp4_codes_and_scales_move_with_their_experts():
    layer, case = make_layer(MoEConfig(256, 128, 12, 3, weight_format="mxfp4"))
    expected = run(layer, case)
    layer.load_plan(make_plan())
    assert torch.equal(run(layer, case), expected)
    rebalance = layer.rebalance(make_plan("lognormal"), max_bytes=layer._engine.expert_bytes)
    assert rebalance.moved_bytes > 0
    while not rebalance.step():
        assert torch.equal(run(layer, case), expected)
    assert torch.equal(run(layer, case), expected)


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_every_step_serves_and_keeps_to_its_budget(spare):
    layer, case = make_layer(spare=spare)
    expected = run(layer, case)
    first = make_plan(redundant=spare * RANKS)
    layer.load_plan(first)
    later = update_plan(first, drift(first.load, 0.8, 5), 6)
    expert_bytes = layer._engine.expert_bytes
    rebalance = layer.rebalance(later, max_bytes=expert_bytes)
    assert rebalance.moved_bytes <= 6 * expert_bytes
    steps = 0
    while not rebalance.step():
        moved = np.bincount([move.dst_rank for move in rebalance._staged])
        assert moved.max() <= 1
        assert torch.equal(run(layer, case), expected)
        steps += 1
    assert steps + 1 == rebalance.num_steps or rebalance.moved_bytes == 0
    assert torch.equal(run(layer, case), expected)
    held = layer._engine.placement.reshape(RANKS, -1)
    assert sorted(sorted(have[have >= 0]) for have in held) == sorted(sorted(want) for want in later.placed[0])


def test_a_failure_half_way_leaves_the_last_placement_in_force(monkeypatch):
    layer, case = make_layer()
    expected = run(layer, case)
    engine = layer._engine
    rebalance = layer.rebalance(make_plan(), max_bytes=engine.expert_bytes)
    assert rebalance.num_steps > 3 and not rebalance.step() and not rebalance.step()
    before = engine.placement.copy()

    def fail(sends, step):
        raise MegaMoEError("rank 2 did not come")

    with monkeypatch.context() as patch:
        patch.setattr(engine.exchange, "all_to_all", fail, raising=False)
        with pytest.raises(MegaMoEError):
            rebalance.step()
    assert torch.equal(run(layer, case), expected)
    assert (engine.placement >= 0).sum() >= (before >= 0).sum()
    layer.load_plan(make_plan())
    assert torch.equal(run(layer, case), expected)
    with pytest.raises(RuntimeError, match="start a new one"):
        rebalance.step()


@pytest.mark.parametrize("meanwhile", ["weights are loaded", "another rebalance stages", "another is through"])
def test_what_was_staged_is_not_applied_once_it_is_old(meanwhile):
    """Its weights would be those of before, or another rebalance's."""
    layer, case = make_layer()
    expert_bytes = layer._engine.expert_bytes
    rebalance = layer.rebalance(make_plan(), max_bytes=expert_bytes)
    assert not rebalance.step()
    other = layer.rebalance(make_plan("lognormal"))
    if meanwhile == "weights are loaded":
        case = make_case(4, CONFIG, RANKS, [40, 0, 17, 64])
        load(layer, case)
    elif meanwhile == "another rebalance stages":
        other.step()
    else:
        other.finish()
    with pytest.raises(RuntimeError, match="start a new one"):
        rebalance.step()
    if meanwhile == "another rebalance stages":
        other.finish()
    untouched, _ = make_layer()
    load(untouched, case)
    assert torch.equal(run(layer, case), run(untouched, case))


def test_one_layer_of_a_workspace_moves_at_a_time(monkeypatch):
    layer, case = make_layer()
    other = MoELayer(CONFIG, layer.workspace)
    load(other, case)
    rebalance = layer.rebalance(make_plan())
    assert not rebalance.step()
    with pytest.raises(RuntimeError, match="of another layer of the workspace are on the move"):
        other.load_plan(make_plan())
    rebalance.finish()
    other.load_plan(make_plan())
    assert torch.equal(run(layer, case), run(other, case))

    def fail(sends, step):
        raise MegaMoEError("rank 2 did not come")

    with monkeypatch.context() as patch:
        patch.setattr(layer._engine.exchange, "all_to_all", fail, raising=False)
        with pytest.raises(MegaMoEError):
            layer.load_plan(make_plan("lognormal"))
    other.load_plan(make_plan("lognormal"))  # nothing of the failed step is in the way
    assert torch.equal(run(layer, case), run(other, case))


def test_a_reset_ends_what_was_under_way_and_all_ranks_begin_alike():
    """A step may have failed on one rank only, which then has another bank, or another layer's weights on the move."""
    layer, case = make_layer()
    other = MoELayer(CONFIG, layer.workspace)
    load(other, case)
    rebalance = layer.rebalance(make_plan(), max_bytes=layer._engine.expert_bytes)
    assert not rebalance.step() and layer.workspace.staging.bank == 1
    layer.workspace.reset()
    assert layer.workspace.staging.bank == 0
    with pytest.raises(RuntimeError, match="start a new one"):
        rebalance.step()
    other.load_plan(make_plan())
    assert torch.equal(run(layer, case), run(other, case))


def test_a_rank_that_does_not_come_to_a_plan_is_named(monkeypatch):
    layer, _ = make_layer()
    absent = AbsentRankError("rank 0 waited 1.0 s at arena for rank 2, which was not seen yet", 0, (2,), "arena", 4)
    monkeypatch.setattr(layer._engine, "settle", lambda: (_ for _ in ()).throw(absent))
    with pytest.raises(MegaMoEError, match="role host step arena: rank 0 waited") as raised:
        layer.load_plan(make_plan())
    assert raised.value.record.index == 2


def some_placement(rng, ranks, slots, local):
    placed = [list(row) for row in rng.permutation(local * ranks).reshape(ranks, local)]
    for row in placed:
        others = [e for e in rng.permutation(local * ranks) if e not in row]
        row += others[: int(rng.integers(0, slots - local + 1))]
        row += [-1] * (slots - len(row))
    return np.array([rng.permutation(row) for row in placed])


@pytest.mark.parametrize("ranks", range(2, 9))
def test_any_placement_is_reached_with_any_budget_and_no_expert_is_ever_lost(ranks):
    rng = np.random.default_rng(ranks)
    for _ in range(60):
        slots, per_step = int(rng.integers(1, 10)), int(rng.integers(1, 5))
        local = int(rng.integers(1, slots + 1))
        held, wanted = (some_placement(rng, ranks, slots, local) for _ in range(2))
        lacks = [len(set(want) - set(have) - {-1}) for have, want in zip(held, wanted)]
        steps, received = plan_steps(held, wanted, per_step), np.zeros(ranks, int)
        for moves in steps:
            assert moves and all(held[m.src_rank, m.src_slot] == m.expert for m in moves)
            assert len({(m.dst_rank, m.dst_slot) for m in moves}) == len(moves)
            now = np.bincount([m.dst_rank for m in moves], minlength=ranks)
            assert now.max() <= per_step
            received += now
            for m in moves:
                held[m.dst_rank, m.dst_slot] = m.expert
            assert set(range(local * ranks)) <= set(held.ravel())
            assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in held)
        assert received.tolist() == lacks
        assert all(set(want) - {-1} <= set(have) for have, want in zip(held, wanted))


@pytest.mark.parametrize("redundant, per_step", [(0, 1), (8, 1), (8, 3)])
def test_two_ranks_of_many_experts_take_few_steps(redundant, per_step):
    load = np.random.default_rng(0).lognormal(0, 1, (1, 64))
    plan = plan_experts(load, num_ranks=2, num_redundant_experts=redundant)
    held = default_placement(64, 2, 32 + redundant // 2).reshape(2, -1)
    most = max(len(set(want) - set(have)) for have, want in zip(held, plan.placed[0]))
    assert len(plan_steps(held, plan.placed[0], per_step)) <= -(-most // per_step) + 1


def test_ranks_that_only_trade_names_move_nothing():
    layer, _ = make_layer()
    plan = make_plan()
    layer.load_plan(plan)
    for order in ([1, 0, 3, 2], [2, 3, 0, 1]):
        placed, share = (of.reshape(2, RANKS, -1)[:, order].reshape(2, -1) for of in (plan.placed, plan.share))
        renamed = replace(plan, physical_to_logical=placed, share=share)
        rebalance = layer.rebalance(renamed)
        assert rebalance.moved_bytes == 0 and rebalance.num_steps == 1 and rebalance.step()


def test_a_copy_that_a_step_makes_frees_the_old_one_in_the_same_step():
    held, wanted = np.array([[0, -1], [1, 2]]), np.array([[0, 1], [2, 0]])
    assert len(plan_steps(held, wanted, 1)) == 1


def test_ranks_are_matched_within_nodes():
    have = np.arange(16).reshape(8, 2)
    for order in ([1, 0, 2, 3, 5, 4, 7, 6], [6, 7, 5, 4, 3, 2, 0, 1]):
        assert (have[order][match_ranks(have, have[order], 4)] == have).all()
    crossed = have[[0, 2, 1, 3, 4, 5, 6, 7]]
    assert match_ranks(have, crossed, 4).tolist() == list(range(8))
    assert (crossed[match_ranks(have, crossed, 2)] == have).all()


def test_load_counts_are_what_was_served():
    layer, case = make_layer()
    want = torch.bincount(torch.cat([i.topk_idx.flatten() for i in case.inputs]), minlength=12)
    layer.load_plan(plan_experts(want[None].numpy(), num_ranks=RANKS, num_redundant_experts=8))
    run(layer, case)
    loads = layer.load_counts()
    assert torch.equal(sum(one.logical for one in loads), want)
    assert sum(int(one.physical.sum()) for one in loads) == int(want.sum())
    rows = [int(one.physical.sum()) for one in loads]
    assert max(rows) - min(rows) <= 2  # balanced by the batch's own counts


def test_biases_move_with_their_experts():
    layer, case = make_layer(MoEConfig(256, 128, 12, 3, weight_format="bf16", bias=True))
    expected = run(layer, case)
    layer.load_plan(make_plan())
    assert case.weights[0].linear2_bias.any() and torch.equal(run(layer, case), expected)


def test_a_layer_with_the_weights_of_another_follows_its_plan():
    first, case = make_layer()
    ep_config = first.workspace.ep_config
    second = MoELayer(CONFIG, Workspace(CONFIG, ep_config, device="cpu"), weights_of=first)
    expected = run(second, case)
    first.load_plan(make_plan())
    assert torch.equal(run(second, case), expected) and torch.equal(run(first, case), expected)
    used = sum(int((i.topk_idx >= 0).sum()) for i in case.inputs)
    served = [sum(int(one.logical.sum()) for one in layer.load_counts()) for layer in (first, second)]
    assert served == [used, 2 * used]
    with pytest.raises(RuntimeError, match="weights of another"):
        second.load_plan(make_plan())
    for other, named in (
        (EPConfig(64, RANKS), "num_redundant_slots_per_rank=2, this layer on one with 0"),
        (replace(ep_config, virtual_ranks=2), "ep_size=4, this layer on one with 2"),
        (replace(ep_config, ranks_per_domain=2), "domains=1, this layer on one with 2"),
    ):
        with pytest.raises(ValueError, match=named):
            MoELayer(CONFIG, Workspace(CONFIG, other, device="cpu"), weights_of=first)


def test_several_domains_refuse_a_plan_and_count_load():
    ep_config = EPConfig(64, RANKS, ranks_per_domain=2)
    layer = MoELayer(CONFIG, Workspace(CONFIG, ep_config, device="cpu"))
    case = make_case(3, CONFIG, RANKS, [40, 0, 17, 64], "zipf")
    load(layer, case)
    run(layer, case)
    want = torch.bincount(torch.cat([i.topk_idx.flatten() for i in case.inputs]), minlength=12)
    loads = layer.load_counts()
    assert torch.equal(sum(one.logical for one in loads), want)
    assert torch.equal(torch.cat([one.physical for one in loads]), want)
    assert layer.stats().calls == 1 and layer.stats().wait_s == 0
    with pytest.raises(ValueError, match="4 ranks are 2 NVLink domains.*ranks_per_domain"):
        layer.load_plan(make_plan(redundant=0))


def test_plans_that_do_not_fit_name_the_numbers():
    layer, _ = make_layer(spare=0)
    with pytest.raises(TypeError, match="plan has type NoneType; pass an ExpertPlan"):
        layer.load_plan(None)
    with pytest.raises(ValueError, match="num_redundant_slots_per_rank=2 or more"):
        layer.load_plan(make_plan())
    with pytest.raises(ValueError, match="for 12 experts on 2 ranks, the layer has 12 on 4"):
        layer.load_plan(plan_experts(np.ones((1, 12)), num_ranks=2))
    with pytest.raises(ValueError, match="plan_layer=2: the plan has 2 layers"):
        layer.load_plan(make_plan(redundant=0), plan_layer=2)
    with pytest.raises(ValueError, match="max_bytes=1000: no room for one expert a step; pass 98328 or more"):
        layer.rebalance(make_plan(redundant=0), max_bytes=1000)
    with pytest.raises(TypeError, match="max_bytes=1000000.0 has type float"):
        layer.rebalance(make_plan(redundant=0), max_bytes=1e6)
    with pytest.raises(ValueError, match="choice='best'"):
        layer.load_plan(make_plan(redundant=0), choice="best")
