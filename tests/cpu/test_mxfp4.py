"""MXFP4 by its definition: every code and scale factor, quantization, the fit to e4m3, and the layer in this format."""

import numpy as np
import pytest
import torch

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
from megamoe.exchange import LocalExchange
from megamoe.quant import mxfp4
from megamoe.quant.mxfp4 import Mxfp4, dequantize, fit, quantize, refusal
from megamoe.steps import moe_layer
from megamoe.testing.cases import random_case
from megamoe.testing.compare import rel_l2, verdict_ranks
from megamoe.testing.data import make_case
from megamoe.testing.reference import moe_reference, round_e4m3

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TINY = MoEConfig(hidden=256, intermediate=128, num_experts=4, topk=2, weight_format="mxfp4")


def weights_of(codes: torch.Tensor, sf: torch.Tensor) -> Mxfp4:
    """codes uint8 [..., K] one an element -> packed."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return Mxfp4(low | high << 4, sf)


def every_pair() -> Mxfp4:
    """Row s: scale factor s, the 16 codes twice."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, 2)
    return weights_of(codes, torch.arange(256, dtype=torch.uint8)[:, None])


def test_every_code_and_scale_factor_has_its_value():
    values = dequantize(*every_pair(), torch.float64).numpy()
    signed = np.concatenate((E2M1, -E2M1))
    expected = np.tile(signed, (256, 2)) * np.ldexp(1.0, np.arange(256) - 127)[:, None]
    assert np.array_equal(values[:255], expected[:255]) and np.isnan(values[255]).all()
    in_fp32 = dequantize(*every_pair()).double().numpy()
    assert np.array_equal(in_fp32[:253], expected[:253])


def test_low_nibble_comes_first():
    values = dequantize(torch.tensor([[0xA1] + [0] * 15], dtype=torch.uint8), torch.tensor([[127]], dtype=torch.uint8))
    assert values[0, :3].tolist() == [0.5, -1.0, 0.0]


def nearest_e2m1(values: np.ndarray) -> np.ndarray:
    """By search: the nearest magnitude, ties to the even code."""
    distance = np.abs(np.abs(values)[..., None] - E2M1)
    best = distance.min(-1, keepdims=True)
    even = np.where(distance == best, np.arange(8) % 2, 2)
    return E2M1[even.argmin(-1)] * np.sign(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantization_is_the_nearest_code_under_the_mx_scale(dtype):
    weight = (torch.randn(64, 256) * torch.exp2(torch.randint(-20, 20, (64, 1)).float())).to(dtype)
    weight[0, :32] = 0
    weight[1, :32] = torch.arange(32) / 4  # ties: amax 7.75, so that the unit is 1
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight[2, :15] = torch.cat((torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1), torch.ones(1) * 6))
    codes, sf = quantize(weight)
    groups = weight.double().numpy().reshape(64, 8, 32)
    amax = np.abs(groups).max(2)
    wanted = np.where(amax > 0, np.floor(np.log2(np.maximum(amax, 1e-300))) - 2 + 127, mxfp4.MIN_QUANTIZED_SF)
    assert np.array_equal(sf.numpy(), wanted)
    scale = np.ldexp(1.0, wanted.astype(int) - 127)[..., None]
    expected = (nearest_e2m1(groups / scale) * scale).reshape(64, 256)
    assert np.array_equal(dequantize(codes, sf, torch.float64).numpy(), expected)
    assert dequantize(codes, sf)[1, :32].tolist()[:13] == [0, 0, 0.5, 1, 1, 1, 1.5, 2, 2, 2, 2, 3, 3]
    again = quantize(dequantize(codes, sf))
    assert torch.equal(dequantize(*again), dequantize(codes, sf))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_gets_a_scale_factor_that_is_refused(bad):
    weight = torch.randn(128, 128)
    weight[3, 70] = bad
    codes, sf = quantize(weight)
    assert int((sf == 255).sum()) == 1 and int(sf[3, 2]) == 255
    assert "scale factor 255 (NaN) at row 3, group 2" in refusal(codes, sf)


def test_values_outside_fp32s_normal_range_are_refused_and_those_inside_are_not():
    pairs = every_pair()
    for sf in range(255):
        for code in range(1, 8):
            one = torch.zeros(1, 32, dtype=torch.uint8)
            one[0, 5] = code
            codes, factor = weights_of(one, pairs.sf[sf : sf + 1])
            value = E2M1[code] * 2.0 ** (sf - 127)
            assert (refusal(codes, factor) is None) == (2.0**-126 <= value < 2.0**128), (sf, code)
    assert refusal(torch.zeros(1, 16, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)) is None


@pytest.mark.parametrize("top", [20, 123, 252])
def test_every_pair_under_a_base_is_e4m3_of_it_and_exact_within_15_binades(top):
    """The result stated for each (code, scale factor) pair: round to nearest even on e4m3's grid under the base."""
    codes, sf = every_pair()
    codes, sf = codes[: top + 1], sf[: top + 1]
    rows = -len(sf) % 128
    codes, sf = torch.nn.functional.pad(codes, (0, 0, 0, rows)), torch.nn.functional.pad(sf, (0, 0, 0, rows))
    # One base a 128 rows: give every row block the top
    codes = torch.cat([codes, codes[top].expand(len(codes), -1)], 1)
    sf = torch.cat([sf, torch.full_like(sf, top)], 1)
    fitted = fit(codes, sf)
    exact = dequantize(codes, sf, torch.float64).numpy()
    base = 2.0 ** (top - 127 - 6)
    expected = round_e4m3(exact / base) * base
    assert np.array_equal(dequantize(fitted.codes, fitted.sf, torch.float64).numpy(), expected)
    same = np.array_equal(exact[top - 14 : top + 1], expected[top - 14 : top + 1])
    assert same and fitted.rerounded == top - 14 and not np.array_equal(exact[top - 15], expected[top - 15])
    again = fit(fitted.codes, fitted.sf)
    assert again.rerounded == 0 and again.codes is fitted.codes


