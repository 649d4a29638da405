// Which warp does what for the whole launch. What it costs in registers: config.cuh.
#pragma once
#include "params.gen.cuh"
#include "prelude.cuh"

namespace moe {

// warps 0-7   math      wgmma, swiglu, linear2 rows           (two warpgroups)
// warp  8     weights   tickets, tile slots, weight images    (plan step first, as all of warps 0-11)
// warps 9-10  tokens    rows for linear1, h images for linear2, names of the rows
// warp  11    store     h images and linear2 rows out, readiness flags
// warps 12-15 exchange  dispatch: routing and rows to the peers, into expert order for pairs of CTAs; then combine
constexpr u32 kWeightsWarp = 8, kTokensWarp = 9, kStoreWarp = 11, kExchangeWarp = 12;
constexpr u32 kMathWarps = 8, kTokensWarps = 2, kPlanWarps = 12;
static_assert(32 * (kExchangeWarp + kExchangeWarps) == kNumThreads);
constexpr u32 kGatherArrivals = 33;  // of each gathering warp on tokens_full: one a lane, one more by lane 0
constexpr u32 kTileReaders = kMathWarps + kTokensWarps + 1;

// Read again in each step on purpose: a value the compiler may not keep costs no register across the main loop, where
// the accumulators need all of them.
MOE_DEVICE u32 lane_id() {
    u32 v;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(v));
    return v;
}
MOE_DEVICE u32 warp_id() {
    u32 v;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
    return v / 32;
}

// The same value, computed with where it is used: what follows from it is not kept in registers across a loop.
MOE_DEVICE u32 computed_here(u32 v) {
    asm volatile("" : "+r"(v));
    return v;
}

// Named barriers (0 is __syncthreads).
constexpr int kBarrierPlan = 1, kBarrierMath = 2;

}  // namespace moe
