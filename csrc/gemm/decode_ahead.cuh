// MXFP4 weights where many token blocks read each of them: decoded once a launch, by the exchange warps, from the
// layer's images into FP8 images in the local workspace. What reads those is as for FP8, tile and all. The math warps
// would decode each weight again for every 192 tokens (gemm/mxfp4_split.cuh; benchmarks/notes/0005, 0007).
// Partners: wait_decoded in load_weights.cuh; permute_rows in pipeline/1_permute.cuh gives each warp its turns.
#pragma once
#include "config.cuh"
#include "debug/faults.cuh"
#include "gemm/mxfp4_decode.cuh"
#include "ptx/convert.cuh"
#include "ptx/copy.cuh"
#include "roles.cuh"
#include "sched/order.cuh"

namespace moe {

MOE_DEVICE u32 images_of(const Launch& l, u32 second) {
    return (second ? computed_here(l.n_blocks2()) * (l.p.intermediate / kKBlock)
                   : computed_here(l.n_blocks1()) * (l.p.hidden / kKBlock));
}

// Weight blocks are counted over all local experts, linear1's first; their images lie in the same order.
MOE_DEVICE u32 weight_block(const Launch& l, u32 second, u32 expert, u32 n_block) {
    return second ? computed_here(l.p.num_local_experts) * l.n_blocks1() + expert * l.n_blocks2() + n_block
                  : expert * l.n_blocks1() + n_block;
}
MOE_DEVICE u8* decoded_image(const Launch& l, u32 second, u32 expert, u32 image) {
    const u32 before = second ? l.p.num_local_experts * images_of(l, 0) : 0;
    return l.decoded(before + expert * images_of(l, second) + image);
}

// 16 columns of rows r and r + 8, to `to` and 8 rows on. rows: of the decoder's table, r's lowest; masked, since a slot
// without an expert holds anything.
MOE_DEVICE void decode_piece(u8* to, uint4 codes, u32 rows, const u64* decode_rows) {
#pragma unroll
    for (u32 upper = 0; upper < 2; ++upper) {
        const uint2 row =
            *reinterpret_cast<const uint2*>(reinterpret_cast<const u8*>(decode_rows) + (rows >> 8 * upper & 0x78));
        uint4 out;
        decode_word(upper ? codes.y : codes.x, row.x, row.y, out.x, out.y);
        decode_word(upper ? codes.w : codes.z, row.x, row.y, out.z, out.w);
        ptx::st_v4(to + upper * 8 * kKBlock, out);
    }
}

// One exchange warp's part in it: every item_stride-th image, in the order in which tiles first want them: linear1 of
// some experts, then linear2 of the first one after linear1 of the next one. Where the warp stands lies in shared
// memory: rows on their way take its registers.
template <class C>
struct DecodeAhead {
    const Launch& l;
    SharedStorage<C>& s;

    MOE_DEVICE DecodeTurn& turn() const { return s.decode_turn[warp_id() - kExchangeWarp]; }
    MOE_DEVICE void start() const {
        if (lane_id() == 0) turn() = {0, ~0u, first_item(l)};
        __syncwarp();
    }

    MOE_DEVICE u32 item() const { return first_item(l) + turn().done * item_stride(l); }
    MOE_DEVICE TileOrder order() const {
        return {l.p.num_local_experts, images_of(l, 0), images_of(l, 1), 1, static_cast<u32>(l.p.decode_lag)};
    }
    MOE_DEVICE bool is_done() const { return item() >= order().num_tiles(); }
    // Rows that are to be copied before the next image: as large a part of them as of the images.
    MOE_DEVICE u32 rows_due(u32 rows) const {
        return is_done() ? rows : static_cast<u32>(u64(rows) * item() / order().num_tiles());
    }
    MOE_DEVICE void advance_rows(u32 count) const {
        __syncwarp();
        if (lane_id() == 0) turn().next_row += count * item_stride(l);
        __syncwarp();
    }

    // The last image of a weight block raises its flag. Completion chain: the warps' stores -> warp barrier ->
    // decode_done -> its last arriver -> decoded_ready.
    MOE_DEVICE void publish() const {
        __syncwarp();
        if (lane_id() == 0 && turn().unpublished != ~0u) {
            const u32 block = turn().unpublished;
            turn().unpublished = ~0u;
            const u32 k_blocks = (block < weight_block(l, 1, 0, 0) ? l.p.hidden : l.p.intermediate) / kKBlock;
            if (ptx::atom_add_acq_rel_gpu(l.decode_done(block), 1) + 1 == k_blocks) {
                ptx::st_relaxed_gpu(l.decode_done(block), 0);
                ptx::st_release_gpu(l.decoded_ready(block), MOE_FAULT(l, decoded, l.epoch));
            }
        }
    }

