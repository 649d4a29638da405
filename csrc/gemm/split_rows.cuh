// How the CTAs of a pair split an MXFP4 weight block of 256 rows, and each CTA's warps its half. Also built by a host
// compiler (tests/cpu/test_mxfp4_kernel.py).
#pragma once
#include "params.gen.cuh"
#include "prelude.cuh"

namespace moe {

constexpr u32 kPieceBytes = kMxfp4ScalesOffset / 4;  // codes of two of the 8 warps that an image is packed for

// Which 16 of the block's rows a math warp of CTA `half` has: those of one slab of one image warp. The warps of a wgmma
// A operand need not be neighbours in the image, for it comes from registers. linear1: two of each four image warps,
// whose 64 columns of h are bytes 64 half to 64 half + 63 of a row in the order of permute_k. linear2: four image
// warps, 128 columns of y.
struct SplitRows {
    u32 image_warp, part;  // part: of the image warp's two slabs
    u32 piece;             // of the two that the CTA loads

    MOE_HOST_DEVICE SplitRows(bool second, u32 half, u32 warp) {
        const u32 group = warp / 4, v = warp % 4;
        part = second ? group : v / 2;
        piece = second ? v / 2 : group;
        image_warp = second ? 4 * half + v : 4 * group + 2 * half + v % 2;
    }
    // Where piece i begins in the image.
    MOE_HOST_DEVICE static u32 piece_begin(bool second, u32 half, u32 i) {
        return (second ? 2 * half + i : half + 2 * i) * kPieceBytes;
    }
    // In a stage's weights: the first of the lane's two times 16 bytes of codes, and the scales of its two rows.
    MOE_HOST_DEVICE u32 codes(u32 lane) const {
        return piece * kPieceBytes + image_warp % 2 * (kPieceBytes / 2) + part * 1024 + lane * 16;
    }
    MOE_HOST_DEVICE u32 scales(u32 lane) const { return 2 * kPieceBytes + (image_warp * 32 + lane) * 4 + part * 2; }
    // Row r of the warp's 16 is column() + r of y's 256, or, for r < 8 (gate; up is row r + 8), of h's 128.
    MOE_HOST_DEVICE u32 column(bool second) const {
        return second ? image_warp / 4 * 128 + part * 64 + image_warp % 4 * 16
                      : image_warp / 4 * 64 + part * 32 + image_warp % 4 * 8;
    }
};

}  // namespace moe
