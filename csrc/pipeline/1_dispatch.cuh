// dispatch: every rank pushes its routing table to every rank, then each token's row once to each rank that needs it,
// into a slot known in advance: recv_x[source][token]. Nothing is allocated and nothing waits. Partners: wait_heads in
// sched/table.cuh (head_ready); wait_rows in gemm/gather_tokens.cuh and permute_rows in 1_permute.cuh (x_ready).
#pragma once
#include "config.cuh"
#include "debug/faults.cuh"
#include "extras.cuh"
#include "ptx/convert.cuh"
#include "roles.cuh"
#include "sched/replica.cuh"
#include "sync/launch.cuh"

namespace moe {

// Builds of workspaces that may be given an expert plan. Others pay nothing for it.
#ifdef PLANS
constexpr bool kPlans = true;
#else
constexpr bool kPlans = false;
#endif
MOE_DEVICE bool has_plan(const Launch& l) { return kPlans && l.me.replica_map; }
MOE_DEVICE ReplicaMap replica_map(const Launch& l) { return {reinterpret_cast<const u32*>(l.me.replica_map)}; }

// Slot i is token * topk + slot, the shared experts' slots included.
MOE_DEVICE bool is_shared(const Launch& l, u64 i) { return kExtras && shared_experts(l).has(static_cast<u32>(i)); }
MOE_DEVICE i32 shared_idx(const Launch& l, u64 i) { return shared_experts(l).own(l.me.ep_rank, static_cast<u32>(i)); }
MOE_DEVICE u64 given_slot(const Launch& l, u64 i) {
    if constexpr (!kExtras) return i;
    return shared_experts(l).given(static_cast<u32>(is_shared(l, i) ? i - i % l.p.topk : i));  // of the same token
}

// An id as it lies: two words of an int64, or one int32 twice. No branch holds these loads up, so that a lane can have
// several on their way.
struct RawIdx {
    u32 low, high;
};
MOE_DEVICE RawIdx load_topk_idx(const Launch& l, u64 i) {
    const u32 words = l.p.idx_is_int64 ? 2 : 1;
    const u32* p = reinterpret_cast<const u32*>(l.me.topk_idx) + given_slot(l, i) * words;
    return {p[0], p[words - 1]};
}
MOE_DEVICE i32 to_idx(const Launch& l, RawIdx raw) {
    const i32 low = static_cast<i32>(raw.low), high = static_cast<i32>(raw.high);
    if (!l.p.idx_is_int64 || high == low >> 31) return low;
    return high < 0 ? -0x7FFFFFFF : 0x7FFFFFFF;  // saturated: out of range in any model
}
MOE_DEVICE bool is_none(RawIdx raw) { return (raw.low & raw.high) == ~0u; }  // -1
MOE_DEVICE i32 read_topk_idx(const Launch& l, u64 i) { return to_idx(l, load_topk_idx(l, i)); }

// A weight as it lies: the two halves of an fp32, or one bf16 twice.
struct RawWeight {
    u16 low, high;
};
MOE_DEVICE RawWeight load_topk_weight(const Launch& l, u64 i) {
    const u32 halves = l.p.weights_are_bf16 ? 1 : 2;
    const u16* p = reinterpret_cast<const u16*>(l.me.topk_weights) + given_slot(l, i) * halves;
    return {p[0], p[halves - 1]};
}
MOE_DEVICE f32 to_weight(const Launch& l, RawWeight raw) {
    return __uint_as_float(u32(raw.high) << 16 | (l.p.weights_are_bf16 ? 0u : u32(raw.low)));
}

// Experts that the caller may name.
MOE_DEVICE u32 num_logical_experts(const Launch& l) {
    return has_plan(l) ? replica_map(l).num_logical() : l.num_experts() - shared_experts(l).count * l.p.ep_size;
}

// Copies are chosen from the counts of all ranks, by the plan step (sched/chosen.cuh); otherwise by the source alone.
MOE_DEVICE bool chosen_by_counts(const Launch& l) { return has_plan(l) && replica_map(l).choice() != kChoice_static; }

// What the routing table says of an id: the slot over all ranks if the source decides alone, the id if counts do.
MOE_DEVICE i32 table_idx(const Launch& l, i32 id) {
    if (shared_experts(l).count) return shared_experts(l).routed(l.p.ep_size, id);  // never with a plan
    if (!has_plan(l) || id < 0 || chosen_by_counts(l)) return id;
    const ReplicaMap map = replica_map(l);
    if (static_cast<u32>(id) < map.num_logical()) return static_cast<i32>(map.by_source(l.me.ep_rank, id));
    return id | kUnmappedIdBit;  // out of range also where there are more slots than experts
}

// What a source says beside its number of tokens: its order of K, and which layer it calls.
constexpr u32 kHeadLayers = (1u << kHeadLayerBits) - 1;
static_assert(kHeadTokensBits + kHeadLayerBits == 31 && kHeadTokensBits > kMaxTokenBits);
template <class C>
MOE_DEVICE u32 head_mark(const Launch& l) {
    return static_cast<u32>(l.p.layer) << kHeadTokensBits | C::kAheadBit;
}

constexpr u32 kHeadLoads = 4;  // ids and weights that a lane has in flight

// Routing of kHeadSliceTokens tokens a slice: ids and weights to every rank, then one flag each. Slice 0 always goes:
// it brings num_tokens. Small, so that many warps share what every rank waits for.
template <class C>
MOE_DEVICE void push_head(const Launch& l) {
    const u32 lane = lane_id(), me = l.me.ep_rank, num_tokens = l.num_tokens,
              slices = max_u32(1, ceil_div(num_tokens, kHeadSliceTokens));
    for (u32 slice = first_item(l); slice < slices; slice += item_stride(l)) {
        const u32 begin = slice * kHeadSliceTokens * l.p.topk,
                  end = min_u32(begin + kHeadSliceTokens * l.p.topk, num_tokens * l.p.topk);
#pragma unroll 1
        for (u32 base = begin; base < end; base += 32 * kHeadLoads) {
            RawIdx raw_idx[kHeadLoads];
            RawWeight raw_weight[kHeadLoads];
#pragma unroll
            for (u32 b = 0; b < kHeadLoads; ++b) {
                if (base + 32 * b >= end) break;
                const u32 i = min_u32(base + 32 * b + lane, end - 1);
                raw_idx[b] = load_topk_idx(l, i), raw_weight[b] = load_topk_weight(l, i);
            }
#pragma unroll
            for (u32 b = 0; b < kHeadLoads; ++b) {
                if (base + 32 * b >= end) break;
                const u32 i = base + 32 * b + lane;
                if (i >= end) continue;
                const i32 id = is_shared(l, i) ? shared_idx(l, i) : table_idx(l, to_idx(l, raw_idx[b]));
                const f32 weight = is_shared(l, i) ? 1.0f : to_weight(l, raw_weight[b]);
                for (u32 dst = 0; dst < l.p.ep_size; ++dst) {
                    l.head_idx(dst, me)[i] = MOE_FAULT(l, routing, id);
                    l.head_weights(dst, me)[i] = weight;
                }
            }
        }
        if (slice == 0 && lane < l.p.ep_size)
            *l.head_num_tokens(lane, me) = MOE_FAULT(l, count, num_tokens) | head_mark<C>(l);
        __syncwarp();
        if (lane < l.p.ep_size) {
            ptx::fence_acq_rel_sys();  // cumulative over the warp's stores, ordered before it by the warp barrier
            ptx::st_relaxed_sys(l.head_ready(lane, me, slice), MOE_FAULT(l, head, l.epoch));
        }
    }
}

struct QuantizedChunk {
    uint4 values;  // 16 e4m3
    f32 sf;        // of the lane's group of 128, equal in its 8 lanes
};

// 16 bf16 of a lane; 8 lanes hold a group of 128. Bit for bit megamoe/quant/fp8.py: quotients of bf16 values fall on
// ties of e4m3 so often that an inexact division is visible in the layer's output (1.3e-2 relative, measured).
MOE_DEVICE QuantizedChunk quantize_bf16(uint4 a, uint4 b) {
    const u32 pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    f32 v[16], amax = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        v[2 * i] = ptx::bf16_low(pairs[i]), v[2 * i + 1] = ptx::bf16_high(pairs[i]);
        amax = fmaxf(amax, fmaxf(fabsf(v[2 * i]), fabsf(v[2 * i + 1])));
    }
#pragma unroll
    for (u32 d = 1; d < 8; d *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, d));
    const f32 sf = ptx::e4m3_sf(amax), inverse = ptx::reciprocal(sf);
    u32 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const f32* x = v + 4 * i;
        q[i] = ptx::pack_e4m3(ptx::divide(x[0], sf, inverse), ptx::divide(x[1], sf, inverse),
                              ptx::divide(x[2], sf, inverse), ptx::divide(x[3], sf, inverse));
    }
    return {make_uint4(q[0], q[1], q[2], q[3]), sf};
}

