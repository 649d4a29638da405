"""The specification against an independently written float64 loop, and its promises one by one."""

import ast
import inspect

import pytest
import torch

from megamoe.config import MoEConfig
from megamoe.exchange import LocalExchange
from megamoe.quant.fp8 import dequantize_blocks, dequantize_rows
from megamoe.steps import ExpertWeights, RankInput, combine, dispatch, linear1, linear2, moe_layer, swiglu
from megamoe.testing import reference
from megamoe.testing.cases import random_case
from megamoe.testing.compare import rel_l2, verdict_ranks
from megamoe.testing.data import ROUTINGS, make_case
from megamoe.testing.reference import moe_reference

TINY = MoEConfig(hidden=256, intermediate=128, num_experts=8, topk=3)


def run(case, **options) -> list[torch.Tensor]:
    return moe_layer(case.config, LocalExchange(case.ep_size), case.weights, case.inputs, **options)


def bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.view(torch.int16) for t in tensors]


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_float64_loop(seed):
    case, _, text = random_case(seed)
    expected = moe_reference(case.config, case.weights, case.inputs)
    # In float64 nothing but the last bit of a sum can differ, so that a wrong formula cannot hide behind rounding
    exact = verdict_ranks(run(case, dtype=torch.float64), expected, max_rel_l2=1e-4, max_row_rel_l2=4e-3)
    assert exact.ok, f"float64: {exact.text} {text}"
    judged = verdict_ranks(run(case), expected)
    assert judged.ok, f"{judged.text} {text}"


@pytest.mark.parametrize("seed", range(15))
def test_equals_the_float64_loop_without_quantizers(seed):
    case, _, text = random_case(seed, weight_format="bf16")
    judged = verdict_ranks(run(case), moe_reference(case.config, case.weights, case.inputs), max_rel_l2=2e-3)
    assert judged.ok, f"{judged.text} {text}"


def test_fp32_model_stays_in_fp32():
    config = MoEConfig(256, 384, 4, 2, weight_format="bf16")
    case = make_case(0, config, 2, [9, 3], dtype=torch.float32)
    y = run(case)
    assert y[0].dtype == torch.float32
    limits = {"max_rel_l2": 1e-6, "max_row_rel_l2": 2e-6}
    assert verdict_ranks(y, moe_reference(config, case.weights, case.inputs), **limits).ok


@pytest.mark.parametrize("weight_format", ["fp8", "bf16"])
@pytest.mark.parametrize(("activation", "limit"), [("swiglu_oai", 1.0), ("swiglu_oai", None), ("swiglu", None)])
def test_biases_and_the_gpt_oss_activation_equal_the_float64_loop(weight_format, activation, limit):
    config = MoEConfig(
        256, 128, 8, 3, weight_format=weight_format, swiglu_limit=limit, activation=activation, bias=True
    )
    case = make_case(4, config, 4, [7, 0, 12, 1], "duplicates")
    expected = moe_reference(config, case.weights, case.inputs)
    judged = verdict_ranks(run(case, dtype=torch.float64), expected, max_rel_l2=3e-4, max_row_rel_l2=4e-3)
    assert judged.ok, judged.text
    assert verdict_ranks(run(case), expected).ok
    # Each bias, and its weight, is part of that: a row with a bias left out is another row
    for field in ("linear1_bias", "linear2_bias"):
        without = [w._replace(**{field: torch.zeros_like(getattr(w, field))}) for w in case.weights]
        assert not verdict_ranks(run(case._replace(weights=without)), expected).ok
    doubled = [i._replace(topk_weights=2 * i.topk_weights) for i in case.inputs]
    again = moe_reference(config, case.weights, doubled)
    assert verdict_ranks(run(case._replace(inputs=doubled)), again).ok
    assert verdict_ranks(again, [2 * y for y in expected], max_rel_l2=2e-2, max_row_rel_l2=5e-2).ok


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_at_topk_16_and_three_widths(routing):
    config = MoEConfig(hidden=384, intermediate=256, num_experts=24, topk=16, swiglu_limit=1.0)
    case = make_case(5, config, 4, [0, 3, 20, 1], routing)
    judged = verdict_ranks(run(case), moe_reference(config, case.weights, case.inputs))
    assert judged.ok, judged.text


def test_rank_count_does_not_change_a_bit():
    whole = make_case(1, TINY, 1, 24)
    weights, tokens = whole.weights[0], whole.inputs[0]
    (expected,) = run(whole)
    for ep_size in (2, 4, 8):
        split = [ExpertWeights(*parts) for parts in zip(*(t.chunk(ep_size) for t in weights[:4]), strict=True)]
        counts = [24 - 3 * (ep_size - 1)] + [3] * (ep_size - 1)
        x, idx, weight = tokens.x.split(counts), tokens.topk_idx.split(counts), tokens.topk_weights.split(counts)
        inputs = [RankInput(x[r], None, idx[r], weight[r]) for r in range(ep_size)]
        y = torch.cat(moe_layer(TINY, LocalExchange(ep_size), split, inputs))
        assert torch.equal(y, expected), f"ep_size {ep_size}"


