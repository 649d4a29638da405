// The plan step: the row list of this rank, made by sched/table.cuh from ids that name slots or by sched/chosen.cuh
// from ids that name experts; then what was served is counted.
#pragma once
#include "sched/chosen.cuh"
#include "sched/table.cuh"

namespace moe {

// Rows served so far, by expert and by slot. One CTA's plan threads: nobody else writes them.
template <class C>
MOE_DEVICE void count_load(const Launch& l, SharedStorage<C>& s, u32 thread) {
    if (l.cta != 0 || thread >= l.p.num_local_experts) return;
    const ReplicaMap map = replica_map(l);
    u64* served = reinterpret_cast<u64*>(l.me.load_count);
    const u32 rows = s.row_offset[thread + 1] - s.row_offset[thread];
    const u32 expert = map.expert_in(l.me.ep_rank * l.p.num_local_experts + thread, l.p.ep_size);
    served[map.num_logical() + thread] += rows;
    if (expert < map.num_logical()) served[expert] += rows;
}

// Called by all plan threads, when the heads are here. False: the launch is lost.
template <class C>
MOE_DEVICE bool plan_rows(const Launch& l, SharedStorage<C>& s, u32 thread) {
    if constexpr (kPlans) {
        const bool done =
            chosen_by_counts(l) ? build_chosen_list(l, s, replica_map(l), thread) : build_row_list(l, s, thread);
        if (done && has_plan(l)) count_load(l, s, thread);
        return done;
    }
    return build_row_list(l, s, thread);
}

}  // namespace moe
