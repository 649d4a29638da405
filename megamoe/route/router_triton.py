"""The router as one Triton kernel: logits to topk_idx and topk_weights, a token a program, everything in fp32.

The same arguments and results as `router.route`, whose docstring names the sources. Ids are those of route unless two
biased scores lie within a few ulp (exp and its sum are rounded otherwise here), weights within 1e-6 of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.route.router import Routed, check_groups, check_route


@triton.jit
def _order_key(value):
    """int32 that sorts as fp32 does: -inf below every number, -0 as 0, NaN above everything, as torch.sort has it."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(value != value, 0x7FFFFFFF, key)


@triton.jit
def _best(key, index, out, num: tl.constexpr):
    """Index of the largest key that is not out, the lowest of equals; num if all are out. All 1-D, out int32."""
    wide = tl.where(out != 0, -(1 << 40), key.to(tl.int64))
    top = tl.max(wide, 0)
    return tl.min(tl.where((wide == top) & (out == 0), index, num), 0)


@triton.jit
def _route_kernel(logits, bias, topk_idx, topk_weights, stride, scale,
                  E: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr,
                  KEPT: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
                  BIASED: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    inside = index < E
    x = tl.load(logits + token * stride + index, mask=inside, other=-float("inf")).to(tl.float32)
    if SOFTMAX:
        top = tl.max(tl.where(x == x, x, -float("inf")), 0)
        e = tl.where(inside, tl.exp(x - top), 0.0)
        score = e / tl.sum(e, 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-x))
    picking = score
    if BIASED:
        picking = score + tl.load(bias + index, mask=inside, other=0.0)
    key = _order_key(picking)
    out = (index >= E).to(tl.int32)
    if KEPT < GROUPS:
        SIZE: tl.constexpr = E // GROUPS
        # Two best of each group, one group after the other: the sums must be added as route adds them, best first
        group = tl.arange(0, BLOCK)
        group_score = tl.full([BLOCK], -float("inf"), tl.float32)
        for g in range(GROUPS):
            member = (index // SIZE == g) & inside
            first = _best(key, index, (member == 0).to(tl.int32), E)
            total = tl.sum(tl.where(index == first, picking, 0.0), 0)
            if SIZE > 1:
                rest = ((member == 0) | (index == first)).to(tl.int32)
                second = _best(key, index, rest, E)
                total += tl.sum(tl.where(index == second, picking, 0.0), 0)
            group_score = tl.where(group == g, total, group_score)
        group_key = _order_key(group_score)
        group_out = (group >= GROUPS).to(tl.int32)
        dropped = tl.full([BLOCK], 1, tl.int32)
        for _ in range(KEPT):
            kept = _best(group_key, group, group_out, GROUPS)
            group_out = tl.where(group == kept, 1, group_out)
            dropped = tl.where(index // SIZE == kept, 0, dropped)
        out = tl.where(inside, dropped, 1)
    slot = tl.arange(0, SLOTS)
    ids = tl.zeros([SLOTS], tl.int32)
    weights = tl.zeros([SLOTS], tl.float32)
    for k in range(TOPK):
        chosen = _best(key, index, out, E)
        ids = tl.where(slot == k, chosen, ids)
        weights = tl.where(slot == k, tl.sum(tl.where(index == chosen, score, 0.0), 0), weights)
        out = tl.where(index == chosen, 1, out)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(topk_idx + token * TOPK + slot, ids, mask=slot < TOPK)
    tl.store(topk_weights + token * TOPK + slot, weights * scale, mask=slot < TOPK)


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
    """As router.route, in one launch on the current stream. logits: rows may be strided, columns contiguous.

    ValueError as there; in addition for logits whose columns are not contiguous.
    """
    check_route(logits, topk, score, bias)
    num_tokens, num_experts = logits.shape
    topk_groups = check_groups(num_experts, topk, num_groups, topk_groups)
    if num_experts > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits has strides {logits.stride()}; pass contiguous columns")
    topk_idx = torch.empty(num_tokens, topk, dtype=torch.int32, device=logits.device)
    topk_weights = torch.empty(num_tokens, topk, dtype=torch.float32, device=logits.device)
    if num_tokens:
        block = triton.next_power_of_2(num_experts)
        _route_kernel[(num_tokens,)](
            logits, logits if bias is None else bias.float().contiguous(), topk_idx, topk_weights, logits.stride(0),
            float(scale), E=num_experts, BLOCK=block, TOPK=topk, SLOTS=triton.next_power_of_2(topk), GROUPS=num_groups,
            KEPT=topk_groups, SOFTMAX=score == "softmax", NORMALIZE=normalize, BIASED=bias is not None,
            num_warps=1 if block <= 256 else 4,
        )  # fmt: skip
    return Routed(topk_idx, topk_weights)
