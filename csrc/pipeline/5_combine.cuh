// combine: y[token] = sum of the token's linear2 rows, fp32, in slot order (bitwise reproducible), as bf16 through the
// TMA engine. An item is a token and `combine_columns` of it. A warp watches 32 items at once and sums whichever is
// complete: tokens complete in the order of their last expert, so most are summed while the tensor cores still work.
#pragma once
#include "config.cuh"
#include "debug/trace.cuh"
#include "pipeline/1_dispatch.cuh"
#include "ptx/copy.cuh"
#include "sync/wait.cuh"

namespace moe {

// Wraps after 71 minutes; only differences are used.
MOE_DEVICE u32 now_us() { return static_cast<u32>(ptx::globaltimer_ns() / 1000); }

// Bits of the token's used slots.
MOE_DEVICE u32 used_slots(const Launch& l, u32 token) {
    u32 used = 0;
    if (token >= l.num_tokens) return 0;
#pragma unroll 1
    for (u32 slot = 0; slot < routed_slots(l); ++slot)
        used |= u32(!is_none(load_topk_idx(l, u64(token) * l.p.topk + slot))) << slot;
    if constexpr (kExtras) used |= (1u << l.p.topk) - (1u << routed_slots(l));  // shared experts' slots: always
    return used;
}

// What a lane knows of its item: used slots in the low half, those of them still missing in the high half.
// Drops slots whose rows are here, up to the first that is not. Partner: store_rows in pipeline/store.cuh.
MOE_DEVICE u32 drop_arrived(const Launch& l, u32 token, u32 slots) {
    while (slots >> 16 && ptx::ld_acquire_sys(l.combine_ready(l.me.ep_rank, token, __ffs(slots >> 16) - 1)) == l.epoch)
        slots &= (slots - 0x10000) | 0xFFFF;
    return slots;
}

MOE_DEVICE void add_bf16(f32 (&sum)[8], uint4 v) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[2 * i] += ptx::bf16_low(pairs[i]), sum[2 * i + 1] += ptx::bf16_high(pairs[i]);
}

// How many loads of 16 bytes a combining lane has in flight: of slots, times steps of kCombineStep columns.
template <u32 kSlots_, u32 kSteps_>
struct CombineLoads {
    static constexpr u32 kSlots = kSlots_, kSteps = kSteps_, kBufferBytes = kSteps * kCombineStep * 2;
};

// 8 columns of a lane: kLoads slots' loads in flight at a time, sums in slot order. For the exchange warps, whose 64
// registers the general form below overruns by a few.
template <u32 kLoads>
MOE_DEVICE uint4 sum_slots(const u16* rows, u32 hidden, u32 used) {
    f32 sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    while (used) {
        uint4 v[kLoads];
        const u32 batch = used;
#pragma unroll
        for (u32 i = 0; i < kLoads; ++i) {
            if (used) v[i] = ptx::ld_cg_v4(rows + (__ffs(used) - 1) * hidden);
            used &= used - 1;
        }
        u32 rest = batch;
#pragma unroll
        for (u32 i = 0; i < kLoads; ++i) {
            if (rest) add_bf16(sum, v[i]);
            rest &= rest - 1;
        }
    }
    return make_uint4(ptx::pack_bf16(sum[0], sum[1]), ptx::pack_bf16(sum[2], sum[3]), ptx::pack_bf16(sum[4], sum[5]),
                      ptx::pack_bf16(sum[6], sum[7]));
}

// The same in each of the first `steps` steps, at least one, summed in slot order.
template <class Loads>
MOE_DEVICE void sum_steps(uint4 (&y)[Loads::kSteps], const u16* rows, u32 hidden, u32 used, u32 steps) {
    f32 sum[Loads::kSteps][8] = {};
    while (used) {
        uint4 v[Loads::kSteps][Loads::kSlots];
        const u32 batch = used;
#pragma unroll
        for (u32 i = 0; i < Loads::kSlots; ++i) {
#pragma unroll
            for (u32 step = 0; step < Loads::kSteps; ++step)
                if (used && (step == 0 || step < steps))
                    v[step][i] = ptx::ld_cg_v4(rows + (__ffs(used) - 1) * hidden + step * kCombineStep);
            used &= used - 1;
        }
        u32 rest = batch;
#pragma unroll
        for (u32 i = 0; i < Loads::kSlots; ++i) {
#pragma unroll
            for (u32 step = 0; step < Loads::kSteps; ++step)
                if (rest && (step == 0 || step < steps)) add_bf16(sum[step], v[step][i]);
            rest &= rest - 1;
        }
    }
#pragma unroll
    for (u32 step = 0; step < Loads::kSteps; ++step) {
        const f32(&f)[8] = sum[step];
        y[step] = make_uint4(ptx::pack_bf16(f[0], f[1]), ptx::pack_bf16(f[2], f[3]), ptx::pack_bf16(f[4], f[5]),
                             ptx::pack_bf16(f[6], f[7]));
    }
}