// What goes to bytes [column, column + 16) of a row in the order of permute_k, from a row in K order. Word: 4 columns.
template <class Word>
MOE_DEVICE void read_permuted(const Word* row, u32 column, Word (&words)[4]) {
    const Word* group = row + column / kKBlock * (kKBlock / 4);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) words[i] = group[column / 16 % 8 + 8 * i];
}

constexpr i32 kPushLoads = 4;  // of 16 bytes that a lane has in flight: 2048 e4m3 take one latency

// One row to every rank of `dst_mask`, 16 e4m3 a lane at a time.
template <class C>
MOE_DEVICE void push_row(const Launch& l, u32 token, u32 dst_mask, u32 lane) {
    const u32 me = l.me.ep_rank, hidden = l.p.hidden, groups = hidden / kKBlock;
    if (l.p.x_is_fp8) {
        const u8* x = reinterpret_cast<const u8*>(l.me.x) + u64(token) * hidden;
        const f32* x_sf = reinterpret_cast<const f32*>(l.me.x_sf) + u64(token) * groups;
        f32 first_sf = 0;
        if (lane < groups) first_sf = x_sf[lane];
#pragma unroll 1
        for (i32 left = hidden - lane * 16; left > 0; left -= kPushLoads * 512) {
            const u32 column = hidden - left;
            uint4 v[kPushLoads];
#pragma unroll
            for (i32 i = 0; i < kPushLoads; ++i) {
                if (i * 512 >= left) continue;
                if constexpr (C::kDecodesInLoop) {
                    u32 words[4];
                    read_permuted(reinterpret_cast<const u32*>(x), column + i * 512, words);
                    v[i] = make_uint4(words[0], words[1], words[2], words[3]);
                } else {
                    v[i] = reinterpret_cast<const uint4*>(x + column)[i * 32];
                }
            }
            for (u32 rest = dst_mask; rest; rest &= rest - 1) {
                u8* to = l.recv_x(__ffs(rest) - 1, me, token) + column;
#pragma unroll
                for (i32 i = 0; i < kPushLoads; ++i)
                    if (i * 512 < left) ptx::st_v4(to + i * 512, v[i]);
            }
        }
        for (u32 g = lane; g < groups; g += 32) {
            const f32 sf = g == lane ? first_sf : x_sf[g];
            for (u32 rest = dst_mask; rest; rest &= rest - 1) l.recv_x_sf(__ffs(rest) - 1, me, token)[g] = sf;
        }
        return;
    }
    const u16* x = reinterpret_cast<const u16*>(l.me.x) + u64(token) * hidden;
#pragma unroll 1
    for (u32 base = 0; base < hidden; base += 512) {
        const u32 column = base + lane * 16;
        const bool inside = column < hidden;  // whole groups of 8 lanes: hidden is a multiple of 128
        QuantizedChunk q;
        if constexpr (C::kDecodesInLoop) {
            uint2 words[4];
            read_permuted(reinterpret_cast<const uint2*>(x), inside ? column : lane % 8 * 16, words);
            q = quantize_bf16(make_uint4(words[0].x, words[0].y, words[1].x, words[1].y),
                              make_uint4(words[2].x, words[2].y, words[3].x, words[3].y));
        } else {
            const uint4* source = reinterpret_cast<const uint4*>(x + (inside ? column : 0));
            q = quantize_bf16(source[0], source[1]);
        }
        if (!inside) continue;
        for (u32 rest = dst_mask; rest; rest &= rest - 1) {
            const u32 dst = __ffs(rest) - 1;
            ptx::st_v4(l.recv_x(dst, me, token) + column, q.values);
            if (lane % 8 == 0) l.recv_x_sf(dst, me, token)[column / kKBlock] = q.sf;
        }
    }
}

