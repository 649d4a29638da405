// The K loop of a math warpgroup: 128 of K a stage on the tensor cores, then promotion to fp32 by both scale factors,
// so that the tensor cores' short accumulation (~14 bits, DeepSeek-V3 report 3.3.2) never spans more than 128 of K. Two
// orientations behind one name, `accumulate`: weights on M (few rows an expert) and tokens on M (many).
#pragma once
#include "config.cuh"
#include "debug/trace.cuh"
#include "ptx/wgmma.cuh"
#include "roles.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

constexpr u32 kSlabBytes = 64 * kKBlock;  // 64 rows: one wgmma M

// fp32 sums of one warpgroup's part of a tile.
// Weights on M: 2 slabs of 64 weight rows x kBlockTokens. Tokens on M: 64 tokens x 2 halves of 128 weight rows.
template <class C>
struct Accumulator {
    static constexpr u32 kParts = 2;
    static constexpr u32 kN = C::kWeightsOnM ? C::kBlockTokens : 128;
    f32 sum[kParts][kN / 2];
};

// 64 x kN x 128: four instructions.
template <u32 kN>
MOE_DEVICE void mma_k_block(f32 (&d)[kN / 2], u64 a, u64 b) {
#pragma unroll
    for (int k = 0; k < 4; ++k) ptx::Wgmma<kN>::mma(d, a + 2 * k, b + 2 * k, k != 0);
}

// To the loaders of this CTA, and of the other one that multicasts into it.
template <u32 kCluster>
MOE_DEVICE void release_stage(u64* empty, u32 lane) {
    __syncwarp();
    if constexpr (kCluster == 1) {
        if (lane == 0) ptx::mbarrier_arrive(empty);
    } else {
        if (lane < kCluster) ptx::mbarrier_arrive_cluster(empty, lane);
    }
}

// Weight scale factors of a thread's rows r and r + 8. linear1: gate and up rows alternate by 8; linear2: 128 rows
// share one.
MOE_DEVICE void promote_weights_on_m(f32* sum, const f32* acc, u32 registers, f32 low, f32 high, const f32* tokens_sf,
                                     u32 lane) {
#pragma unroll
    for (u32 j = 0; j < registers / 4; ++j) {
        const float2 sf = *reinterpret_cast<const float2*>(tokens_sf + 8 * j + 2 * (lane % 4));
        sum[4 * j + 0] += acc[4 * j + 0] * (low * sf.x);
        sum[4 * j + 1] += acc[4 * j + 1] * (low * sf.y);
        sum[4 * j + 2] += acc[4 * j + 2] * (high * sf.x);
        sum[4 * j + 3] += acc[4 * j + 3] * (high * sf.y);
    }
}

template <class C, class Stage>
MOE_DEVICE void accumulate_stage_weights_on_m(Accumulator<C>& out, const Stage& stage, u32 warpgroup, bool second,
                                              u32 lane, u64* empty) {
    constexpr u32 kRegisters = C::kBlockTokens / 2;
    f32 acc[2][kRegisters];
    const u32 base = __shfl_sync(~0u, ptx::shared_address(stage.tokens), 0);  // uniform: descriptors cost one move each
    const u64 a = ptx::descriptor_k_major_128b(base + C::kTokensBytes + warpgroup * 2 * kSlabBytes);
    const u64 b = ptx::descriptor_k_major_128b(base);
    ptx::wgmma_fence_operands(acc[0]);
    ptx::wgmma_fence_operands(acc[1]);
    ptx::wgmma_fence();
    mma_k_block<C::kBlockTokens>(acc[0], a, b);
    ptx::wgmma_commit();
    mma_k_block<C::kBlockTokens>(acc[1], a + (kSlabBytes >> 4), b);
    ptx::wgmma_commit();
    const f32 low = second ? stage.weights_sf[warpgroup] : stage.weights_sf[0],
              high = second ? low : stage.weights_sf[1];
    ptx::wgmma_wait<1>();
    ptx::wgmma_fence_operands(acc[0]);
    promote_weights_on_m(out.sum[0], acc[0], kRegisters, low, high, stage.tokens_sf, lane);
    ptx::wgmma_wait<0>();
    ptx::wgmma_fence_operands(acc[1]);
    promote_weights_on_m(out.sum[1], acc[1], kRegisters, low, high, stage.tokens_sf, lane);
    release_stage<C::kCluster>(empty, lane);
}

