// Waits on memory, each with a deadline, a story, and an end for all CTAs and ranks when one of them gives up (combine
// watches many words at once: is_over in pipeline/5_combine.cuh); and waits inside a CTA, which need none.
// A wait on memory returns false when the launch is lost; the CTA then runs to its end without further effect, and the
// last CTA of the rank fills y with NaN.
#pragma once
#include "ptx/mbarrier.cuh"
#include "sync/launch.cuh"

namespace moe {

struct Story {
    u32 role, step, index;
};

// The first to give up on this rank leaves the record; the rank's last CTA hands it to the host and to the peers
// (pipeline/exit.cuh). Kept this small because every wait carries a copy: a call here would cost the math warps their
// registers.
MOE_DEVICE void give_up(const Launch& l, u32 code, Story s, u32 have, u32 want) {
    if (ptx::atom_cas_relaxed_sys(l.abort_word(l.me.ep_rank), 0, 1 + l.me.ep_rank) != 0) return;
    u32* record = l.record();
    record[0] = code, record[1] = l.cta, record[2] = s.role, record[3] = s.step, record[4] = s.index, record[5] = have,
    record[6] = want, record[7] = l.epoch;
}

MOE_DEVICE bool is_lost(const Launch& l) { return ptx::ld_relaxed_sys(l.abort_word(l.me.ep_rank)) != 0; }

// Polls load() until it gives `want`. One thread's wait; a warp ANDs its lanes' answers.
template <class Load>
MOE_DEVICE bool wait_equal(const Launch& l, Load load, u32 want, u64 deadline_ns, Story story) {
    u32 have = load();
    if (have == want) return true;
    const u64 start = ptx::globaltimer_ns();
    for (u32 polls = 1;; ++polls) {
        have = load();
        if (have == want) return true;
        if (polls % 64 == 0) {
            if (is_lost(l)) return false;
            if (ptx::globaltimer_ns() - start > deadline_ns) {
                give_up(l, kCode_timeout, story, have, want);
                return false;
            }
        }
    }
}

MOE_DEVICE bool wait_acquire_sys(const Launch& l, const u32* word, u64 deadline_ns, Story story) {
    return wait_equal(l, [&] { return ptx::ld_acquire_sys(word); }, l.epoch, deadline_ns, story);
}
MOE_DEVICE bool wait_acquire_gpu(const Launch& l, const u32* word, u64 deadline_ns, Story story) {
    return wait_equal(l, [&] { return ptx::ld_acquire_gpu(word); }, l.epoch, deadline_ns, story);
}

// Waits inside a CTA. They need no deadline of their own and never fail: every role keeps its arrivals up to the tile
// that announces the end, also after the launch is lost, and every wait on memory above has a deadline. A role that
// left alone would strand its partners in a barrier or split a warpgroup in front of wgmma.
MOE_DEVICE void wait_mbarrier(u64* bar, u32 parity) {
    while (!ptx::mbarrier_try_wait(bar, parity)) {
    }
}
// For stores of the other CTA of the cluster.
MOE_DEVICE void wait_mbarrier_acquire_cluster(u64* bar, u32 parity) {
    while (!ptx::mbarrier_try_wait_acquire_cluster(bar, parity)) {
    }
}

}  // namespace moe
