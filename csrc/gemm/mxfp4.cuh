// The K loop of a math warpgroup with MXFP4 weights: codes out of the stage in fragment order, decoded to e4m3 in
// registers, which are the wgmma A operand. Weights on M. The warps decode one slab of 64 rows while the tensor cores
// work on the other. Promotion is that of mainloop.cuh, with the tokens' scale factors only: a weight's own scale is in
// its e4m3 value, and the base of its 128 rows, constant along K, multiplies the sums at the end.
#pragma once
#include "config.cuh"
#include "debug/trace.cuh"
#include "gemm/mainloop_sums.cuh"
#include "gemm/mxfp4_decode.cuh"
#include "ptx/wgmma_register_a.cuh"
#include "roles.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

// At entry; nothing in FP8 builds.
template <class C>
MOE_DEVICE void make_decode_table(SharedStorage<C>& s, u32 thread) {
    if constexpr (C::kIsMxfp4) {
        if (thread < kDecodeRows) s.decode_rows[thread] = decode_row(thread);
    }
}

// One slab's A operand of a stage: 4 instructions of 32 K, 4 registers each.
struct DecodedSlab {
    u32 a[4][4];
};

// What a lane owns of a slab: 2 x 16 bytes of codes, 512 apart, and the table rows of its two weight rows.
struct LaneCodes {
    uint4 half[2];
    u32 rows;
};

MOE_DEVICE uint2 table_row(u32 table, u32 rows, u32 i) { return ptx::ld_shared_v2(table + (rows >> 8 * i & 0xFF)); }

// Half of them: two instructions' A operand.
MOE_DEVICE void decode_half(DecodedSlab& out, const uint4& v, u32 half, const uint2 (&row)[2]) {
    const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32(&a)[4] = out.a[2 * half + i / 2];
        decode_word(word[i], row[i % 2].x, row[i % 2].y, a[i % 2], a[i % 2 + 2]);
    }
}

template <class C, class Stage>
MOE_DEVICE void decode_slab(DecodedSlab& out, const SharedStorage<C>& s, const Stage& stage, u32 part, u32 thread) {
    const u32 rows = reinterpret_cast<const u32*>(stage.weights + kMxfp4ScalesOffset)[thread] >> 16 * part;
    const u8* table = reinterpret_cast<const u8*>(s.decode_rows);
    const uint2 row[2] = {*reinterpret_cast<const uint2*>(table + (rows & 0xFF)),
                          *reinterpret_cast<const uint2*>(table + (rows >> 8 & 0xFF))};
    const uint4* codes = reinterpret_cast<const uint4*>(stage.weights) + thread / 32 * 128 + thread % 32 + part * 64;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) decode_half(out, codes[half * 32], half, row);
}

// 64 x kN x 128: four instructions.
template <u32 kN>
MOE_DEVICE void mma_slab(f32 (&d)[kN / 2], const DecodedSlab& slab, u64 b) {
    ptx::wgmma_fence_operands(d);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) ptx::WgmmaRegisterA<kN>::mma(d, slab.a[k], b + 2 * k, k != 0);
    ptx::wgmma_commit();
}

// All K of one tile.
template <class C>
MOE_DEVICE void accumulate_mxfp4(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out,
                                 RingPosition<kStages<C>>& stage, const TileSlot& t) {
    constexpr u32 kN = C::kBlockTokens, kRegisters = kN / 2;
    const u32 lane = lane_id(), thread = warp_id() * 32 + lane;
    const bool second = t.kind == kTile_linear2;
    const u32 k_blocks = (second ? l.p.intermediate : l.p.hidden) / kKBlock;
    clear(out);
    // Up to 64 tokens each slab has accumulators of its own, and is promoted while the other's products are summed.
    // More tokens leave registers for one: the other warpgroup's products must fill the pauses.
    constexpr u32 kAccumulators = kN <= 64 ? 2 : 1, kOther = kAccumulators - 1;
    DecodedSlab slab[2];
    f32 acc[kAccumulators][kRegisters], low = 0, high = 0;
    wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());
    decode_slab(slab[0], s, s.stages[stage.slot()], 0, thread);
    wait_mbarrier(&s.tokens_full[stage.slot()], stage.consumer_parity());
    if (thread % 128 < 32) trace(l, s, kTrace_math0 + thread / 128, kEvent_first_stage, t.number);
    for (u32 k = 0; k < k_blocks; ++k) {
        auto& here = s.stages[stage.slot()];
        if (!second) ptx::fence_proxy_async_shared();  // gathered rows were written by the generic proxy
        const u64 b = ptx::descriptor_k_major_128b(__shfl_sync(~0u, ptx::shared_address(here.tokens), 0));
        mma_slab<kN>(acc[0], slab[0], b);
        decode_slab(slab[1], s, here, 1, thread);
        if constexpr (kAccumulators == 2) mma_slab<kN>(acc[kOther], slab[1], b);
        else wait_mbarrier(&s.weights_full[stage.slot()], stage.consumer_parity());  // a branch: or ptxas decodes below
        ptx::wgmma_wait<kOther>();
        ptx::wgmma_fence_operands(acc[0]);
        promote_weights_on_m(out.sum[0], acc[0], kRegisters, 1.0f, 1.0f, here.tokens_sf, lane);
        if constexpr (kAccumulators == 1) mma_slab<kN>(acc[0], slab[1], b);
        RingPosition<kStages<C>> next = stage;
        next.advance();
        if (k + 1 < k_blocks) {  // the next stage's first slab under this one's second
            wait_mbarrier(&s.weights_full[next.slot()], next.consumer_parity());
            decode_slab(slab[0], s, s.stages[next.slot()], 0, thread);
            wait_mbarrier(&s.tokens_full[next.slot()], next.consumer_parity());
        } else {
            low = second ? here.weights_sf[thread / 128] : here.weights_sf[0];
            high = second ? low : here.weights_sf[1];
        }
        ptx::wgmma_wait<0>();
        ptx::wgmma_fence_operands(acc[kOther]);
        promote_weights_on_m(out.sum[1], acc[kOther], kRegisters, 1.0f, 1.0f, here.tokens_sf, lane);
        release_stage<C::kCluster>(&s.stage_empty[stage.slot()], lane);
        stage = next;
    }
#pragma unroll
    for (u32 part = 0; part < 2; ++part)
#pragma unroll
        for (u32 i = 0; i < kRegisters; ++i) out.sum[part][i] *= i / 2 % 2 ? high : low;
}

}  // namespace moe
