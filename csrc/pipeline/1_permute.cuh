// dispatch, last part, with tokens on M: once the plan is known, every received row is copied to its places in expert
// order, in the form of the stage images that linear1 loads (swizzled e4m3 rows, then scale factors). A row is read
// intermediate / 128 times from there, by whole-image bulk copies: gathered each time by 16-byte copies, it held
// linear1 back by 15 % (benchmarks/notes/0002). Partners: push_rows (x_ready), wait_rows in gemm/load_images.cuh
// (x_image_ready).
#pragma once
#include "config.cuh"
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
    static constexpr u32 kLoads = 6, kColumns = kLoads * 512;
    uint4 v[kLoads];

    MOE_DEVICE void load(const u8* row, u32 column, u32 hidden) {
#pragma unroll
        for (u32 i = 0; i < kLoads; ++i)
            if (column + i * 512 < hidden) v[i] = ptx::ld_cg_v4(row + column + i * 512);
    }
    // image: of the row's block; a 512-column step is four k blocks on.
    template <class C>
    MOE_DEVICE void store(u8* image, u32 r, u32 column, u32 hidden) const {
        u8* to = image + column / kKBlock * C::kHImageBytes + swizzle_128b(r, column % kKBlock);
#pragma unroll
        for (u32 i = 0; i < kLoads; ++i)
            if (column + i * 512 < hidden) ptx::st_v4(to + i * (512 / kKBlock) * C::kHImageBytes, v[i]);
    }
};

// One row, and then the flag of the row before it: the wait for that one's stores hides behind these loads.
template <class C>
MOE_DEVICE void copy_row(const Launch& l, u32 name, u32 place, u32 place_before, u32 lane) {
    const u32 hidden = l.p.hidden, me = l.me.ep_rank, r = place % C::kBlockTokens;
    const u8* row = l.recv_x(me, row_src_rank(name), row_token(name));
    u8* image = l.x_image(place / C::kBlockTokens, 0, C::kHImageBytes);
#pragma unroll 1
    for (u32 base = 0; base < hidden; base += RowPiece::kColumns) {
        RowPiece piece;
        piece.load(row, base + lane * 16, hidden);
        if (base == 0 && place_before != ~0u) publish_row(l, place_before, lane);
        piece.store<C>(image, r, base + lane * 16, hidden);
    }
    const f32* sf = l.recv_x_sf(me, row_src_rank(name), row_token(name));
#pragma unroll 1
    for (u32 k = lane; k < hidden / kKBlock; k += 32)
        reinterpret_cast<f32*>(image + k * C::kHImageBytes + C::kTokensBytes)[r] = ptx::ld_cg(sf + k);
}

// One warp, every lane for itself. False: lost.
MOE_DEVICE bool wait_row(const Launch& l, u32 name) {
    const u32* flag = l.x_ready(l.me.ep_rank, row_src_rank(name), row_token(name));
    const bool here =
        wait_acquire_sys(l, flag, l.p.step_deadline_ns, {kRole_exchange, kStep_dispatch, row_src_rank(name)});
    return __all_sync(~0u, here);
}

// The exchange warps, in the list's order, which is the order of the tiles. 32 rows are looked up at once, a lane each.
template <class C>
MOE_DEVICE void permute_rows(const Launch& l, SharedStorage<C>& s) {
    while (!ptx::ld_acquire_cta_shared(&s.plan_done)) {  // set however the plan ends
    }
    const u32 lane = lane_id(), rows = s.row_offset[kMaxLocalExperts], stride = item_stride(l);
    if (!__shfl_sync(~0u, s.healthy, 0)) return;  // lost; combine ends by itself
    u32 place_before = ~0u;
#pragma unroll 1
    for (u32 first = first_item(l); first < rows; first += 32 * stride) {
        const u32 mine = first + lane * stride;
        const u32 names = mine < rows ? ptx::ld_cg(l.row_list() + mine) : 0, places = place_in_images(s, mine);
        const u32* flag = l.x_ready(l.me.ep_rank, row_src_rank(names), row_token(names));
        const u32 here = __ballot_sync(~0u, mine < rows && ptx::ld_acquire_sys(flag) == l.epoch);
        __syncwarp();  // the lanes' acquires, before the warp reads what they announced
#pragma unroll 1
        for (u32 i = 0; i < 32 && first + i * stride < rows; ++i) {
            const u32 name = __shfl_sync(~0u, names, i), place = __shfl_sync(~0u, places, i);
            if (!(here >> i & 1) && !wait_row(l, name)) return;
            copy_row<C>(l, name, place, place_before, lane);
            place_before = place;
        }
    }
    if (place_before != ~0u) publish_row(l, place_before, lane);
}

}  // namespace moe
