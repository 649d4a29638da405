// The K loop of a math warpgroup: 128 of K a stage on the tensor cores, then promotion to fp32 by both scale factors,
// so that the tensor cores' short accumulation (~14 bits, DeepSeek-V3 report 3.3.2) never spans more than 128 of K. Two
// orientations behind one name, `accumulate`: weights on M (few rows an expert) and tokens on M (many).
#pragma once
#include "config.cuh"
#include "debug/trace.cuh"
#include "gemm/mainloop_sums.cuh"
#include "ptx/wgmma.cuh"
#include "roles.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

constexpr u32 kSlabBytes = 64 * kKBlock;  // 64 rows: one wgmma M

// 64 x kN x 128: four instructions.
template <u32 kN>
MOE_DEVICE void mma_k_block(f32 (&d)[kN / 2], u64 a, u64 b) {
#pragma unroll
    for (int k = 0; k < 4; ++k) ptx::Wgmma<kN>::mma(d, a + 2 * k, b + 2 * k, k != 0);
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
MOE_DEVICE void wait_stage(SharedStorage<C>& s, u32 slot, u32 parity) {
    wait_mbarrier(&s.weights_full[slot], parity);
    wait_mbarrier(&s.tokens_full[slot], parity);
}

template <class C>
MOE_DEVICE void accumulate_weights_on_m(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out,
                                        RingPosition<kStages<C>>& stage, const TileSlot& t, u32 k_blocks) {
    const u32 lane = lane_id(), warp = warp_id(), warpgroup = __shfl_sync(~0u, warp / 4, 0);
    const bool second = t.kind == kTile_linear2;
    for (u32 k = 0; k < k_blocks; ++k) {
        wait_stage(s, stage.slot(), stage.consumer_parity());
        if (k == 0 && warp % 4 == 0) trace(l, s, kTrace_math0 + warpgroup, kEvent_first_stage, t.number);
        if (!second) ptx::fence_proxy_async_shared();  // gathered rows were written by the generic proxy
        accumulate_stage_weights_on_m(out, s.stages[stage.slot()], warpgroup, second, lane,
                                      &s.stage_empty[stage.slot()]);
        stage.advance();
    }
}

// Scale factors of a thread's two rows (r, r + 8), and of the image's two halves.
struct Scales {
    f32 low, high, half[2];
};

// tokens_sf: shared address of the first row's.
template <class C>
MOE_DEVICE Scales read_scales(u32 stage, u32 tokens_sf) {
    constexpr u32 kWeightsSf = C::kTokensBytes + C::kImageSfOffset;
    return {ptx::ld_shared_f32(tokens_sf),
            ptx::ld_shared_f32(tokens_sf + 32),
            {ptx::ld_shared_f32(stage + kWeightsSf), ptx::ld_shared_f32(stage + kWeightsSf + 4)}};
}

// even, odd: which half's factor the 8-column blocks of the accumulators take.
MOE_DEVICE void promote_tokens_on_m(f32 (&sum)[64], const f32 (&acc)[64], f32 low_even, f32 low_odd, f32 high_even,
                                    f32 high_odd) {
#pragma unroll
    for (u32 j = 0; j < 16; ++j) {
        sum[4 * j + 0] += acc[4 * j + 0] * (j % 2 ? low_odd : low_even);
        sum[4 * j + 1] += acc[4 * j + 1] * (j % 2 ? low_odd : low_even);
        sum[4 * j + 2] += acc[4 * j + 2] * (j % 2 ? high_odd : high_even);
        sum[4 * j + 3] += acc[4 * j + 3] * (j % 2 ? high_odd : high_even);
    }
}

// linear1: 8 gate columns, then 8 up columns, each with its own factor; linear2: a half of 128 columns shares one.
template <bool kSecond, u32 kHalf>
MOE_DEVICE void promote_half(f32 (&sum)[64], const f32 (&acc)[64], const Scales& f) {
    constexpr u32 kEven = kSecond ? kHalf : 0, kOdd = kSecond ? kHalf : 1;
    promote_tokens_on_m(sum, acc, f.low * f.half[kEven], f.low * f.half[kOdd], f.high * f.half[kEven],
                        f.high * f.half[kOdd]);
}

// A warpgroup's 64 rows by 128 weight rows. Both: low words of descriptors, the same in all lanes.
MOE_DEVICE void issue_half(f32 (&acc)[64], u32 tokens, u32 weights) {
    ptx::wgmma_fence_operands(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < 4; ++k)
        ptx::Wgmma<128>::mma(acc, ptx::descriptor_k_major_128b_of(tokens + 2 * k),
                             ptx::descriptor_k_major_128b_of(weights + 2 * k), k != 0);
    ptx::wgmma_commit();
}

// Two halves of 128 weight rows share one set of accumulators: a half is multiplied, then promoted. What else a stage
// needs is done while the tensor cores work on it: its scale factors are read, the next stage is waited for. The other
// warpgroup's products fill the promotions, as long as nothing else stands between: thread and stage numbers that
// became descriptors where they were used took 15 % of the loop (benchmarks/notes/0006). So a stage's address is ready
// before its turn, and one shuffle makes it uniform.
template <bool kSecond, class C>
MOE_DEVICE void accumulate_tokens_on_m(SharedStorage<C>& s, Accumulator<C>& out, RingPosition<kStages<C>>& stage,
                                       u32 k_blocks) {
    constexpr u32 kTokensSf = C::kTokensBytes + C::kImageSfOffset + 16;
    const u32 group = __shfl_sync(~0u, warp_id() / 4, 0) * (kSlabBytes >> 4);
    const u32 row_sf = kTokensSf + (warp_id() * 16 + lane_id() / 4) * 4;
    u32 at = ptx::shared_address(s.stages[stage.slot()].tokens);
#pragma unroll 1
    for (u32 left = k_blocks; left != 0;) {
        f32 acc[64];
        const u32 low = ptx::descriptor_low(__shfl_sync(~0u, at, 0)), weights = low + (C::kTokensBytes >> 4);
        issue_half(acc, low + group, weights);
        const Scales f = read_scales<C>(at, at + row_sf);
        ptx::wgmma_wait<0>();
        ptx::wgmma_fence_operands(acc);
        promote_half<kSecond, 0>(out.sum[0], acc, f);
        issue_half(acc, low + group, weights + (2 * kSlabBytes >> 4));
        const u32 done = stage.slot();
        stage.advance();
        at = ptx::shared_address(s.stages[stage.slot()].tokens);
        if (--left != 0) wait_stage(s, stage.slot(), stage.consumer_parity());
        ptx::wgmma_wait<0>();
        ptx::wgmma_fence_operands(acc);
        release_stage<C::kCluster>(&s.stage_empty[done], lane_id());
        promote_half<kSecond, 1>(out.sum[1], acc, f);
    }
}

// Of a warpgroup whose rows are all padding: an expert's last block has 64 rows or less as often as not, and what the
// tensor cores draw for nothing slows the others down, for the card is at its power limit.
template <class C>
MOE_DEVICE void pass_stages(SharedStorage<C>& s, RingPosition<kStages<C>>& stage, u32 k_blocks) {
    for (u32 k = 0; k < k_blocks; ++k, stage.advance()) {
        wait_stage(s, stage.slot(), stage.consumer_parity());
        release_stage<C::kCluster>(&s.stage_empty[stage.slot()], lane_id());
    }
}

template <class C>
MOE_DEVICE void accumulate_tokens_on_m(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out,
                                       RingPosition<kStages<C>>& stage, const TileSlot& t) {
    const bool second = t.kind == kTile_linear2;
    if (t.row_count <= __shfl_sync(~0u, warp_id() / 4, 0) * 64)
        return pass_stages(s, stage, (second ? l.p.intermediate : l.p.hidden) / kKBlock);
    wait_stage(s, stage.slot(), stage.consumer_parity());
    if (warp_id() % 4 == 0) trace(l, s, kTrace_math0 + warp_id() / 4, kEvent_first_stage, t.number);
    if (second) accumulate_tokens_on_m<true>(s, out, stage, l.p.intermediate / kKBlock);
    else accumulate_tokens_on_m<false>(s, out, stage, l.p.hidden / kKBlock);
}

// All K of one tile.
template <class C>
MOE_DEVICE void accumulate(const Launch& l, SharedStorage<C>& s, Accumulator<C>& out, RingPosition<kStages<C>>& stage,
                           const TileSlot& t) {
    clear(out);
    if constexpr (C::kWeightsOnM) {
        const u32 k_blocks = (t.kind == kTile_linear2 ? l.p.intermediate : l.p.hidden) / kKBlock;
        accumulate_weights_on_m(l, s, out, stage, t, k_blocks);
    } else {
        accumulate_tokens_on_m(l, s, out, stage, t);
    }
}

}  // namespace moe
