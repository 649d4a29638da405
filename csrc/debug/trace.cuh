// Where the time goes: per CTA and role a list of (event, tile, nanoseconds). Compiled out unless TRACE is defined;
// read by megamoe/trace.py. One lane of the role's first warp writes, so the list needs no atomics.
#pragma once
#include "config.cuh"
#include "roles.cuh"
#include "sync/launch.cuh"

namespace moe {

#ifdef TRACE
struct TraceRecord {
    u64 ns;
    u32 event, tile;
};

template <class C>
MOE_DEVICE void trace(const Launch& l, SharedStorage<C>& s, u32 role, u32 event, u32 tile) {
    if (l.me.trace == 0 || lane_id() != 0) return;
    const u32 n = s.trace_count[role]++;
    if (n >= kTraceRecords) return;
    TraceRecord* list =
        reinterpret_cast<TraceRecord*>(l.me.trace) + (u64(l.cta) * kNumTraceRoles + role) * kTraceRecords;
    list[n] = {ptx::globaltimer_ns(), event, tile};
}
#else
template <class C>
MOE_DEVICE void trace(const Launch&, SharedStorage<C>&, u32, u32, u32) {}
#endif

}  // namespace moe
