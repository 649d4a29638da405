// The end of a launch on one rank: the last CTA to leave closes the books. After a lost launch it fills y with NaN, so
// that a failed call never looks plausible, and leaves a record for the host. A rank may have left with all its rows
// before another gives up. In a launch of several ranks (virtual ranks) the call has failed for it too, and the one
// that gave up spoils its y as well; a rank in a launch of its own keeps a y that is right, and its next call fails.
#pragma once
#include "config.cuh"
#include "sync/wait.cuh"

namespace moe {

MOE_DEVICE void fill_nan(const RankParams& rank, u32 hidden, u32 thread, u32 num_threads) {
    const u64 words = u64(rank.num_tokens) * hidden / 2;
    u32* y = reinterpret_cast<u32*>(rank.y);
    for (u64 i = thread; i < words; i += num_threads) y[i] = 0x7FFF7FFF;  // two bf16 NaN
}

MOE_DEVICE u32 ranks_of_launch(const Launch& l) { return gridDim.x / l.num_ctas; }

// One thread, before the other y are filled. Each CTA of another rank of this launch has either counted itself out
// before our visit to its counter, and its stores to y are behind us; or will after it, and finds the abort word set.
MOE_DEVICE void end_peers(const Launch& l, u32 aborted) {
    for (u32 r = 0; r < l.p.ep_size; ++r) ptx::atom_cas_relaxed_sys(l.abort_word(r), 0, aborted);
    for (u32 i = 0; i < ranks_of_launch(l); ++i) {
        const LaunchState state{l.p.ranks[i], l.cta, l.num_ctas, l.epoch, 0};
        ptx::atom_add_acq_rel_gpu(Launch(l.p, state).exit_counter(), 0);
    }
}

// The record of our own give-up, or the name of the peer that gave up first, into pinned host memory; `code` last.
MOE_DEVICE void report(const Launch& l, u32 aborted) {
    const bool own = aborted == 1 + l.me.ep_rank;
    const u32* record = l.record();
    KernelStatus* status = reinterpret_cast<KernelStatus*>(l.me.status);
    if (status->code != kCode_ok) return;  // launches queued behind the lost one keep its record
    status->rank = l.me.ep_rank, status->origin = aborted - 1, status->epoch = own ? record[7] : l.epoch;
    status->cta = own ? record[1] : 0, status->role = own ? record[2] : kRole_none,
    status->step = own ? record[3] : kStep_none;
    status->index = own ? record[4] : 0, status->have = own ? record[5] : 0, status->want = own ? record[6] : 0;
    ptx::st_release_sys(&status->code, own ? record[0] : kCode_aborted_by_peer);
}

template <class C>
MOE_DEVICE void leave(const Launch& l, SharedStorage<C>& s, u32 thread, u32 num_threads) {
    if constexpr (C::kCluster > 1) ptx::cluster_sync();  // the partner may still copy and arrive here
    else __syncthreads();
    if (thread == 0) {
        ptx::fence_acq_rel_gpu();
        s.is_last_cta = ptx::atom_add_acq_rel_gpu(l.exit_counter(), 1) + 1 == l.num_ctas;
        s.aborted = ptx::ld_relaxed_sys(l.abort_word(l.me.ep_rank));  // once: a peer may write it at any time
    }
    __syncthreads();
    if (!s.is_last_cta) return;
    if (s.aborted != 0) {
        fill_nan(l.me, l.p.hidden, thread, num_threads);
        if (thread == 0) report(l, s.aborted);
        if (s.aborted == 1 + l.me.ep_rank) {
            if (thread == 0) end_peers(l, s.aborted);
            __syncthreads();
            for (u32 i = 0; i < ranks_of_launch(l); ++i)
                if (l.p.ranks[i].ep_rank != l.me.ep_rank) fill_nan(l.p.ranks[i], l.p.hidden, thread, num_threads);
        }
    }
    __syncthreads();
    if (thread == 0) {
        ptx::atom_add_relaxed_gpu(l.exit_counter(), 0 - l.num_ctas);  // to 0; not a store: see end_peers
        *l.ticket_counter() = 0;
        *l.epoch_word() = l.epoch + 1 == 0 ? 2 : l.epoch + 1;  // never 0; parity alternates (head banks)
    }
}

}  // namespace moe