// One item: columns [begin, begin + combine_columns) of a token, through two shared buffers of the warp in turn.
template <class Loads>
MOE_DEVICE void combine_item(const Launch& l, u8 (&buffers)[2][Loads::kBufferBytes], u32 token, u32 begin, u32 used) {
    constexpr u32 kColumns = Loads::kSteps * kCombineStep;
    const u32 lane = lane_id(), hidden = l.p.hidden, end = min_u32(begin + l.p.combine_columns, hidden);
#pragma unroll 1
    for (u32 column = begin; column < end; column += kColumns) {
        const u32 columns = min_u32(kColumns, (Loads::kSteps == 1 ? hidden : end) - column);
        u8* buffer = buffers[column / kColumns % 2];
        uint4 y[Loads::kSteps] = {};
        if (lane * 8 < columns) {
            const u16* rows = l.combine_y(l.me.ep_rank, token, 0) + column + lane * 8;
            if constexpr (Loads::kSteps == 1) y[0] = sum_slots<Loads::kSlots>(rows, hidden, used);
            else sum_steps<Loads>(y, rows, hidden, used, ceil_div(columns - lane * 8, kCombineStep));
        }
        if (lane == 0) ptx::bulk_wait_read<1>();  // the buffer of the turn before last
        __syncwarp();
#pragma unroll
        for (u32 step = 0; step < Loads::kSteps; ++step)
            if (lane * 8 + step * kCombineStep < columns)
                ptx::st_shared_v4(ptx::shared_address(buffer) + (step * 32 + lane) * 16, y[step]);
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (lane == 0) {
            ptx::bulk_store(reinterpret_cast<u16*>(l.me.y) + u64(token) * hidden + column, buffer, columns * 2);
            ptx::bulk_commit();
        }
    }
    if (lane == 0) ptx::bulk_wait_read<0>();  // the next item may start with either buffer
    __syncwarp();
}

MOE_DEVICE u32 num_items(const Launch& l) { return l.me.num_tokens * l.p.combine_chunks; }

// A window is 32 items, one a lane: item `first + lane * item_stride`.
MOE_DEVICE u32 window_item(const Launch& l, u32 first, u32 lane) { return first + lane * item_stride(l); }

// What a lane watches: see drop_arrived. Items past the end have nothing to wait for and are never pending.
MOE_DEVICE u32 watch(const Launch& l, u32 item) {
    return item < num_items(l) ? used_slots(l, item / l.p.combine_chunks) * 0x10001 : 0;
}

// Sums those of the items `ready` that this warp is the first to take.
template <class Loads, class C>
MOE_DEVICE void combine_ready_items(const Launch& l, SharedStorage<C>& s, u8 (&buffers)[2][Loads::kBufferBytes],
                                    u32 window, u32 ready, u32 slots) {
#pragma unroll 1
    for (; ready; ready &= ready - 1) {
        const u32 owner = __ffs(ready) - 1;
        u32 mine = 0;
        if (lane_id() == 0) mine = atomicAnd(&s.watch_pending[window], ~(1u << owner)) >> owner & 1;
        if (!__shfl_sync(~0u, mine, 0)) continue;
        const u32 item = window_item(l, s.watch_first[window], owner);
        combine_item<Loads>(l, buffers, item / l.p.combine_chunks, item % l.p.combine_chunks * l.p.combine_columns,
                            __shfl_sync(~0u, slots & 0xFFFF, owner));
    }
}

MOE_DEVICE u32 my_window() { return warp_id() - kExchangeWarp; }

// The launch is lost, or nothing that this warp watches has become complete for two step deadlines (its partners may
// wait one for rows themselves). Not counted before the plan is done: until then the plan warps may wait for a late
// rank, and name it.
template <class C>
MOE_DEVICE bool is_over(const Launch& l, SharedStorage<C>& s, u32 item, u32 slots) {
    bool lost = is_lost(l);
    if constexpr (!C::kInExpertOrder) {  // else permute_rows has waited for it
        if (!ptx::ld_relaxed_cta_shared(&s.plan_done) && lane_id() == 0) s.watch_idle_since[my_window()] = now_us();
        __syncwarp();
    }
    if (slots >> 16 && now_us() - s.watch_idle_since[my_window()] > 2 * l.p.step_deadline_ns / 1000) {
        give_up(l, kCode_timeout, {kRole_exchange, kStep_combine, item / l.p.combine_chunks}, 0, l.epoch);
        lost = true;
    }
    return __any_sync(~0u, lost);
}

template <class C>
MOE_DEVICE u32 next_window(const Launch& l, const SharedStorage<C>& s, u32 warp) {
    return s.watch_first[warp] + 32 * item_stride(l);
}