def test_dispatch_delivers_each_row_exactly_once_in_order():
    case = make_case(2, TINY, 4, [5, 0, 9, 2], "duplicates")
    num_local_experts = 2
    delivered = []
    for ep_rank, rows in enumerate(dispatch(TINY, LocalExchange(4), case.inputs)):
        names = list(zip(*(t.tolist() for t in (rows.local_expert, rows.src_rank, rows.token, rows.slot)), strict=True))
        assert names == sorted(names)
        assert rows.num_rows == [sum(name[0] == e for name in names) for e in range(num_local_experts)]
        for i, (local_expert, src_rank, token, slot) in enumerate(names):
            source = case.inputs[src_rank]
            assert source.topk_idx[token, slot] == ep_rank * num_local_experts + local_expert
            assert rows.topk_weight[i] == source.topk_weights[token, slot]
            value = dequantize_rows(rows.x[i : i + 1], rows.x_sf[i : i + 1])[0]
            assert rel_l2(value[None], source.x[token : token + 1]) < 0.05
        delivered += [name[1:] for name in names]
    assert sorted(delivered) == [(r, t, k) for r, n in enumerate([5, 0, 9, 2]) for t in range(n) for k in range(3)]


def test_trace_holds_every_intermediate_of_the_result():
    case, trace = make_case(3, TINY, 2, [6, 7]), {}
    y = run(case, trace=trace)
    totals = [torch.zeros(n, TINY.hidden) for n in (6, 7)]
    for ep_rank, steps in trace.items():
        rows, weights, num_rows = steps["rows"], case.weights[ep_rank], sum(steps["rows"].num_rows)
        assert steps["linear1"].shape == (num_rows, 256) and steps["linear1"].dtype == torch.float32
        assert steps["h"].shape == (num_rows, 128) and steps["h_sf"].shape == (num_rows, 1)
        assert steps["linear2"].shape == (num_rows, 256) and steps["linear2"].dtype == torch.bfloat16
        for i in range(num_rows):
            weight = dequantize_blocks(weights.linear2, weights.linear2_sf)[rows.local_expert[i]]
            row = weight @ dequantize_rows(steps["h"][i : i + 1], steps["h_sf"][i : i + 1])[0]
            assert rel_l2(steps["linear2"][i : i + 1], row[None]) < 4e-3
            totals[rows.src_rank[i]][rows.token[i]] += steps["linear2"][i].float()
    for rank in range(2):
        assert rel_l2(y[rank], totals[rank]) < 4e-3


def test_steps_can_be_called_one_by_one():
    case, trace = make_case(3, TINY, 1, [6]), {}
    run(case, trace=trace)
    (rows,) = dispatch(TINY, LocalExchange(1), case.inputs)
    acc = linear1(TINY, case.weights[0], rows)
    h = swiglu(TINY, acc, rows.topk_weight)
    y = linear2(TINY, case.weights[0], h, rows.num_rows)
    assert torch.equal(acc, trace[0]["linear1"]) and torch.equal(y, trace[0]["linear2"])
    assert rel_l2(acc, linear1(TINY, case.weights[0], rows, dtype=torch.float64)) < 1e-6


def test_combine_skips_unused_slots_and_a_token_without_any_is_exactly_zero():
    case = make_case(4, TINY, 2, [8, 8], "holes")
    for y, rank_input in zip(run(case), case.inputs, strict=True):
        unused = (rank_input.topk_idx == -1).all(1)
        assert unused.any() and not unused.all()
        assert not y[unused].view(torch.int16).any()  # not even a minus zero
        assert y[~unused].abs().sum(1).min() > 0
    for y in run(make_case(4, TINY, 2, [8, 8], "none")):
        assert not y.view(torch.int16).any()


def test_combine_adds_in_fp32_in_slot_order():
    # 2^24 + 1 is 2^24 in fp32, so that the order of the three decides whether the 1 survives; in bf16 it never does
    config = MoEConfig(128, 128, 1, 3)
    x = torch.zeros(2, 128).bfloat16()
    rank_input = RankInput(x, None, torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3))
    (rows,) = dispatch(config, LocalExchange(1), [rank_input])
    big = 2.0**24
    addends = torch.tensor([[1.0, big, -big], [big, -big, 1.0]])
    y = addends[rows.token, rows.slot][:, None].expand(6, 128).bfloat16()
    (total,) = combine(config, LocalExchange(1), [rows], [y], [rank_input])
    assert total[:, 0].tolist() == [0.0, 1.0]
    y = torch.tensor([[256.0, 1.0, 1.0]] * 2)[rows.token, rows.slot][:, None].expand(6, 128).bfloat16()
    assert combine(config, LocalExchange(1), [rows], [y], [rank_input])[0][0, 0] == 258


def test_the_reference_shares_no_arithmetic_with_what_it_checks():
    imported = {node.module for node in ast.walk(ast.parse(inspect.getsource(reference))) if hasattr(node, "module")}
    assert not {name for name in imported if name and name.startswith("megamoe")}


