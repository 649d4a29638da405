// Which h images of a token block are written. linear2 starts on its first k block when that part of linear1 is done.
#pragma once
#include "ptx/copy.cuh"
#include "sync/wait.cuh"

namespace moe {

struct HReadiness {
    const u32* ready;  // of the token block
    u32 end = 0;       // k blocks known to be written

    // One warp. The needed block first, then as many of the next 31 as are there. Partner: store_h. False: lost.
    MOE_DEVICE bool wait(const Launch& l, u32 healthy, u32 k, u32 k_blocks, Story story) {
        if (k < end) return true;
        const u32 lane = lane_id();
        const bool there = k + lane < k_blocks && ptx::ld_acquire_gpu(ready + k + lane) == l.epoch;
        const u32 missing = ~__ballot_sync(~0u, there);
        end = k + (missing ? __ffs(missing) - 1 : 32);
        if (k == end) {
            const bool ok = healthy && wait_acquire_gpu(l, ready + k, 2 * l.p.step_deadline_ns, story);
            if (!__all_sync(~0u, ok)) return false;
            end = k + 1;
        }
        ptx::fence_proxy_async_global();  // acquired by generic loads, read by the copy engine next
        return true;
    }
};

}  // namespace moe
