// Barriers: mbarriers of this CTA and of its cluster (arrive releases and wait acquires at CTA scope, the PTX default),
// cluster and named barriers, proxy fences, and setmaxnreg, which is collective like them.
#pragma once
#include "prelude.cuh"

namespace moe::ptx {

MOE_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

MOE_DEVICE void mbarrier_init(u64* bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
MOE_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
MOE_DEVICE void mbarrier_arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
MOE_DEVICE void mbarrier_arrive_expect_tx(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
                 : "memory");
}
MOE_DEVICE void mbarrier_arrive(u64* bar, u32 arrivals) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
// On the same barrier of a CTA of the cluster, for stages that were only read. The default scope, .cta, keeps the
// arrival behind those reads, and it is the same instruction at any scope; but by the letter it orders nothing for the
// other CTA. The letter costs, each arrival: .release.cluster a membar.gpu (benchmarks/notes/0001), a relaxed arrival
// behind fence.release.sync_restrict a membar.cta and a proxy fence. Relaxed without that fence, it may pass the reads.
MOE_DEVICE void mbarrier_arrive_cluster(u64* bar, u32 cluster_rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(bar)),
        "r"(cluster_rank)
        : "memory");
}
// The same, releasing stores to the other CTA's shared memory.
MOE_DEVICE void mbarrier_arrive_release_cluster(u64* bar, u32 cluster_rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(bar)),
        "r"(cluster_rank)
        : "memory");
}
MOE_DEVICE bool mbarrier_try_wait_acquire_cluster(u64* bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
    return done != 0;
}
MOE_DEVICE void st_shared_cluster(u32* p, u32 cluster_rank, u32 v) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "st.shared::cluster.u32 [remote], %2;\n}" ::"r"(shared_address(p)),
        "r"(cluster_rank), "r"(v)
        : "memory");
}
// All threads of all CTAs of the cluster; what they did before is visible after.
MOE_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
MOE_DEVICE bool mbarrier_try_wait(u64* bar, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
    return done != 0;
}

// Between generic accesses and the copy engine's or wgmma's, each for its own memory: the unqualified fence is a
// membar.gpu besides, which waits for every store in flight (benchmarks/notes/0001).
MOE_DEVICE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
MOE_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
template <int kId, int kThreads>
MOE_DEVICE void named_barrier_sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

template <int kRegisters>
MOE_DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
MOE_DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace moe::ptx
