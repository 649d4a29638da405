// The plan step where the batch's own counts choose among the copies of an expert: counts rows per logical expert,
// cuts them into one interval a copy (sched/replica.cuh), and writes the list of this rank's rows and, for the exchange
// warps, the slot of each of its own tokens' rows. Every CTA of every rank that sees the same tables cuts alike.
#pragma once
#include "config.cuh"
#include "roles.cuh"
#include "sched/replica.cuh"
#include "sched/table.cuh"

namespace moe {

// RankLevels over the lanes of one warp.
struct WarpLevels {
    u32 level;

    MOE_DEVICE u32 own(u32 mask) const { return mask >> lane_id() & 1; }
    MOE_DEVICE u32 nth(u32 mask) const { return __popc(mask & ((1u << lane_id()) - 1)); }
    MOE_DEVICE u32 sum(u32 mask) const { return __reduce_add_sync(~0u, own(mask) ? level : 0); }
    MOE_DEVICE u32 above(u32 mask, u32 height) const { return __ballot_sync(~0u, own(mask) && level > height); }
    MOE_DEVICE u32 lowest(u32 mask) const {  // levels are active experts here: they leave five bits for the rank
        return __reduce_min_sync(~0u, own(mask) ? level << 5 | lane_id() : ~0u) & 31;
    }
    template <class F>
    MOE_DEVICE u32 raise(u32 mask, u32* share, F f) {
        u32 changed = 0;
        if (own(mask)) {
            const u32 more = f(lane_id(), level);
            changed = more ^ share[nth(mask)];
            share[nth(mask)] = more;
            level += more;
        }
        return __ballot_sync(~0u, changed != 0);
    }
    MOE_DEVICE void lower(u32 mask, const u32* share) {
        if (own(mask)) level -= share[nth(mask)];
    }
};

// Scratch of this plan step, in the last stages as PlanScratch is: one, or with MXFP4's smaller ones two.
struct ChosenScratch {
    u32 histogram[kPlanWarps][kMaxLogicalExperts];
    u32 count[kMaxLogicalExperts], before[kMaxLogicalExperts];
    u32 begin[kMaxCopies];
    u32 local_count[kMaxLocalExperts];
    u32 level[kMaxEpSize];
};

struct ChosenEntry {
    u32 expert, row;  // kMaxLogicalExperts: no row
};

template <class C>
MOE_DEVICE ChosenEntry read_logical(const Launch& l, SharedStorage<C>& s, u32 num_logical, u32 position, u32 end) {
    if (position >= end) return {kMaxLogicalExperts, 0};
    const u32 src = find_expert(s.table_offset, l.p.ep_size, position);
    const u32 slot_index = position - s.table_offset[src];
    const i32 id =
        static_cast<i32>(ptx::ld_cg(reinterpret_cast<const u32*>(l.head_idx(l.me.ep_rank, src)) + slot_index));
    if (id == -1) return {kMaxLogicalExperts, 0};
    if (id < 0 || id >= static_cast<i32>(num_logical)) {
        refuse_expert(l, s, src, slot_index / l.p.topk, id, num_logical);
        return {kMaxLogicalExperts, 0};
    }
    return {static_cast<u32>(id), pack_row(src, slot_index / l.p.topk, slot_index % l.p.topk)};
}

// All CTAs' counts into scratch.count, those of the CTAs before into scratch.before.
MOE_DEVICE void sum_logical_counts(const Launch& l, ChosenScratch& scratch, u32 num_logical, u32 thread) {
    constexpr u32 kThreads = kPlanWarps * 32;
    for (u32 e = thread; e < num_logical; e += kThreads) scratch.count[e] = scratch.before[e] = 0;
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
#pragma unroll 8
    for (u32 i = thread; i < l.num_ctas * num_logical; i += kThreads) {
        const u32 c = i / num_logical, e = i % num_logical, n = ptx::ld_cg(l.range_count(c) + e);
        if (n) atomicAdd(&scratch.count[e], n);
        if (n && c < l.cta) atomicAdd(&scratch.before[e], n);
    }
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
}

// From scratch.count: the first row of each copy, and the rows of each local slot.
MOE_DEVICE void choose_copies(const Launch& l, ChosenScratch& scratch, const ReplicaMap& map, u32 thread) {
    constexpr u32 kThreads = kPlanWarps * 32;
    const u32 slots = l.p.num_local_experts, num_logical = map.num_logical();
    for (u32 i = thread; i < map.num_copies(); i += kThreads) scratch.begin[i] = 0;
    if (thread < kMaxLocalExperts) scratch.local_count[thread] = 0;
    if (thread < kMaxEpSize) scratch.level[thread] = 0;
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    for (u32 e = thread; e < num_logical; e += kThreads) {
        const u32 rows = map.choice() == kChoice_balanced ? scratch.count[e] : min_u32(scratch.count[e], 1);
        if (map.first(e + 1) - map.first(e) == 1) atomicAdd(&scratch.level[map.copy(map.first(e)) / slots], rows);
    }
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    if (thread < 32) {
        WarpLevels levels{scratch.level[thread]};
        share_rows(map, levels, scratch.count, scratch.begin);
    }
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    for (u32 e = thread; e < num_logical; e += kThreads) {
        const u32 end = map.first(e + 1), rows = scratch.count[e];
        begins_of(map, e, rows, scratch.begin);
        for (u32 i = map.first(e); i < end; ++i) {
            const u32 slot = map.copy(i) - l.me.ep_rank * slots;  // another rank's wraps or lies beyond
            if (slot < slots)
                scratch.local_count[slot] = (i + 1 < end ? scratch.begin[i + 1] : rows) - scratch.begin[i];
        }
    }
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
}

// build_row_list for these choices. Called by all plan threads. False: the launch is lost.
template <class C>
MOE_DEVICE bool build_chosen_list(const Launch& l, SharedStorage<C>& s, const ReplicaMap& map, u32 thread) {
    constexpr u32 kThreads = kPlanWarps * 32;
    constexpr u32 kScratchStages = ceil_div(static_cast<u32>(sizeof(ChosenScratch)), C::kStageBytes);
    static_assert(kScratchStages <= kStages<C>);
    ChosenScratch& scratch = *reinterpret_cast<ChosenScratch*>(&s.stages[kStages<C> - kScratchStages]);
    const u32 warp = thread / 32, lane = thread % 32, num_logical = map.num_logical();
    for (u32 i = thread; i < kPlanWarps * kMaxLogicalExperts; i += kThreads) scratch.histogram[0][i] = 0;
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();

    const TableRange range = table_range(l, s, warp);
    u32* histogram = scratch.histogram[warp];

#pragma unroll 1
    for (u32 base = range.warp_begin; base < range.warp_end; base += 32) {
        const ChosenEntry entry = read_logical(l, s, num_logical, base + lane, range.warp_end);
        const u32 peers = __match_any_sync(~0u, entry.expert);
        if (entry.expert != kMaxLogicalExperts && lane == __ffs(peers) - 1) histogram[entry.expert] += __popc(peers);
        __syncwarp();
    }
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    for (u32 e = thread; e < num_logical; e += kThreads) {
        u32 own = 0;  // this CTA's rows of expert e; the histogram becomes the rows of the warps before
        for (u32 w = 0; w < kPlanWarps; ++w) {
            const u32 c = scratch.histogram[w][e];
            scratch.histogram[w][e] = own;
            own += c;
        }
        scratch.count[e] = own, scratch.before[e] = 0;
        if (!range.small) l.range_count(l.cta)[e] = own;
    }
    if (!range.small) {
        if (!grid_rendezvous(l, l.range_ready(0), thread, &s.healthy, 0)) return false;
        sum_logical_counts(l, scratch, num_logical, thread);
    }
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    choose_copies(l, scratch, map, thread);
    if (warp == 0) offsets_of(l, s, scratch.local_count, lane);
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();
    for (u32 i = thread; i < kPlanWarps * num_logical; i += kThreads)
        scratch.histogram[i / num_logical][i % num_logical] += scratch.before[i % num_logical];
    ptx::named_barrier_sync<kBarrierPlan, kThreads>();

    u32* list = range.small ? s.small_list : l.row_list();
    const u32 slots = l.p.num_local_experts, first_slot = l.me.ep_rank * slots;
#pragma unroll 1
    for (u32 base = range.warp_begin; base < range.warp_end; base += 32) {
        const ChosenEntry entry = read_logical(l, s, num_logical, base + lane, range.warp_end);
        const u32 peers = __match_any_sync(~0u, entry.expert);
        const bool used = entry.expert != kMaxLogicalExperts;
        if (used) {
            const u32 n = histogram[entry.expert] + __popc(peers & ((1u << lane) - 1));
            const u32 i = find_copy(map, scratch.begin, entry.expert, n), slot = map.copy(i) - first_slot;
            if (slot < slots) list[s.row_offset[slot] + n - scratch.begin[i]] = entry.row;
            // Of a small table every CTA sees all; it writes for the tokens that its own exchange warps push.
            const u32 token = row_token(entry.row);
            if (row_src_rank(entry.row) == l.me.ep_rank && (!range.small || token % l.num_ctas == l.cta))
                l.chosen(token)[row_slot(entry.row)] = static_cast<i32>(slot + first_slot);
        }
        __syncwarp();
        if (used && lane == __ffs(peers) - 1) histogram[entry.expert] += __popc(peers);
        __syncwarp();
    }
    return end_row_list(l, s, range.small, thread);
}

}  // namespace moe
