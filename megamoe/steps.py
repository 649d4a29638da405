"""The specification: what one expert-parallel MoE layer computes, one plain torch function a step.

    route -> dispatch -> linear1 -> swiglu -> linear2 -> combine

It is the oracle of every test, for any number of ranks in one process, and it is the layer itself on CPU ranks. It
also runs on CUDA tensors. Speed is no aim; every number is defined here.

Conventions. n = num_tokens of a rank, E = num_local_experts. Expert e lives on rank e // E. A *row* is one used slot
of one token. Rows of one rank are sorted by (local_expert, src_rank, token, slot), and this order is part of the
specification. Shared experts are local experts of every rank, after the E, and slots of its tokens, after the topk.
A NaN or infinity in one token reaches no other token: no step mixes rows before combine, and combine mixes only a
token's own.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.config import MoEConfig
from megamoe.quant import mxfp4
from megamoe.quant.fp8 import Quantized, dequantize_blocks, dequantize_rows, quantize_rows
from megamoe.route.router import route

OAI_ALPHA = 1.702
"""Slope of the sigmoid in "swiglu_oai", as gpt-oss's reference code has it."""

__all__ = [
    "Dispatched",
    "ExpertWeights",
    "RankInput",
    "add_domains",
    "combine",
    "dispatch",
    "linear1",
    "linear2",
    "moe_layer",
    "route",
    "slot_experts",
    "swiglu",
]

class ExpertWeights(NamedTuple):
    """The experts of one rank: E of them, of which the last MoEConfig.num_shared_experts are the shared ones.

    linear1: e4m3 [E, 2 * intermediate, hidden], first `intermediate` rows gate, then up. bf16 format: bf16 or fp32.
    linear1_sf: fp32 [E, 2 * intermediate / 128, hidden / 128]; None in bf16 format.
    linear2: e4m3 [E, hidden, intermediate]. bf16 format: as linear1.
    linear2_sf: fp32 [E, hidden / 128, intermediate / 128]; None in bf16 format.
    linear1_bias: fp32 [E, 2 * intermediate], in the order of linear1's rows; None without MoEConfig.bias.
    linear2_bias: fp32 [E, hidden]; None without MoEConfig.bias.
    mxfp4 format: linear1 uint8 [E, 2 * intermediate, hidden / 2], linear1_sf uint8 [E, 2 * intermediate, hidden / 32];
        linear2 uint8 [E, hidden, intermediate / 2], linear2_sf uint8 [E, hidden, intermediate / 32]: quant/mxfp4.py.
    """

    linear1: Tensor
    linear1_sf: Tensor | None
    linear2: Tensor
    linear2_sf: Tensor | None
    linear1_bias: Tensor | None = None
    linear2_bias: Tensor | None = None


class RankInput(NamedTuple):
    """One rank's tokens.

    x: bf16 [n, hidden], or e4m3 [n, hidden] with x_sf. bf16 format: the dtype of the weights.
    x_sf: fp32 [n, hidden / 128], or None when x is to be quantized by dispatch.
    topk_idx: int32 or int64 [n, topk], expert ids over all ranks, -1 = unused slot. An expert named twice counts twice.
    topk_weights: fp32 or bf16 [n, topk].
    num_tokens: None, or int32 with one element: rows from it on are ignored and their output is zero.
    """

    x: Tensor
    x_sf: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor
    num_tokens: Tensor | None = None


class Dispatched(NamedTuple):
    """The rows a rank's experts work on, R of them, sorted by (local_expert, src_rank, token, slot).

    x [R, hidden], x_sf [R, hidden / 128] or None, topk_weight fp32 [R]; src_rank, token, slot, local_expert int64 [R];
    num_rows: list of E ints, rows of each local expert.
    """

    x: Tensor
    x_sf: Tensor | None
    topk_weight: Tensor
    src_rank: Tensor
    token: Tensor
    slot: Tensor
    local_expert: Tensor
    num_rows: list[int]


