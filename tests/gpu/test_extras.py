"""Kernels with -DEXTRAS: gpt-oss's gating, biases, shared experts, in both weight formats. By stage: test_stages.py."""

from dataclasses import replace

import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, plan_experts, steps
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


SHARED = MoEConfig(512, 256, 8, 3, num_shared_experts=2)


@pytest.mark.parametrize("weight_format", TILES)
@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 37, 700])
def test_shared_experts_serve_every_token_of_their_rank(weight_format, ep_size, num_tokens):
    """Those of the ranks differ here; some tokens have no other expert, and one rank has no token."""
    config = replace(SHARED, weight_format=weight_format)
    counts = [num_tokens] * (ep_size - 1) + [0 if ep_size > 1 else num_tokens]
    case = make_case(9, config, ep_size, counts, "holes", "cuda", prequantized=num_tokens == 37)
    with Workspace(config, EPConfig(num_tokens, ep_size), device="cuda") as workspace:
        with MoELayer(config, workspace) as layer:
            oracle.load(layer, case)
            assert torch.equal(served(layer, case), served(layer, case))


def test_shared_experts_alone():
    case = make_case(9, SHARED, 2, 50, "none", "cuda")
    with Workspace(SHARED, EPConfig(64, 2), device="cuda") as workspace, MoELayer(SHARED, workspace) as layer:
        oracle.load(layer, case)
        assert served(layer, case).any()
        fewer = [i._replace(num_tokens=torch.tensor([20], dtype=torch.int32, device="cuda")) for i in case.inputs]
        outs = oracle.run_layer(layer, case._replace(inputs=fewer))
        torch.cuda.synchronize()
        assert not any(out[20:].any() for out in outs)
        assert oracle.compare(SHARED, outs, oracle.spec(case._replace(inputs=fewer))).ok


@pytest.mark.parametrize("wrong", [8, 9, 11, 500, -2])
def test_no_id_names_a_shared_expert(wrong):
    case = make_case(9, SHARED, 2, 8, "uniform", "cuda")
    ep_config = EPConfig(8, 2, arrive_deadline_s=5.0, step_deadline_s=5.0)
    with Workspace(SHARED, ep_config, device="cuda") as workspace, MoELayer(SHARED, workspace) as layer:
        oracle.load(layer, case)
        before = case.inputs[1].topk_idx[5, 2].clone()
        case.inputs[1].topk_idx[5, 2] = wrong
        outs = oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        with pytest.raises(MegaMoEError, match=f"token 5 of rank 1 names expert {wrong}; legal are -1 and 0 to 7"):
            layer.check()
        assert all(bool(out.isnan().all()) for out in outs)
        workspace.reset()
        case.inputs[1].topk_idx[5, 2] = before
        served(layer, case)


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
