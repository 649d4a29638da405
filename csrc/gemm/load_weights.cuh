// The weights role: takes tickets, announces tiles, and streams weight images, one bulk copy a stage. It never waits
// for tokens, so HBM keeps streaming while rows travel.
#pragma once
#include "config.cuh"
#include "ptx/copy.cuh"
#include "roles.cuh"
#include "sched/order.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

// Announces the tile of ticket `i` (or the end). Readers: every other role of linear1 and linear2.
template <class C>
MOE_DEVICE TileSlot announce(const Launch& l, SharedStorage<C>& s, const TileOrder& order, u32 i, u32 number) {
    const u32 slot = number % kTileSlots;
    TileSlot t{kTile_end, 0, 0, 0, 0, 0, number};
    if (i < order.num_tiles()) {
        const Tile tile = order.at(i);
        t.kind = tile.is_linear2 ? kTile_linear2 : kTile_linear1;
        t.m_block = tile.m_block, t.n_block = tile.n_block;
        t.expert = find_expert(s.block_offset, l.p.num_local_experts, tile.m_block);
        t.row_begin = s.row_offset[t.expert] + (tile.m_block - s.block_offset[t.expert]) * C::kBlockTokens;
        t.row_count = min_u32(C::kBlockTokens, s.row_offset[t.expert + 1] - t.row_begin);
    }
    s.tiles[slot] = t;
    ptx::mbarrier_arrive(&s.tile_full[slot]);
    return t;
}

// One thread.
template <class C>
MOE_DEVICE void load_weights(const Launch& l, SharedStorage<C>& s) {
    const TileOrder order{s.num_m_blocks, l.n_blocks1(), l.n_blocks2(), l.p.order_group, l.p.order_lag};
    const u64 policy = ptx::policy_evict_first();
    RingPosition<C::kStages> stage;
    u32 ticket = l.cta;
    for (u32 number = 0;; ++number) {
        wait_mbarrier(&s.tile_empty[number % kTileSlots], (number / kTileSlots & 1) ^ 1);
        // A lost launch takes no further tile; those announced before run to their end.
        const TileSlot t = announce(l, s, order, s.healthy ? ticket : order.num_tiles(), number);
        if (t.kind == kTile_end) return;
        ticket = l.num_ctas + ptx::atom_add_relaxed_gpu(l.ticket_counter(), 1);  // hidden behind this tile's stages

        const bool second = t.kind == kTile_linear2;
        const u32 k_blocks = (second ? l.p.intermediate : l.p.hidden) / kKBlock;
        const u32 n_blocks = second ? order.n_blocks2 : order.n_blocks1;
        const u8* image = reinterpret_cast<const u8*>(second ? l.me.linear2 : l.me.linear1) +
                          (u64(t.expert) * n_blocks + t.n_block) * k_blocks * u64(kImagePitchBytes);
        for (u32 k = 0; k < k_blocks; ++k, image += kImagePitchBytes) {
            wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());
            u64* full = &s.weights_full[stage.slot()];
            ptx::mbarrier_arrive_expect_tx(full, kImageCopyBytes);
            ptx::bulk_load_hint(s.stages[stage.slot()].weights, image, kImageCopyBytes, full, policy);
            stage.advance();
        }
    }
}

}  // namespace moe
