// The tokens role where CTAs work in pairs. First warp: token side of each stage by bulk copies, x images for linear1,
// h images for linear2; where the pair shares its rows, half of them for both. Second warp: names of the tile's rows,
// ahead of the math warps that send by them.
#pragma once
#include "config.cuh"
#include "debug/trace.cuh"
#include "gemm/h_readiness.cuh"
#include "ptx/copy.cuh"
#include "roles.cuh"
#include "sched/order.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

template <class C>
MOE_DEVICE const u8* first_rows(const Launch& l, const TileSlot& t) {
    return t.kind == kTile_linear2 ? l.h_image(t.m_block, 0, C::kHImageBytes)
                                   : l.x_image(t.m_block, 0, C::kHImageBytes);
}

// Of a tile's rows, those that this CTA loads: all, or half for both CTAs of a pair, in multiples of 8 for the swizzle.
template <class C>
MOE_DEVICE RowShare row_share(const Launch& l, const TileSlot& t) {
    const u32 half = align_up(t.row_count, 16) / 2;
    if constexpr (C::kSplitsWeights) return {first_rows<C>(l, t), l.cta % 2 * half, half};
    return {first_rows<C>(l, t), 0, C::kBlockTokens};
}

// The tile's rows lie in expert order. Partner: permute_rows in pipeline/1_permute.cuh. False: lost.
template <class C>
MOE_DEVICE bool wait_rows(const Launch& l, const SharedStorage<C>& s, const TileSlot& t, u32 lane) {
    bool ok = s.healthy != 0;
    const RowShare share = row_share<C>(l, t);
    const u32 end = min_u32(share.begin + share.count, t.row_count);
#pragma unroll 1
    for (u32 r = share.begin + lane; r < end && ok; r += 32) {
        ok = wait_acquire_gpu(l, l.x_image_ready(t.m_block * C::kBlockTokens + r), 2 * l.p.step_deadline_ns,
                              {kRole_tokens, kStep_plan, t.m_block});
    }
    ptx::fence_proxy_async_global();  // written and acquired by generic accesses, read by the copy engine next
    return __all_sync(~0u, ok);
}

// One warp. Once the launch is lost, stages pass with whatever they hold; the store warp publishes nothing of them.
template <class C>
MOE_DEVICE void load_images(const Launch& l, SharedStorage<C>& s, u32 lane) {
    RingPosition<kStages<C>> stage;
    for (u32 next = 0;;) {
        wait_mbarrier(&s.tile_full[next % kTileSlots], next / kTileSlots & 1);
        const TileSlot& t = s.tiles[next % kTileSlots];
        if (t.kind == kTile_end) return;
        trace(l, s, kTrace_tokens, kEvent_tile, t.number);
        const bool second = t.kind == kTile_linear2;
        const u32 k_blocks = (second ? l.p.intermediate : l.p.hidden) / kKBlock;
        bool ok = second || wait_rows(l, s, t, lane);
        trace(l, s, kTrace_tokens, kEvent_rows_here, t.number);
        if (C::kSplitsWeights && lane_id() == 0) s.row_share = row_share<C>(l, t);  // no registers for it in the loop
        HReadiness<C::kTilesABlock> h{t.m_block};
        const u8* image = first_rows<C>(l, t);
#pragma unroll 1
        for (u32 k = 0; k < k_blocks; ++k, stage.advance()) {
            ok = ok && (!second || h.wait(l, s.healthy, k, k_blocks));
            wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());
            __syncwarp();  // all lanes' acquires above, before lane 0 reads what they announced
            if (lane_id() != 0) continue;
            u64* full = &s.tokens_full[stage.slot()];
            auto& to = s.stages[stage.slot()];
            if (C::kSplitsWeights) {  // also what is lost: the partner counts on its bytes, and publishes none of them
                if (!ok) s.healthy = 0;
                const auto [rows, begin, count] = s.row_share;
                const u8* from = rows + k * C::kHImageBytes;
                ptx::mbarrier_arrive_expect_tx(full, 2 * count * (kKBlock + 4));
                ptx::bulk_load_pair(to.tokens + begin * kKBlock, from + begin * kKBlock, count * kKBlock, full);
                ptx::bulk_load_pair(to.tokens_sf + begin, from + C::kTokensBytes + begin * 4, count * 4, full);
            } else if (ok) {
                const u8* from = image + k * C::kHImageBytes;
                ptx::mbarrier_arrive_expect_tx(full, C::kHImageBytes);
                ptx::bulk_load(to.tokens, from, C::kTokensBytes, full);
                ptx::bulk_load(to.tokens_sf, from + C::kTokensBytes, C::kBlockTokens * 4, full);
            } else {
                s.healthy = 0;
                ptx::mbarrier_arrive(full);
            }
        }
        trace(l, s, kTrace_tokens, kEvent_k_loop, t.number);
        next = t.number + 1;
        __syncwarp();
        if (lane_id() == 0) ptx::mbarrier_arrive(&s.tile_empty[t.number % kTileSlots]);
    }
}

// One warp. The list is whole before the first tile is announced, so this waits for nobody but the tile's slot.
template <class C>
MOE_DEVICE void name_rows(const Launch& l, SharedStorage<C>& s, u32 lane) {
    const u32* list = l.row_list();
    for (u32 next = 0;; ++next) {
        const u32 slot = next % kTileSlots;
        wait_mbarrier(&s.tile_full[slot], next / kTileSlots & 1);
        const TileSlot& t = s.tiles[slot];
        if (t.kind == kTile_end) return;
#pragma unroll
        for (u32 r = lane; r < C::kBlockTokens; r += 32) {
            u32 row = 0;
            f32 weight = 0;
            if (r < t.row_count) {
                row = ptx::ld_cg(list + t.row_begin + r);
                weight = ptx::ld_cg(l.head_weights(l.me.ep_rank, row_src_rank(row)) + row_token(row) * l.p.topk +
                                    row_slot(row));
            }
            s.tile_rows[slot][r] = row;
            s.tile_weights[slot][r] = weight;
        }
        __syncwarp();
        if (lane == 0) {
            ptx::mbarrier_arrive(&s.names_full[slot]);
            ptx::mbarrier_arrive(&s.tile_empty[slot]);
        }
    }
}

}  // namespace moe
