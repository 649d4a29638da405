// The K loop of a math warpgroup where the CTAs of a pair split an MXFP4 weight block: 64 weight rows against up to 192
// tokens, so that a weight is decoded once for all of them. Chunks of 48 tokens take turns in one set of accumulators;
// the other warpgroup's products fill the promotions. Chunks that are all padding are left out. The loop is built once
// for each number of chunks: with a branch around each, ptxas would wait for every product (C7510, notes/0010).
#pragma once
#include "gemm/mxfp4.cuh"
#include "gemm/split_rows.cuh"

namespace moe {

template <class C>
struct SplitLoop {
    static constexpr u32 kChunk = Accumulator<C>::kN, kRegisters = kChunk / 2;
    SharedStorage<C>& s;
    Accumulator<C>& out;
    RingPosition<kStages<C>>& stage;
    u32 codes, scales, sf_lane;  // where the lane's codes and scales lie in a stage's weights, its factors in tokens_sf
    f32 acc[kRegisters];
    DecodedSlab slab[2];

    MOE_DEVICE void read_codes(LaneCodes& to) const {
        const u32 weights = ptx::shared_address(s.stages[stage.slot()].weights);
        to.rows = ptx::ld_shared_u16(weights + scales);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) to.half[half] = ptx::ld_shared_v4(weights + codes + half * 512);
    }
    MOE_DEVICE void read_rows(uint2 (&row)[2], const LaneCodes& from) const {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) row[i] = table_row(ptx::shared_address(s.decode_rows), from.rows, i);
    }
    // Done here, not where the compiler would: other registers are free at this point.
    MOE_DEVICE static void decode(DecodedSlab& to, const LaneCodes& from, u32 half, const uint2 (&row)[2]) {
        decode_half(to, from.half[half], half, row);
#pragma unroll
        for (u32 i = 8 * half; i < 8 * half + 8; ++i) asm volatile("" : "+r"(to.a[i / 4][i % 4])::"memory");
    }
    MOE_DEVICE void issue(const DecodedSlab& from, u32 tokens, u32 chunk) {
        mma_slab<kChunk>(acc, from, ptx::descriptor_k_major_128b_of(tokens + chunk * (kChunk * kKBlock >> 4)));
    }
    MOE_DEVICE u32 tokens_of_stage() const {
        return ptx::descriptor_low(__shfl_sync(~0u, ptx::shared_address(s.stages[stage.slot()].tokens), 0));
    }

    // One stage, whose first chunk is in work; then the next one's is. Whatever has a latency is begun while the tensor
    // cores work and used a chunk later: the next stage's codes and barriers, the rows that decode them, the factors.
    template <u32 kChunks, u32 kSlab, bool kLast>
    MOE_DEVICE void step(u32& tokens) {
        const u32 sf_at = ptx::shared_address(s.stages[stage.slot()].tokens_sf) + sf_lane;
        u64* empty = &s.stage_empty[stage.slot()];
        LaneCodes next_codes;
        uint2 row[2];
        u32 next_tokens = 0;
        if constexpr (!kLast) {
            stage.advance();
            wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());
            read_codes(next_codes);
        }
#pragma unroll
        for (u32 j = 0; j < kChunks; ++j) {
            float2 sf[kChunk / 8];
#pragma unroll
            for (u32 i = 0; i < kChunk / 8; ++i) sf[i] = ptx::ld_shared_v2_f32(sf_at + (j * kChunk + 8 * i) * 4);
            if (!kLast && j + 1 == kChunks) {
                next_tokens = tokens_of_stage();
                wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());
            }
            ptx::wgmma_wait<0>();
            ptx::wgmma_fence_operands(acc);
            if (!kLast && j + 1 == kChunks) release_stage<C::kCluster>(empty, lane_id());
#pragma unroll
            for (u32 i = 0; i < kRegisters; ++i) out.sum[j][i] += acc[i] * (i % 2 ? sf[i / 4].y : sf[i / 4].x);
            if (j + 1 < kChunks) issue(slab[kSlab], tokens, j + 1);
            else if constexpr (!kLast) issue(slab[kSlab ^ 1], next_tokens, 0);
            if (!kLast && j == 0) {
                read_rows(row, next_codes);
                decode(slab[kSlab ^ 1], next_codes, 0, row);
                if (kChunks == 2) decode(slab[kSlab ^ 1], next_codes, 1, row);
            }
            if (!kLast && j == 1 && kChunks > 2) decode(slab[kSlab ^ 1], next_codes, 1, row);
        }
        tokens = next_tokens;
    }

    template <u32 kChunks>
    MOE_DEVICE void run(u32 k_blocks) {
        wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());
        LaneCodes first;
        uint2 row[2];
        read_codes(first);
        read_rows(row, first);
        for (u32 half = 0; half < 2; ++half) decode(slab[0], first, half, row);
        wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());
        u32 tokens = tokens_of_stage();
        issue(slab[0], tokens, 0);
#pragma unroll 1
        for (; k_blocks > 2; k_blocks -= 2) {
            step<kChunks, 0, false>(tokens);
            step<kChunks, 1, false>(tokens);
        }
        if (k_blocks == 2) {
            step<kChunks, 0, false>(tokens);
            step<kChunks, 1, true>(tokens);
        } else {
            step<kChunks, 0, true>(tokens);
        }
    }
};

// All K of one tile. The scales' base of a weight row is constant along K, so it multiplies the sums once, at the end.
template <class C>
MOE_DEVICE void accumulate_split(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out,
                                 RingPosition<kStages<C>>& stage, const TileSlot& t) {
    const u32 warp = warp_id(), lane = lane_id(), half = l.cta % 2;
    const bool second = t.kind == kTile_linear2;
    const SplitRows mine(second, half, warp);
    clear(out);
    SplitLoop<C> loop{s, out, stage, mine.codes(lane), mine.scales(lane), lane % 4 * 8};
    if (warp % 4 == 0) trace(l, s, kTrace_math0 + warp / 4, kEvent_first_stage, t.number);
    const u32 k_blocks = (second ? l.p.intermediate : l.p.hidden) / kKBlock;
    const u32 chunks = __shfl_sync(~0u, ceil_div(t.row_count, SplitLoop<C>::kChunk), 0);
    if (chunks == 4) loop.template run<4>(k_blocks);
    else if (chunks == 3) loop.template run<3>(k_blocks);
    else loop.template run<2>(k_blocks);
    const auto& last = s.stages[stage.slot()];
    const f32 low = last.weights_sf[second ? computed_here(l.cta) % 2 : 0], high = second ? low : last.weights_sf[1];
    release_stage<C::kCluster>(&s.stage_empty[stage.slot()], lane);
    stage.advance();
#pragma unroll
    for (u32 part = 0; part < Accumulator<C>::kParts; ++part)
#pragma unroll
        for (u32 i = 0; i < SplitLoop<C>::kRegisters; ++i) out.sum[part][i] *= i / 2 % 2 ? high : low;
}

}  // namespace moe
