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

template <class C>
MOE_DEVICE void wait_stage(SharedStorage<C>& s, const RingPosition<kStages<C>>& stage) {
    wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());
    wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());
}

template <class C>
MOE_DEVICE void accumulate_weights_on_m(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out,
                                        RingPosition<kStages<C>>& stage, const TileSlot& t, u32 k_blocks) {
    const u32 lane = lane_id(), warp = warp_id(), warpgroup = __shfl_sync(~0u, warp / 4, 0);
    const bool second = t.kind == kTile_linear2;
    for (u32 k = 0; k < k_blocks; ++k) {
        wait_stage(s, stage);
        if (k == 0 && warp % 4 == 0) trace(l, s, kTrace_math0 + warpgroup, kEvent_first_stage, t.number);
        if (!second) ptx::fence_proxy_async_shared();  // gathered rows were written by the generic proxy
        accumulate_stage_weights_on_m(out, s.stages[stage.slot()], warpgroup, second, lane,
                                      &s.stage_empty[stage.slot()]);
        stage.advance();
    }
}

// Scale factors of a thread's two rows, and of the half's even and odd 8-column blocks. linear1: 8 gate columns, then 8
// up columns; linear2: a half of 128 columns shares one.
struct Scales {
    f32 low, high, even, odd;
};

template <class Stage>
MOE_DEVICE Scales read_scales(const Stage& stage, bool second, u32 half) {
    const u32 row = warp_id() * 16 + lane_id() / 4;
    const f32 sf0 = stage.weights_sf[0], sf1 = stage.weights_sf[1];
    return {stage.tokens_sf[row], stage.tokens_sf[row + 8], second && half ? sf1 : sf0, second && !half ? sf0 : sf1};
}

// Products only from here on: the assembler would wait for the loads between two instructions of the tensor cores.
MOE_DEVICE void computed_here(Scales& f) { asm volatile("" : "+f"(f.low), "+f"(f.high), "+f"(f.even), "+f"(f.odd)); }

MOE_DEVICE void promote_tokens_on_m(f32 (&sum)[64], const f32 (&acc)[64], const Scales& f) {
    const f32 scale[2][2] = {{f.low * f.even, f.high * f.even}, {f.low * f.odd, f.high * f.odd}};
#pragma unroll
    for (u32 j = 0; j < 16; ++j) {
        sum[4 * j + 0] += acc[4 * j + 0] * scale[j % 2][0];
        sum[4 * j + 1] += acc[4 * j + 1] * scale[j % 2][0];
        sum[4 * j + 2] += acc[4 * j + 2] * scale[j % 2][1];
        sum[4 * j + 3] += acc[4 * j + 3] * scale[j % 2][1];
    }
}

// A warpgroup's 64 rows by the half's 128 weight rows.
template <class Stage>
MOE_DEVICE void issue_half(f32 (&acc)[64], const Stage& stage, u32 half) {
    const u32 base = __shfl_sync(~0u, ptx::shared_address(stage.tokens), 0);  // uniform: descriptors cost one move each
    const u32 warpgroup = __shfl_sync(~0u, warp_id() / 4, 0);
    const u64 a = ptx::descriptor_k_major_128b(base + warpgroup * kSlabBytes);
    const u64 b = ptx::descriptor_k_major_128b(base + 2 * kSlabBytes);
    ptx::wgmma_fence_operands(acc);
    ptx::wgmma_fence();
    mma_k_block<128>(acc, a, b + half * (2 * kSlabBytes >> 4));
    ptx::wgmma_commit();
}

// Two halves of 128 weight rows share one set of accumulators: a half is multiplied, then promoted. What else a stage
// needs is done while the tensor cores work: scale factors are read, the next stage is waited for. In line, all of it
// took 1900 cycles a stage, of which the tensor cores need 1024 for both warpgroups (benchmarks/notes/0004).
template <class C>
MOE_DEVICE void accumulate_tokens_on_m(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out,
                                       RingPosition<kStages<C>>& stage, const TileSlot& t, u32 k_blocks) {
    const bool second = t.kind == kTile_linear2;
    wait_stage(s, stage);
    if (warp_id() % 4 == 0) trace(l, s, kTrace_math0 + warp_id() / 4, kEvent_first_stage, t.number);
#pragma unroll 1
    for (u32 left = k_blocks; left != 0;) {
        f32 acc[64];
        issue_half(acc, s.stages[stage.slot()], 0);
        Scales scales = read_scales(s.stages[stage.slot()], second, 0);
        ptx::wgmma_wait<0>();
        ptx::wgmma_fence_operands(acc);
        computed_here(scales);
        promote_tokens_on_m(out.sum[0], acc, scales);
        issue_half(acc, s.stages[stage.slot()], 1);
        scales = read_scales(s.stages[stage.slot()], second, 1);
        const u32 done = stage.slot();
        stage.advance();
        if (--left != 0) wait_stage(s, stage);
        ptx::wgmma_wait<0>();
        ptx::wgmma_fence_operands(acc);
        release_stage<C::kCluster>(&s.stage_empty[done], lane_id());
        computed_here(scales);
        promote_tokens_on_m(out.sum[1], acc, scales);
    }
}

// All K of one tile.
template <class C>
MOE_DEVICE void accumulate(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out, RingPosition<kStages<C>>& stage,
                           const TileSlot& t) {
    const u32 k_blocks = (t.kind == kTile_linear2 ? l.p.intermediate : l.p.hidden) / kKBlock;
#pragma unroll
    for (u32 part = 0; part < 2; ++part)
#pragma unroll
        for (u32 i = 0; i < Accumulator<C>::kN / 2; ++i) out.sum[part][i] = 0;
    if constexpr (C::kWeightsOnM) accumulate_weights_on_m(l, s, out, stage, t, k_blocks);
    else accumulate_tokens_on_m(l, s, out, stage, t, k_blocks);
}

}  // namespace moe
