// The store role: what a tile leaves behind, and the flags that say so. linear1: the h image, then h_ready. linear2:
// rows to their owners; the last tile of a token block raises combine_ready for all its rows.
#pragma once
#include "config.cuh"
#include "debug/faults.cuh"
#include "debug/trace.cuh"
#include "ptx/copy.cuh"
#include "roles.cuh"
#include "sched/order.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

// A lost launch must not publish what a tile holds. Weights that are decoded ahead, and rows that the other CTA of a
// pair loads, may be lost to that one alone: its abort word was up before they came here.
template <class C>
MOE_DEVICE bool may_publish(const Launch& l, const SharedStorage<C>& s, const TileSlot& t) {
    return s.healthy && t.row_count != 0 && !(C::kPartnerMayLose && is_lost(l));
}

// Lane 0. One warpgroup's rows of the image (all of it where the warpgroups share an epilogue).
template <class C>
MOE_DEVICE void store_h_group(SharedStorage<C>& s, u8* image, u32 group) {
    constexpr u32 kRows = C::kBlockTokens / C::kStagingGroups;
    const u32 rows = group * kRows * kKBlock, sf = C::kTokensBytes + group * kRows * 4;
    if constexpr (C::kStagingGroups == 1) {
        ptx::bulk_store(image, s.staging, C::kHImageBytes);
    } else {
        ptx::bulk_store(image + rows, s.staging + rows, kRows * kKBlock);
        ptx::bulk_store(image + sf, s.staging + sf, kRows * 4);
    }
    ptx::bulk_commit();
}

// Where two CTAs split a weight block: their 64 columns of h are 64 bytes of a row in the order of permute_k, and stay
// together in the swizzle. Of the scale factors, which both have, each stores half.
template <class C>
MOE_DEVICE void store_h_half(const Launch& l, SharedStorage<C>& s, const TileSlot& t, u32 parity, u32 lane) {
    u8* image = l.h_image(t.m_block, t.n_block, C::kHImageBytes);
    constexpr u32 kBytes = kKBlock / 2, kSfBytes = C::kBlockTokens * 4 / 2;
    const u32 half = l.cta % 2;
    wait_mbarrier(&s.staging_full[0], parity);
    const bool publish = __all_sync(~0u, may_publish(l, s, t));
    for (u32 r = lane; r < t.row_count && publish; r += 32) {
        const u32 at = r * kKBlock + (half ^ r / 4 % 2) * kBytes;
        ptx::bulk_store(image + at, s.staging + at, kBytes);
    }
    const u32 sf = C::kTokensBytes + half * kSfBytes;
    if (lane == 0 && publish) ptx::bulk_store(image + sf, s.staging + sf, kSfBytes);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&s.staging_empty[0]);
    ptx::bulk_wait_all();
    ptx::fence_proxy_async_global();  // every lane: its own bulk stores
    __syncwarp();                     // the release is cumulative over what the lanes did before
    if (lane == 0 && publish)
        ptx::st_release_gpu(l.h_ready(t.m_block, 2) + 2 * t.n_block + half, MOE_FAULT(l, h, l.epoch));
}

template <class C>
MOE_DEVICE void store_h(const Launch& l, SharedStorage<C>& s, const TileSlot& t, u32 parity, u32 lane) {
    u8* image = l.h_image(t.m_block, t.n_block, C::kHImageBytes);
    for (u32 group = 0; group < C::kStagingGroups; ++group) {
        wait_mbarrier(&s.staging_full[group], parity);
        if (lane != 0) continue;
        const bool publish = may_publish(l, s, t);
        if (publish) store_h_group(s, image, group);
        ptx::bulk_wait_read<0>();
        ptx::mbarrier_arrive(&s.staging_empty[group]);
        if (!publish || group + 1 < C::kStagingGroups) continue;
        ptx::bulk_wait_all();
        ptx::fence_proxy_async_global();
        ptx::st_release_gpu(l.h_ready(t.m_block, 1) + t.n_block,
                            MOE_FAULT(l, h, l.epoch));  // partner: HReadiness::wait
    }
    __syncwarp();
}

// Rows of this tile are on their way (weights on M: sent here). Completion chain: the math warps' stores ->
// staging_full -> fence -> block_done -> its last arriver -> combine_ready at the owner.
template <class C>
MOE_DEVICE void store_rows(const Launch& l, SharedStorage<C>& s, const TileSlot& t, const u32* rows, u32 parity,
                           u32 lane) {
    for (u32 group = 0; group < C::kStagingGroups; ++group) wait_mbarrier(&s.staging_full[group], parity);
    const bool publish = __all_sync(~0u, may_publish(l, s, t));  // lanes may see a launch become lost apart
    if constexpr (C::kWeightsOnM) {
        const u32 begin = t.n_block * kNBlock + (C::kSplitsWeights ? l.cta % 2 * C::kTileColumns : 0);
        const u32 columns = begin < l.p.hidden ? min_u32(C::kTileColumns, l.p.hidden - begin) : 0;
        for (u32 r = lane; r < t.row_count && publish && columns != 0; r += 32) {
            const u32 row = rows[r];
            ptx::bulk_store(l.combine_y(row_src_rank(row), row_token(row), row_slot(row)) + begin,
                            s.staging + r * C::kStagingRowBytes, columns * 2);
        }
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&s.staging_empty[0]);
        ptx::bulk_wait_all();
        ptx::fence_proxy_async_global();
    } else {
        if (lane < C::kStagingGroups) ptx::mbarrier_arrive(&s.staging_empty[lane]);
    }
    if (!publish) return;
    ptx::fence_acq_rel_sys();  // every lane: its own bulk stores, and the math warps' stores seen through staging_full
    __syncwarp();
    u32 is_last = 0;
    if (lane == 0) {
        is_last = ptx::atom_add_acq_rel_gpu(l.block_done(t.m_block), 1) + 1 == l.n_blocks2() * C::kTilesABlock;
        if (is_last) ptx::st_relaxed_gpu(l.block_done(t.m_block), 0);
    }
    is_last = __shfl_sync(~0u, is_last, 0);
    if (!is_last) return;
    __syncwarp();              // lane 0's acquire, before every lane's fence
    ptx::fence_acq_rel_sys();  // after the acquire above: the other CTAs' rows, before the flags
    for (u32 r = lane; r < t.row_count; r += 32) {
        const u32 row = rows[r];
        ptx::st_relaxed_sys(l.combine_ready(row_src_rank(row), row_token(row), row_slot(row)),
                            MOE_FAULT(l, combine, l.epoch));  // partner: drop_arrived
    }
}

// One warp.
template <class C>
MOE_DEVICE void store_tiles(const Launch& l, SharedStorage<C>& s, u32 lane) {
    u32 parity = 0;
    for (RingPosition<kTileSlots> slot;; slot.advance(), parity ^= 1) {
        wait_mbarrier(&s.tile_full[slot.slot()], slot.consumer_parity());
        const TileSlot& t = s.tiles[slot.slot()];
        if (t.kind == kTile_end) return;
        trace(l, s, kTrace_store, kEvent_tile, t.number);
        if (t.kind == kTile_linear1 && C::kSplitsWeights) store_h_half(l, s, t, parity, lane);
        else if (t.kind == kTile_linear1) store_h(l, s, t, parity, lane);
        else store_rows(l, s, t, s.tile_rows[slot.slot()], parity, lane);
        trace(l, s, kTrace_store, kEvent_stored, t.number);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&s.tile_empty[slot.slot()]);
    }
}

}  // namespace moe
