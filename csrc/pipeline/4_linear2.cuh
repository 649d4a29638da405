// linear2's epilogue: rows in bf16 to their owner's combine_y[token][slot]. Weights on M: transposed into staging,
// whence the store warp sends 512 bytes a row, or 256 of a split weight block. Tokens on M: through 2 KB slices, 128
// bytes a row straight from the math warps.
#pragma once
#include "gemm/mainloop.cuh"
#include "gemm/split_rows.cuh"
#include "ptx/convert.cuh"
#include "sched/order.cuh"

namespace moe {

// stmatrix.trans turns (8 columns of y) x (8 tokens) into 16-byte pieces of token rows.
template <class C>
MOE_DEVICE void stage_rows_weights_on_m(const Launch& l, SharedStorage<C>& s, const Accumulator<C>& acc, u32 warp,
                                        u32 lane) {
    constexpr u32 kN = Accumulator<C>::kN;
    const u32 staging = ptx::shared_address(s.staging);
#pragma unroll
    for (u32 part = 0; part < Accumulator<C>::kParts; ++part) {
        const u32 first = C::kSplitsWeights ? SplitRows(true, l.cta % 2, warp).column(true) % C::kTileColumns
                                            : warp / 4 * 128 + part * 64 + warp % 4 * 16;
        const u32 column = first + (lane / 8 % 2) * 8, token = C::kSplitsWeights ? part * kN : 0;
#pragma unroll
        for (u32 j = 0; j < kN / 8; ++j) {
            const f32* d = &acc.sum[part][4 * j];
            ptx::stmatrix_x2_trans(staging + (token + 8 * j + lane % 8) * C::kStagingRowBytes + column * 2,
                                   ptx::pack_bf16(d[0], d[1]), ptx::pack_bf16(d[2], d[3]));
        }
    }
    ptx::fence_proxy_async_shared();  // staging is read next by bulk copies
}

// Four passes of 64 columns: 16 rows x 128 bytes of a warp into its slice (16-byte chunks XORed by row), out as 8 lanes
// a row.
template <class C>
MOE_DEVICE void send_rows_tokens_on_m(const Launch& l, SharedStorage<C>& s, const Accumulator<C>& acc,
                                      const TileSlot& t, const u32* rows, u32 warp, u32 lane) {
    const u32 slice = ptx::shared_address(s.staging) + warp * C::kSliceBytes;
    u16* destination[4];
    u32 valid = 0;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 r = warp * 16 + i * 4 + lane / 8, row = rows[r];
        destination[i] =
            l.combine_y(row_src_rank(row), row_token(row), row_slot(row)) + t.n_block * kNBlock + lane % 8 * 8;
        if (r < t.row_count) valid |= 1u << i;
    }
    const u32 columns = min_u32(kNBlock, l.p.hidden - t.n_block * kNBlock);
#pragma unroll
    for (u32 pass = 0; pass < 4; ++pass) {
#pragma unroll
        for (u32 j = 0; j < 8;
             j +=
             2) {  // two 8-column blocks: matrices (rows 0-7, j), (rows 8-15, j), (rows 0-7, j + 1), (rows 8-15, j + 1)
            const f32* d = &acc.sum[pass / 2][(pass % 2) * 32 + 4 * j];
            const u32 row = lane % 16, chunk = j + lane / 16;
            ptx::stmatrix_x4(slice + swizzle_128b(row, chunk * 16), ptx::pack_bf16(d[0], d[1]),
                             ptx::pack_bf16(d[2], d[3]), ptx::pack_bf16(d[4], d[5]), ptx::pack_bf16(d[6], d[7]));
        }
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const uint4 v = ptx::ld_shared_v4(slice + swizzle_128b(i * 4 + lane / 8, lane % 8 * 16));
            if (valid >> i & 1 && pass * 64 < columns) ptx::st_v4(destination[i] + pass * 64, v);
        }
        __syncwarp();
    }
}

}  // namespace moe
