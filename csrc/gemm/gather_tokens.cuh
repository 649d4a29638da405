// The tokens role (two warps) where a CTA works alone: brings the token side of each stage. linear1 gathers rows by
// 16-byte copies straight from recv_x into the swizzled tile: few rows, and no hop between arrival and use. linear2
// copies a ready-made h image. It also tells math and store the tile's row names.
#pragma once
#include "config.cuh"
#include "debug/trace.cuh"
#include "gemm/h_readiness.cuh"
#include "ptx/copy.cuh"
#include "roles.cuh"
#include "sched/order.cuh"
#include "sched/tickets.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

template <class C>
struct TokenGatherer {
    static constexpr u32 kRows = C::kBlockTokens / kTokensWarps;  // rows of a tile that one warp brings
    static constexpr u32 kSteps = kRows / 4;                      // a warp copies 4 rows x 128 bytes at once

    const Launch& l;
    SharedStorage<C>& s;
    const u32* list;
    RingPosition<kStages<C>> stage;

    MOE_DEVICE static u32 my_half() { return warp_id() - kTokensWarp; }  // which rows of the tile are this warp's
    MOE_DEVICE Story story(u32 step, u32 index) const { return {kRole_tokens, step, index}; }

    MOE_DEVICE void mark(u32 event, const TileSlot& t) const {
        if (my_half() == 0) trace(l, s, kTrace_tokens, event, t.number);
    }

    // Names and weights of this warp's rows into the slot. Readers see them through the tile's first tokens_full.
    MOE_DEVICE void name_rows(const TileSlot& t, u32 slot) const {
        const u32 half = my_half();
#pragma unroll 1
        for (u32 i = lane_id(); i < kRows; i += 32) {
            const u32 r = half * kRows + i;
            u32 row = 0;
            f32 weight = 0;
            if (r < t.row_count) {
                row = list[t.row_begin + r];
                weight = ptx::ld_cg(l.head_weights(l.me.ep_rank, row_src_rank(row)) + row_token(row) * l.p.topk +
                                    row_slot(row));
            }
            s.tile_rows[slot][r] = row;
            s.tile_weights[slot][r] = weight;
        }
        __syncwarp();
    }

    // Partner: push_rows in pipeline/1_dispatch.cuh.
    MOE_DEVICE bool wait_rows(const TileSlot& t, u32 slot) const {
        bool ok = s.healthy != 0;
        const u32 half = my_half();
#pragma unroll 1
        for (u32 i = lane_id(); i < kRows && ok; i += 32) {
            const u32 r = half * kRows + i;
            if (r >= t.row_count) break;
            const u32 row = s.tile_rows[slot][r];
            ok = wait_acquire_sys(l, l.x_ready(l.me.ep_rank, row_src_rank(row), row_token(row)), l.p.step_deadline_ns,
                                  story(kStep_dispatch, row_src_rank(row)));
        }
        return __all_sync(~0u, ok);
    }

