"""A token's copy as it travels between domains: one row of 32-bit words,

    x | scale factors | topk_idx, over all ranks' experts | topk_weights

x in e4m3 as bytes, once quantized by its own rank (bf16 format: the dtype of the weights, no scale factors); scale
factors and weights fp32, ids int32. A row is written once, whatever number of domains it goes to: the receiver picks
its own experts out of the ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.config import BLOCK, MoEConfig
from megamoe.quant.fp8 import quantize_rows
from megamoe.steps import RankInput

UNUSED = -1


class RowFormat(NamedTuple):
    """Widths in 32-bit words."""

    x_dtype: torch.dtype
    x: int
    sf: int
    topk: int

    @property
    def words(self) -> int:
        return self.x + self.sf + 2 * self.topk


def row_format(config: MoEConfig, x_dtype: torch.dtype = torch.float8_e4m3fn) -> RowFormat:
    sf = config.hidden // BLOCK if config.has_e4m3_activations else 0
    return RowFormat(x_dtype, config.hidden * x_dtype.itemsize // 4, sf, config.topk)


def pack(config: MoEConfig, rank_input: RankInput) -> tuple[Tensor, RowFormat]:
    """All tokens of one rank: int32 [n, words]. A token from num_tokens on has no used slot. Reads nothing back."""
    x, x_sf, topk_idx, topk_weights, num_tokens = rank_input
    if config.has_e4m3_activations and x_sf is None:
        x, x_sf = quantize_rows(x)
    form = row_format(config, x.dtype)
    topk_idx = topk_idx.to(torch.int32)
    if num_tokens is not None:
        beyond = torch.arange(len(x), device=x.device) >= num_tokens.reshape(1)
        topk_idx = topk_idx.masked_fill(beyond[:, None], UNUSED)
    rows = torch.empty(len(x), form.words, dtype=torch.int32, device=x.device)
    parts = rows.split([form.x, form.sf, form.topk, form.topk], dim=1)
    parts[0].copy_(_as_words(x))
    if x_sf is not None:
        parts[1].copy_(_as_words(x_sf))
    parts[2].copy_(topk_idx)
    parts[3].copy_(_as_words(topk_weights.float()))
    return rows, form


def _as_words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def ids_of(rows: Tensor, form: RowFormat) -> Tensor:
    """The ids of packed rows, a view: int32 [..., topk]."""
    begin = form.x + form.sf
    return rows[..., begin : begin + form.topk]


def local_ids(topk_idx: Tensor, num_experts: int, num_domains: int, domain: int) -> Tensor:
    """Ids over a domain's own experts: -1 for what another domain serves. An id that no domain has stays one that the
    domain refuses, so that it is reported and not dropped."""
    here = num_experts // num_domains
    local = topk_idx - domain * here
    elsewhere = (topk_idx >= UNUSED) & (topk_idx < num_experts) & ((local < 0) | (local >= here))
    illegal = (topk_idx < UNUSED) | (topk_idx >= num_experts)
    return local.masked_fill(elsewhere, UNUSED).masked_fill(illegal, here)


def unpack(config: MoEConfig, rows: Tensor, form: RowFormat, num_domains: int, domain: int, take) -> RankInput:
    """Arrivals as further tokens of a rank of `domain`. take(name, shape, dtype) -> a contiguous tensor to fill."""
    x, sf, idx, weights = rows.split([form.x, form.sf, form.topk, form.topk], dim=1)
    x_out = take("x", (len(rows), config.hidden), form.x_dtype)
    x_out.view(torch.int32).copy_(x)
    sf_out = None
    if form.sf:
        sf_out = take("x_sf", (len(rows), form.sf), torch.float32)
        sf_out.view(torch.int32).copy_(sf)
    idx_out = take("topk_idx", (len(rows), form.topk), torch.int32)
    idx_out.copy_(local_ids(idx, config.num_experts, num_domains, domain))
    weights_out = take("topk_weights", (len(rows), form.topk), torch.float32)
    weights_out.view(torch.int32).copy_(weights)
    return RankInput(x_out, sf_out, idx_out, weights_out)
