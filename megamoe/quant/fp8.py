"""FP8 e4m3 with fp32 scale factors, in plain torch: per token and 128 of K for activations, per 128x128 block for
weights.

e4m3 is the 8-bit format of OCP "8-bit Floating Point Specification" (OFP8) rev 1.0: 4 exponent bits, 3 mantissa bits,
no infinity, largest finite value 448. The granularity is that of the DeepSeek-V3 technical report (arXiv 2412.19437),
section 3.3.2: activations in 1x128 groups, weights in 128x128 blocks. A value is always  q * sf.

Both divisions, amax / 448 and x / sf, are correctly rounded fp32 divisions, and this is part of the format: quotients
of bf16 inputs fall exactly between two e4m3 values so often (wherever the mantissa of amax is a multiple of 7) that a
reciprocal, or a wider type, changes whole rows by more than 1e-2.

A NaN or infinity makes its whole group NaN once dequantized, and nothing outside the group: an infinite amax gives an
infinite sf, and 0 * inf and inf / inf are NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.config import BLOCK

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-10
"""Keeps the scale factor of an all-zero group finite and non-zero, so that 0 / sf is 0."""


class Quantized(NamedTuple):
    """values: e4m3; sf: fp32, one per group. The number meant is values * sf."""

    values: Tensor
    sf: Tensor


def _scale(amax: Tensor) -> Tensor:
    amax = amax.clamp(min=AMAX_FLOOR)  # a NaN stays NaN
    # By a tensor: torch on CUDA divides by a Python number with a reciprocal, which is off by one bit at times
    return amax / torch.full_like(amax, E4M3_MAX)


def _round(scaled: Tensor) -> Tensor:
    # Saturates first: x / sf may exceed 448 by one rounding, which a bare cast would turn into NaN
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def quantize_rows(x: Tensor) -> Quantized:
    """Quantize activations: sf = max(amax, 1e-10) / 448 over each 128 of the last dimension, q = x / sf to nearest
    even.

    x: floating [..., K], K a multiple of 128 -> values e4m3 [..., K], sf fp32 [..., K / 128].
    Source: DeepSeek-V3 report, 3.3.2 (fine-grained quantization, online amax).
    """
    groups = x.float().unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))
    sf = _scale(groups.abs().amax(-1))
    return Quantized(_round(groups / sf[..., None]).flatten(-2), sf)


def dequantize_rows(values: Tensor, sf: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """values e4m3 [..., K], sf fp32 [..., K / 128] -> [..., K] in ``dtype`` (fp32, or fp64 where the product is
    exact)."""
    groups = values.to(dtype).unflatten(-1, (sf.shape[-1], BLOCK))
    return (groups * sf.to(dtype)[..., None]).flatten(-2)


def quantize_blocks(weight: Tensor) -> Quantized:
    """Quantize weights: one sf per 128x128 block of the last two dimensions, same formula as ``quantize_rows``.

    weight: floating [..., N, K], N and K multiples of 128 -> values e4m3 [..., N, K], sf fp32 [..., N / 128, K / 128].
    sf multiplies, as ``weight_scale_inv`` of DeepSeek-V3 checkpoints does. One matrix at a time: the fp32 copy of all
    experts would be the largest tensor of a load.
    """
    *lead, n, k = weight.shape
    values = torch.empty_like(weight, dtype=E4M3, memory_format=torch.contiguous_format)
    sf = torch.empty(*lead, n // BLOCK, k // BLOCK, dtype=torch.float32, device=weight.device)
    matrices = zip(weight.reshape(-1, n, k), values.view(-1, n, k), sf.view(-1, n // BLOCK, k // BLOCK), strict=True)
    for source, values_out, sf_out in matrices:
        blocks = source.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        block_sf = _scale(blocks.abs().amax((1, 3)))
        sf_out.copy_(block_sf)
        values_out.copy_(_round(blocks / block_sf[:, None, :, None]).reshape(n, k))
    return Quantized(values, sf)


def dequantize_blocks(values: Tensor, sf: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """values e4m3 [..., N, K], sf fp32 [..., N / 128, K / 128] -> [..., N, K] in ``dtype``."""
    blocks = values.to(dtype).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    return (blocks * sf.to(dtype)[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
