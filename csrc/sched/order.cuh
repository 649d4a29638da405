// The order of all tiles of a launch, as arithmetic: the i-th ticket is a pure function of the block counts.
// Groups of token blocks run linear1; `lag` groups later the same blocks run linear2 (expert waves with a fixed lag).
// Every tile waits only for tiles earlier in this order, which is what makes the tickets deadlock-free.
#pragma once
#include "prelude.cuh"

namespace moe {

struct Tile {
    u32 is_linear2;  // 0: linear1 (+ swiglu), 1: linear2
    u32 m_block;     // token block, counted over all local experts
    u32 n_block;     // block of 256 weight rows
};

struct TileOrder {
    u32 num_m_blocks;          // token blocks of this rank
    u32 n_blocks1, n_blocks2;  // weight blocks of linear1, linear2
    u32 group, lag;            // token blocks a group; groups between linear1 and linear2 of the same block

    MOE_HOST_DEVICE u32 num_groups() const { return ceil_div(num_m_blocks, group); }
    MOE_HOST_DEVICE u32 used_lag() const { return min_u32(max_u32(lag, 1), num_groups()); }
    MOE_HOST_DEVICE u32 num_tiles() const { return num_m_blocks * (n_blocks1 + n_blocks2); }

    // Inside a group the weight block is innermost. So the rows of a token block are done long before those of the
    // group's last one: linear2 finds them early, and of the last group not all are summed after the last tile.
    MOE_HOST_DEVICE Tile inside(u32 is_linear2, u32 g, u32 i) const {
        const u32 n_blocks = is_linear2 ? n_blocks2 : n_blocks1;
        return {is_linear2, g * group + i / n_blocks, i % n_blocks};
    }

    MOE_HOST_DEVICE Tile at(u32 i) const {
        const u32 groups = num_groups(), lag_ = used_lag();
        const u32 head = min_u32(lag_ * group, num_m_blocks) * n_blocks1;  // linear1 of the first `lag` groups
        if (i < head) return inside(0, i / (group * n_blocks1), i % (group * n_blocks1));
        i -= head;
        const u32 steady =
            groups > lag_ ? (num_m_blocks - lag_ * group) * n_blocks1 + (groups - lag_) * group * n_blocks2 : 0;
        if (i <
            steady) {  // phase p: linear1 of group lag + p, then linear2 of group p; only the last linear1 can be short
            const u32 p = i / (group * (n_blocks1 + n_blocks2)), g1 = lag_ + p;
            i -= p * group * (n_blocks1 + n_blocks2);
            const u32 linear1_tiles = min_u32(group, num_m_blocks - g1 * group) * n_blocks1;
            return i < linear1_tiles ? inside(0, g1, i) : inside(1, p, i - linear1_tiles);
        }
        i -= steady;
        const u32 g = i / (group * n_blocks2);
        return inside(1, groups - lag_ + g, i - g * group * n_blocks2);
    }
};

// Two sequences merged in proportion, each in its own order: how many of the first `count` come from the first one.
// ratio = ceil(2^32 first / all), and both are there.
MOE_HOST_DEVICE u32 merged_first(u32 count, u32 ratio) { return static_cast<u32>(u64(count) * ratio >> 32); }

// Last index e with offsets[e] <= x: the expert of a token block. offsets has count + 1 entries; empty experts are
// skipped.
template <class T>
MOE_HOST_DEVICE u32 find_expert(const T* offsets, u32 count, u32 x) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (offsets[middle] <= x) low = middle;
        else high = middle;
    }
    return low;
}

// A row's name, 32 bits: source rank (8), token (20), slot (4).
constexpr u32 kMaxTokenBits = 20, kMaxSlotBits = 4;
MOE_HOST_DEVICE u32 pack_row(u32 src_rank, u32 token, u32 slot) {
    return (src_rank << kMaxTokenBits | token) << kMaxSlotBits | slot;
}
MOE_HOST_DEVICE u32 row_src_rank(u32 row) { return row >> (kMaxTokenBits + kMaxSlotBits); }
MOE_HOST_DEVICE u32 row_token(u32 row) { return row >> kMaxSlotBits & ((1u << kMaxTokenBits) - 1); }
MOE_HOST_DEVICE u32 row_slot(u32 row) { return row & ((1u << kMaxSlotBits) - 1); }

// Byte of (row, byte column) in a tile of 128-byte rows with 128B swizzle: 16-byte chunks XORed by row % 8.
MOE_HOST_DEVICE u32 swizzle_128b(u32 row, u32 byte) { return row * 128 + (byte ^ ((row & 7) << 4)); }

}  // namespace moe
