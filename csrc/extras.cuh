// What only some models ask for: biases, and the gating of gpt-oss. In builds of their own (-DEXTRAS); others pay
// nothing for it.
#pragma once
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

}  // namespace moe