// Slot over all ranks of one row of this rank's tokens. Where counts choose: from the plan step, see push_rows.
MOE_DEVICE i32 row_slot_idx(const Launch& l, bool by_counts, u32 token, u32 k) {
    const u64 i = u64(token) * l.p.topk + k;
    if (is_shared(l, i)) return shared_idx(l, i);
    const i32 id = read_topk_idx(l, i);
    if (!by_counts) return table_idx(l, id);
    return id == -1 ? -1 : static_cast<i32>(ptx::ld_cg(reinterpret_cast<const u32*>(l.chosen(token)) + k));
}

// Rows of this warp's tokens, four behind one fence: it waits for every store in flight.
template <class C>
MOE_DEVICE void push_rows(const Launch& l, SharedStorage<C>& s) {
    const bool by_counts = chosen_by_counts(l);
    if (by_counts) {
        // Partner: build_chosen_list, through mega_moe.cu. Its own waits have deadlines, and it always gets there.
        while (!ptx::ld_acquire_cta_shared(&s.plan_done)) __nanosleep(20);
        if (!__shfl_sync(~0u, s.healthy, 0)) return;
    }
    constexpr u32 kBatch = 4;
    const u32 lane = lane_id(), stride = item_stride(l), me = l.me.ep_rank;
    for (u32 first = first_item(l); first < l.num_tokens; first += kBatch * stride) {
        i32 ids[kBatch];  // all of the batch before the first row: one latency
#pragma unroll
        for (u32 b = 0; b < kBatch; ++b) {
            const u32 token = computed_here(first) + b * stride;
            ids[b] = lane < l.p.topk && token < l.num_tokens ? row_slot_idx(l, by_counts, token, lane) : -1;
        }
        u32 masks = 0;  // lane b: destination ranks of the batch's token b
#pragma unroll
        for (u32 b = 0; b < kBatch; ++b) {
            const bool valid = ids[b] >= 0 && ids[b] < static_cast<i32>(l.num_experts());
            const u32 owner = valid ? 1u << (static_cast<u32>(ids[b]) / l.p.num_local_experts) : 0u;
            const u32 mask = __reduce_or_sync(~0u, owner);
            if (lane == b) masks = mask;
        }
#pragma unroll 1
        for (u32 b = 0, token = first; b < kBatch && token < l.num_tokens; ++b, token += stride)
            push_row<C>(l, token, __shfl_sync(~0u, masks, b), lane);
        __syncwarp();
        ptx::fence_acq_rel_sys();
        for (u32 b = 0; b < kBatch; ++b) {
            const u32 mask = __shfl_sync(~0u, masks, b);
            if (mask >> lane & 1)
                ptx::st_relaxed_sys(l.x_ready(lane, me, first + b * stride), MOE_FAULT(l, rows, l.epoch));
        }
    }
}

}  // namespace moe