// linear1: 8 gate columns, then 8 up columns; linear2: a half of 128 columns shares one scale factor.
MOE_DEVICE void promote_tokens_on_m(f32 (&sum)[64], const f32 (&acc)[64], f32 even, f32 odd, f32 row_low,
                                    f32 row_high) {
    const f32 scale[2][2] = {{row_low * even, row_high * even}, {row_low * odd, row_high * odd}};
#pragma unroll
    for (u32 j = 0; j < 16; ++j) {
        sum[4 * j + 0] += acc[4 * j + 0] * scale[j % 2][0];
        sum[4 * j + 1] += acc[4 * j + 1] * scale[j % 2][0];
        sum[4 * j + 2] += acc[4 * j + 2] * scale[j % 2][1];
        sum[4 * j + 3] += acc[4 * j + 3] * scale[j % 2][1];
    }
}

template <class C, class Stage>
MOE_DEVICE void accumulate_stage_tokens_on_m(Accumulator<C>& out, const Stage& stage, u32 warpgroup, bool second,
                                             u32 lane, u64* empty) {
    f32 acc[64];
    const u32 row = warp_id() * 16 + lane / 4;
    const u32 base = __shfl_sync(~0u, ptx::shared_address(stage.tokens), 0);  // uniform: descriptors cost one move each
    const u64 a = ptx::descriptor_k_major_128b(base + warpgroup * kSlabBytes);
    const u64 b = ptx::descriptor_k_major_128b(base + C::kTokensBytes);
    const f32 row_low = stage.tokens_sf[row], row_high = stage.tokens_sf[row + 8];
    const f32 sf0 = stage.weights_sf[0], sf1 = stage.weights_sf[1];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        ptx::wgmma_fence_operands(acc);
        ptx::wgmma_fence();
        mma_k_block<128>(acc, a, b + half * (2 * kSlabBytes >> 4));
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::wgmma_fence_operands(acc);
        if (half == 1) release_stage<C::kCluster>(empty, lane);
        promote_tokens_on_m(out.sum[half], acc, second && half ? sf1 : sf0, second && !half ? sf0 : sf1, row_low,
                            row_high);
    }
}

// All K of one tile.
template <class C>
MOE_DEVICE void accumulate(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out, RingPosition<kStages<C>>& stage,
                           const TileSlot& t) {
    const u32 lane = lane_id(), warp = warp_id(), warpgroup = __shfl_sync(~0u, warp / 4, 0);
    const bool second = t.kind == kTile_linear2;
    const u32 k_blocks = (second ? l.p.intermediate : l.p.hidden) / kKBlock;
#pragma unroll
    for (u32 part = 0; part < 2; ++part)
#pragma unroll
        for (u32 i = 0; i < Accumulator<C>::kN / 2; ++i) out.sum[part][i] = 0;
    for (u32 k = 0; k < k_blocks; ++k) {
        wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());
        wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());
        if (k == 0 && warp % 4 == 0) trace(l, s, kTrace_math0 + warpgroup, kEvent_first_stage, t.number);
        if constexpr (C::kWeightsOnM) {
            if (!second) ptx::fence_proxy_async_shared();  // gathered rows were written by the generic proxy
            accumulate_stage_weights_on_m(out, s.stages[stage.slot()], warpgroup, second, lane,
                                          &s.stage_empty[stage.slot()]);
        } else {
            accumulate_stage_tokens_on_m(out, s.stages[stage.slot()], warpgroup, second, lane,
                                         &s.stage_empty[stage.slot()]);
        }
        stage.advance();
    }
}

}  // namespace moe
