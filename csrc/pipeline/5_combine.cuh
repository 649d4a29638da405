// combine: y[token] = sum of the token's linear2 rows, fp32, in slot order (bitwise reproducible), as bf16 through the
// TMA engine. An item is a token and `combine_columns` of it; an item waits only for its own token's rows.
#pragma once
#include "config.cuh"
#include "pipeline/1_dispatch.cuh"
#include "ptx/copy.cuh"
#include "sync/wait.cuh"

namespace moe {

// Mask of the token's used slots, once all their rows are here. Partner: store_rows in pipeline/store.cuh.
MOE_DEVICE bool wait_slots(const Launch& l, u32 token, u32 lane, u32* used) {
    const i32 id = token < l.num_tokens && lane < l.p.topk ? read_topk_idx(l, u64(token) * l.p.topk + lane) : -1;
    bool ok = true;
    const u64 deadline_ns = l.p.arrive_deadline_ns + 2 * l.p.step_deadline_ns;  // its partners wait for rows first
    if (id != -1)
        ok = wait_acquire_sys(l, l.combine_ready(l.me.ep_rank, token, lane), deadline_ns,
                              {kRole_exchange, kStep_combine, token});
    *used = __ballot_sync(~0u, id != -1);
    return __all_sync(~0u, ok);
}

MOE_DEVICE void add_bf16(f32 (&sum)[8], uint4 v) {
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[2 * i] += ptx::bf16_low(pairs[i]), sum[2 * i + 1] += ptx::bf16_high(pairs[i]);
}

// 8 columns of a lane: two slots' loads in flight at a time, sums in slot order.
MOE_DEVICE uint4 sum_slots(const u16* rows, u32 hidden, u32 used) {
    f32 sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    while (used) {
        const u32 first = __ffs(used) - 1;
        used &= used - 1;
        const uint4 a = ptx::ld_cg_v4(rows + first * hidden);
        if (used) {
            const u32 next = __ffs(used) - 1;
            used &= used - 1;
            const uint4 b = ptx::ld_cg_v4(rows + next * hidden);
            add_bf16(sum, a);
            add_bf16(sum, b);
        } else {
            add_bf16(sum, a);
        }
    }
    return make_uint4(ptx::pack_bf16(sum[0], sum[1]), ptx::pack_bf16(sum[2], sum[3]), ptx::pack_bf16(sum[4], sum[5]),
                      ptx::pack_bf16(sum[6], sum[7]));
}

// The exchange warps' second half. Rows past num_tokens and tokens with no slot give exact zeros.
template <class C>
MOE_DEVICE void combine(const Launch& l, SharedStorage<C>& s, u32 warp, u32 lane) {
    const u32 hidden = l.p.hidden, chunks = ceil_div(hidden, l.p.combine_columns);
    u32 buffer = 0;
    for (u32 item = first_item(l, warp); item < l.me.num_tokens * chunks; item += item_stride(l)) {
        const u32 token = item / chunks, begin = item % chunks * l.p.combine_columns;
        u32 used;
        if (!wait_slots(l, token, lane, &used)) break;
#pragma unroll 1
        for (u32 column = begin; column < min_u32(begin + l.p.combine_columns, hidden); column += 256, buffer ^= 1) {
            const u32 columns = min_u32(256, hidden - column);
            if (lane == 0) ptx::bulk_wait_read<1>();  // the buffer used two steps ago
            __syncwarp();
            if (lane * 8 < columns) {
                const uint4 v = sum_slots(l.combine_y(l.me.ep_rank, token, 0) + column + lane * 8, hidden, used);
                ptx::st_shared_v4(ptx::shared_address(s.y_slice[warp][buffer]) + lane * 16, v);
            }
            ptx::fence_proxy_async();
            __syncwarp();
            if (lane == 0) {
                ptx::bulk_store(reinterpret_cast<u16*>(l.me.y) + u64(token) * hidden + column, s.y_slice[warp][buffer],
                                columns * 2);
                ptx::bulk_commit();
            }
        }
    }
    if (lane == 0) ptx::bulk_wait_all();
    __syncwarp();
}

}  // namespace moe