def test_a_duplicate_counts_twice():
    case = make_case(6, TINY, 1, 5)
    once = case.inputs[0]._replace(topk_idx=torch.tensor([[3, -1, -1]] * 5), topk_weights=torch.ones(5, 3))
    twice = once._replace(topk_idx=torch.tensor([[3, -1, 3]] * 5))
    (y1,), (y2,) = run(case._replace(inputs=[once])), run(case._replace(inputs=[twice]))
    assert torch.equal(y2, y1 * 2)


def test_one_rank_has_no_tokens_and_no_rank_has_any():
    y = run(make_case(7, TINY, 2, [0, 4]))
    assert y[0].shape == (0, 256) and y[1].isfinite().all() and y[1].any()
    assert [t.shape for t in run(make_case(7, TINY, 2, [0, 0]))] == [(0, 256), (0, 256)]


@pytest.mark.parametrize("prequantized", [False, True])
def test_rows_from_num_tokens_on_are_ignored_and_zero(prequantized):
    case = make_case(8, TINY, 2, [6, 6], prequantized=prequantized)
    garbage = []
    for rank_input, count in zip(case.inputs, (0, 4), strict=True):
        idx = rank_input.topk_idx.clone()
        idx[count:] = 1_000_000  # ids there mean nothing and must not even be looked at
        garbage.append(rank_input._replace(topk_idx=idx, num_tokens=torch.tensor([count], dtype=torch.int32)))
    short = [
        RankInput(i.x[:n], None if i.x_sf is None else i.x_sf[:n], i.topk_idx[:n], i.topk_weights[:n])
        for i, n in zip(case.inputs, (0, 4), strict=True)
    ]
    expected = run(case._replace(inputs=short))
    for y, y_short, count in zip(run(case._replace(inputs=garbage)), expected, (0, 4), strict=True):
        assert y.shape == (6, 256)
        assert torch.equal(y[:count], y_short)
        assert not y[count:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "x_sf", "topk_weights"])
@pytest.mark.parametrize("weight_format", ["fp8", "bf16"])
def test_a_bad_token_changes_no_bit_of_any_other(bad, where, weight_format):
    if where == "x_sf" and weight_format == "bf16":
        where = "x"
    config = MoEConfig(256, 128, 4, 2, weight_format=weight_format)
    case = make_case(9, config, 2, [7, 5], prequantized=where == "x_sf")
    clean = run(case)
    getattr(case.inputs[0], where)[3, 1] = bad
    poisoned = run(case)
    assert not poisoned[0][3].isfinite().all()
    others = torch.arange(7) != 3
    assert torch.equal(poisoned[0][others], clean[0][others])
    assert torch.equal(poisoned[1], clean[1])


def test_swiglu_is_silu_gate_times_up_times_weight():
    config = MoEConfig(128, 128, 1, 1, weight_format="bf16")
    acc, weight = torch.randn(4, 256) * 20, torch.rand(4)
    h, sf = swiglu(config, acc, weight)
    assert sf is None
    expected = torch.nn.functional.silu(acc[:, :128].double()) * acc[:, 128:].double() * weight.double()[:, None]
    assert rel_l2(h, expected) < 1e-6


def test_swiglu_clamps_gate_from_above_and_up_on_both_sides():
    config = MoEConfig(128, 128, 1, 1, weight_format="bf16", swiglu_limit=2.0)
    acc = torch.zeros(4, 256)
    acc[:, 0], acc[:, 128] = torch.tensor([9.0, -9.0, 1.0, 9.0]), torch.tensor([9.0, 1.0, -9.0, -1.0])
    h = swiglu(config, acc, torch.ones(4))[0][:, 0]
    silu = torch.nn.functional.silu
    expected = silu(torch.tensor([2.0, -9.0, 1.0, 2.0])) * torch.tensor([2.0, 1.0, -2.0, -1.0])
    assert torch.allclose(h, expected, rtol=1e-6)


def test_large_negative_gate_gives_zero_not_nan():
    config = MoEConfig(128, 128, 1, 1, weight_format="bf16")
    acc = torch.full((1, 256), -1e5)
    assert not swiglu(config, acc, torch.ones(1))[0].any()


def test_same_bits_from_run_to_run_and_matmul_precision_is_left_as_found():
    case = make_case(10, TINY, 2, [9, 4])
    torch.set_float32_matmul_precision("medium")
    try:
        first = run(case)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(bits(first), bits(run(case)), strict=True):
        assert torch.equal(a, b)


def test_make_case_for_one_rank_is_that_rank_of_the_whole():
    whole, part = make_case(11, TINY, 4, [1, 2, 3, 4], "zipf"), make_case(11, TINY, 4, [1, 2, 3, 4], "zipf", ranks=[2])
    assert torch.equal(whole.weights[2].linear1.view(torch.uint8), part.weights[0].linear1.view(torch.uint8))
    assert torch.equal(whole.inputs[2].topk_idx, part.inputs[0].topk_idx)
    assert torch.equal(whole.inputs[2].x, part.inputs[0].x)
