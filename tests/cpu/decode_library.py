"""The exchange warps' turns with decode-ahead (csrc/gemm/decode_ahead.cuh, permute_rows in csrc/pipeline/1_permute.cuh)
built by the host's compiler, a lane at a time. What lies around them is replaced: copies to shared memory land when
they are waited for, and a log says who did what, in words of (event, a, b, c)."""

import ctypes
import re
from pathlib import Path

from tests.cpu.host_library import CSRC, build_library

DECODED, PUBLISHED, RAISED, ROWS = range(4)
"""Events: image a's place is asked for; one more image of block a is done; block a is ready; rows a, a + c, ... < b
are copied."""

CONFIG = """
#pragma once
#include "params.gen.cuh"
#include "prelude.cuh"
#define MOE_DEVICE inline
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
template <class T> T __shfl_sync(u32, T v, u32) { return v; }
inline bool __all_sync(u32, bool v) { return v; }
inline u32 __ballot_sync(u32, bool v) { return v; }
inline void __syncwarp() {}
namespace moe {
%s
enum Logged : u32 { kDecoded, kPublished, kRaised, kRows };
inline u32 *log_at, log_count, log_room;
inline void log(u32 event, u32 a, u32 b = 0, u32 c = 0) {
    if (log_count++ >= log_room) return;
    *log_at++ = event, *log_at++ = a, *log_at++ = b, *log_at++ = c;
}
inline u32 the_lane, the_warp, polls_before_plan;
inline u32 lane_id() { return the_lane; }
inline u32 warp_id() { return the_warp; }
inline u32 computed_here(u32 v) { return v; }
constexpr u32 kExchangeWarp = 12;

struct Many { static constexpr bool kDecodesAhead = true; static constexpr u32 kBlockTokens = 128; };
template <class C> struct SharedStorage {
    u32 row_offset[kMaxLocalExperts + 1], plan_done, healthy;
    u16 block_offset[kMaxLocalExperts + 1];
    DecodeTurn decode_turn[kExchangeWarps];
    u8 exchange_buffer[kExchangeWarps][kDecodeRing][512];
    u64 decode_rows[16];
};
struct Launch {
    u32 cta, num_ctas, epoch;
    struct { u32 num_local_experts, hidden, intermediate, decode_lag, step_deadline_ns; } p;
    struct { const u8 *linear1, *linear2; u32 ep_rank; } me;
    u32 *done, *ready;
    u8* memory;
    u32 n_blocks1() const { return p.intermediate / 128; }
    u32 n_blocks2() const { return ceil_div(p.hidden, 256); }
    u8* decoded(u32 image) const {
        log(kDecoded, image);
        return memory;
    }
    u32* decode_done(u32 block) const { return done + block; }
    u32* decoded_ready(u32 block) const { return ready + block; }
    // Named by the templates that copy rows, which are not built.
    u32* x_image_ready(u32) const { return ready; }
    const u32* x_ready(u32, u32, u32) const { return ready; }
    const u8* recv_x(u32, u32, u32) const { return memory; }
    const f32* recv_x_sf(u32, u32, u32) const { return nullptr; }
    u8* x_image(u32, u32, u32) const { return memory; }
    const u32* row_list() const { return ready; }
};
inline Launch launch;
inline SharedStorage<Many> shared;
inline u32 first_item(const Launch& l) { return (warp_id() - kExchangeWarp) * l.num_ctas + l.cta; }
inline u32 item_stride(const Launch& l) { return l.num_ctas * kExchangeWarps; }
inline bool copy_rows(const Launch& l, const SharedStorage<Many>&, u32 begin, u32 end) {  // before the template
    log(kRows, begin, end, item_stride(l));
    return true;
}
struct Story { u32 role, step, index; };
inline bool wait_acquire_sys(const Launch&, const u32*, u64, Story) { return true; }
}
"""

