"""Calls in sequence: thousands in a row, CUDA graphs, other bounds, other layers, new weights, another stream; in both
weight formats."""

import dataclasses
import sys

import pytest
import torch

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
from megamoe.plan.tiles import TILES, choose_block_tokens
from megamoe.testing.data import make_case
from tests.gpu import oracle

CONFIG = MoEConfig(hidden=512, intermediate=512, num_experts=4, topk=2)


@pytest.fixture(autouse=True, params=("fp8", "mxfp4"))
def _weight_format(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, weight_format=request.param))


def deadlines(capacity: int, ep_size: int | None = None) -> EPConfig:
    return EPConfig(capacity, ep_size, arrive_deadline_s=5.0, step_deadline_s=5.0)


def assert_right(case, outs):
    result = oracle.compare(case.config, outs, oracle.spec(case))
    assert result.ok, result.text


def copy_inputs(to, source) -> None:
    """Other numbers in the same tensors, as a captured graph wants them."""
    for a, b in zip(to.inputs, source.inputs, strict=True):
        for mine, other in zip(a, b, strict=True):
            if mine is not None:
                mine.copy_(other)


def with_counts(case, counts):
    tensors = [torch.tensor([n], dtype=torch.int32, device="cuda") for n in counts]
    return case._replace(inputs=[i._replace(num_tokens=n) for i, n in zip(case.inputs, tensors, strict=True)])


@pytest.mark.parametrize("num_tokens, ep_size", [(4, 2), (150, 1)])
def test_ten_thousand_calls_without_a_pause(num_tokens, ep_size):
    """Bitwise the same output; the launch's number passes many times the two banks and the flags of older launches."""
    case = make_case(11, CONFIG, ep_size, num_tokens, "uniform", "cuda", prequantized=True)
    with Workspace(CONFIG, deadlines(num_tokens, ep_size), device="cuda") as workspace:
        with MoELayer(CONFIG, workspace) as layer:
            oracle.load(layer, case)
            first = oracle.bits(oracle.run_layer(layer, case))
            outs, wrong = oracle.empty_outs(case), torch.zeros((), dtype=torch.int64, device="cuda")
            for number in range(10_000):
                if number % 500 == 0:
                    for out in outs:
                        out.fill_(float("nan"))
                oracle.call(layer, case, None, outs)
                if number % 50 == 0:
                    wrong += (oracle.bits(outs) != first).sum()
            wrong += (oracle.bits(outs) != first).sum()
            torch.cuda.synchronize()
            layer.check()
            assert int(wrong) == 0
            assert_right(case, outs)


