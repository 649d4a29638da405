// Biases of both linears, added to a tile's fp32 sums between K loop and epilogue; only in builds with -DEXTRAS.
// linear2's counts once a row, times the row's top-k weight: h brings that weight along, a bias does not.
#pragma once
#include "config.cuh"
#include "extras.cuh"
#include "gemm/mainloop_sums.cuh"
#include "gemm/split_rows.cuh"
#include "roles.cuh"
#include "sync/wait.cuh"

namespace moe {

// linear1: a tile's 128 gate biases, whose up biases lie `intermediate` further on. linear2: those of its columns of y.
// Null in layers without.
MOE_DEVICE const f32* tile_bias(const Launch& l, const TileSlot& t) {
    const bool second = t.kind == kTile_linear2;
    const f32* all = reinterpret_cast<const f32*>(second ? rank_biases(l).linear2 : rank_biases(l).linear1);
    if (all == nullptr) return nullptr;
    const u32 width = second ? l.p.hidden : 2 * l.p.intermediate;
    return all + u64(t.expert) * width + t.n_block * (second ? kNBlock : 128);
}

// A thread holds weight rows r and r + 8 of each slab, for tokens 8 j + 2 q + {0, 1}: gate and up of one h column, or
// two columns of y.
template <class C>
MOE_DEVICE void add_bias_weights_on_m(const Launch& l, Accumulator<C>& acc, const f32* bias, const f32* weights,
                                      bool second, u32 columns) {
    constexpr u32 kN = Accumulator<C>::kN;
    const u32 warp = warp_id(), r = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (u32 part = 0; part < Accumulator<C>::kParts; ++part) {
        const u32 token = C::kSplitsWeights ? part * kN : 0;
        const u32 low = C::kSplitsWeights ? SplitRows(second, l.cta % 2, warp).column(second) + r
                        : second          ? warp / 4 * 128 + part * 64 + warp % 4 * 16 + r  //
                                          : warp / 4 * 64 + part * 32 + warp % 4 * 8 + r;
        if (low >= columns) continue;  // for all of a warp: columns is a multiple of 128
        const f32 first = bias[low], other = bias[low + (second ? 8 : l.p.intermediate)];
#pragma unroll
        for (u32 j = 0; j < kN / 8; ++j)
#pragma unroll
            for (u32 c = 0; c < 2; ++c) {
                const f32 weight = second ? weights[token + 8 * j + 2 * q + c] : 1.0f;
                acc.sum[part][4 * j + c] += weight * first;
                acc.sum[part][4 * j + 2 + c] += weight * other;
            }
    }
}

// A thread holds rows r and r + 8 of its warp's 16, and of each half's 8-column blocks j the columns 2 q + {0, 1}:
// in linear1 gate and up blocks alternate.
template <class C>
MOE_DEVICE void add_bias_tokens_on_m(const Launch& l, Accumulator<C>& acc, const f32* bias, const f32* weights,
                                     bool second, u32 columns) {
    const u32 row = warp_id() * 16 + lane_id() / 4, q = lane_id() % 4;
    const f32 low = second ? weights[row] : 1.0f, high = second ? weights[row + 8] : 1.0f;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        if (second && half * 128 >= columns) continue;
#pragma unroll
        for (u32 j = 0; j < 16; ++j) {
            const u32 column = second ? half * 128 + 8 * j : half * 64 + j / 2 * 8 + j % 2 * l.p.intermediate;
            const float2 b = *reinterpret_cast<const float2*>(bias + column + 2 * q);
            acc.sum[half][4 * j + 0] += low * b.x;
            acc.sum[half][4 * j + 1] += low * b.y;
            acc.sum[half][4 * j + 2] += high * b.x;
            acc.sum[half][4 * j + 3] += high * b.y;
        }
    }
}

// All math warps. Sums of rows and columns past the end may hold anything after it, as before.
template <class C>
MOE_DEVICE void add_bias(const Launch& l, SharedStorage<C>& s, Accumulator<C>& acc, const TileSlot& t) {
    const f32* bias = tile_bias(l, t);
    if (bias == nullptr) return;
    const bool second = t.kind == kTile_linear2;
    const f32* weights = s.tile_weights[t.number % kTileSlots];
    // Gathered rows: their weights came with the tile's first stage. Partner: name_rows.
    if constexpr (C::kInExpertOrder) wait_mbarrier(&s.names_full[t.number % kTileSlots], t.number / kTileSlots & 1);
    const u32 columns = second ? min_u32(kNBlock, l.p.hidden - t.n_block * kNBlock) : 128;
    if constexpr (C::kWeightsOnM) add_bias_weights_on_m(l, acc, bias, weights, second, columns);
    else add_bias_tokens_on_m(l, acc, bias, weights, second, columns);
}

}  // namespace moe
