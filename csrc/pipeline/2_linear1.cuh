// linear1 and linear2 as the math warpgroups see them: tile after tile, K loop, epilogue, hand-over to the store warp.
#pragma once
#include "gemm/bias.cuh"
#include "gemm/mainloop.cuh"
#include "gemm/mxfp4.cuh"
#include "gemm/mxfp4_split.cuh"
#include "pipeline/3_swiglu.cuh"
#include "pipeline/4_linear2.cuh"

namespace moe {

#ifdef DUMP_LINEAR1
// Test builds only: the fp32 sums of linear1 and its bias as [row of the list, rounded up per expert]
// [2 * intermediate], gate then up.
template <class C>
MOE_DEVICE void dump_linear1(const Launch& l, const Accumulator<C>& acc, const TileSlot& t) {
    if (t.kind != kTile_linear1 || l.me.linear1_dump == 0) return;
    const u32 warp = warp_id(), r = lane_id() / 4, q = lane_id() % 4, width = 2 * l.p.intermediate;
    f32* rows = reinterpret_cast<f32*>(l.me.linear1_dump) + u64(t.m_block) * C::kBlockTokens * width + t.n_block * 128;
    for (u32 part = 0; part < Accumulator<C>::kParts; ++part)
        for (u32 i = 0; i < Accumulator<C>::kN / 2; ++i) {
            const u32 j = i / 4, low = i % 2, high = i / 2 % 2;  // D fragment: rows r + 8 high, columns 8 j + 2 q + low
            u32 row, column, up;
            if (C::kSplitsWeights) {
                row = part * Accumulator<C>::kN + 8 * j + 2 * q + low;
                column = SplitRows(false, l.cta % 2, warp).column(false) + r, up = high;
            } else if (C::kWeightsOnM) {
                row = 8 * j + 2 * q + low, column = warp / 4 * 64 + part * 32 + warp % 4 * 8 + r, up = high;
            } else {
                row = warp * 16 + r + 8 * high, column = part * 64 + j / 2 * 8 + 2 * q + low, up = j % 2;
            }
            if (row < t.row_count) rows[u64(row) * width + up * l.p.intermediate + column] = acc.sum[part][i];
        }
}
#endif

template <class C>
MOE_DEVICE void mark_math(const Launch& l, SharedStorage<C>& s, u32 event, u32 tile) {
    if (warp_id() % 4 == 0) trace(l, s, kTrace_math0 + warp_id() / 4, event, tile);
}

// Eight warps.
template <class C>
MOE_DEVICE void compute_tiles(const Launch& l, SharedStorage<C>& s) {
    RingPosition<kStages<C>> stage;
    // The tile's number is read back from its slot: kept in a register, it would be one too many for the accumulators.
    for (u32 next = 0;;) {
        wait_mbarrier(&s.tile_full[next % kTileSlots], next / kTileSlots & 1);
        const TileSlot& t = s.tiles[next % kTileSlots];
        if (t.kind == kTile_end) return;
        mark_math(l, s, kEvent_tile, next);
        Accumulator<C> acc;
        if constexpr (C::kSplitsWeights) accumulate_split(l, s, acc, stage, t);
        else if constexpr (C::kDecodesInLoop) accumulate_mxfp4(l, s, acc, stage, t);
        else accumulate(l, s, acc, stage, t);
        if constexpr (kExtras) add_bias(l, s, acc, t);
#ifdef DUMP_LINEAR1
        dump_linear1(l, acc, t);
#endif

        const u32 number = t.number, slot = number % kTileSlots;
        mark_math(l, s, kEvent_k_loop, number);
        const u32 warp = warp_id(), lane = lane_id(), group = warp / 4 % C::kStagingGroups;
        if constexpr (C::kInExpertOrder) wait_mbarrier(&s.names_full[slot], number / kTileSlots & 1);
        wait_mbarrier(&s.staging_empty[group], (number & 1) ^ 1);
        mark_math(l, s, kEvent_staging, number);
        if (t.kind == kTile_linear1) {
            swiglu_and_quantize(l, s, acc, slot, warp, lane);
        } else if constexpr (C::kWeightsOnM) {
            stage_rows_weights_on_m(l, s, acc, warp, lane);
        } else if (__shfl_sync(~0u, s.healthy, 0)) {  // a lost tile's sums are not worth the links
            send_rows_tokens_on_m(l, s, acc, t, s.tile_rows[slot], warp, lane);
        }
        __syncwarp();
        next = number + 1;
        mark_math(l, s, kEvent_epilogue, number);
        if (lane == 0) {
            ptx::mbarrier_arrive(&s.staging_full[group]);
            ptx::mbarrier_arrive(&s.tile_empty[slot]);
        }
    }
}

}  // namespace moe
