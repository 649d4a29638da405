"""Several domains on one GPU: virtual ranks, a kernel a domain, copies in memory between them."""

from dataclasses import replace

import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, plan_memory
from megamoe.domains import workspace as resources
from megamoe.exchange import LocalExchange
from megamoe.steps import moe_layer
from megamoe.testing.data import make_case
from tests.gpu import oracle

CONFIG = MoEConfig(hidden=512, intermediate=512, num_experts=16, topk=4)


def spec(case, num_domains):
    return moe_layer(case.config, LocalExchange(case.ep_size), case.weights, case.inputs, num_domains=num_domains)


def judge(layer, case, bound=None):
    """Twice, bit for bit the same, and the specification with this order of sums."""
    first = [y.clone() for y in oracle.run_layer(layer, case, bound)]
    second = oracle.run_layer(layer, case, bound)
    torch.cuda.synchronize()
    layer.check()
    assert torch.equal(oracle.bits(first), oracle.bits(second))
    result = oracle.compare(case.config, second, spec(case, layer.workspace.domains.num_domains))
    assert result.ok, result.text


def opened(config, ep_size, size, capacity, **more):
    ep_config = EPConfig(capacity, ep_size, 5.0, 5.0, ranks_per_domain=size, **more)
    return Workspace(config, ep_config, device="cuda")


@pytest.mark.parametrize("limit", [None, 16])
@pytest.mark.parametrize("seed", range(16))
def test_random_case_matches_the_specification(seed, limit):
    plan = oracle.draw(3000 + seed, (2, 4, 8))
    case = oracle.build(plan)
    for size in [size for size in (1, 2, 4) if size < plan.ep_size]:
        chosen = None if limit is None else min(limit, plan.capacity)
        with opened(plan.config, plan.ep_size, size, plan.capacity, domain_tokens=chosen) as workspace:
            with MoELayer(plan.config, workspace) as layer:
                oracle.load(layer, case)
                judge(layer, case, plan.bound)


@pytest.mark.parametrize("limit", [None, 16])
@pytest.mark.parametrize("prequantized", [False, True])
def test_mxfp4_tokens_fit_the_buffers(prequantized, limit):
    """They travel in e4m3, as with FP8 weights, and the memory plan counts on it."""
    config = replace(CONFIG, weight_format="mxfp4")
    case = make_case(7, config, 4, [40, 0, 39, 8], "holes", "cuda", prequantized=prequantized)
    with opened(config, 4, 2, 40, domain_tokens=limit) as workspace, MoELayer(config, workspace) as layer:
        oracle.load(layer, case)
        judge(layer, case)


def test_two_micro_batches(monkeypatch):
    monkeypatch.setattr(resources, "OVERLAP_MIN_TOKENS", 64)
    case = make_case(5, CONFIG, 4, [200, 0, 199, 64], "holes", "cuda")
    with opened(CONFIG, 4, 2, 200) as workspace, MoELayer(CONFIG, workspace) as layer:
        assert workspace.domains.pieces == resources.Pieces(100, 2)
        oracle.load(layer, case)
        judge(layer, case)


@pytest.mark.parametrize("capacity, min_tokens", [(40, 1024), (40, 16)])
def test_a_graph_replays_other_routings(capacity, min_tokens, monkeypatch):
    monkeypatch.setattr(resources, "OVERLAP_MIN_TOKENS", min_tokens)
    static = make_case(3, CONFIG, 4, capacity, "uniform", "cuda")
    counts = [torch.zeros(1, dtype=torch.int32, device="cuda") for _ in static.inputs]
    static = static._replace(inputs=[i._replace(num_tokens=n) for i, n in zip(static.inputs, counts)])
    with opened(CONFIG, 4, 2, capacity) as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, static)
        outs, graph = oracle.empty_outs(static), torch.cuda.CUDAGraph()
        oracle.run_layer(layer, static, None, outs)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            oracle.call(layer, static, None, outs)
        for seed, routing in enumerate(("uniform", "holes", "none", "duplicates", "one_expert")):
            other = make_case(60 + seed, CONFIG, 4, capacity, routing, "cuda")
            for rank, (mine, theirs) in enumerate(zip(static.inputs, other.inputs)):
                mine.x.copy_(theirs.x)
                mine.topk_idx.copy_(theirs.topk_idx)
                mine.topk_weights.copy_(theirs.topk_weights)
                mine.num_tokens.fill_(max(capacity - 13 * rank * seed, 0))
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            layer.check()
            result = oracle.compare(CONFIG, outs, spec(static, 2))
            assert result.ok, f"{routing}: {result.text}"
        del graph


def test_rounds_refuse_to_be_captured():
    case = make_case(3, CONFIG, 2, 8, "uniform", "cuda")
    with opened(CONFIG, 2, 1, 8, domain_tokens=4) as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        outs = [y.clone() for y in oracle.run_layer(layer, case)]
        with pytest.raises(ValueError, match="capture graphs with domain_tokens=None"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                oracle.call(layer, case, None, outs)


def test_an_id_of_no_expert_is_reported_by_its_domain():
    case = make_case(3, CONFIG, 4, 8, "uniform", "cuda")
    with opened(CONFIG, 4, 2, 8) as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        kept = int(case.inputs[1].topk_idx[3, 1])
        case.inputs[1].topk_idx[3, 1] = 99
        outs = oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        assert all(bool(y.isnan().all()) for y in outs)
        with pytest.raises(MegaMoEError, match="in domain 0, of ranks 0 to 1"):
            layer.check()
        with pytest.raises(MegaMoEError, match="workspace.reset"):
            oracle.run_layer(layer, case)
        workspace.reset()
        case.inputs[1].topk_idx[3, 1] = kept
        judge(layer, case)


def test_memory_is_what_the_plan_says():
    ep_config = EPConfig(64, 4, ranks_per_domain=2)
    planned = {row.name: row.bytes for row in plan_memory(CONFIG, ep_config).rows if row.name.startswith("domain_")}
    with Workspace(CONFIG, ep_config, device="cuda") as workspace:
        for storage in workspace.domains._storage:
            assert {name: sum(t.nbytes for t in parts) for name, parts in storage.items()} == planned