def dispatch(config: MoEConfig, exchange, inputs: list[RankInput]) -> list[Dispatched]:
    """Quantize each token once on its own rank, then send one row per used slot to the rank of its expert; a shared
    expert's slot is used by every token, with weight 1, and stays on its rank.

    inputs: one per rank held here (exchange.ranks) -> rows, one Dispatched per rank held here.
    Quantization comes before the exchange (DeepSeek-V3 report, 3.3.3): the wire carries e4m3 and scale factors.
    """
    num_local_experts = config.num_local_experts(exchange.ep_size) + config.num_shared_experts
    sends = []
    for ep_rank, rank_input in zip(exchange.ranks, inputs, strict=True):
        n = _num_tokens(rank_input)
        x, x_sf = rank_input.x[:n], rank_input.x_sf
        if config.has_e4m3_activations:
            x, x_sf = quantize_rows(x) if x_sf is None else Quantized(x, x_sf[:n])
        idx = slot_experts(config, exchange.ep_size, ep_rank, rank_input.topk_idx[:n])
        token, slot = (idx >= 0).nonzero(as_tuple=True)  # row-major: by token, then slot
        expert = idx[token, slot]
        topk_weights = rank_input.topk_weights[:n].float()
        topk_weight = torch.nn.functional.pad(topk_weights, (0, config.num_shared_experts), value=1.0)[token, slot]
        dst_rank = expert // num_local_experts
        to_ranks = []
        for dst in range(exchange.ep_size):
            picked = (dst_rank == dst).nonzero(as_tuple=True)[0]
            where = torch.stack([token[picked], slot[picked], expert[picked] % num_local_experts], 1)
            bundle = [_take(x, token[picked]), topk_weight[picked], where]
            to_ranks.append((*bundle, x_sf[token[picked]]) if x_sf is not None else tuple(bundle))
        sends.append(to_ranks)
    return [_sort_rows(received, num_local_experts) for received in exchange.all_to_all(sends, "dispatch")]


def slot_experts(config: MoEConfig, ep_size: int, ep_rank: int, topk_idx: Tensor) -> Tensor:
    """The expert of each slot of a rank's tokens, -1 = unused: int64 [n, topk + num_shared_experts].

    Experts are counted over all ranks, each rank's shared ones behind its own; without shared experts, topk_idx.
    """
    shared, own = config.num_shared_experts, config.num_local_experts(ep_size)
    idx = topk_idx.long()
    idx = torch.where(idx >= 0, idx + idx // own * shared, -1)
    last = torch.arange(shared, device=idx.device) + ep_rank * (own + shared) + own
    return torch.cat([idx, last.expand(len(idx), shared)], 1)


def linear1(
    config: MoEConfig, weights: ExpertWeights, rows: Dispatched, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gate and up projections of one rank: row @ linear1[expert]^T, + linear1_bias[expert] with MoEConfig.bias.

    -> [R, 2 * intermediate] in ``dtype``: first gate, then up.
    With e4m3 operands each 128 of K contributes sf_x * sf_w * sum(q_x * q_w), added up in fp32 (DeepSeek-V3 report,
    3.3.2, "Increasing Accumulation Precision"). Written here as the product of the dequantized operands: the same sum.
    dtype=float64 gives the error-free value of the same operands. mxfp4 format: the same sum with the decoded weights.
    """
    acc = _grouped_matmul(rows.x, rows.x_sf, weights.linear1, weights.linear1_sf, rows.num_rows, dtype)
    return acc if weights.linear1_bias is None else acc + weights.linear1_bias[rows.local_expert].to(dtype)


def swiglu(config: MoEConfig, acc: Tensor, topk_weight: Tensor, out_dtype: torch.dtype = torch.float32):
    """h = silu(gate) * up * topk_weight, then quantized per row and 128 for linear2.

    acc: [R, 2 * intermediate], topk_weight: fp32 [R]
    -> (h e4m3 [R, intermediate], h_sf fp32 [R, intermediate / 128]); bf16 format: (h in ``out_dtype``, None).
    silu(z) = z / (1 + exp(-z)): FFN_SwiGLU of Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), eq. 6.
    config.swiglu_limit clamps first: gate <= limit, |up| <= limit.
    config.activation "swiglu_oai": h = gate * sigmoid(1.702 * gate) * (up + 1) * topk_weight, gpt-oss's gating (its
    model card, arXiv 2508.10925, section 2.2: clamping and a residual connection); sigmoid(z) = 1 / (1 + exp(-z)).
    A gate of 0 gives h = 0 in both, so that columns padded with zeros stay zero.
    The router's weight is folded in here, where the row is still in fp32: linear2 is linear, so that the sum over slots
    stays the same and combine becomes a plain sum.
    """
    gate, up = acc.chunk(2, dim=1)
    if config.swiglu_limit is not None:
        gate = gate.clamp(max=config.swiglu_limit)
        up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
    if config.activation == "swiglu_oai":
        h = gate / (1 + torch.exp(-OAI_ALPHA * gate)) * (up + 1) * topk_weight[:, None].to(acc.dtype)
    else:
        h = gate / (1 + torch.exp(-gate)) * up * topk_weight[:, None].to(acc.dtype)
    return quantize_rows(h) if config.has_e4m3_activations else Quantized(h.to(out_dtype), None)


def linear2(
    config: MoEConfig, weights: ExpertWeights, h: Quantized, num_rows: list[int], *,
    topk_weight: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Down projection of one rank: h @ linear2[expert]^T, each row rounded once to what travels back.

    With MoEConfig.bias, + topk_weight * linear2_bias[expert] before that rounding: h holds the weight already (swiglu),
    the bias does not.
    h: (h, h_sf) as swiglu returns them; num_rows, topk_weight: of Dispatched, the latter for the bias only
    -> [R, hidden] in bf16 (bf16 format: the dtype of h). Accumulation as in linear1.
    """
    values, sf = h
    row_dtype = torch.bfloat16 if config.has_e4m3_activations else values.dtype
    y = _grouped_matmul(values, sf, weights.linear2, weights.linear2_sf, num_rows, dtype)
    if weights.linear2_bias is not None:
        local_expert = torch.arange(len(num_rows)).repeat_interleave(torch.tensor(num_rows)).to(y.device)
        y += topk_weight[:, None].to(dtype) * weights.linear2_bias[local_expert].to(dtype)
    return y.to(row_dtype)


