// Which h images of a token block are written. linear2 starts on its first k block when that part of linear1 is done.
#pragma once
#include "ptx/copy.cuh"
#include "sync/wait.cuh"

namespace moe {

// kParts: of an image, each with a flag.
template <u32 kParts>
struct HReadiness {
    u32 m_block;
    u32 end = 0;  // parts known to be written

    // One warp. The needed part first, then as many of the next 31 as are there. Partner: store_h. False: lost.
    MOE_DEVICE bool wait_part(const Launch& l, u32 healthy, u32 part, u32 parts) {
        if (part < end) return true;
        const u32* ready = l.h_ready(m_block, kParts);
        const u32 lane = lane_id();
        const bool there = part + lane < parts && ptx::ld_acquire_gpu(ready + part + lane) == l.epoch;
        const u32 missing = ~__ballot_sync(~0u, there);
        end = part + (missing ? __ffs(missing) - 1 : 32);
        if (part == end) {
            const bool ok = healthy && wait_acquire_gpu(l, ready + part, 2 * l.p.step_deadline_ns,
                                                        {kRole_tokens, kStep_swiglu, m_block});
            if (!__all_sync(~0u, ok)) return false;
            end = part + 1;
        }
        ptx::fence_proxy_async_global();  // acquired by generic loads, read by the copy engine next
        return true;
    }
    MOE_DEVICE bool wait(const Launch& l, u32 healthy, u32 k, u32 k_blocks) {
        bool ok = true;
#pragma unroll
        for (u32 i = 0; i < kParts; ++i) ok = ok && wait_part(l, healthy, k * kParts + i, k_blocks * kParts);
        return ok;
    }
};

}  // namespace moe