PTX = """
#pragma once
#include <cstring>
#include <deque>
#include "config.cuh"
namespace moe::ptx {
template <class T> T at(const void* p) { T v; std::memcpy(&v, p, sizeof v); return v; }
inline u32 shared_address(const void* p) {
    return static_cast<u32>(static_cast<const u8*>(p) - reinterpret_cast<const u8*>(&shared));
}
inline uint4 ld_shared_v4(u32 slot) { return at<uint4>(reinterpret_cast<u8*>(&shared) + slot); }
inline uint2 ld_cg_v2(const u8* p) { return at<uint2>(p); }
inline uint4 ld_cg_v4(const u8* p) { return at<uint4>(p); }
template <class T> T ld_cg(const T* p) { return *p; }
inline void st_v4(u8* p, uint4 v) { std::memcpy(p, &v, 16); }

struct Copy { u32 slot; const u8* from; };
inline std::deque<std::deque<Copy>> groups{1};
inline void cp_async_16(u32 slot, const u8* from, bool) { groups.back().push_back({slot, from}); }
inline void cp_async_commit() { groups.emplace_back(); }
template <int kOpen> void cp_async_wait() {
    for (; groups.size() > kOpen + 1; groups.pop_front())
        for (Copy c : groups.front()) std::memcpy(reinterpret_cast<u8*>(&shared) + c.slot, c.from, 16);
}

inline u32 atom_add_acq_rel_gpu(u32* p, u32 v) {
    log(kPublished, static_cast<u32>(p - launch.done));
    *p += v;
    return *p - v;
}
inline void st_relaxed_gpu(u32* p, u32 v) { *p = v; }
inline void st_release_gpu(u32* p, u32 v) {
    log(kRaised, static_cast<u32>(p - launch.ready));
    *p = v;
}
inline void fence_acq_rel_gpu() {}
inline u32 ld_acquire_sys(const u32* p) { return *p; }
inline bool ld_acquire_cta_shared(const u32*) { return polls_before_plan == 0 || polls_before_plan-- == 0; }
}
"""

SOURCE = """
#include "pipeline/1_permute.cuh"
using namespace moe;
extern "C" {
// One exchange warp's whole part; sizes: experts, hidden, intermediate, decode_lag, CTAs. weights: zeros, enough for
// every image. Returns the events; at most `room` are written.
u32 permute(const u32* sizes, const u32* row_offset, u32 warp, u32 cta, u32 polls, const u8* weights, u8* memory,
            u32* done, u32* ready, u32 epoch, u32 room, u32* out) {
    launch = {cta, sizes[4], epoch, {sizes[0], sizes[1], sizes[2], sizes[3], 0}, {weights, weights, 0},
              done, ready, memory};
    for (u32 e = 0; e <= kMaxLocalExperts; ++e) shared.row_offset[e] = row_offset[min_u32(e, sizes[0])];
    shared.healthy = 1, polls_before_plan = polls;
    the_lane = 0, the_warp = kExchangeWarp + warp;
    log_at = out, log_count = 0, log_room = room;
    permute_rows<Many>(launch, shared);
    return log_count;
}
// An image of codes to an FP8 image, all lanes.
void decode_image(const u8* from, u8* to) {
    for (u32 i = 0; i < kDecodeRows; ++i) shared.decode_rows[i] = decode_row(i);
    log_room = log_count = 0, the_warp = kExchangeWarp + 1;
    const DecodeAhead<Many> decode{launch, shared};
    for (the_lane = 0; the_lane < 32; ++the_lane) decode.decode_image(from, to, the_lane, [] {});
}
}
"""


def build(folder: Path) -> ctypes.CDLL | None:
    """SOURCE as a library, or None where there is no host compiler."""
    config = (CSRC / "config.cuh").read_text()
    kept = [r"constexpr u32 kDecodeRing = \d+;", r"struct DecodeTurn \{.*?\};"]
    shims = {"config.cuh": CONFIG % "\n".join(re.search(pattern, config, re.DOTALL)[0] for pattern in kept)}
    shims |= dict.fromkeys(("roles.cuh", "pipeline/1_dispatch.cuh", "sync/wait.cuh"), '#include "config.cuh"\n')
    shims |= dict.fromkeys(("ptx/convert.cuh", "ptx/copy.cuh"), PTX)
    shims["debug/faults.cuh"] = "#define MOE_FAULT(l, point, value) value\n"
    for name, text in shims.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return build_library(folder, SOURCE, include=(folder,))
