"""Router scores to topk_idx and topk_weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from .groups import kept_experts, members_of_groups


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
    num_groups: int = 1,
    topk_groups: int | None = None,
) -> Routed:
    """Pick topk experts per token; ties go to the lower index.

    logits: floating [n, num_experts], computed in fp32.
    score: "softmax" over all experts (Shazeer et al., arXiv 1701.06538; Qwen3-MoE), or "sigmoid" per expert
        (DeepSeek-V3 report, arXiv 2412.19437, eq. 15).
    normalize: divide the picked scores by their sum (DeepSeek-V3 report, eq. 13; `norm_topk_prob` of Qwen3-MoE).
    bias: fp32 [num_experts] or None: added for picking only, the weights keep the unbiased score (DeepSeek-V3 report,
        eq. 16).
    scale: factor on the weights (`routed_scaling_factor` of DeepSeek-V3).
    num_groups, topk_groups: with more than one expert group (equal runs of neighbouring experts), a token picks from
        its topk_groups best groups only; the score of a group is the sum of its two best biased scores, ties go to
        the lower group (DeepSeek-V3, `n_group` and `topk_group` of its configuration; the report's node-limited
        routing, section 2.1.2, with topk / topk_groups = 2 and a node per group). Experts of other groups are out
        even where every biased score of the kept ones is negative.
    A NaN logit affects its own token only. ValueError names a wrong argument.
    """
    scores, picking = expert_scores(logits, topk, score, bias)
    num_experts = logits.shape[1]
    topk_groups = check_groups(num_experts, topk, num_groups, topk_groups)
    kept = None
    if topk_groups < num_groups:
        kept = kept_experts(picking, members_of_groups(num_experts, num_groups, logits.device), topk_groups, num_best=2)
    return pick_experts(scores, picking, kept, topk, normalize, scale)


def check_groups(num_experts: int, topk: int, num_groups: int, topk_groups: int | None) -> int:
    """topk_groups of route, 1 where there is one group; ValueError names a wrong one."""
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {num_experts} experts of logits")
    if topk_groups is None and num_groups == 1:
        topk_groups = 1
    if topk_groups is None or not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups={topk_groups} must be between 1 and num_groups={num_groups}")
    most = topk_groups * (num_experts // num_groups)
    if topk > most:
        raise ValueError(f"topk={topk} is more than the {most} experts of topk_groups={topk_groups}; keep more groups")
    return topk_groups


def expert_scores(logits: Tensor, topk: int, score: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scores that weigh, scores that pick), both fp32 [n, num_experts]; arguments and errors as for route."""
    check_route(logits, topk, score, bias)
    scores = torch.softmax(logits.float(), dim=1) if score == "softmax" else torch.sigmoid(logits.float())
    return scores, scores if bias is None else scores + bias.float()


def check_route(logits: Tensor, topk: int, score: str, bias: Tensor | None) -> None:
    """ValueError names a wrong argument of route."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, dtype {logits.dtype}; pass floating [num_tokens, num_experts]"
        )
    num_experts = logits.shape[1]
    if not 1 <= topk <= num_experts:
        raise ValueError(f"topk={topk} must be between 1 and the {num_experts} experts of logits")
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; pass [num_experts] = [{num_experts}]")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score={score!r} must be 'softmax' or 'sigmoid'")


def pick_experts(
    scores: Tensor, picking: Tensor, kept: Tensor | None, topk: int, normalize: bool, scale: float
) -> Routed:
    """The topk highest of picking among kept (bool [n, num_experts], at least topk per token; None: all)."""
    # A stable sort, because torch.topk leaves the order of ties open
    order = picking.sort(dim=1, descending=True, stable=True).indices
    if kept is not None:
        # Moved behind, not masked with -inf: no bias and no NaN can make an expert that is out look as good as one in
        out = (~kept).gather(1, order).to(torch.uint8)
        order = order.gather(1, out.sort(dim=1, stable=True).indices)
    topk_idx = order[:, :topk]
    weights = scores.gather(1, topk_idx)
    if normalize:
        # 1e-20 only keeps an all-zero sigmoid row from 0 / 0; it is below fp32 resolution of any other sum
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    return Routed(topk_idx.to(torch.int32), weights * scale)
