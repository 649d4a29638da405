"""MXFP4 weights: e2m1 codes, two to a byte, and one power-of-two scale factor for each 32 along K, in plain torch.

Source: OCP "Microscaling Formats (MX) Specification" v1.0. A code is sign, two exponent bits, one mantissa bit (5.3.3);
a scale factor `sf` is UE8M0: 2^(sf - 127), 255 is NaN (5.4.1). The low nibble of a byte comes first along K. A value is
code * 2^(sf - 127).

Hopper multiplies e4m3, so the kernel decodes a code to e4m3(code * 2^s) and multiplies sums by a power of two, the
*base* of 128 rows: 2^(top - 133), top the largest sf of these rows' groups that are not all zero, s = sf - top + 6.
e4m3 holds every e2m1 value times 2^s exactly for s = -8 to 6, which is 15 binades of scale factors. A group further
below its rows' top (by 2^-15 and more) is rounded to the e4m3 grid, to nearest even, and counted: `fit` does both, at
load, so that what the specification multiplies is what the kernel multiplies.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megamoe.layout import MXFP4_GROUP

CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of codes 0 to 7; 8 to 15 are their negatives."""
BINADES = 15
"""Scale factors, top included, whose groups e4m3 holds exactly under one base."""
BASE_ROWS = 128
"""Rows that share a base."""
LARGEST_EXPONENT = 6  # 6 * 2^6 = 384 is e4m3, 6 * 2^7 is not
_TIES = [(low + high) / 2 for low, high in pairwise(CODE_VALUES)]
# The largest fp32 number that rounds below codes 1 to 7. An odd code's tie with the one below it goes down, to the even
# mantissa, an even code's goes up.
_BELOW_CODES = [tie if code % 2 else float(np.nextafter(np.float32(tie), np.float32(0)))
                for code, tie in enumerate(_TIES, 1)]
MIN_QUANTIZED_SF = 2  # 0.5 * 2^(2 - 127) is fp32's smallest normal number


class Mxfp4(NamedTuple):
    """codes: uint8 [..., N, K / 2], element 2 i of a row in the low nibble of byte i. sf: uint8 [..., N, K / 32]."""

    codes: Tensor
    sf: Tensor


class Fitted(NamedTuple):
    """codes, sf: as Mxfp4, every group within the binades of its rows' base. rerounded: how many groups were not."""

    codes: Tensor
    sf: Tensor
    rerounded: int


