// swiglu: linear1's epilogue. h = silu(gate) * up * topk_weight, or gpt-oss's variant, requantized to e4m3 per row and
// 128 columns, laid out in the staging buffer as the stage image that linear2 will load: swizzled rows, then their
// scale factors. Partner: store_h.
#pragma once
#include "extras.cuh"
#include "gemm/mainloop.cuh"
#include "gemm/split_rows.cuh"
#include "ptx/convert.cuh"

namespace moe {

// gate <= limit, |up| <= limit, ahead of swiglu: most models have no limit, and in line the comparisons are a third of
// its instructions.
template <class C>
MOE_DEVICE void clamp_sums(Accumulator<C>& acc, f32 limit) {
    if (limit == __int_as_float(0x7F800000)) return;
#pragma unroll
    for (u32 part = 0; part < Accumulator<C>::kParts; ++part)
#pragma unroll
        for (u32 i = 0; i < Accumulator<C>::kN / 2; ++i) {
            const bool is_up = C::kWeightsOnM ? i / 2 % 2 : i / 4 % 2;
            f32& sum = acc.sum[part][i];
            if (sum > limit) sum = limit;  // comparisons, not fmin: NaN must stay NaN
            if (is_up && sum < -limit) sum = -limit;
        }
}

MOE_DEVICE f32 swiglu(const Launch& l, f32 gate, f32 up, f32 weight) {
    if constexpr (kExtras) up += l.p.up_shift;
    const f32 exponent = kExtras ? l.p.gate_exponent : -1.4426950408889634f;  // exp(-x) = 2^(-x log2 e)
    return gate * ptx::reciprocal_approx(1.0f + ptx::exp2_approx(gate * exponent)) * up * weight;
}

// Where h column `column` of 128 lies in a row of the image: linear2's weights must lie in the same order of K.
template <class C>
MOE_DEVICE u32 h_byte(u32 column) {
    return C::kDecodesInLoop ? permute_k(column) : column;
}

// Weights on M: a thread holds gate (row r) and up (row r + 8) of h column 8 (4 slab + warp % 4) + r, for tokens
// 8 j + 2 q + {0, 1}.
template <class C>
MOE_DEVICE void quantize_weights_on_m(const Launch& l, SharedStorage<C>& s, Accumulator<C>& acc, const f32* weights,
                                      u32 warp, u32 lane) {
    constexpr u32 kTokens = C::kBlockTokens;
    const u32 r = lane / 4, q = lane % 4;
    // h overwrites sum[part][4 j + c], c = 0, 1
#pragma unroll
    for (u32 j = 0; j < kTokens / 8; ++j) {
        f32 amax[2] = {0, 0};
#pragma unroll
        for (u32 c = 0; c < 2; ++c) {
            const f32 weight = weights[8 * j + 2 * q + c];
#pragma unroll
            for (u32 part = 0; part < 2; ++part) {
                const f32 h = swiglu(l, acc.sum[part][4 * j + c], acc.sum[part][4 * j + 2 + c], weight);
                acc.sum[part][4 * j + c] = h;
                amax[c] = fmaxf(amax[c], fabsf(h));
            }
#pragma unroll
            for (u32 d = 4; d < 32; d *= 2) amax[c] = fmaxf(amax[c], __shfl_xor_sync(~0u, amax[c], d));
        }
        if (r == 0) *reinterpret_cast<float2*>(&s.row_amax[warp][8 * j + 2 * q]) = make_float2(amax[0], amax[1]);
    }
    ptx::named_barrier_sync<kBarrierMath, kMathWarps * 32>();
    f32* sf = reinterpret_cast<f32*>(s.staging + C::kTokensBytes);
    const u32 thread = warp * 32 + lane;
    if (thread < kTokens) {
        f32 amax = 0;
#pragma unroll
        for (u32 w = 0; w < kMathWarps; ++w) amax = fmaxf(amax, s.row_amax[w][thread]);
        sf[thread] = ptx::e4m3_sf(amax);
        // The reciprocal suffices here: h is fp32, so quotients rarely lie on a tie of e4m3; in dispatch they often do.
        s.row_scale[thread] = ptx::reciprocal(ptx::e4m3_sf(amax));
    }
    ptx::named_barrier_sync<kBarrierMath, kMathWarps * 32>();
    const u32 staging = ptx::shared_address(s.staging);
#pragma unroll
    for (u32 j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (u32 c = 0; c < 2; ++c) {
            const u32 token = 8 * j + 2 * q + c;
            const f32 scale = s.row_scale[token];
            const u32 pair = ptx::pack_e4m3(acc.sum[0][4 * j + c] * scale, acc.sum[1][4 * j + c] * scale);
            const u32 column =
                warp / 4 * 64 + warp % 4 * 8 + r;  // slab 2 (warp / 4); the other slab lies 32 columns on
            ptx::st_shared_u8(staging + swizzle_128b(token, h_byte<C>(column)), pair & 0xFF);
            ptx::st_shared_u8(staging + swizzle_128b(token, h_byte<C>(column + 32)), pair >> 8);
        }
    }
}

// Each CTA of a pair has 64 of the 128 columns: they exchange their largest values, and a row's is the larger of both.
// Two buffers, in turn: a CTA that has read the other's values of this tile may send its own of the next linear1 tile
// while the other still reads those of this one. Two mbarriers, for the same reason: with one, its arrivals for the
// next tile could complete a further phase before all of the other's warps have seen this one.
template <class C>
MOE_DEVICE f32 largest_of_pair(const Launch& l, SharedStorage<C>& s, f32 amax, u32 token) {
    const u32 turn = s.amax_turn, buffer = turn % 2, other = l.cta % 2 ^ 1;
    ptx::st_shared_cluster(&s.partner_amax[buffer][token], other, __float_as_uint(amax));
    __syncwarp();
    if (token % 32 == 0) ptx::mbarrier_arrive_release_cluster(&s.amax_full[buffer], other);
    wait_mbarrier_acquire_cluster(&s.amax_full[buffer], turn / 2);
    return fmaxf(amax, __uint_as_float(s.partner_amax[buffer][token]));
}

// Of 2 kHalf values in each of the lanes that differ in `lane_bit` alone, the larger ones of two lanes, a half each.
template <u32 kHalf>
MOE_DEVICE void halve_amax(f32* amax, u32 lane, u32 lane_bit) {
    const bool upper = lane & lane_bit;
#pragma unroll
    for (u32 i = 0; i < kHalf; ++i) {
        const f32 other = __shfl_xor_sync(~0u, upper ? amax[i] : amax[i + kHalf], lane_bit);
        amax[i] = fmaxf(upper ? amax[i + kHalf] : amax[i], other);
    }
}

// Half a weight block: a thread holds gate (row r) and up (row r + 8) of one h column, for tokens
// 48 chunk + 8 j + 2 q + {0, 1}.
template <class C>
MOE_DEVICE void quantize_split(const Launch& l, SharedStorage<C>& s, Accumulator<C>& acc, const f32* weights, u32 warp,
                               u32 lane) {
    constexpr u32 kChunk = Accumulator<C>::kN, kChunks = Accumulator<C>::kParts, kBlocks = kChunk / 8;
    constexpr u32 kValues = C::kBlockTokens / 4;  // tokens of a thread
    const u32 r = lane / 4, q = lane % 4, thread = warp * 32 + lane;
    f32 amax[kValues];  // of the thread's tokens; h overwrites sum[chunk][4 j + c], c = 0, 1
#pragma unroll
    for (u32 chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
        for (u32 j = 0; j < kBlocks; ++j) {
            const float2 weight = *reinterpret_cast<const float2*>(weights + chunk * kChunk + 8 * j + 2 * q);
            f32* d = &acc.sum[chunk][4 * j];
            d[0] = swiglu(l, d[0], d[2], weight.x), d[1] = swiglu(l, d[1], d[3], weight.y);
            amax[2 * (chunk * kBlocks + j)] = fabsf(d[0]), amax[2 * (chunk * kBlocks + j) + 1] = fabsf(d[1]);
        }
    halve_amax<kValues / 2>(amax, lane, 16);
    halve_amax<kValues / 4>(amax, lane, 8);
    halve_amax<kValues / 8>(amax, lane, 4);  // leaves the r-th eighth of the values
#pragma unroll
    for (u32 i = 0; i < kValues / 8; ++i) {
        const u32 value = r * (kValues / 8) + i;
        s.row_amax[warp][value / 2 * 8 + 2 * q + value % 2] = amax[i];
    }
    ptx::named_barrier_sync<kBarrierMath, kMathWarps * 32>();
    f32* sf = reinterpret_cast<f32*>(s.staging + C::kTokensBytes);
    if (thread < C::kBlockTokens) {
        f32 row = 0;
#pragma unroll
        for (u32 w = 0; w < kMathWarps; ++w) row = fmaxf(row, s.row_amax[w][thread]);
        row = largest_of_pair(l, s, row, thread);
        sf[thread] = ptx::e4m3_sf(row);
        s.row_scale[thread] = ptx::reciprocal(ptx::e4m3_sf(row));  // suffices: see quantize_weights_on_m
    }
    ptx::named_barrier_sync<kBarrierMath, kMathWarps * 32>();
    if (thread == 0) s.amax_turn = (s.amax_turn + 1) % 4;
    const u32 staging = ptx::shared_address(s.staging);
    const u32 column = h_byte<C>(SplitRows(false, l.cta % 2, warp).column(false) + r);
#pragma unroll
    for (u32 chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
        for (u32 j = 0; j < kBlocks; ++j) {
            const u32 token = chunk * kChunk + 8 * j + 2 * q;
            const float2 scale = *reinterpret_cast<const float2*>(&s.row_scale[token]);
            const u32 pair = ptx::pack_e4m3(acc.sum[chunk][4 * j] * scale.x, acc.sum[chunk][4 * j + 1] * scale.y);
            ptx::st_shared_u8(staging + swizzle_128b(token, column), pair & 0xFF);
            ptx::st_shared_u8(staging + swizzle_128b(token + 1, column), pair >> 8);
        }
}

// Tokens on M: a thread holds rows r and r + 8, and of each half the h columns 64 half + 8 j + 2 q + {0, 1}.
template <class C>
MOE_DEVICE void quantize_tokens_on_m(const Launch& l, SharedStorage<C>& s, Accumulator<C>& acc, const f32* weights,
                                     u32 warp, u32 lane) {
    const u32 q = lane % 4, staging = ptx::shared_address(s.staging);
    f32* sf = reinterpret_cast<f32*>(s.staging + C::kTokensBytes);
#pragma unroll
    for (u32 upper = 0; upper < 2; ++upper) {
        const u32 row = warp * 16 + lane / 4 + upper * 8;
        const f32 weight = weights[row];
        f32 amax = 0;
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
#pragma unroll
            for (u32 j = 0; j < 8; ++j)
#pragma unroll
                for (u32 c = 0; c < 2; ++c) {
                    const u32 i = 8 * j + 2 * upper + c;  // gate columns; up lies 4 registers on
                    const f32 h = swiglu(l, acc.sum[half][i], acc.sum[half][i + 4], weight);
                    acc.sum[half][i] = h;
                    amax = fmaxf(amax, fabsf(h));
                }
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1));
        amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
        const f32 scale = ptx::reciprocal(ptx::e4m3_sf(amax));
        if (q == 0) sf[row] = ptx::e4m3_sf(amax);
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                const u32 i = 8 * j + 2 * upper;
                ptx::st_shared_u16(staging + swizzle_128b(row, half * 64 + j * 8 + q * 2),
                                   ptx::pack_e4m3(acc.sum[half][i] * scale, acc.sum[half][i + 1] * scale));
            }
    }
}

template <class C>
MOE_DEVICE void swiglu_and_quantize(const Launch& l, SharedStorage<C>& s, Accumulator<C>& acc, u32 slot, u32 warp,
                                    u32 lane) {
    clamp_sums(acc, l.p.swiglu_limit);
    if constexpr (C::kSplitsWeights) {
        quantize_split(l, s, acc, s.tile_weights[slot], warp, lane);
    } else if constexpr (C::kWeightsOnM) {
        quantize_weights_on_m(l, s, acc, s.tile_weights[slot], warp, lane);
    } else {
        quantize_tokens_on_m(l, s, acc, s.tile_weights[slot], warp, lane);
    }
    ptx::fence_proxy_async_shared();  // staging is read next by a bulk copy
}

}  // namespace moe
