"""Triton kernels of the unfused baseline: two grouped FP8 matmuls with 128x128-block weight scales, and the row moves
around them.

Rows (token, slot pairs) are sorted by local expert; `offsets` [num_local_experts + 1] says where each expert's rows
begin, and lives on the device, so grids are sized for the worst case and surplus programs leave at once: the whole
layer can be captured in a CUDA graph. Every 128 of K is one tensor-core product, scaled and added in fp32.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128


@triton.jit
def _locate_tile(offsets_ptr, tile, num_experts, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    # tile number -> (expert, its first row in this tile, end of the expert's rows); begin >= end where there is no such
    # tile
    expert_idx = tl.arange(0, EXPERTS)
    real = expert_idx < num_experts
    begin = tl.load(offsets_ptr + expert_idx, mask=real, other=0)
    end = tl.load(offsets_ptr + expert_idx + 1, mask=real, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    tiles_before = tl.sum(tl.where(expert_idx < expert, tiles, 0), 0)
    row_begin = tl.sum(tl.where(expert_idx == expert, begin, 0), 0) + (tile - tiles_before) * BLOCK_M
    row_end = tl.sum(tl.where(expert_idx == expert, end, 0), 0)
    return expert, row_begin, row_end


@triton.jit
def _linear1_swiglu(
    x_ptr,
    x_sf_ptr,
    topk_weights_ptr,
    pair_ptr,
    offsets_ptr,
    w_ptr,
    w_sf_ptr,
    h_ptr,
    h_sf_ptr,
    x_stride,
    x_sf_stride,
    weights_stride,
    num_experts,
    hidden,
    intermediate,
    topk,
    limit,
    HAS_LIMIT: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n_block = tl.program_id(0)
    expert, row_begin, row_end = _locate_tile(offsets_ptr, tl.program_id(1), num_experts, EXPERTS, BLOCK_M)
    if row_begin >= row_end:
        return
    row = row_begin + tl.arange(0, BLOCK_M)
    live = row < row_end
    pair = tl.load(pair_ptr + row, mask=live, other=0).to(tl.int64)
    token = pair // topk
    k = tl.arange(0, 128)
    n = n_block * 128 + tl.arange(0, 128)
    num_k = hidden // 128
    expert = expert.to(tl.int64)
    x_ptrs = x_ptr + token[:, None] * x_stride + k[None, :]
    x_sf_ptrs = x_sf_ptr + token * x_sf_stride
    gate_ptrs = w_ptr + expert * 2 * intermediate * hidden + n[None, :] * hidden + k[:, None]
    up_ptrs = gate_ptrs + intermediate * hidden
    gate_sf_ptr = w_sf_ptr + (expert * 2 * (intermediate // 128) + n_block) * num_k
    up_sf_ptr = gate_sf_ptr + (intermediate // 128) * num_k
    gate = tl.zeros((BLOCK_M, 128), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, 128), dtype=tl.float32)
    for k_block in range(num_k):
        a = tl.load(x_ptrs + k_block * 128, mask=live[:, None], other=0.0)
        a_sf = tl.load(x_sf_ptrs + k_block, mask=live, other=0.0)
        gate += tl.dot(a, tl.load(gate_ptrs + k_block * 128)) * (a_sf * tl.load(gate_sf_ptr + k_block))[:, None]
        up += tl.dot(a, tl.load(up_ptrs + k_block * 128)) * (a_sf * tl.load(up_sf_ptr + k_block))[:, None]
    if HAS_LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    topk_weight = tl.load(topk_weights_ptr + token * weights_stride + pair % topk, mask=live, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up * topk_weight[:, None]
    # these 128 columns are exactly one quantization group of the row
    sf = tl.maximum(tl.max(tl.abs(h), 1), 1e-10) / 448.0
    h = tl.minimum(tl.maximum(h / sf[:, None], -448.0), 448.0)
    row = row.to(tl.int64)
    tl.store(h_ptr + row[:, None] * intermediate + n[None, :], h.to(h_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(h_sf_ptr + row * (intermediate // 128) + n_block, sf, mask=live)


@triton.jit
def _linear2(
    h_ptr,
    h_sf_ptr,
    pair_ptr,
    offsets_ptr,
    w_ptr,
    w_sf_ptr,
    y_ptr,
    num_experts,
    hidden,
    intermediate,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n_block = tl.program_id(0)
    expert, row_begin, row_end = _locate_tile(offsets_ptr, tl.program_id(1), num_experts, EXPERTS, BLOCK_M)
    if row_begin >= row_end:
        return
    row = row_begin + tl.arange(0, BLOCK_M)
    live = row < row_end
    row = row.to(tl.int64)
    k = tl.arange(0, 128)
    n = n_block * 128 + tl.arange(0, 128)
    num_k = intermediate // 128
    expert = expert.to(tl.int64)
    h_ptrs = h_ptr + row[:, None] * intermediate + k[None, :]
    w_ptrs = w_ptr + expert * hidden * intermediate + n[None, :] * intermediate + k[:, None]
    w_sf_ptr += (expert * (hidden // 128) + n_block) * num_k
    acc = tl.zeros((BLOCK_M, 128), dtype=tl.float32)
    for k_block in range(num_k):
        a = tl.load(h_ptrs + k_block * 128, mask=live[:, None], other=0.0)
        a_sf = tl.load(h_sf_ptr + row * num_k + k_block, mask=live, other=0.0)
        acc += tl.dot(a, tl.load(w_ptrs + k_block * 128)) * (a_sf * tl.load(w_sf_ptr + k_block))[:, None]
    # leaves in (token, slot) order, so that combine needs no inverse of the sort
    pair = tl.load(pair_ptr + row, mask=live, other=0).to(tl.int64)
    tl.store(y_ptr + pair[:, None] * hidden + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def _sum_slots(
    y_ptr,
    row_ptr,
    topk_idx_ptr,
    out_ptr,
    idx_stride,
    first_expert,
    num_experts,
    hidden,
    topk,
    HAS_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in range(topk):
        expert = tl.load(topk_idx_ptr + token * idx_stride + slot) - first_expert
        here = (expert >= 0) & (expert < num_experts)
        row = token * topk + slot
        if HAS_ROW:
            row = tl.load(row_ptr + row)
        total += tl.load(y_ptr + row * hidden + column, mask=here & (column < hidden), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def _quantize_rows(x_ptr, q_ptr, sf_ptr, q_stride, sf_stride, hidden):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * 128 + tl.arange(0, 128)
    x = tl.load(x_ptr + row * hidden + column).to(tl.float32)
    sf = tl.math.div_rn(tl.maximum(tl.max(tl.abs(x), 0), 1e-10), 448.0)
    q = tl.minimum(tl.maximum(tl.math.div_rn(x, sf), -448.0), 448.0)
    tl.store(q_ptr + row * q_stride + column, q.to(q_ptr.dtype.element_ty))
    tl.store(sf_ptr + row * sf_stride + block, sf)


@triton.jit
def _gather_rows(x_ptr, pair_ptr, total_ptr, out_ptr, x_stride, hidden, topk, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(total_ptr):
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(pair_ptr + row).to(tl.int64) // topk
    tl.store(
        out_ptr + row * hidden + column,
        tl.load(x_ptr + token * x_stride + column, mask=column < hidden),
        mask=column < hidden,
    )


@triton.jit
def _swiglu_rows(
    acc_ptr,
    pair_ptr,
    topk_weights_ptr,
    total_ptr,
    h_ptr,
    weights_stride,
    intermediate,
    topk,
    limit,
    HAS_LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(total_ptr):
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < intermediate
    gate = tl.load(acc_ptr + row * 2 * intermediate + column, mask=inside).to(tl.float32)
    up = tl.load(acc_ptr + row * 2 * intermediate + intermediate + column, mask=inside).to(tl.float32)
    if HAS_LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    pair = tl.load(pair_ptr + row).to(tl.int64)
    topk_weight = tl.load(topk_weights_ptr + (pair // topk) * weights_stride + pair % topk).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up * topk_weight
    tl.store(h_ptr + row * intermediate + column, h.to(h_ptr.dtype.element_ty), mask=inside)


COLUMNS = 1024


def block_m_for(rows_per_expert: float) -> int:
    """Rows of a tile: the smallest that one expert's expected rows fill. 16 runs on mma.sync, 64 and 128 on wgmma."""
    return 16 if rows_per_expert <= 16 else 64 if rows_per_expert <= 96 else 128