def dequantize(codes: Tensor, sf: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> [..., N, K] in ``dtype`` (fp32 or fp64, both exact where `refusal` finds nothing); sf 255 gives NaN."""
    groups = _values(codes, dtype).unflatten(-1, (-1, MXFP4_GROUP))
    return (groups * _powers(sf.device, dtype)[sf.int()][..., None]).flatten(-2)


def quantize(weight: Tensor) -> Mxfp4:
    """Quantize weights: sf from floor(log2(amax)) - 2 of each 32 along K, codes to nearest even, saturating at 6.

    weight: floating [..., N, K], K a multiple of 32. A group with NaN or infinity gets sf 255, which no layer loads. sf
    is at least 2, so that no value leaves fp32's normal range: smaller groups become zero. One matrix at a time, so
    that no fp32 copy of all experts exists.
    Source: OCP MX v1.0, 6.3 (conversion from scalar to MX).
    """
    *lead, n, k = weight.shape
    codes = torch.empty(*lead, n, k // 2, dtype=torch.uint8, device=weight.device)
    sf = torch.empty(*lead, n, k // MXFP4_GROUP, dtype=torch.uint8, device=weight.device)
    matrices = zip(weight.reshape(-1, n, k), codes.view(-1, n, k // 2), sf.view(-1, n, sf.shape[-1]), strict=True)
    for source, codes_out, sf_out in matrices:
        groups = source.float().unflatten(1, (-1, MXFP4_GROUP))
        amax = groups.abs().amax(2)
        exponent = torch.frexp(amax).exponent - 1 - 2  # of 6's binade, so that amax lies in [4, 8)
        group_sf = torch.where(amax > 0, (exponent + 127).clamp(MIN_QUANTIZED_SF, 254), MIN_QUANTIZED_SF)
        inverse = ((254 - group_sf) << 23).view(torch.float32)  # 2^(127 - sf): between 2^-127 and 2^125
        scaled = groups * inverse[..., None]
        sf_out.copy_(torch.where(amax.isfinite(), group_sf, 255))
        codes_out.copy_(_pack(_round(scaled.nan_to_num(0.0)).view(n, k)))
    return Mxfp4(codes, sf)


def refusal(codes: Tensor, sf: Tensor) -> str | None:
    """Why these weights cannot be served, or None: a NaN scale factor, or a value outside fp32's normal range."""
    if bool((sf == 255).any()):
        row, group = (sf == 255).nonzero()[0].tolist()
        return f"scale factor 255 (NaN) at row {row}, group {group}"
    extreme = (sf < MIN_QUANTIZED_SF) | (sf > 252)
    if not bool(extreme.any()):
        return None
    for row, group in extreme.nonzero().tolist():
        half = MXFP4_GROUP // 2
        values = dequantize(codes[row, half * group : half * (group + 1)], sf[row, group : group + 1], torch.float64)
        used = values[values != 0].abs()
        if used.numel() and (float(used.max()) >= 2.0**128 or float(used.min()) < 2.0**-126):
            return (
                f"scale factor {int(sf[row, group])} at row {row}, group {group} puts values at 2^128 and above, or "
                "below 2^-126, outside fp32's normal range"
            )
    return None


def tops(codes: Tensor, sf: Tensor) -> Tensor:
    """Largest sf of a not all-zero group in each 128 rows: int32 [N / 128]; 0 where there is none."""
    used = torch.where(_is_used(codes), sf.int(), 0)
    return used.view(-1, BASE_ROWS * sf.shape[1]).amax(1)


def fit(codes: Tensor, sf: Tensor) -> Fitted:
    """One matrix [N, K] brought within the binades of its rows' bases; the tensors themselves where nothing is to do.

    An all-zero group keeps its sf, whatever that is. Idempotent.
    """
    lowest = (tops(codes, sf) - (BINADES - 1)).repeat_interleave(BASE_ROWS)[:, None]
    outside = (sf.int() < lowest) & _is_used(codes)
    rerounded = int(outside.sum())
    if not rerounded:
        return Fitted(codes, sf, 0)
    row, group = outside.nonzero(as_tuple=True)
    new_sf = lowest.expand_as(sf)[row, group]
    codes, sf = codes.clone(), sf.clone()
    groups = codes.view(*sf.shape, MXFP4_GROUP // 2)
    # The smallest binade's grid is e4m3's there: multiples of 2^-9. Nothing is larger than 6 / 2 in its units
    scaled = _values(groups[row, group], torch.float32) * torch.exp2((sf[row, group].int() - new_sf).float())[:, None]
    groups[row, group] = _pack(_round(scaled))
    sf[row, group] = new_sf.to(torch.uint8)
    return Fitted(codes, sf, rerounded)


def _is_used(codes: Tensor) -> Tensor:
    return (codes.unflatten(-1, (-1, MXFP4_GROUP // 2)) & 0x77).amax(-1) != 0


def _values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.tensor((*CODE_VALUES, *(-v for v in CODE_VALUES)), dtype=dtype, device=codes.device)
    byte = torch.arange(256, device=codes.device)
    return torch.stack((values[byte & 15], values[byte >> 4]), 1)[codes.int()].flatten(-2)


def _powers(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor([*(2.0 ** (i - 127) for i in range(255)), float("nan")], dtype=dtype, device=device)


def _round(values: Tensor) -> Tensor:
    """Codes (uint8) of the nearest e2m1 numbers, ties to the even mantissa; what becomes zero is +0."""
    # One comparison tree instead of a dozen passes: a code is how many of these a magnitude is above
    above = torch.tensor(_BELOW_CODES, device=values.device)
    code = torch.bucketize(values.abs().contiguous(), above, out_int32=True).to(torch.uint8)
    return code | ((values < 0) & (code != 0)).to(torch.uint8) << 3


def _pack(codes: Tensor) -> Tensor:
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4