def combine(
    config: MoEConfig, exchange, rows: list[Dispatched], y: list[Tensor], inputs: list[RankInput], num_domains: int = 1
) -> list[Tensor]:
    """Send each row back to its token's rank and add a token's rows in fp32, in slot order 0, 1, ..., then round once.

    num_domains: with several, domain d has an equal part of the ranks with their experts; slots of one domain are added
    in slot order and rounded to the dtype of y, as that partial sum travels, then add_domains adds the domains.

    rows, y: one per rank held here, as dispatch and linear2 returned them.
    -> [n, hidden] in the dtype of y, one per rank held here.
    A token without a used slot, or beyond num_tokens, gives exact zeros. The shared experts' rows come last.
    Source: the sum over selected experts of Shazeer et al., "Outrageously Large Neural Networks" (arXiv 1701.06538),
    eq. 1, with the weights already inside the rows. The fixed order makes it reproducible bit for bit.
    """
    sends = []
    for rank_rows, rank_y in zip(rows, y, strict=True):
        where = torch.stack([rank_rows.token, rank_rows.slot], 1)
        back = [(rank_rows.src_rank == src).nonzero(as_tuple=True)[0] for src in range(exchange.ep_size)]
        sends.append([(rank_y[picked], where[picked]) for picked in back])
    outputs, ep_size = [], exchange.ep_size
    experts_a_domain = (config.num_local_experts(ep_size) + config.num_shared_experts) * ep_size // num_domains
    received_y = exchange.all_to_all(sends, "combine")
    for ep_rank, rank_input, rank_y, received in zip(exchange.ranks, inputs, y, received_y, strict=True):
        shape = num_domains, rank_input.x.shape[0], config.hidden
        total = torch.zeros(shape, dtype=torch.float32, device=rank_y.device)
        row_y = torch.cat([bundle[0] for bundle in received])
        token, slot = torch.cat([bundle[1] for bundle in received]).unbind(1)
        idx = slot_experts(config, ep_size, ep_rank, rank_input.topk_idx)
        for k in range(config.token_slots):
            picked = slot == k  # at most one row per token, so that the indexed add has no order of its own
            domain = idx[token[picked], k] // experts_a_domain
            total[domain, token[picked]] += row_y[picked].float()
        outputs.append(add_domains(total.to(rank_y.dtype)))
    return outputs


def add_domains(partial: Tensor) -> Tensor:
    """A token's partial sums of all domains, added in fp32 in the order of domains 0, 1, ..., then rounded once.

    partial: [num_domains, n, hidden] in the dtype of the result, zero where a domain has none of a token's experts
    -> [n, hidden]. With one domain, partial[0] itself. Against the sum over slots alone this rounds once more a domain.
    """
    if len(partial) == 1:
        return partial[0]
    total = torch.zeros(partial.shape[1:], dtype=torch.float32, device=partial.device)
    for one in partial:
        total += one.float()
    return total.to(partial.dtype)