def test_an_all_zero_group_sets_no_base_and_is_never_rounded():
    codes, sf = quantize(torch.randn(128, 128))
    codes[:, :16], sf[:, 0] = 0, 250
    codes[:, 16:32], sf[:, 1] = 0, 0
    fitted = fit(codes, sf)
    assert fitted.rerounded == 0 and int(mxfp4.tops(codes, sf)[0]) == int(sf[:, 2:].max())


@pytest.mark.parametrize("seed", range(12))
def test_the_layer_equals_the_float64_loop(seed):
    case, _, text = random_case(seed, weight_format="mxfp4")
    expected = moe_reference(case.config, case.weights, case.inputs)
    exact = verdict_ranks(
        moe_layer(case.config, LocalExchange(case.ep_size), case.weights, case.inputs, dtype=torch.float64), expected,
        max_rel_l2=1e-4, max_row_rel_l2=4e-3,
    )  # fmt: skip
    assert exact.ok, f"{exact.text} {text}"


def make_layer() -> tuple[MoELayer, object]:
    layer = MoELayer(TINY, Workspace(TINY, EPConfig(16), device="cpu"))
    return layer, make_case(0, TINY, 1, 5)


def call(layer, case) -> torch.Tensor:
    return layer(case.inputs[0].x, case.inputs[0].topk_idx, case.inputs[0].topk_weights)


def test_codes_and_floats_load_alike_and_the_caller_keeps_its_tensors():
    layer, case = make_layer()
    linear1, linear2 = torch.randn(4, 256, 256).bfloat16() / 16, torch.randn(4, 256, 128) / 11
    layer.load_weights(linear1, linear2)
    y = call(layer, case)
    assert y.dtype == torch.bfloat16 and layer.rerounded_groups == [{"linear1": 0, "linear2": 0}]
    first, second = quantize(linear1), quantize(linear2)
    before = first.codes.clone()
    layer.load_weights(first.codes, second.codes, first.sf, second.sf)
    assert torch.equal(call(layer, case), y) and torch.equal(first.codes, before)


def test_rerounded_groups_are_counted_and_are_what_is_multiplied():
    layer, case = make_layer()
    first, second = quantize(torch.randn(4, 256, 256) / 16), quantize(torch.randn(4, 256, 128) / 11)
    first.sf[2, 7, 3] -= 30
    given = first.sf.clone()
    with pytest.warns(UserWarning, match="MXFP4 groups re-rounded on loading"):
        layer.load_weights(first.codes, second.codes, first.sf, second.sf)
    assert layer.rerounded_groups == [{"linear1": 1, "linear2": 0}] and torch.equal(first.sf, given)
    kept = layer._engine.weights[0]
    group = dequantize(kept.linear1[2], kept.linear1_sf[2])[7, 96:128]
    assert not group.any()  # 2^-30 below the rest: nothing of it is left on e4m3's grid


def bad_weights():
    first, second = quantize(torch.randn(4, 256, 256)), quantize(torch.randn(4, 256, 128))
    nan = first.sf.clone()
    nan[3, 9, 1] = 255
    yield (first.codes, second.codes), ValueError, "linear1_sf is missing; mxfp4 codes need uint8 [4, 256, 8]"
    yield (first.codes, second.codes, nan, second.sf), ValueError, "linear1 of local expert 3: scale factor 255 (NaN)"
    yield (first.codes[:, :, :64], second.codes, first.sf, second.sf), ValueError, "linear1 has shape [4, 256, 64]"
    yield (first.codes, second.codes, first.sf, second.sf.float()), TypeError, "linear2_sf has dtype torch.float32"
    yield (torch.randn(4, 256, 128), torch.randn(4, 256, 128)), ValueError, "linear1 has shape [4, 256, 128]; expected"
    yield (torch.randn(4, 256, 256), torch.randn(4, 256, 128), first.sf), ValueError, "scale factors belong to uint8"
    yield (first.codes.int(), second.codes, first.sf, second.sf), TypeError, "linear1 has dtype torch.int32"
    nans = torch.full((4, 256, 256), float("nan"))
    yield (nans, torch.randn(4, 256, 128)), ValueError, "linear1 of local expert 0: scale factor 255 (NaN)"


@pytest.mark.parametrize(("arguments", "error", "text"), list(bad_weights()), ids=lambda value: None)
def test_bad_weights_are_refused_with_expert_and_tensor(arguments, error, text):
    layer, _ = make_layer()
    with pytest.raises(error) as raised:
        layer.load_weights(*arguments)
    assert text in str(raised.value)


def test_error_against_bf16_weights_is_that_of_four_bits():
    """Random normal weights: 11 to 12 % of each weight, the figure of e2m1 with a power-of-two scale."""
    weight = torch.randn(256, 512)
    assert 0.10 < rel_l2(dequantize(*quantize(weight)), weight) < 0.13
