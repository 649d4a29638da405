// What the K loops of every weight format share: the fp32 sums of a tile, promotion into them with weights on M, and
// the release of a stage.
#pragma once
#include "config.cuh"
#include "ptx/wgmma.cuh"
#include "roles.cuh"

namespace moe {

// fp32 sums of one warpgroup's part of a tile.
// Weights on M: 2 slabs of 64 weight rows x kBlockTokens, or where CTAs split weight blocks one slab x 4 chunks of
// tokens. Tokens on M: 64 tokens x 2 halves of 128 weight rows.
template <class C>
struct Accumulator {
    static constexpr u32 kParts = C::kSplitsWeights ? 4 : 2;
    static constexpr u32 kN = C::kSplitsWeights ? C::kBlockTokens / kParts : C::kWeightsOnM ? C::kBlockTokens : 128;
    f32 sum[kParts][kN / 2];
};

template <class C>
MOE_DEVICE void clear(Accumulator<C>& out) {
#pragma unroll
    for (u32 part = 0; part < Accumulator<C>::kParts; ++part)
#pragma unroll
        for (u32 i = 0; i < Accumulator<C>::kN / 2; ++i) out.sum[part][i] = 0;
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

}  // namespace moe