def _tile_grid(num_pairs: int, num_experts: int, block_m: int) -> int:
    # every expert may end in a tile that is not full, and no more experts than rows have one
    return num_pairs // block_m + min(num_experts, num_pairs)


def _launch(block_m: int) -> dict:
    # 64 rows on 4 warps spill in linear1, which holds two accumulators; 16 rows leave room for two CTAs an SM
    return {"num_warps": 4 if block_m == 16 else 8, "num_stages": 4}


def linear1_swiglu(
    x, x_sf, topk_weights, pair, offsets, weight, weight_sf, h, h_sf, *, topk: int, limit: float | None, block_m: int
) -> None:
    """h, h_sf [pairs, intermediate (/ 128)] = quantize(swiglu(x[pair // topk] @ weight^T) * topk_weight), rows in
    sorted order.

    x: e4m3 rows with any row stride, x_sf fp32 likewise; pair: int64 [pairs], sorted (token * topk + slot); weight e4m3
    [E, 2 * inter, hidden].
    """
    num_experts, intermediate, hidden = weight.shape[0], weight.shape[1] // 2, weight.shape[2]
    grid = (intermediate // BLOCK, _tile_grid(pair.numel(), num_experts, block_m))
    _linear1_swiglu[grid](
        x,
        x_sf,
        topk_weights,
        pair,
        offsets,
        weight,
        weight_sf,
        h,
        h_sf,
        x.stride(0),
        x_sf.stride(0),
        topk_weights.stride(0),
        num_experts,
        hidden,
        intermediate,
        topk,
        limit or 0.0,
        HAS_LIMIT=limit is not None,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        **_launch(block_m),
    )


def linear2(h, h_sf, pair, offsets, weight, weight_sf, y, *, block_m: int) -> None:
    """y[pair] = h @ weight^T, bf16 [pairs, hidden] in (token, slot) order; rows of other ranks' experts are left
    unwritten."""
    num_experts, hidden, intermediate = weight.shape
    grid = (hidden // BLOCK, _tile_grid(pair.numel(), num_experts, block_m))
    _linear2[grid](
        h,
        h_sf,
        pair,
        offsets,
        weight,
        weight_sf,
        y,
        num_experts,
        hidden,
        intermediate,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        **_launch(block_m),
    )


def sum_slots(y, topk_idx, out, *, first_expert: int, num_experts: int, row: torch.Tensor | None = None) -> None:
    """out[token] = sum over the token's slots whose expert is local of y[token * topk + slot] (of y[row[..]] if given),
    fp32 inside."""
    tokens, topk = topk_idx.shape
    hidden = y.shape[-1]
    if tokens:
        _sum_slots[(tokens, triton.cdiv(hidden, COLUMNS))](
            y,
            y if row is None else row,
            topk_idx,
            out,
            topk_idx.stride(0),
            first_expert,
            num_experts,
            hidden,
            topk,
            HAS_ROW=row is not None,
            COLUMNS=COLUMNS,
        )


def quantize_rows(x, q, sf) -> None:
    """x bf16 [n, hidden] -> q e4m3, sf fp32 [n, hidden / 128], both with any row stride."""
    if x.shape[0]:
        _quantize_rows[(x.shape[0], x.shape[1] // BLOCK)](x, q, sf, q.stride(0), sf.stride(0), x.shape[1], num_warps=1)


def gather_rows(x, pair, offsets, out, *, topk: int) -> None:
    """out[i] = x[pair[i] // topk] for the rows that some local expert has."""
    grid = (pair.numel(), triton.cdiv(x.shape[1], COLUMNS))
    _gather_rows[grid](x, pair, offsets[-1:], out, x.stride(0), x.shape[1], topk, COLUMNS=COLUMNS)


def swiglu_rows(acc, pair, topk_weights, offsets, h, *, topk: int, limit: float | None) -> None:
    """h = silu(gate) * up * topk_weight for the rows that some local expert has, fp32 inside."""
    grid = (pair.numel(), triton.cdiv(h.shape[1], COLUMNS))
    _swiglu_rows[grid](
        acc,
        pair,
        topk_weights,
        offsets[-1:],
        h,
        topk_weights.stride(0),
        h.shape[1],
        topk,
        limit or 0.0,
        HAS_LIMIT=limit is not None,
        COLUMNS=COLUMNS,
    )
