// One MoE layer in one launch: dispatch -> linear1 -> swiglu -> linear2 -> combine, on every rank's CTAs at once.
//
//   warps  0-7    math      pipeline/2_linear1.cuh, 3_swiglu.cuh, 4_linear2.cuh, gemm/mainloop.cuh
//   warp   8      weights   gemm/load_weights.cuh        warps 0-11 first plan: sched/table.cuh
//   warps  9-10   tokens    gemm/load_tokens.cuh
//   warp   11     store     pipeline/store.cuh
//   warps 12-15   exchange  pipeline/1_dispatch.cuh, then 5_combine.cuh
//
// Built once per tile size: -DBLOCK_TOKENS=8|16|32|64|128 (config.cuh).
#include "config.cuh"
#include "gemm/load_tokens.cuh"
#include "gemm/load_weights.cuh"
#include "pipeline/1_dispatch.cuh"
#include "pipeline/2_linear1.cuh"
#include "pipeline/5_combine.cuh"
#include "pipeline/exit.cuh"
#include "pipeline/store.cuh"
#include "roles.cuh"
#include "sched/table.cuh"

namespace moe {

using Kernel = Config<BLOCK_TOKENS>;
static_assert(shared_storage_fits<Kernel>());

template <class C>
MOE_DEVICE void init_barriers(SharedStorage<C>& s) {
    for (u32 i = 0; i < C::kStages; ++i) {
        ptx::mbarrier_init(&s.weights_full[i], 1);
        ptx::mbarrier_init(&s.tokens_full[i], kTokensWarps);
        ptx::mbarrier_init(&s.stage_empty[i], kMathWarps);
    }
    for (u32 i = 0; i < kTileSlots; ++i) {
        ptx::mbarrier_init(&s.tile_full[i], 1);
        ptx::mbarrier_init(&s.tile_empty[i], kTileReaders);
    }
    ptx::mbarrier_init(&s.staging_full, kMathWarps);
    ptx::mbarrier_init(&s.staging_empty, 1);
    ptx::fence_mbarrier_init();
}

}  // namespace moe

using namespace moe;

// Bytes of dynamic shared memory, read by the host: this file is where that number is known.
extern "C" __device__ const u32 mega_moe_shared_bytes = sizeof(SharedStorage<Kernel>);

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) mega_moe(const __grid_constant__ KernelParams params) {
    extern __shared__ __align__(1024) u8 shared[];
    SharedStorage<Kernel>& s = *reinterpret_cast<SharedStorage<Kernel>*>(shared);
    const u32 thread = threadIdx.x, warp = __shfl_sync(~0u, thread / 32, 0), lane = thread % 32;
    if (thread == 0) {
        init_barriers(s);
        s.launch = read_launch_state(params);
        s.healthy = 1;
    }
    __syncthreads();
    const Launch l(params, s.launch);

    if (warp >= kExchangeWarp) {
        ptx::setmaxnreg_dec<kOtherRegisters>();
        push_head(l, warp - kExchangeWarp, lane);
        push_rows(l, warp - kExchangeWarp, lane);
        combine(l, s, warp - kExchangeWarp, lane);
    } else {
        if (!build_row_list(l, s, thread)) s.healthy = 0;
        ptx::fence_proxy_async();  // the plan's scratch lies in a stage that bulk copies fill next
        ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
        if (warp >= kWeightsWarp) {
            ptx::setmaxnreg_dec<kOtherRegisters>();
            if (warp == kWeightsWarp) {
                if (lane == 0) load_weights(l, s);
            } else if (warp == kStoreWarp) {
                store_tiles(l, s, lane);
            } else {
                load_tokens(l, s);
            }
        } else {
            ptx::setmaxnreg_inc<kMathRegisters>();
            compute_tiles(l, s);
        }
    }
    __syncwarp();
    leave(l, s, thread, kNumThreads);
}