def test_graph_replays_with_changed_inputs_and_device_counts():
    counts = [[9, 12], [0, 12], [9, 0], [1, 1], [0, 0], [4, 7]]
    cases = [with_counts(make_case(seed, CONFIG, 2, [9, 12], routing, "cuda"), n)
             for seed, (routing, n) in enumerate(zip(("uniform", "holes", "one_expert", "none", "duplicates", "zipf"),
                                                     counts))]  # fmt: skip
    static = with_counts(make_case(99, CONFIG, 2, [9, 12], "uniform", "cuda"), [9, 12])
    outs, graph = oracle.empty_outs(static), torch.cuda.CUDAGraph()
    with Workspace(CONFIG, deadlines(12, 2), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, static)
        oracle.run_layer(layer, static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            oracle.call(layer, static, None, outs)
        for case in [*cases, *cases[::-1]]:
            copy_inputs(static, case)
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            layer.check()
            assert_right(case._replace(weights=static.weights), outs)
        eager = oracle.run_layer(layer, static)  # eager calls and replays mix
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(oracle.bits(eager), oracle.bits(outs))
        del graph


def test_a_graph_of_many_calls_and_many_replays():
    case = make_case(5, CONFIG, 2, 8, "uniform", "cuda", prequantized=True)
    outs, graph = [oracle.empty_outs(case) for _ in range(10)], torch.cuda.CUDAGraph()
    with Workspace(CONFIG, deadlines(8, 2), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        first = oracle.bits(oracle.run_layer(layer, case))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for out in outs:
                oracle.call(layer, case, None, out)
        for _ in range(100):
            graph.replay()
        torch.cuda.synchronize()
        layer.check()
        assert all(torch.equal(oracle.bits(out), first) for out in outs)
        del graph


def test_loading_weights_again_under_a_captured_graph():
    case, other = (make_case(seed, CONFIG, 2, 20, "uniform", "cuda") for seed in (1, 2))
    outs, graph = oracle.empty_outs(case), torch.cuda.CUDAGraph()
    with Workspace(CONFIG, deadlines(20, 2), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            oracle.call(layer, case, None, outs)
        graph.replay()
        torch.cuda.synchronize()
        assert_right(case, outs)
        oracle.load(layer, other)
        graph.replay()
        torch.cuda.synchronize()
        layer.check()
        assert_right(case._replace(weights=other.weights), outs)
        del graph


def test_bounds_choose_other_tiles_in_one_workspace(monkeypatch):
    monkeypatch.setattr("megamoe.plan.tiles.DECODE_AHEAD_ROWS", 128)
    bounds = (9, 20, 44, 96, 140, 200, 300)
    tiles = dict.fromkeys(choose_block_tokens(CONFIG, 1, bound) for bound in bounds)
    assert tuple(tiles) == TILES[CONFIG.weight_format]
    case = make_case(3, CONFIG, 1, 9, "uniform", "cuda")
    full = make_case(4, CONFIG, 1, 300, "uniform", "cuda")._replace(weights=case.weights)
    with Workspace(CONFIG, deadlines(300, 1), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        for bound in (*bounds, *bounds[::-1], None):
            assert_right(case, oracle.run_layer(layer, case, bound))
        assert_right(full, oracle.run_layer(layer, full))
        with pytest.raises(ValueError, match="num_tokens_bound=8"):
            oracle.run_layer(layer, case, 8)
        empty = make_case(3, CONFIG, 1, 0, "uniform", "cuda")
        assert oracle.run_layer(layer, empty, 0)[0].shape == (0, CONFIG.hidden)
        torch.cuda.synchronize()
        layer.check()


def test_two_layers_of_different_shape_take_turns():
    other = MoEConfig(hidden=384, intermediate=896, num_experts=12, topk=5, swiglu_limit=1.0)
    configs = (CONFIG, other)
    with Workspace(configs, deadlines(64, 2), device="cuda") as workspace:
        layers = [MoELayer(config, workspace) for config in configs]
        for round_ in range(6):
            counts = [[64, 3], [0, 64], [17, 40]][round_ % 3]
            cases = [make_case(round_, config, 2, counts, "duplicates", "cuda") for config in configs]
            outs = []
            for layer, case in zip(layers, cases):
                oracle.load(layer, case)
            for _ in range(3):  # no host wait between the layers' calls
                outs = [oracle.run_layer(layer, case) for layer, case in zip(layers, cases)]
            torch.cuda.synchronize()
            for layer, case, out in zip(layers, cases, outs):
                layer.check()
                assert_right(case, out)
        for layer in layers:
            layer.close()


def test_num_tokens_as_a_device_scalar_without_virtual_ranks():
    """One rank, plain tensors, a 0-d count, the result allocated by the layer."""
    case = make_case(8, CONFIG, 1, 30, "uniform", "cuda")
    rank_input, weights = case.inputs[0], case.weights[0]
    with Workspace(CONFIG, deadlines(30), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf)
        count = torch.tensor(13, dtype=torch.int32, device="cuda")
        y = layer(rank_input.x, rank_input.topk_idx, rank_input.topk_weights, num_tokens=count)
        (expected,) = oracle.spec(case)
        assert y.shape == expected.shape and y.dtype == torch.bfloat16
        assert not oracle.bits([y[13:]]).any()
        result = oracle.compare(CONFIG, [y[:13]], [expected[:13]])
        assert result.ok, result.text
        kept = y.clone()
        layer(rank_input.x.neg(), rank_input.topk_idx, rank_input.topk_weights)
        torch.cuda.synchronize()
        assert torch.equal(oracle.bits([y]), oracle.bits([kept]))  # no view of anything the layer keeps


def test_out_is_written_and_returned():
    case = make_case(8, CONFIG, 2, 30, "uniform", "cuda")
    with Workspace(CONFIG, deadlines(30, 2), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        wide = [torch.full((32, CONFIG.hidden), 5.0, dtype=torch.bfloat16, device="cuda") for _ in case.inputs]
        outs = [t[1:31] for t in wide]
        result = oracle.call(layer, case, None, outs)
        assert all(a is b for a, b in zip(result, outs))
        assert_right(case, outs)
        assert all(bool((t[0] == 5).all() and (t[31] == 5).all()) for t in wide)  # nothing beside it


def test_calls_allocate_no_device_memory_beyond_the_result():
    case = make_case(8, CONFIG, 2, 30, "uniform", "cuda")
    with Workspace(CONFIG, deadlines(30, 2), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        outs = oracle.run_layer(layer, case)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(10):
            oracle.call(layer, case, None, outs)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        oracle.call(layer, case, None, None)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + len(outs)


def test_the_current_stream_is_used():
    """A call waits for what its stream holds before it, and for nothing of other streams."""
    case = make_case(8, CONFIG, 2, 30, "uniform", "cuda")
    source = [i.x.clone() for i in case.inputs]
    stream = torch.cuda.Stream()
    with Workspace(CONFIG, deadlines(30, 2), device="cuda") as workspace, MoELayer(CONFIG, workspace) as layer:
        oracle.load(layer, case)
        outs = oracle.empty_outs(case)
        for i in case.inputs:
            i.x.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # some 100 ms: a call on another stream would see the zeros
            for i, x in zip(case.inputs, source):
                i.x.copy_(x)
            oracle.call(layer, case, None, outs)
        assert not stream.query()
        stream.synchronize()
        layer.check()
        assert_right(case, outs)