    // The launch is lost: this tile's remaining stages pass with whatever they hold, and the store warp, which sees
    // `healthy` through its partners' barriers, publishes nothing of it.
    MOE_DEVICE void pass_stages(u32 count) {
        if (lane_id() == 0) s.healthy = 0;
        for (u32 i = 0; i < count; ++i, stage.advance()) {
            wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());
            if (lane_id() == 0) ptx::mbarrier_arrive(&s.tokens_full[stage.slot()], kGatherArrivals);
        }
    }

    // Where this warp's rows and their scale factors start. In shared memory: 16 rows a lane would not fit the
    // registers.
    MOE_DEVICE void locate_rows(u32 slot) const {
        const u32 half = my_half();
        for (u32 i = lane_id(); i < kRows; i += 32) {
            const u32 r = half * kRows + i, row = s.tile_rows[slot][r];
            s.row_source[r] = l.recv_x(l.me.ep_rank, row_src_rank(row), row_token(row));
            s.row_sf_source[r] = l.recv_x_sf(l.me.ep_rank, row_src_rank(row), row_token(row));
        }
        __syncwarp();
    }

    // What a tile needs besides stages: names of its rows, and for linear1 that they have arrived. Done in the tile
    // before (look_up_at), where the ring hides its three dependent loads (traced: 4 to 5 us).
    MOE_DEVICE void prepare(u32 number) {
        const u32 slot = number % kTileSlots;
        wait_mbarrier(&s.tile_full[slot], number / kTileSlots & 1);
        const TileSlot& t = s.tiles[slot];
        if (t.kind == kTile_end) return;
        name_rows(t, slot);
        mark(kEvent_rows_named, t);
        if (t.kind == kTile_linear1 && !wait_rows(t, slot) && lane_id() == 0) s.healthy = 0;
        mark(kEvent_rows_here, t);
    }

    MOE_DEVICE void load_linear1(const TileSlot& t) {
        const u32 k_blocks = l.p.hidden / kKBlock;
        __syncwarp();
        if (!s.healthy) return pass_stages(k_blocks);
        locate_rows(t.number % kTileSlots);
        const u32 half = my_half(), lane = lane_id();
        // Lane: 16-byte chunk lane % 8 of rows lane / 8 + 4 i. The swizzle of a row depends on i only by its parity.
        const u32 first = half * kRows + lane / 8, chunk = lane % 8 * 16;
        const u32 valid_steps = t.row_count > first ? ceil_div(t.row_count - first, 4) : 0;
        const u32 to_even = swizzle_128b(first, chunk), to_odd = swizzle_128b(first + 4, chunk) - 4 * kKBlock;
        for (u32 k = 0; k < k_blocks; ++k, stage.advance()) {
            wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());
            auto& to = s.stages[stage.slot()];
            const u32 tokens = ptx::shared_address(to.tokens);
#pragma unroll 2
            for (u32 i = 0; i < kSteps; ++i) {
                ptx::cp_async_16(tokens + (i % 2 ? to_odd : to_even) + i * 4 * kKBlock,
                                 s.row_source[first + i * 4] + k * kKBlock + chunk, i < valid_steps);
            }
#pragma unroll 1
            for (u32 r = half * kRows + lane; r < (half + 1) * kRows; r += 32)
                ptx::cp_async_4(ptx::shared_address(&to.tokens_sf[r]), s.row_sf_source[r] + k, r < t.row_count);
            // Each lane arrives when its copies land; lane 0 once more, at once, for the names of the rows (its arrival
            // releases them, an asynchronous one does not). Math fences the proxies.
            ptx::cp_async_arrive(&s.tokens_full[stage.slot()]);
            if (lane == 0) ptx::mbarrier_arrive(&s.tokens_full[stage.slot()]);
            if (k == look_up_at<C>(computed_here(k_blocks))) prepare(t.number + 1);
        }
    }

    // h images of this token block. The role's first warp copies; the second only keeps the arrival count at two.
    MOE_DEVICE void load_linear2(const TileSlot& t) {
        const u32 half = my_half(), lane = lane_id();
        const u32 k_blocks = l.p.intermediate / kKBlock;
        HReadiness<1> h{t.m_block};
        for (u32 k = 0; k < k_blocks; ++k, stage.advance()) {
            if (half == 0 && !h.wait(l, s.healthy, k, k_blocks)) return pass_stages(k_blocks - k);
            wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());
            __syncwarp();  // all lanes' acquires above, before lane 0 reads what they announced
            if (lane == 0) {
                u64* full = &s.tokens_full[stage.slot()];
                auto& to = s.stages[stage.slot()];
                if (half == 1) {
                    ptx::mbarrier_arrive(full, kGatherArrivals);
                } else {
                    const u8* image = l.h_image(t.m_block, k, C::kHImageBytes);
                    ptx::mbarrier_arrive(full, kGatherArrivals - 1);
                    ptx::mbarrier_arrive_expect_tx(full, C::kHImageBytes);
                    ptx::bulk_load(to.tokens, image, C::kTokensBytes, full);
                    ptx::bulk_load(to.tokens_sf, image + C::kTokensBytes, C::kBlockTokens * 4, full);
                }
            }
            __syncwarp();
            if (k == look_up_at<C>(computed_here(k_blocks))) prepare(t.number + 1);
        }
    }
};

// Two warps.
template <class C>
MOE_DEVICE void gather_tokens(const Launch& l, SharedStorage<C>& s) {
    TokenGatherer<C> loader{l, s, is_small_table(s, l.p.ep_size) ? s.small_list : l.row_list(), {}};
    loader.prepare(0);
    for (u32 next = 0;;) {  // the number is read back from the slot: a register less across the K loop
        wait_mbarrier(&s.tile_full[next % kTileSlots], next / kTileSlots & 1);
        const TileSlot& t = s.tiles[next % kTileSlots];
        if (t.kind == kTile_end) return;
        loader.mark(kEvent_tile, t);
        if (t.kind == kTile_linear2) loader.load_linear2(t);
        else loader.load_linear1(t);
        loader.mark(kEvent_k_loop, t);
        next = t.number + 1;
        __syncwarp();
        if (lane_id() == 0) ptx::mbarrier_arrive(&s.tile_empty[(next - 1) % kTileSlots]);
    }
}

}  // namespace moe
