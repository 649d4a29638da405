// Position in a ring of shared-memory slots: the slot, and the phase bit of its mbarriers.
#pragma once
#include "prelude.cuh"

namespace moe {

// Both in one register: the math warps have none to spare.
template <u32 kSlots>
struct RingPosition {
    u32 slot_and_phase = 0;
    MOE_HOST_DEVICE u32 slot() const { return slot_and_phase >> 1; }
    MOE_HOST_DEVICE void advance() {
        slot_and_phase += 2;
        if (slot_and_phase >= 2 * kSlots) slot_and_phase = (slot_and_phase & 1) ^ 1;
    }
    MOE_HOST_DEVICE u32 consumer_parity() const { return slot_and_phase & 1; }
    // A producer finds a fresh ring free: it waits for the phase before the first.
    MOE_HOST_DEVICE u32 producer_parity() const { return (slot_and_phase & 1) ^ 1; }
};

}  // namespace moe
