// The plan step on the device: joins the routing tables of all sources, counts rows per local expert, and writes the
// list of rows sorted by (expert, source, token, slot). No atomics: every rank that sees the same tables gets the same
// list. Up to kSmallTable slots each CTA does it alone; above, each CTA takes one range and the grid meets twice.
#pragma once
#include "config.cuh"
#include "pipeline/1_dispatch.cuh"
#include "roles.cuh"
#include "sched/order.cuh"
#include "sync/grid.cuh"

namespace moe {

// Waits for every source's routing. Partner: push_head in pipeline/1_dispatch.cuh.
template <class C>
MOE_DEVICE bool wait_heads(const Launch& l, SharedStorage<C>& s, u32 thread) {
    const u32 me = l.me.ep_rank;
    if (thread < l.p.ep_size) {
        const bool ok = wait_acquire_sys(l, l.head_ready(me, thread, 0), l.p.arrive_deadline_ns,
                                         {kRole_plan, kStep_dispatch, thread});
        const u32 mark = head_mark<C>(l), word = ok ? ptx::ld_cg(l.head_num_tokens(me, thread)) : mark;
        const u32 differs = (word ^ mark) >> kHeadTokensBits;
        if (differs) {
            give_up(l, differs & kHeadLayers ? kCode_unequal_layers : kCode_unequal_bounds,
                    {kRole_plan, kStep_dispatch, thread}, word >> kHeadTokensBits & kHeadLayers,
                    mark >> kHeadTokensBits & kHeadLayers);
        }
        if (!ok || differs) s.healthy = 0;
        s.num_tokens[thread] = differs ? 0 : min_u32(word ^ mark, l.p.capacity);
    }
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
    if (thread == 0) {
        u32 sum = 0;
        for (u32 src = 0; src < l.p.ep_size; ++src) {
            s.table_offset[src] = sum;
            sum += s.num_tokens[src] * l.p.topk;
        }
        s.table_offset[l.p.ep_size] = sum;
    }
    u32 most_tokens = 0;
    for (u32 src = 0; src < l.p.ep_size; ++src) most_tokens = max_u32(most_tokens, s.num_tokens[src]);
    for (u32 i = thread;; i += kPlanWarps * 32) {
        const u32 src = i % l.p.ep_size, slice = 1 + i / l.p.ep_size;
        if (slice * kHeadSliceTokens >= most_tokens) break;
        if (slice * kHeadSliceTokens < s.num_tokens[src] &&
            !wait_acquire_sys(l, l.head_ready(me, src, slice), l.p.arrive_deadline_ns,
                              {kRole_plan, kStep_dispatch, src}))
            s.healthy = 0;
    }
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
    const bool ok = s.healthy != 0;
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();  // all have read it before read_entry may clear it
    return ok;
}

// An id that names no expert: the launch is lost, and says which token's.
template <class C>
MOE_DEVICE void refuse_expert(const Launch& l, SharedStorage<C>& s, u32 src, u32 token, i32 id, u32 experts) {
    give_up(l, kCode_expert_out_of_range, {kRole_plan, kStep_plan, src << kMaxTokenBits | token}, static_cast<u32>(id),
            experts);
    s.healthy = 0;
}

// The part of the joined table that a warp reads: all of a small one, the CTA's range of a larger one, in 12 parts.
struct TableRange {
    bool small;
    u32 warp_begin, warp_end;
};

template <class C>
MOE_DEVICE TableRange table_range(const Launch& l, SharedStorage<C>& s, u32 warp) {
    const u32 total = s.table_offset[l.p.ep_size];
    const bool small = is_small_table(s, l.p.ep_size);
    const u32 range = small ? total : ceil_div(total, l.num_ctas);
    const u32 begin = small ? 0 : min_u32(l.cta * range, total), end = min_u32(begin + range, total);
    const u32 per_warp = align_up(ceil_div(range, kPlanWarps), 32);
    const u32 warp_begin = min_u32(begin + warp * per_warp, end), warp_end = min_u32(warp_begin + per_warp, end);
    return {small, warp_begin, warp_end};
}

// The row list is written: known to all plan threads of the CTA, of a large table to those of all CTAs.
template <class C>
MOE_DEVICE bool end_row_list(const Launch& l, SharedStorage<C>& s, bool small, u32 thread) {
    ptx::fence_proxy_async_shared();  // the scratch lies in a stage that bulk copies, also the partner's, fill next
    if (!small) return grid_rendezvous(l, l.list_ready(0), thread, &s.healthy, 1);
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
    return s.healthy != 0;
}

// One slot of the joined table: its local expert (kMaxLocalExperts = not here) and its row name.
struct TableEntry {
    u32 expert, row;
};

template <class C>
MOE_DEVICE TableEntry read_entry(const Launch& l, SharedStorage<C>& s, u32 position, u32 end) {
    if (position >= end) return {kMaxLocalExperts, 0};
    const u32 src = find_expert(s.table_offset, l.p.ep_size, position);
    const u32 slot_index = position - s.table_offset[src];
    const i32 id =
        static_cast<i32>(ptx::ld_cg(reinterpret_cast<const u32*>(l.head_idx(l.me.ep_rank, src)) + slot_index));
    if (id < -1 || id >= static_cast<i32>(l.num_experts())) {
        refuse_expert(l, s, src, slot_index / l.p.topk, id, num_logical_experts(l));
        return {kMaxLocalExperts, 0};
    }
    const u32 first = l.me.ep_rank * l.p.num_local_experts,
              expert = static_cast<u32>(id) - first;  // -1 wraps far out of range
    if (expert >= l.p.num_local_experts) return {kMaxLocalExperts, 0};
    return {expert, pack_row(src, slot_index / l.p.topk, slot_index % l.p.topk)};
}

// Exclusive sums over the experts: rows, blocks of C::kBlockTokens rows, and where blocks are paired, pairs and
// experts with a block left over. One warp, 8 experts a lane.
template <class C>
MOE_DEVICE void offsets_of(const Launch& l, SharedStorage<C>& s, const u32* count, u32 lane) {
    constexpr u32 kPerLane = kMaxLocalExperts / 32, kSums = C::kPairsBlocks ? 4 : 2;
    const auto terms = [&](u32 e, u32(&term)[4]) {
        const u32 rows = e < l.p.num_local_experts ? count[e] : 0, blocks = ceil_div(rows, C::kBlockTokens);
        term[0] = rows, term[1] = blocks, term[2] = blocks / 2, term[3] = blocks % 2;
    };
    u32 before[4] = {0, 0, 0, 0}, term[4];
    const auto write = [&](u32 e) {
        s.row_offset[e] = before[0], s.block_offset[e] = before[1];
        if constexpr (C::kPairsBlocks) s.pair_offset[e] = before[2], s.single_offset[e] = before[3];
    };
#pragma unroll 1
    for (u32 i = 0; i < kPerLane; ++i) {
        terms(lane * kPerLane + i, term);
#pragma unroll
        for (u32 k = 0; k < kSums; ++k) before[k] += term[k];
    }
#pragma unroll
    for (u32 k = 0; k < kSums; ++k) {
        const u32 own = before[k];
#pragma unroll
        for (u32 d = 1; d < 32; d *= 2) {
            const u32 other = __shfl_up_sync(~0u, before[k], d);
            if (lane >= d) before[k] += other;
        }
        before[k] -= own;
    }
#pragma unroll 1
    for (u32 i = 0; i < kPerLane; ++i) {
        const u32 e = lane * kPerLane + i;
        terms(e, term);
        write(e);
#pragma unroll
        for (u32 k = 0; k < kSums; ++k) before[k] += term[k];
    }
    if (lane == 31) {
        write(kMaxLocalExperts);
        s.num_m_blocks = before[1];
    }
}

// Scratch of the plan step: lies in the last stage, which is loaded long after it.
struct PlanScratch {
    u32 histogram[kPlanWarps][kMaxLocalExperts];
    u32 count[kMaxLocalExperts];
    u32 before[kMaxLocalExperts];
};

// All CTAs' counts into scratch.count; returns the rows of expert `thread` in the ranges of the CTAs before. Threads
// take (CTA, expert) pairs, so that every one has a few loads in flight: one thread an expert took 25 us.
MOE_DEVICE u32 sum_counts(const Launch& l, PlanScratch& scratch, u32 thread) {
    constexpr u32 kThreads = kPlanWarps * 32;
    if (thread < kMaxLocalExperts) scratch.count[thread] = scratch.before[thread] = 0;
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    const u32 experts = l.p.num_local_experts;
#pragma unroll 8
    for (u32 i = thread; i < l.num_ctas * experts; i += kThreads) {
        const u32 c = i / experts, e = i % experts, n = ptx::ld_cg(l.range_count(c) + e);
        if (n) atomicAdd(&scratch.count[e], n);
        if (n && c < l.cta) atomicAdd(&scratch.before[e], n);
    }
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    return thread < kMaxLocalExperts ? scratch.before[thread] : 0;
}

// Called by all plan threads, when the heads are here. False: the launch is lost.
template <class C>
MOE_DEVICE bool build_row_list(const Launch& l, SharedStorage<C>& s, u32 thread) {
    PlanScratch& scratch = *reinterpret_cast<PlanScratch*>(&s.stages[kStages<C> - 1]);
    static_assert(sizeof(PlanScratch) <= C::kStageBytes);
    const u32 warp = thread / 32, lane = thread % 32;
    for (u32 i = thread; i < kPlanWarps * kMaxLocalExperts; i += kPlanWarps * 32) scratch.histogram[0][i] = 0;
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();

    const auto [small, warp_begin, warp_end] = table_range(l, s, warp);
    u32* histogram = scratch.histogram[warp];

    for (u32 base = warp_begin; base < warp_end; base += 32) {
        const TableEntry entry = read_entry(l, s, base + lane, warp_end);
        const u32 peers = __match_any_sync(~0u, entry.expert);
        if (entry.expert != kMaxLocalExperts && lane == __ffs(peers) - 1) histogram[entry.expert] += __popc(peers);
        __syncwarp();
    }
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();

    u32 own = 0;  // this CTA's rows of expert `thread`; the histogram becomes the rows of the warps before
    if (thread < kMaxLocalExperts) {
        for (u32 w = 0; w < kPlanWarps; ++w) {
            const u32 c = scratch.histogram[w][thread];
            scratch.histogram[w][thread] = own;
            own += c;
        }
        scratch.count[thread] = own;
    }
    u32 before = 0;  // rows of expert `thread` in the ranges of the CTAs before
    if (!small) {
        if (thread < l.p.num_local_experts) l.range_count(l.cta)[thread] = own;
        if (!grid_rendezvous(l, l.range_ready(0), thread, &s.healthy, 0)) return false;
        before = sum_counts(l, scratch, thread);
    }
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
    if (warp == 0) offsets_of(l, s, scratch.count, lane);
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();
    if (thread < l.p.num_local_experts) {
        for (u32 w = 0; w < kPlanWarps; ++w) scratch.histogram[w][thread] += s.row_offset[thread] + before;
    }
    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();

    u32* list = small ? s.small_list : l.row_list();
    for (u32 base = warp_begin; base < warp_end; base += 32) {
        const TableEntry entry = read_entry(l, s, base + lane, warp_end);
        const u32 peers = __match_any_sync(~0u, entry.expert);
        const bool here = entry.expert != kMaxLocalExperts;
        if (here) list[histogram[entry.expert] + __popc(peers & ((1u << lane) - 1))] = entry.row;
        __syncwarp();
        if (here && lane == __ffs(peers) - 1) histogram[entry.expert] += __popc(peers);
        __syncwarp();
    }
    return end_row_list(l, s, small, thread);
}

// The CTAs of a cluster go on together or not at all: one that failed its plan takes its partner's along.
template <class C>
MOE_DEVICE void agree_in_cluster(const Launch& l, SharedStorage<C>& s, u32 thread) {
    if constexpr (C::kCluster > 1) {
        if (thread == 0) {
            const u32 other = l.cta % 2 ^ 1;
            if (!s.healthy) ptx::st_shared_cluster(&s.partner_failed, other, 1);
            ptx::mbarrier_arrive(&s.plan_agreed);
            ptx::mbarrier_arrive_release_cluster(&s.plan_agreed, other);
            wait_mbarrier_acquire_cluster(&s.plan_agreed, 0);
            if (s.partner_failed) s.healthy = 0;
        }
    }
}

}  // namespace moe
