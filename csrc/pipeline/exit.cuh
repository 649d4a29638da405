// The end of a launch on one rank: the last CTA to leave closes the books. After a lost launch it fills y with NaN, so
// that a failed call never looks plausible, and leaves a record for the host.
#pragma once
#include "config.cuh"
#include "sync/wait.cuh"

namespace moe {

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
    if (!own) return;
    for (u32 r = 0; r < l.p.ep_size; ++r) ptx::atom_cas_relaxed_sys(l.abort_word(r), 0, aborted);
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
        const u64 words = u64(l.me.num_tokens) * l.p.hidden / 2;
        u32* y = reinterpret_cast<u32*>(l.me.y);
        for (u64 i = thread; i < words; i += num_threads) y[i] = 0x7FFF7FFF;  // two bf16 NaN
        if (thread == 0) report(l, s.aborted);
    }
    __syncthreads();
    if (thread == 0) {
        *l.exit_counter() = 0;
        *l.ticket_counter() = 0;
        *l.epoch_word() = l.epoch + 1 == 0 ? 2 : l.epoch + 1;  // never 0; parity alternates (head banks)
    }
}

}  // namespace moe
