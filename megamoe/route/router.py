"""Router scores to topk_idx and topk_weights."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """topk_idx int32 [n, topk], distinct per token, best first; topk_weights fp32 [n, topk]."""

    topk_idx: Tensor
    topk_weights: Tensor


def route(
    logits: Tensor,
    topk: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Routed:
    """Pick topk experts per token; ties go to the lower index.

    logits: floating [n, num_experts], computed in fp32.
    score: "softmax" over all experts (Shazeer et al., arXiv 1701.06538; Qwen3-MoE), or "sigmoid" per expert
        (DeepSeek-V3 report, arXiv 2412.19437, eq. 15).
    normalize: divide the picked scores by their sum (DeepSeek-V3 report, eq. 13; `norm_topk_prob` of Qwen3-MoE).
    bias: fp32 [num_experts] or None: added for picking only, the weights keep the unbiased score (DeepSeek-V3 report,
        eq. 16).
    scale: factor on the weights (`routed_scaling_factor` of DeepSeek-V3).
    A NaN logit affects its own token only. ValueError names a wrong argument.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, dtype {logits.dtype}; pass floating [num_tokens, num_experts]"
        )
    num_experts = logits.shape[1]
    if not 1 <= topk <= num_experts:
        raise ValueError(f"topk={topk} must be between 1 and the {num_experts} experts of logits")
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; pass [num_experts] = [{num_experts}]")
    if score == "softmax":
        scores = torch.softmax(logits.float(), dim=1)
    elif score == "sigmoid":
        scores = torch.sigmoid(logits.float())
    else:
        raise ValueError(f"score={score!r} must be 'softmax' or 'sigmoid'")
    picking = scores if bias is None else scores + bias.float()
    # A stable sort, because torch.topk leaves the order of ties open
    topk_idx = picking.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    weights = scores.gather(1, topk_idx)
    if normalize:
        # 1e-20 only keeps an all-zero sigmoid row from 0 / 0; it is below fp32 resolution of any other sum
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return Routed(topk_idx.to(torch.int32), weights * scale)
