"""Kernels with -DEXTRAS: gpt-oss's gating and biases, in both weight formats. Stage by stage: test_stages.py."""

from dataclasses import replace

import pytest
import torch

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, plan_experts, steps
from megamoe.exchange import LocalExchange
from megamoe.plan import popularity
from megamoe.plan.tiles import TILES
from megamoe.testing.data import Case, make_case
from tests.gpu import oracle, stages

CONFIG = MoEConfig(640, 384, 8, 4, swiglu_limit=7.0, activation="swiglu_oai", bias=True)
every_block = pytest.mark.parametrize(
    "weight_format, block_tokens", [(weight_format, block) for weight_format in TILES for block in TILES[weight_format]]
)


@pytest.mark.parametrize("weight_format", TILES)
@pytest.mark.parametrize("seed", range(1000, 1080))
def test_random_case_matches_the_specification(seed, weight_format):
    plan = oracle.draw(seed, weight_format=weight_format, extras=True)
    result = oracle.judge(plan)
    assert result.ok, f"{result.text}\n{plan}"


def zero_weights(case: Case) -> Case:
    """Only biases are left: linear1's is all that swiglu gets, linear2's all that a row is."""
    zeros = [
        {name: torch.zeros_like(getattr(w, name).view(torch.uint8)).view(getattr(w, name).dtype)
         for name in ("linear1", "linear2")}
        for w in case.weights
    ]  # fmt: skip
    return case._replace(weights=[w._replace(**z) for w, z in zip(case.weights, zeros, strict=True)])


@every_block
@pytest.mark.parametrize("num_tokens", [(9, 0), (70, 150)])
def test_every_bias_reaches_its_column_and_row_exactly(weight_format, block_tokens, num_tokens):
    config = replace(CONFIG, weight_format=weight_format)
    case = zero_weights(make_case(11, config, 2, num_tokens, "holes", "cuda"))
    trace = {}
    expected = steps.moe_layer(config, LocalExchange(2), case.weights, case.inputs, trace=trace)
    got = stages.run(case, [trace[rank]["rows"].num_rows for rank in range(2)], block_tokens)
    for rank, weights in enumerate(case.weights):
        assert torch.equal(got.linear1[rank], weights.linear1_bias[trace[rank]["rows"].local_expert])
    assert torch.equal(oracle.bits(got.y), oracle.bits(expected))
    assert oracle.bits(expected).any()


def served(layer: MoELayer, case: Case) -> torch.Tensor:
    outs = oracle.run_layer(layer, case)
    torch.cuda.synchronize()
    layer.check()
    result = oracle.compare(case.config, outs, oracle.spec(case))
    assert result.ok, result.text
    return oracle.bits(outs)


@pytest.mark.parametrize("weight_format", TILES)
def test_weights_and_biases_loaded_again_are_served_in_a_captured_graph(weight_format):
    config = replace(CONFIG, weight_format=weight_format)
    first, second = (make_case(seed, config, 2, 40, "uniform", "cuda") for seed in (1, 2))
    with Workspace(config, EPConfig(40, 2), device="cuda") as workspace, MoELayer(config, workspace) as layer:
        oracle.load(layer, first)
        served(layer, first)
        outs, graph = oracle.empty_outs(first), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            oracle.call(layer, first, None, outs)
        oracle.load(layer, second)
        graph.replay()
        torch.cuda.synchronize()
        expected = served(layer, first._replace(weights=second.weights))
        assert torch.equal(oracle.bits(outs), expected)
        del graph


def test_layers_with_and_without_extras_share_a_workspace():
    plain = MoEConfig(640, 384, 8, 4)
    cases = [make_case(3, config, 2, 50, "uniform", "cuda") for config in (plain, CONFIG)]
    with Workspace([plain, CONFIG], EPConfig(50, 2), device="cuda") as workspace:
        layers = [MoELayer(config, workspace) for config in (plain, CONFIG)]
        for layer, case in zip(layers, cases, strict=True):
            oracle.load(layer, case)
        for _ in range(2):
            for layer, case in zip(layers, cases, strict=True):
                served(layer, case)
        for layer in layers:
            layer.close()


@pytest.mark.parametrize("choice", ["static", "balanced"])
def test_biases_move_with_their_experts_under_a_plan(choice):
    case = make_case(5, CONFIG, 2, (90, 33), "zipf", "cuda")
    ep_config = EPConfig(90, 2, num_redundant_slots_per_rank=2, num_staged_experts=2)
    with Workspace(CONFIG, ep_config, device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        before = served(layer, case)
        plan = plan_experts(popularity("zipf", 1, 8, 1), num_ranks=2, num_redundant_experts=4)
        layer.load_plan(plan, choice=choice)
        assert torch.equal(served(layer, case), before)


def test_biases_are_rows_of_their_experts():
    config = replace(CONFIG, weight_format="mxfp4")
    case = make_case(7, config, 1, 60, "uniform", "cuda")
    order = torch.tensor([3, 1, 0, 7, 2, 6, 5, 4], device="cuda")
    with Workspace(config, EPConfig(60, 1), device="cuda") as workspace, MoELayer(config, workspace) as layer:
        oracle.load(layer, case)
        before = served(layer, case)
        rows = layer.expert_rows()[0]
        assert len(rows) == 4
        for tensor in rows:
            tensor.copy_(tensor[order])
        moved = [i._replace(topk_idx=order.argsort()[i.topk_idx.long()]) for i in case.inputs]
        outs = oracle.run_layer(layer, case._replace(inputs=moved))
        torch.cuda.synchronize()
        assert torch.equal(oracle.bits(outs), before)
