// Asynchronous copies: 1D bulk (the TMA engine, async proxy) and 16/4-byte cp.async (generic proxy).
#pragma once
#include "prelude.cuh"
#include "ptx/mbarrier.cuh"

namespace moe::ptx {

// Weights that one token block reads: evict them first, so that activations keep the L2 cache. Weights that many blocks
// read within some us: evicted first, they come from HBM again (1.4 % of a call of 8192 tokens).
MOE_DEVICE u64 policy_evict_normal() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
MOE_DEVICE u64 policy_evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
MOE_DEVICE void bulk_load(void* shared, const void* global, u32 bytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
}
MOE_DEVICE void bulk_load_hint(void* shared, const void* global, u32 bytes, u64* bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(bar)), "l"(policy)
        : "memory");
}
// Into the same offset of both CTAs of the cluster, counted on the same barrier of each.
MOE_DEVICE void bulk_load_pair(void* shared, const void* global, u32 bytes, u64* bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
        "[%1], "
        "%2, [%3], %4, %5;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(bar)), "h"(static_cast<u16>(3)), "l"(policy)
        : "memory");
}
MOE_DEVICE void bulk_load_pair(void* shared, const void* global, u32 bytes, u64* bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(bar)), "h"(static_cast<u16>(3))
        : "memory");
}
MOE_DEVICE void bulk_prefetch_l2(const void* global, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}
MOE_DEVICE void bulk_store(void* global, const void* shared, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}
MOE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Sources in shared memory have been read; the writes may still be in flight.
template <int kPending>
MOE_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// The writes of this thread's groups are complete and visible to it.
MOE_DEVICE void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Copies 16 bytes, or writes 16 zero bytes when valid is false.
MOE_DEVICE void cp_async_16(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16u : 0u)
                 : "memory");
}
MOE_DEVICE void cp_async_4(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4u : 0u)
                 : "memory");
}
MOE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last kPending groups of this thread have landed, and it may read them.
template <int kPending>
MOE_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// This thread arrives once all its earlier cp.async have landed. Counted among the barrier's expected arrivals.
MOE_DEVICE void cp_async_arrive(u64* bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

}  // namespace moe::ptx
