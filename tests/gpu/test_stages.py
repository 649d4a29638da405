"""Each stage of the kernel against the specification of that stage alone, applied to what the kernel gave it.

Over the whole layer a flipped e4m3 value of h hides errors of its own size (oracle.row_limit). Not here: linear1 is
compared in float64 on the same quantized operands, h with the kernel's own linear1, the output with the kernel's own
h. Every tile size of both weight formats, partial and empty blocks included.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megamoe import MoEConfig, steps
from megamoe.exchange import LocalExchange
from megamoe.plan.tiles import TILES
from megamoe.testing.compare import rel_l2, row_rel_l2
from megamoe.testing.data import make_case
from tests.gpu import stages

CASES = {
    "uniform": (MoEConfig(512, 384, 8, 4), (37, 150), "uniform", False),
    "odd hidden, clamp": (MoEConfig(896, 256, 6, 3, swiglu_limit=0.5), (90, 5), "holes", True),
    "smallest": (MoEConfig(128, 128, 2, 2), (40, 0), "duplicates", False),
    "wide": (MoEConfig(4096, 2048, 8, 2), (24, 24), "zipf", True),
    "gpt-oss": (MoEConfig(640, 384, 6, 4, "fp8", 2.0, "swiglu_oai", bias=True), (70, 150), "zipf", False),
    "biases": (MoEConfig(512, 256, 4, 2, bias=True), (33, 9), "holes", True),
    "shared experts": (MoEConfig(384, 256, 6, 3, num_shared_experts=2), (140, 21), "holes", False),
}


@cache
def expected(name: str, weight_format: str):
    """The case, and the specification's stages in float64: steps.moe_layer's trace, one a rank."""
    config, num_tokens, routing, prequantized = CASES[name]
    config = replace(config, weight_format=weight_format)
    case = make_case(3, config, len(num_tokens), num_tokens, routing, "cuda", prequantized=prequantized)
    trace = {}
    steps.moe_layer(config, LocalExchange(case.ep_size), case.weights, case.inputs, dtype=torch.float64, trace=trace)
    return case, [trace[rank] for rank in range(case.ep_size)]


@cache
def kernel_stages(name: str, weight_format: str, block_tokens: int) -> stages.Stages:
    case, trace = expected(name, weight_format)
    return stages.run(case, [t["rows"].num_rows for t in trace], block_tokens)


every_case = pytest.mark.parametrize("name", CASES)
every_block = pytest.mark.parametrize(
    "weight_format, block_tokens", [(weight_format, block) for weight_format in TILES for block in TILES[weight_format]]
)


def worst_row(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(row_rel_l2(got, wanted).max()) if len(got) else 0.0


@every_block
@every_case
def test_linear1_rows_in_float64(name, weight_format, block_tokens):
    """Same quantized operands: relative L2 below 1e-3 in every row."""
    case, trace = expected(name, weight_format)
    for got, wanted in zip(kernel_stages(name, weight_format, block_tokens).linear1, trace, strict=True):
        assert got.shape == wanted["linear1"].shape
        assert bool(got.isfinite().all()), "a row was not written"
        error = rel_l2(got, wanted["linear1"]), worst_row(got, wanted["linear1"])
        print(f"linear1: relative L2 {error[0]:.2e}, worst row {error[1]:.2e}")
        assert max(error) < 1e-3


def e4m3_steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many e4m3 numbers apart, elementwise: patterns of one sign are in the order of their values."""
    first, second = (v.view(torch.uint8).to(torch.int32) for v in (a, b))
    first, second = (torch.where(v >= 128, 128 - v, v) for v in (first, second))
    return (first - second).abs()


@every_block
@every_case
def test_h_is_the_swiglu_of_the_kernels_own_linear1(name, weight_format, block_tokens):
    """Scale factors to fp32 rounding; values equal but for a few on a rounding boundary, and those by one step."""
    case, trace = expected(name, weight_format)
    got = kernel_stages(name, weight_format, block_tokens)
    for linear1, h, wanted in zip(got.linear1, got.h, trace, strict=True):
        spec = steps.swiglu(case.config, linear1, wanted["rows"].topk_weight)
        torch.testing.assert_close(h.sf, spec.sf, rtol=1e-5, atol=0)
        apart = e4m3_steps(h.values, spec.values)
        assert int(apart.max() if apart.numel() else 0) <= 1
        assert int((apart != 0).sum()) <= 2 + 1e-3 * apart.numel()


@every_block
@every_case
def test_the_output_is_linear2_and_combine_of_the_kernels_own_h(name, weight_format, block_tokens):
    """Within 5e-3 in every row: what is left is bf16 rounding, 2^-9 at most for each of two roundings."""
    case, trace = expected(name, weight_format)
    got = kernel_stages(name, weight_format, block_tokens)
    rows = [t["rows"] for t in trace]
    y = [steps.linear2(case.config, w, h, r.num_rows, topk_weight=r.topk_weight, dtype=torch.float64)
         for w, h, r in zip(case.weights, got.h, rows, strict=True)]  # fmt: skip
    spec = steps.combine(case.config, LocalExchange(case.ep_size), rows, y, case.inputs)
    for actual, wanted in zip(got.y, spec, strict=True):
        print(f"linear2 and combine: worst row {worst_row(actual, wanted):.2e}")
        assert worst_row(actual, wanted) < 5e-3


def test_the_comparison_sees_a_wrong_block():
    """One k block of one row's h replaced by its neighbour's is far outside the limit."""
    case, trace = expected("uniform", "fp8")
    got, rows = kernel_stages("uniform", "fp8", 32), [t["rows"] for t in trace]
    h = [steps.Quantized(v.values.view(torch.uint8).clone().view(torch.float8_e4m3fn), v.sf.clone()) for v in got.h]
    h[0].values.view(torch.uint8)[0, :128] = h[0].values.view(torch.uint8)[0, 128:256]
    y = [steps.linear2(case.config, w, q, r.num_rows, dtype=torch.float64)
         for w, q, r in zip(case.weights, h, rows, strict=True)]  # fmt: skip
    spec = steps.combine(case.config, LocalExchange(case.ep_size), rows, y, case.inputs)
    assert max(worst_row(a, b) for a, b in zip(got.y, spec)) > 2e-2
