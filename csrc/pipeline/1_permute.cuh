// dispatch, last part, for pairs of CTAs: once the plan is known, every received row is copied to its places in expert
// order, in the form of the stage images that linear1 loads (swizzled e4m3 rows, then scale factors). A row is read
// intermediate / 128 times from there, by whole-image bulk copies: gathered each time by 16-byte copies, it held
// linear1 back by 15 % (benchmarks/notes/0002). Partners: push_rows (x_ready), wait_rows in gemm/load_images.cuh
// (x_image_ready).
#pragma once
#include "config.cuh"
#include "gemm/decode_ahead.cuh"
#include "pipeline/1_dispatch.cuh"
#include "sched/order.cuh"
#include "sync/wait.cuh"

namespace moe {

// Place in x_image, counted in rows, of row `index` of the list.
template <class C>
MOE_DEVICE u32 place_in_images(const SharedStorage<C>& s, u32 index) {
    const u32 expert = find_expert(s.row_offset, kMaxLocalExperts, index);
    return s.block_offset[expert] * C::kBlockTokens + index - s.row_offset[expert];
}

MOE_DEVICE void publish_row(const Launch& l, u32 place, u32 lane) {
    __syncwarp();
    if (lane != 0) return;
    ptx::fence_acq_rel_gpu();  // cumulative over the warp's stores, ordered before it by the warp barrier
    ptx::st_relaxed_gpu(l.x_image_ready(place), l.epoch);
}

// A row on its way: six loads of 16 bytes a lane, 3072 columns.
struct RowPiece {
    static constexpr i32 kLoads = 6, kColumns = kLoads * 512;
    uint4 v[kLoads];

    // left: columns from the lane's first on.
    MOE_DEVICE void load(const u8* from, i32 left) {
#pragma unroll
        for (i32 i = 0; i < kLoads; ++i)
            if (i * 512 < left) v[i] = ptx::ld_cg_v4(from + i * 512);
    }
    // to: the lane's place in the first image; a 512-column step is four k blocks on.
    template <class C>
    MOE_DEVICE void store(u8* to, i32 left) const {
#pragma unroll
        for (i32 i = 0; i < kLoads; ++i)
            if (i * 512 < left) ptx::st_v4(to + i * i32(512 / kKBlock * C::kHImageBytes), v[i]);
    }
};

// One row, and then the flag of the row before it: the wait for that one's stores hides behind these loads.
template <class C>
MOE_DEVICE void copy_row(const Launch& l, u32 name, u32 place, u32 place_before, u32 lane) {
    const u8* from = l.recv_x(l.me.ep_rank, row_src_rank(name), row_token(name)) + lane * 16;
    // Not the accessor of the lane's own image: with hidden < 512 some lanes have none, and debug builds would say so.
    u8* to = l.x_image(place / C::kBlockTokens, 0, C::kHImageBytes) +
             (lane / 8 * C::kHImageBytes + swizzle_128b(place % C::kBlockTokens, lane % 8 * 16));
#pragma unroll 1
    for (i32 left = l.p.hidden; left > 0; left -= RowPiece::kColumns) {
        RowPiece piece;
        piece.load(from, left - i32(lane * 16));
        if (place_before != ~0u) publish_row(l, place_before, lane);
        place_before = ~0u;
        piece.store<C>(to, left - i32(lane * 16));
        from += RowPiece::kColumns, to += RowPiece::kColumns / kKBlock * C::kHImageBytes;
    }
    const f32* sf = l.recv_x_sf(l.me.ep_rank, row_src_rank(name), row_token(name));
    u8* to_sf = l.x_image(place / C::kBlockTokens, 0, C::kHImageBytes) + C::kTokensBytes + place % C::kBlockTokens * 4;
#pragma unroll 1
    for (u32 k = lane; k < l.p.hidden / kKBlock; k += 32)
        *reinterpret_cast<f32*>(to_sf + k * C::kHImageBytes) = ptx::ld_cg(sf + k);
}

// One warp, every lane for itself. False: lost.
MOE_DEVICE bool wait_row(const Launch& l, u32 name) {
    const u32* flag = l.x_ready(l.me.ep_rank, row_src_rank(name), row_token(name));
    const bool here =
        wait_acquire_sys(l, flag, l.p.step_deadline_ns, {kRole_exchange, kStep_dispatch, row_src_rank(name)});
    return __all_sync(~0u, here);
}

// Of the lanes' rows, those that are here.
MOE_DEVICE u32 rows_here(const Launch& l, u32 name, bool valid) {
    const u32* flag = l.x_ready(l.me.ep_rank, row_src_rank(name), row_token(name));
    const u32 here = __ballot_sync(~0u, valid && ptx::ld_acquire_sys(flag) == l.epoch);
    __syncwarp();  // the lanes' acquires, before the warp reads what they announced
    return here;
}

// This warp's rows of the list in [begin, end), in the list's order, which is the order of the tiles. 32 are looked up
// at once, a lane each. begin: the first of them. False: lost.
template <class C>
MOE_DEVICE bool copy_rows(const Launch& l, const SharedStorage<C>& s, u32 begin, u32 end) {
    const u32 lane = lane_id();
    u32 place_before = ~0u;
#pragma unroll 1
    for (u32 first = begin; first < end; first += 32 * item_stride(l)) {
        const u32 mine = first + lane * item_stride(l);
        const u32 names = mine < end ? ptx::ld_cg(l.row_list() + mine) : 0, places = place_in_images(s, mine);
        u32 here = rows_here(l, names, mine < end);
#pragma unroll 1
        for (u32 i = 0; i < 32 && first + i * item_stride(l) < end; ++i) {
            const u32 name = __shfl_sync(~0u, names, i), place = __shfl_sync(~0u, places, i);
            if (!(here >> i & 1)) {
                if (!wait_row(l, name)) return false;
                here = rows_here(l, names, first + lane_id() * item_stride(l) < end);
            }
            copy_row<C>(l, name, place, place_before, lane);
            place_before = place;
        }
    }
    if (place_before != ~0u) publish_row(l, place_before, lane);
    return true;
}

// The exchange warps. Where weights are decoded ahead they take an image and some rows in turn: both lie in the order
// of the tiles. Until the plan is known there are only images.
template <class C>
MOE_DEVICE void permute_rows(const Launch& l, SharedStorage<C>& s) {
    if constexpr (C::kDecodesAhead) {
        const DecodeAhead<C> decode{l, s};
        decode.start();
#pragma unroll 1
        for (bool planned = false;;) {
            decode.step(planned);
            if (decode.is_done()) decode.publish();  // not after the last rows, which may be late
            planned = __all_sync(~0u, ptx::ld_acquire_cta_shared(&s.plan_done));  // set however the plan ends
            if (!planned) continue;
            if (!__shfl_sync(~0u, s.healthy, 0)) return;  // lost; combine ends by itself
            const u32 begin = decode.turn().next_row, end = decode.rows_due(s.row_offset[kMaxLocalExperts]);
            if (begin < end) {
                if (!copy_rows(l, s, begin, end)) return;
                decode.advance_rows(ceil_div(end - begin, item_stride(l)));
            }
            if (decode.is_done()) break;
        }
    } else {
        while (!ptx::ld_acquire_cta_shared(&s.plan_done)) {  // set however the plan ends
        }
        if (!__shfl_sync(~0u, s.healthy, 0)) return;  // lost; combine ends by itself
        copy_rows(l, s, first_item(l), s.row_offset[kMaxLocalExperts]);
    }
}

}  // namespace moe