def moe_layer(
    config: MoEConfig,
    exchange,
    weights: list[ExpertWeights],
    inputs: list[RankInput],
    *,
    dtype: torch.dtype = torch.float32,
    trace: dict | None = None,
    num_domains: int = 1,
) -> list[Tensor]:
    """The whole layer on the ranks held here (exchange.ranks): one entry of weights and inputs each.

    -> per rank [n, hidden] in bf16 (bf16 format: the dtype of x).
    dtype: of the matrix products and swiglu; float64 for an oracle without rounding between the quantizers.
    trace: None, or a dict that gets trace[ep_rank] = {"rows", "linear1", "h", "h_sf", "linear2"}: what each step
        returned, "rows" a Dispatched, the others tensors (h_sf None in bf16 format).
    num_domains: the order of combine's sum; see there.
    """
    rows = dispatch(config, exchange, inputs)
    y = []
    for ep_rank, rank_weights, rank_rows in zip(exchange.ranks, weights, rows, strict=True):
        acc = linear1(config, rank_weights, rank_rows, dtype=dtype)
        h = swiglu(config, acc, rank_rows.topk_weight, rank_rows.x.dtype)
        y.append(linear2(config, rank_weights, h, rank_rows.num_rows, topk_weight=rank_rows.topk_weight, dtype=dtype))
        if trace is not None:
            trace[ep_rank] = {"rows": rank_rows, "linear1": acc, "h": h.values, "h_sf": h.sf, "linear2": y[-1]}
    return combine(config, exchange, rows, y, inputs, num_domains)


def _num_tokens(rank_input: RankInput) -> int:
    return rank_input.x.shape[0] if rank_input.num_tokens is None else int(rank_input.num_tokens)


# e4m3 tensors are moved as bytes: not every device copies, gathers or joins them as what they are
def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.view(torch.uint8)[rows].view(x.dtype) if x.element_size() == 1 else x[rows]


def _cat(tensors: tuple[Tensor, ...]) -> Tensor:
    dtype = tensors[0].dtype
    return torch.cat([t.view(torch.uint8) for t in tensors]).view(dtype) if dtype.itemsize == 1 else torch.cat(tensors)


def _sort_rows(received: list[tuple[Tensor, ...]], num_local_experts: int) -> Dispatched:
    # Arrives by (src_rank, token, slot); a stable sort by expert keeps that order inside each expert
    x, topk_weight, where, *x_sf = [_cat(column) for column in zip(*received, strict=True)]
    src_rank = torch.cat([torch.full_like(bundle[1], src, dtype=torch.int64) for src, bundle in enumerate(received)])
    order = where[:, 2].argsort(stable=True)
    token, slot, local_expert = where[order].unbind(1)
    num_rows = torch.bincount(local_expert, minlength=num_local_experts).tolist()
    sf = x_sf[0][order] if x_sf else None
    return Dispatched(_take(x, order), sf, topk_weight[order], src_rank[order], token, slot, local_expert, num_rows)


def _grouped_matmul(
    x: Tensor, x_sf: Tensor | None, weight: Tensor, weight_sf: Tensor | None, num_rows: list[int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[1], dtype=dtype, device=x.device)
    begin = 0
    with _full_precision_matmul():
        for expert, count in enumerate(num_rows):
            end = begin + count
            if count:
                a = x[begin:end].to(dtype) if x_sf is None else dequantize_rows(x[begin:end], x_sf[begin:end], dtype)
                sf = None if weight_sf is None else weight_sf[expert]
                out[begin:end] = _matmul(a, _dequantize_weight(weight[expert], sf, dtype).t())
            begin = end
    return out


# On a CPU the order in which a product sums K depends on the number of rows. In blocks of equal size a row's bits do
# not depend on the company it keeps, nor on which copy of an expert serves it.
MATMUL_ROWS = 16


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type != "cpu":
        return a @ b
    blocks = torch.nn.functional.pad(a, (0, 0, 0, -len(a) % MATMUL_ROWS)).split(MATMUL_ROWS)
    return torch.cat([block @ b for block in blocks])[: len(a)]


def _dequantize_weight(weight: Tensor, sf: Tensor | None, dtype: torch.dtype) -> Tensor:
    if sf is None:
        return weight.to(dtype)
    return (mxfp4.dequantize if weight.dtype == torch.uint8 else dequantize_blocks)(weight, sf, dtype)


@contextmanager
def _full_precision_matmul():
    # TF32 and bf16 passes would make the oracle less exact than the kernel it judges
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
