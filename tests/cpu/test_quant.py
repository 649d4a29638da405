"""Quantizers against an e4m3 written out in float64, and against hand-made numbers."""

import numpy as np
import pytest
import torch

from megamoe.quant.fp8 import E4M3, dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from megamoe.testing import reference


def all_e4m3() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(E4M3)


def test_reference_rounding_is_the_e4m3_grid():
    grid = all_e4m3().double()
    grid = grid[grid.isfinite()].sort().values.unique()
    assert len(grid) == 253 and grid[-1] == 448  # 256 less two NaN and one of the two zeros
    assert np.array_equal(reference.round_e4m3(grid.numpy()), grid.numpy())
    middle = (grid[1:] + grid[:-1]) / 2
    nearest = reference.round_e4m3((middle * (1 + 1e-9)).numpy())
    away = torch.where(middle > 0, grid[1:], grid[:-1])
    assert np.array_equal(nearest[middle != 0], away[middle != 0].numpy())


def test_values_are_the_nearest_e4m3_of_x_over_sf_ties_to_even():
    x = torch.randn(64, 384) * torch.logspace(-6, 6, 64)[:, None]
    values, sf = quantize_rows(x)
    quotient = (x.unflatten(1, (3, 128)) / sf[..., None]).flatten(1)
    assert np.array_equal(values.double().numpy(), reference.round_e4m3(quotient.double().numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_independent_quantizer(dtype):
    x = torch.randn(32, 256).to(dtype)
    expected = np.stack([reference.fake_quantize(row) for row in x.double().numpy()])
    assert np.array_equal(dequantize_rows(*quantize_rows(x), torch.float64).numpy(), expected)


def test_blocks_equal_the_independent_quantizer():
    weight = torch.randn(3, 256, 384).bfloat16()
    values, sf = quantize_blocks(weight)
    assert values.shape == weight.shape and values.dtype == E4M3
    assert sf.shape == (3, 2, 3) and sf.dtype == torch.float32
    expected = np.stack([reference.fake_quantize_blocks(matrix) for matrix in weight.double().numpy()])
    assert np.array_equal(dequantize_blocks(values, sf, torch.float64).numpy(), expected)


def test_scale_factor_is_amax_over_448_and_amax_keeps_its_value():
    x = torch.zeros(1, 256)
    x[0, 5], x[0, 130] = -896.0, 3.5
    values, sf = quantize_rows(x)
    assert sf.tolist() == [[2.0, 3.5 / 448]]
    assert values[0, 5].item() == -448 and values[0, 130].item() == 448
    assert torch.equal(dequantize_rows(values, sf), x)


def test_zero_group_has_the_floor_as_amax_and_stays_zero():
    values, sf = quantize_rows(torch.zeros(2, 128))
    assert torch.equal(sf, torch.full((2, 1), 1e-10) / torch.tensor(448.0))
    assert not values.float().any()


def test_tiny_values_below_the_floor_do_not_overflow():
    assert dequantize_rows(*quantize_rows(torch.full((1, 128), 1e-30))).abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_poisons_its_own_group_only(bad):
    x = torch.randn(4, 384)
    clean = dequantize_rows(*quantize_rows(x))
    x[1, 200] = bad
    poisoned = dequantize_rows(*quantize_rows(x))
    assert poisoned[1, 128:256].isnan().all()
    poisoned[1, 128:256] = clean[1, 128:256]
    assert torch.equal(poisoned, clean)


def test_relative_error_of_a_value_is_at_most_half_a_step():
    x = torch.randn(16, 128).exp()  # no value below the normal range of its group
    error = (dequantize_rows(*quantize_rows(x)) - x).abs() / x
    assert 0 < error.max() <= 2.0**-4 * 1.001


def test_empty_tensors():
    assert quantize_rows(torch.empty(0, 256)).sf.shape == (0, 2)
    assert dequantize_rows(*quantize_rows(torch.empty(0, 256))).shape == (0, 256)
    assert quantize_blocks(torch.empty(0, 128, 128)).sf.shape == (0, 1, 1)
