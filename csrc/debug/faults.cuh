// Test builds only (-DFAULTS): a value that the protocol is about to publish comes late, wrong, or not at all. The
// points are words of layout.FAULT_POINTS; which one, how, and on which rank, the host writes into mega_moe_fault
// (megamoe/testing/faults/device.py). Compiled out otherwise: MOE_FAULT(l, point, value) is then the text of the value.
#pragma once
#include "sync/launch.cuh"

#ifdef FAULTS
extern "C" __device__ u32 mega_moe_fault[4];  // FaultKind, FaultPoint, rank, and what it takes: ns / 1024, or a mask

namespace moe {

enum FaultKind : u32 { kFaultKind_none, kFaultKind_delay, kFaultKind_drop, kFaultKind_corrupt };

template <class T>
MOE_DEVICE T fault(const Launch& l, u32 point, T value) {
    if (mega_moe_fault[1] != point || mega_moe_fault[2] != l.me.ep_rank) return value;
    if (mega_moe_fault[0] == kFaultKind_delay) {
        const u64 start = ptx::globaltimer_ns(), ns = u64(mega_moe_fault[3]) * 1024;
        while (ptx::globaltimer_ns() - start < ns) {
        }
    }
    if (mega_moe_fault[0] == kFaultKind_drop)
        return value - 1;  // a flag of the launch before: as if nothing was stored
    if (mega_moe_fault[0] == kFaultKind_corrupt) return value ^ static_cast<T>(mega_moe_fault[3]);
    return value;
}

}  // namespace moe

#define MOE_FAULT(l, point, value) fault(l, kFault_##point, value)
#else
#define MOE_FAULT(l, point, value) value
#endif
