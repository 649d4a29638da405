// One MoE layer in one launch: dispatch -> linear1 -> swiglu -> linear2 -> combine, on every rank's CTAs at once.
//
//   warps  0-7    math      pipeline/2_linear1.cuh, 3_swiglu.cuh, 4_linear2.cuh, gemm/mainloop.cuh
//   warp   8      weights   gemm/load_weights.cuh        warps 0-11 first plan: sched/table.cuh
//   warps  9-10   tokens    gemm/gather_tokens.cuh, or for pairs of CTAs gemm/load_images.cuh
//   warp   11     store     pipeline/store.cuh
//   warps 12-15   exchange  pipeline/1_dispatch.cuh, 1_permute.cuh (pairs of CTAs), then 5_combine.cuh
//
// Built once per tile size and weight format: -DBLOCK_TOKENS=, -DWEIGHT_FORMAT= (config.cuh).
// -DEXTRAS (extras.cuh), -DPLANS (pipeline/1_dispatch.cuh): for layers that ask for it.
#include "config.cuh"
#include "debug/trace.cuh"
#include "gemm/gather_tokens.cuh"
#include "gemm/load_images.cuh"
#include "gemm/load_weights.cuh"
#include "pipeline/1_dispatch.cuh"
#include "pipeline/1_permute.cuh"
#include "pipeline/2_linear1.cuh"
#include "pipeline/5_combine.cuh"
#include "pipeline/exit.cuh"
#include "pipeline/store.cuh"
#include "roles.cuh"
#include "sched/plan.cuh"

#ifndef WEIGHT_FORMAT
#define WEIGHT_FORMAT kFp8
#endif

namespace moe {

using Kernel = Config<BLOCK_TOKENS, WEIGHT_FORMAT>;
static_assert(shared_storage_fits<Kernel>());

template <class C>
MOE_DEVICE void init_barriers(SharedStorage<C>& s) {
    for (u32 i = 0; i < kStages<C>; ++i) {
        ptx::mbarrier_init(&s.weights_full[i], 1);
        ptx::mbarrier_init(&s.tokens_full[i], C::kTokensArrivals);
        ptx::mbarrier_init(&s.stage_empty[i], kMathWarps * C::kCluster);
    }
    for (u32 i = 0; i < kTileSlots; ++i) {
        ptx::mbarrier_init(&s.tile_full[i], 1);
        ptx::mbarrier_init(&s.tile_empty[i], kTileReaders);
        ptx::mbarrier_init(&s.names_full[i], 1);
    }
    for (u32 i = 0; i < C::kStagingGroups; ++i) {
        ptx::mbarrier_init(&s.staging_full[i], kMathWarps / C::kStagingGroups);
        ptx::mbarrier_init(&s.staging_empty[i], 1);
    }
    for (u32 i = 0; i < kTicketSlots; ++i) ptx::mbarrier_init(&s.ticket_full[i], 1);
    ptx::mbarrier_init(&s.plan_agreed, 2);
    if constexpr (C::kSplitsWeights) {
        for (u64& full : s.amax_full) ptx::mbarrier_init(&full, C::kBlockTokens / 32);
    }
    ptx::fence_mbarrier_init();
}

}  // namespace moe

using namespace moe;

// Bytes of dynamic shared memory, read by the host: this file is where that number is known.
extern "C" __device__ const u32 mega_moe_shared_bytes = kSharedBytes<Kernel>;

#if BLOCK_TOKENS > 96
#define MOE_CLUSTER __cluster_dims__(2, 1, 1)
static_assert(Kernel::kCluster == 2);
#else
#define MOE_CLUSTER
static_assert(Kernel::kCluster == 1);
#endif

extern "C" __global__ void MOE_CLUSTER __launch_bounds__(kNumThreads, 1)
    mega_moe(const __grid_constant__ KernelParams params) {
    extern __shared__ __align__(1024) u8 shared[];
    SharedStorage<Kernel>& s = *reinterpret_cast<SharedStorage<Kernel>*>(shared);
    const u32 thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
    if (thread == 0) {
        init_barriers(s);
        s.launch = read_launch_state(params);
#ifdef TRACE
        for (u32 i = 0; i < kNumTraceRoles; ++i) s.trace_count[i] = 0;
#endif
        s.healthy = 1, s.partner_failed = 0, s.plan_done = 0, s.amax_turn = 0;
        for (u32 i = 0; i < kExchangeWarps; ++i) s.watch_open[i] = 0;
    }
    make_decode_table(s, thread);
    if constexpr (Kernel::kCluster > 1) ptx::cluster_sync();
    else __syncthreads();
    const Launch l(params, s.launch);

    if (warp >= kExchangeWarp) {
        ptx::setmaxnreg_dec<Kernel::kExchangeRegisters>();
        push_head<Kernel>(l);
        push_rows(l, s);
        if constexpr (Kernel::kInExpertOrder) permute_rows(l, s);
        if (warp_id() == kExchangeWarp) trace(l, s, kTrace_exchange, kEvent_pushed, 0);
        combine(l, s);
        if (warp_id() == kExchangeWarp) trace(l, s, kTrace_exchange, kEvent_combined, 0);
    } else {
        if (warp == 0) trace(l, s, kTrace_plan, kEvent_start, 0);
        bool planned = wait_heads(l, s, thread);
        if (thread == 0) prefetch_first_tile<Kernel>(l);
        planned = planned && plan_rows(l, s, thread);
        if (!planned) s.healthy = 0;
        if (warp == 0) trace(l, s, kTrace_plan, kEvent_list, 0);
        agree_in_cluster(l, s, thread);
        if (thread == 0) ptx::st_release_cta_shared(&s.plan_done, 1);  // the exchange warps' deadline runs from here
        ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
        if (warp >= kWeightsWarp) {
            ptx::setmaxnreg_dec<Kernel::kLoadRegisters>();
            if (warp == kWeightsWarp) {
                if (lane == 0) load_weights(l, s);
            } else if (warp == kStoreWarp) {
                store_tiles(l, s, lane);
            } else if constexpr (!Kernel::kInExpertOrder) {
                gather_tokens(l, s);
            } else if (warp == kTokensWarp) {
                load_images(l, s, lane);
            } else {
                name_rows(l, s, lane);
            }
        } else {
            ptx::setmaxnreg_inc<Kernel::kMathRegisters>();
            compute_tiles(l, s);
            help_combine(l, s);
        }
    }
    __syncwarp();
    if (warp == 0) trace(l, s, kTrace_plan, kEvent_end, 0);
    leave(l, s, thread, kNumThreads);
}
