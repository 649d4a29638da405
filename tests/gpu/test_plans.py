"""Plans on the GPU: the same bits under any plan, choice and step of a rebalance, also under graph replay."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, plan_experts
from megamoe.layout import CHOICES
from megamoe.plan import popularity
from megamoe.plan.choice import choose_rows, replica_map
from megamoe.testing.data import make_case
from tests.gpu import oracle

CONFIG = MoEConfig(hidden=512, intermediate=256, num_experts=16, topk=4)
FORMATS = {form: replace(CONFIG, weight_format=form) for form in ("fp8", "mxfp4")}
RANKS, SPARE = 4, 2


@contextlib.contextmanager
def opened(num_tokens, routing="zipf", staged=1, config=CONFIG):
    ep_config = EPConfig(max(num_tokens), RANKS, 5.0, 5.0, num_redundant_slots_per_rank=SPARE,
                         num_staged_experts=staged)  # fmt: skip
    case = make_case(21, config, RANKS, num_tokens, routing, "cuda", prequantized=True)
    with Workspace(config, ep_config, device="cuda") as workspace, MoELayer(config, workspace) as layer:
        oracle.load(layer, case)
        yield layer, case


def make_plan(kind="zipf", seed=1, redundant=8):
    return plan_experts(popularity(kind, 1, 16, seed), num_ranks=RANKS, num_redundant_experts=redundant)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("num_tokens", [(5, 0, 1, 9), (150, 7, 64, 90), (700, 700, 0, 511)])
def test_the_bits_do_not_depend_on_the_plan_and_every_row_is_counted(weight_format, choice, num_tokens):
    with opened(num_tokens, config=FORMATS[weight_format]) as (layer, case):
        first = oracle.bits(oracle.run_layer(layer, case))
        result = oracle.compare(case.config, oracle.run_layer(layer, case), oracle.spec(case))
        assert result.ok, result.text
        for plan in (make_plan(), make_plan("lognormal", 3, 4), make_plan("group", 2, 0)):
            before = layer.load_counts()
            layer.load_plan(plan, choice=choice)
            outs = oracle.run_layer(layer, case)
            torch.cuda.synchronize()
            layer.check()
            assert torch.equal(oracle.bits(outs), first), (choice, plan.num_redundant_experts)
            after = layer.load_counts()
            placed = layer._engine.placement
            replicas = replica_map(placed, 16, RANKS, choice, load=plan.load[0])
            slots = choose_rows(replicas, [i.topk_idx.cpu().numpy() for i in case.inputs])
            slots = np.concatenate([one.ravel() for one in slots])
            want = np.bincount(slots[slots >= 0], minlength=len(placed)).reshape(RANKS, -1)
            got = [(b.physical - a.physical).cpu().numpy() for a, b in zip(before, after)]
            assert (np.stack(got) == want).all()
            rows = torch.cat([i.topk_idx.flatten() for i in case.inputs])
            logical = sum(b.logical - a.logical for a, b in zip(before, after))
            assert torch.equal(logical.cpu(), torch.bincount(rows[rows >= 0], minlength=16).cpu())


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("num_tokens", [(9, 12, 3, 1), (300, 120, 256, 64)])
def test_a_rebalance_goes_on_between_replays_of_one_graph(weight_format, num_tokens):
    with opened(num_tokens, config=FORMATS[weight_format]) as (layer, case):
        first = oracle.bits(oracle.run_layer(layer, case))
        outs, graph = oracle.empty_outs(case), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            oracle.call(layer, case, None, outs)
        steps = 0
        for plan, choice in ((make_plan(), "balanced"), (make_plan("hot", 2), "min_active"), (make_plan(), "static")):
            rebalance = layer.rebalance(plan, choice=choice)
            while not rebalance.step():
                for out in outs:
                    out.fill_(float("nan"))
                graph.replay()
                steps += 1
                assert torch.equal(oracle.bits(outs), first), (choice, steps)
            graph.replay()
            assert torch.equal(oracle.bits(outs), first), choice
        torch.cuda.synchronize()
        layer.check()
        assert steps > 6
        del graph


def test_layers_take_turns_with_the_room_for_weights_on_the_move():
    with opened((9, 12, 3, 1)) as (layer, case), MoELayer(CONFIG, layer.workspace) as other:
        oracle.load(other, case)
        first = oracle.bits(oracle.run_layer(layer, case))
        rebalance = layer.rebalance(make_plan())
        assert not rebalance.step()
        with pytest.raises(RuntimeError, match="of another layer of the workspace are on the move"):
            other.load_plan(make_plan())
        rebalance.finish()
        other.load_plan(make_plan("lognormal", 3, 4))
        for one in (layer, other):
            assert torch.equal(oracle.bits(oracle.run_layer(one, case)), first)
        torch.cuda.synchronize()
        layer.check()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("wrong", [16, 20, 24, 1000, -2])
def test_an_id_out_of_range_is_named_as_the_caller_gave_it(choice, wrong):
    with opened((8, 8, 8, 8)) as (layer, case):
        layer.load_plan(make_plan(), choice=choice)
        oracle.run_layer(layer, case)
        case.inputs[1].topk_idx[5, 2] = wrong
        oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        with pytest.raises(MegaMoEError, match=f"token 5 of rank 1 names expert {wrong}; legal are -1 and 0 to 15"):
            layer.check()
        layer.workspace.reset()
        case.inputs[1].topk_idx[5, 2] = 3
        result = oracle.compare(case.config, oracle.run_layer(layer, case), oracle.spec(case))
        assert result.ok, result.text


def test_without_room_for_plans_the_remedy_is_named():
    case = make_case(1, CONFIG, 2, 8, "uniform", "cuda")
    with Workspace(CONFIG, EPConfig(8, 2), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        with pytest.raises(ValueError, match="num_staged_experts"):
            layer.load_plan(plan_experts(np.ones((1, 16)), num_ranks=2))
