// What only some models ask for: biases, the gating of gpt-oss, shared experts. In builds of their own (-DEXTRAS);
// others pay nothing for it.
#pragma once
#include "sched/shared.cuh"
#include "sync/launch.cuh"

namespace moe {

#ifdef EXTRAS
constexpr bool kExtras = true;
#else
constexpr bool kExtras = false;
#endif

// Of this CTA's rank, found as in read_launch_state: a look into shared memory would cost the K loop of the largest
// MXFP4 tile its last register.
MOE_DEVICE const RankBiases& rank_biases(const Launch& l) { return l.p.biases[blockIdx.x / l.p.ctas_per_rank]; }

MOE_DEVICE SharedExperts shared_experts(const Launch& l) {
    return {kExtras ? static_cast<u32>(l.p.num_shared_experts) : 0, l.p.topk, l.p.num_local_experts};
}
MOE_DEVICE u32 routed_slots(const Launch& l) { return l.p.topk - shared_experts(l).count; }  // of a token

}  // namespace moe
