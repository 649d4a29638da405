// Fixed-width names and the host/device switch. NVRTC has no standard headers, and the schedule is also built by a host
// compiler.
#pragma once

#ifdef __CUDACC__
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;
using i64 = long long;
#define MOE_HOST_DEVICE __host__ __device__ __forceinline__
#define MOE_DEVICE __device__ __forceinline__
#else
#include <cstdint>
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i32 = std::int32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;
#define MOE_HOST_DEVICE inline
#endif
using f32 = float;

#ifdef __CUDACC_RTC__  // NVRTC has neither offsetof nor the builtin
#define MOE_OFFSETOF(type, member) __INTADDR__(&(((type*)0)->member))
#else
#define MOE_OFFSETOF(type, member) __builtin_offsetof(type, member)
#endif

namespace moe {

MOE_HOST_DEVICE constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
MOE_HOST_DEVICE constexpr u32 align_up(u32 a, u32 b) { return ceil_div(a, b) * b; }
MOE_HOST_DEVICE constexpr u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
MOE_HOST_DEVICE constexpr u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

}  // namespace moe
