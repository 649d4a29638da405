// Rendezvous of the plan warps of all CTAs of one rank: each CTA raises its own epoch word and reads all the others.
// Co-residency comes from the cooperative launch.
#pragma once
#include "roles.cuh"
#include "sync/wait.cuh"

namespace moe {

// Called by all plan threads. Everything that any CTA's plan threads wrote before it is visible after it.
MOE_DEVICE bool grid_rendezvous(const Launch& l, u32* words, u32 thread, u32* healthy, u32 index) {
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
    if (thread == 0) {
        ptx::fence_acq_rel_gpu();  // cumulative over the CTA's stores, ordered before it by the barrier
        ptx::st_relaxed_gpu(words + l.cta, l.epoch);
    }
    for (u32 other = thread; other < l.num_ctas; other += kPlanWarps * 32) {
        if (!wait_acquire_gpu(l, words + other, l.p.step_deadline_ns, {kRole_plan, kStep_plan, index})) *healthy = 0;
    }
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
    return *healthy != 0;
}

}  // namespace moe
