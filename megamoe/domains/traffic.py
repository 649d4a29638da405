"""How often a token crosses between domains: the count that node-limited routing bounds."""

from collections.abc import Sequence

import torch
from torch import Tensor


def domains_of_tokens(topk_idx: Tensor, num_experts: int, num_domains: int) -> Tensor:
    """Which domains hold an expert of a token: bool [n, num_domains].

    topk_idx: int [n, topk], -1 = unused. Domain d holds the experts from d * num_experts / num_domains on.
    With routing limited to max_nodes nodes, a node a domain (`route.limit_nodes`, or `route` with topk_groups expert
    groups of which none spans two domains), no row has more than max_nodes: at most so many copies of a token exist.
    """
    domain = torch.where(topk_idx >= 0, topk_idx // (num_experts // num_domains), num_domains).long()
    touched = torch.zeros(len(topk_idx), num_domains + 1, dtype=torch.bool, device=topk_idx.device)
    return touched.scatter_(1, domain, True)[:, :num_domains]


def copies_between(topk_idx: Sequence[Tensor], num_experts: int, ranks_per_domain: int) -> float:
    """Mean copies of a token that leave its own domain. topk_idx: one int [n, topk] a rank, in rank order."""
    num_domains = len(topk_idx) // ranks_per_domain
    crossing = tokens = 0
    for rank, idx in enumerate(topk_idx):
        touched = domains_of_tokens(idx, num_experts, num_domains)
        touched[:, rank // ranks_per_domain] = False
        crossing, tokens = crossing + int(touched.sum()), tokens + len(idx)
    return crossing / tokens if tokens else 0.0


def row_bytes(hidden: int, topk: int, sf_block: int = 128) -> int:
    """Bytes of a token's copy between domains: e4m3 row, fp32 scale factors, int32 ids, fp32 weights."""
    return hidden + 4 * (hidden // sf_block) + 8 * topk


def bytes_per_token(copies: float, hidden: int, topk: int) -> float:
    """Bytes that leave and come back for a token with that many copies in other domains: each copy, and its bf16
    partial sum."""
    return copies * (row_bytes(hidden, topk) + 2 * hidden)