// The exchange warps' second half. Rows past num_tokens and tokens with no slot give exact zeros.
template <class C>
MOE_DEVICE void combine(const Launch& l, SharedStorage<C>& s) {
    if (lane_id() == 0) s.watch_first[my_window()] = first_item(l), s.watch_polls[my_window()] = 0;
    __syncwarp();
#pragma unroll 1
    while (true) {
        const u32 item = window_item(l, s.watch_first[my_window()], lane_id());
        u32 slots = watch(l, item);
        const u32 pending = __ballot_sync(~0u, item < num_items(l));
        if (lane_id() == 0) {
            s.watch_pending[my_window()] = pending;
            s.watch_idle_since[my_window()] = now_us();
            if (next_window(l, s, my_window()) >= num_items(l))
                ptx::st_release_cta_shared(&s.watch_open[my_window()], 1);
        }
        __syncwarp();
#pragma unroll 1
        while (true) {
            slots = drop_arrived(l, item / l.p.combine_chunks, slots);
            if (lane_id() == 0) ++s.watch_polls[my_window()];
            __syncwarp();
            const u32 left = __shfl_sync(~0u, ptx::ld_relaxed_cta_shared(&s.watch_pending[my_window()]), 0);
            if (left == 0) break;
            const u32 ready = __ballot_sync(~0u, slots >> 16 == 0) & left;
            if (ready && lane_id() == 0) s.watch_idle_since[my_window()] = now_us();
            combine_ready_items<CombineLoads<C::kCombineLoads, 1>>(
                l, s, *reinterpret_cast<u8(*)[2][512]>(s.exchange_buffer[my_window()]), my_window(), ready, slots);
            if (__shfl_sync(~0u, s.watch_polls[my_window()], 0) % 64 == 0 && is_over(l, s, item, slots)) {
                if (lane_id() == 0) {
                    atomicAnd(&s.watch_pending[my_window()], 0u);  // an open window: math warps take items meanwhile
                    ptx::st_release_cta_shared(&s.watch_open[my_window()], 1);
                }
                break;
            }
        }
        __syncwarp();
        if (ptx::ld_relaxed_cta_shared(&s.watch_open[my_window()]))
            break;  // watch_first stays: a math warp may be at one of its items
        if (lane_id() == 0) s.watch_first[my_window()] = next_window(l, s, my_window());
        __syncwarp();
    }
    if (lane_id() == 0) ptx::bulk_wait_all();
    __syncwarp();
}

// values[w] without an address: they stay in registers.
MOE_DEVICE u32 pick(const u32 (&values)[kExchangeWarps], u32 w) {
    static_assert(kExchangeWarps == 4);
    return w < 2 ? w ? values[1] : values[0] : w == 2 ? values[2] : values[3];
}

// Math warps, once their tiles are done: tokens still open then are the tail of the call, and eight more warps shorten
// it, each with several steps' loads in the registers that held the sums.
template <class C>
MOE_DEVICE void help_combine(const Launch& l, SharedStorage<C>& s) {
    ptx::named_barrier_sync<kBarrierMath, kMathWarps * 32>();  // the stages are free
    const u32 lane = lane_id(), warp = warp_id();
    using Loads = CombineLoads<6, C::kDecodesInLoop ? 2 : 4>;
    static_assert(kMathWarps * 2 * Loads::kBufferBytes <= kStages<C> * C::kStageBytes - C::kTokensBytes);
    auto& buffers =
        *reinterpret_cast<u8(*)[2][Loads::kBufferBytes]>(s.stages[0].weights + warp * 2 * Loads::kBufferBytes);
    u32 slots[kExchangeWarps] = {}, seen = 0;
    for (u32 polls = 1;; ++polls) {
        bool done = true;
        u32 ready[kExchangeWarps] = {};
#pragma unroll
        for (u32 w = 0; w < kExchangeWarps; ++w) {
            if (!__all_sync(~0u, ptx::ld_acquire_cta_shared(&s.watch_open[w]))) {  // each lane acquires for itself
                done = false;
                continue;
            }
            const u32 pending = __shfl_sync(~0u, ptx::ld_relaxed_cta_shared(&s.watch_pending[w]), 0);
            if (pending == 0) continue;
            done = false;
            const u32 item = window_item(l, s.watch_first[w], lane);
            if (!(seen >> w & 1)) slots[w] = watch(l, item), seen |= 1u << w;
            slots[w] = drop_arrived(l, item / l.p.combine_chunks, slots[w]);
            __syncwarp();
            ready[w] = __ballot_sync(~0u, slots[w] >> 16 == 0) & pending;
        }
#pragma unroll 1
        for (u32 w = 0; w < kExchangeWarps; ++w)  // one copy of the sums' code
            combine_ready_items<Loads>(l, s, buffers, w, pick(ready, w), pick(slots, w));
        if (done) break;
        if (polls % 64 == 0 && __any_sync(~0u, is_lost(l))) break;  // the exchange warps hold the deadline
    }
    if (lane == 0) ptx::bulk_wait_all();
    __syncwarp();
}

}  // namespace moe
