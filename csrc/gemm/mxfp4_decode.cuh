// MXFP4 weights as bits: e2m1 codes to e4m3 by table, and the order of K that makes it cheap. Also built by a host
// compiler (tests/cpu/test_mxfp4_kernel.py), which checks every code, scale and fragment. Partner of
// megamoe/quant/mxfp4_images.py, which says how an image is packed.
#pragma once
#include "prelude.cuh"

namespace moe {

// A lane of a wgmma A fragment holds 4-byte words q, q + 4, ..., q + 28 (q = lane % 4) of a row's 128 K bytes. So that
// these 32 values are one scale group, word w of the block lies at word 4 (w % 8) + w / 8, in weights and tokens alike:
// one scale and one table row for each row of a lane, instead of four.
MOE_HOST_DEVICE constexpr u32 permute_k(u32 column) { return column / 4 % 8 * 16 + column / 32 * 4 + column % 4; }

constexpr u32 kDecodeRows = 15;  // binades in which every e2m1 value is an e4m3 value

// The e4m3 bytes of 0, 0.5, 1, 1.5, 2, 3, 4, 6 times 2^(row - 8), the i-th in byte i. Row 2 is the code with two zeros
// below it; the rows above are that with a larger exponent field, the first three reach into e4m3's subnormals.
MOE_HOST_DEVICE constexpr u64 decode_row(u32 row) {
    u64 bytes = 0;
    for (u32 code = 1; code < 8; ++code) {
        const u32 mantissa = code > 1 ? code % 2 * 4 : 0;               // of 8
        const u32 exponent = (code > 1 ? code / 2 : 0) + row;           // e4m3's exponent field + 2
        const u32 byte = exponent > 2 ? (exponent - 2) << 3 | mantissa  // normal
                                      : (8 + mantissa) >> (3 - exponent);
        bytes |= static_cast<u64>(byte) << 8 * code;
    }
    return bytes;
}

// Bytes picked from {high, low} by the four low nibbles of `selector`, whose top bits are zero.
MOE_HOST_DEVICE u32 pick_bytes(u32 low, u32 high, u32 selector) {
#ifdef __CUDA_ARCH__
    u32 picked;  // not __byte_perm: knowing that only 16 bits select, the compiler masks each half apart
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(selector));
    return picked;
#else
    const u64 bytes = static_cast<u64>(high) << 32 | low;
    u32 picked = 0;
    for (u32 i = 0; i < 4; ++i) picked |= static_cast<u32>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return picked;
#endif
}

// Eight codes to eight e4m3 bytes. Magnitude e is in bits 4 e to 4 e + 2; the sign of codes 0 to 3 in bit 8 e + 7, of
// codes 4 to 7 in bit 8 (e - 4) + 3, so that one mask, and one shift for the second half, put it where e4m3 has it.
MOE_HOST_DEVICE void decode_word(u32 word, u32 row_low, u32 row_high, u32& first, u32& second) {
    const u32 magnitudes = word & 0x77777777u;
    first = pick_bytes(row_low, row_high, magnitudes) | (word & 0x80808080u);
    second = pick_bytes(row_low, row_high, magnitudes >> 16) | (word << 4 & 0x80808080u);
}

}  // namespace moe