    // The next image, if there is one; the turn before's is published while this one's first codes are on their way.
    // Waits for nobody. planned: experts without rows are known, and their images only counted.
    MOE_DEVICE void step(bool planned) const {
        if (is_done()) return;
        const u32 lane = lane_id();
        const Tile tile = order().at(item());
        const u32 second = tile.is_linear2, expert = tile.m_block;
        const u32 k_blocks = (second ? l.p.intermediate : l.p.hidden) / kKBlock;
        const u32 block = weight_block(l, second, expert, tile.n_block / k_blocks);
        if (planned && s.row_offset[expert] == s.row_offset[expert + 1]) return next(block);
        const u8* from = reinterpret_cast<const u8*>(second ? l.me.linear2 : l.me.linear1) +
                         (u64(expert) * images_of(l, second) + tile.n_block) * kMxfp4ImagePitchBytes;
        decode_image(from, decoded_image(l, second, expert, tile.n_block), lane, [&] { next(block); });
    }
    MOE_DEVICE void next(u32 block) const {
        publish();
        if (lane_id() == 0) turn().done += 1, turn().unpublished = block;
        __syncwarp();
    }

    // An image is 8 units, each what a math warp would decode of it (gemm/mxfp4.cuh), and a unit four pieces of a lane:
    // in each of two slabs, of rows r and r + 8, one half of the columns [32 q, 32 q + 32) of the even neighbour, and
    // of the odd one. So two lanes' stores fill sectors of 32 bytes. behind_loads(): called when the first loads are on
    // their way.
    template <class F>
    MOE_DEVICE void decode_image(const u8* from, u8* to, u32 lane, F behind_loads) const {
        // Each lane copies and reads its own bytes.
        u32 slot[kDecodeRing];
        const u32 ring = ptx::shared_address(s.exchange_buffer[warp_id() - kExchangeWarp][0]) + lane * 16;
        const u8* rows_from = from + kMxfp4ScalesOffset + lane / 2 * 8;
        uint2 next_rows = ptx::ld_cg_v2(rows_from);
        const f32 sf = ptx::ld_cg(reinterpret_cast<const f32*>(from + kMxfp4ImageSfOffset) + lane % 4);
        from += lane % 2 * 512 + lane / 2 * 32;
#pragma unroll
        for (u32 i = 0; i < kDecodeRing; ++i) slot[i] = ring + i * 512, load_piece(slot[i], from, i, true);
        behind_loads();
        reinterpret_cast<f32*>(to + kFp8ImageSfOffset)[lane % 4] = sf;  // eight lanes each
        const u32 at = swizzle_128b(lane / 4, lane % 4 / 2 * 64 + lane % 2 * 16);
        const i32 to_odd = static_cast<i32>(at ^ 32) - static_cast<i32>(at);
        to += at;
#pragma unroll 1
        for (u32 unit = 0; unit < 8; ++unit) {
            const uint2 rows = next_rows;
            rows_from += 128;
            if (unit < 7) next_rows = ptx::ld_cg_v2(rows_from);
#pragma unroll
            for (u32 piece = 0; piece < 4; ++piece) {
                ptx::cp_async_wait<kDecodeRing - 1>();
                const uint4 codes = ptx::ld_shared_v4(slot[piece % kDecodeRing]);
                // Into the place just read.
                load_piece(slot[piece % kDecodeRing], from, piece + kDecodeRing, piece == 0 || unit < 7);
                decode_piece(to + piece / 2 * 64 * kKBlock + (piece % 2 ? to_odd : 0), codes,
                             (piece % 2 ? rows.y : rows.x) >> piece / 2 * 16, s.decode_rows);
            }
            static_assert(kDecodeRing == 3);  // so four pieces on, the ring has turned by one
            const u32 first = slot[0];
            slot[0] = slot[1], slot[1] = slot[2], slot[2] = first;
            from += 2048, to += (unit == 3 ? 128 - 48 : 16) * kKBlock;
        }
    }

    MOE_DEVICE static void load_piece(u32 slot, const u8* from, u32 piece, bool wanted) {
        if (wanted) ptx::cp_async_16(slot, from + piece / 2 * 1024 + piece % 2 * 16, true);
        ptx::cp_async_commit();
    }
};

}  // namespace moe
