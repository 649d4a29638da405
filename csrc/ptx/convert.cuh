// Number formats: fp32 <-> bf16, fp32 -> e4m3, and the 8x8 matrix store that transposes through shared memory.
#pragma once
#include "prelude.cuh"

namespace moe::ptx {

MOE_DEVICE f32 bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
MOE_DEVICE f32 bf16_high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
MOE_DEVICE u32 pack_bf16(f32 low, f32 high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
// Round to nearest even, saturating to +-448; NaN stays NaN.
MOE_DEVICE u16 pack_e4m3(f32 low, f32 high) {
    u16 d;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
    return d;
}
MOE_DEVICE u32 pack_e4m3(f32 a, f32 b, f32 c, f32 d) {
    return static_cast<u32>(pack_e4m3(a, b)) | (static_cast<u32>(pack_e4m3(c, d)) << 16);
}

MOE_DEVICE f32 exp2_approx(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

MOE_DEVICE f32 reciprocal_approx(f32 x) {
    f32 y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Reciprocal to within an ulp: one Newton step on the approximation.
MOE_DEVICE f32 reciprocal(f32 y) {
    const f32 r = reciprocal_approx(y);
    return fmaf(r, fmaf(-y, r, 1.0f), r);
}
// x / y correctly rounded, given reciprocal(y), for normal y and quotient (Markstein, "Computation of elementary
// functions on the IBM RISC System/6000 processor", 1990): the e4m3 format of megamoe/quant/fp8.py asks for it.
MOE_DEVICE f32 divide(f32 x, f32 y, f32 reciprocal_y) {
    const f32 q = x * reciprocal_y;
    return fmaf(fmaf(-y, q, x), reciprocal_y, q);
}
// Scale factor of a group: amax / 448, correctly rounded; amax floored at 1e-10.
MOE_DEVICE f32 e4m3_sf(f32 amax) { return divide(fmaxf(amax, 1e-10f), 448.0f, 1.0f / 448.0f); }

// Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes each).
MOE_DEVICE void stmatrix_x4(u32 row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
MOE_DEVICE void stmatrix_x2_trans(u32 row, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(a), "r"(b)
                 : "memory");
}
MOE_DEVICE void st_shared_u8(u32 address, u32 v) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
MOE_DEVICE void st_shared_u16(u32 address, u16 v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
MOE_DEVICE void st_shared_v4(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
MOE_DEVICE u32 ld_shared_u16(u32 address) {
    u32 v;
    asm volatile("{\n.reg .u16 h;\nld.shared.u16 h, [%1];\ncvt.u32.u16 %0, h;\n}" : "=r"(v) : "r"(address) : "memory");
    return v;
}
MOE_DEVICE uint2 ld_shared_v2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
// Where it stands in the program: the compiler may not bring it forward.
MOE_DEVICE float2 ld_shared_v2_f32(u32 shared) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(shared) : "memory");
    return v;
}
MOE_DEVICE f32 ld_shared_f32(u32 address) {
    f32 v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}
MOE_DEVICE uint4 ld_shared_v4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

}  // namespace moe::ptx
