// Shared experts, as integer arithmetic: they fill the last of a rank's slots for experts, and each of its tokens goes
// to all of them, by the last of its own slots. steps.slot_experts says the same; a host compiler builds this too, to
// compare them (tests/cpu/test_shared_experts.py).
#pragma once
#include "prelude.cuh"
#include "sched/replica.cuh"

namespace moe {

struct SharedExperts {
    u32 count;         // of them
    u32 token_slots;   // of a token, theirs included
    u32 expert_slots;  // of a rank, theirs included

    // Slot i of a rank's tokens is slot i % token_slots of token i / token_slots: below 2^24 in all.
    MOE_HOST_DEVICE bool has(u32 i) const { return i % token_slots >= token_slots - count; }
    // Where the caller's tensors, which have no room for shared experts, hold slot i, if it is none of theirs.
    MOE_HOST_DEVICE u32 given(u32 i) const { return i - i / token_slots * count; }
    // Slots over all ranks: of the shared expert of slot i, and of an id that the caller gave. The last slot of a token
    // is the last of its rank.
    MOE_HOST_DEVICE i32 own(u32 ep_rank, u32 i) const {
        return static_cast<i32>((ep_rank + 1) * expert_slots - token_slots + i % token_slots);
    }
    MOE_HOST_DEVICE i32 routed(u32 ep_size, i32 id) const {
        const u32 own = expert_slots - count, expert = static_cast<u32>(id);
        if (id < 0) return id;
        return expert < own * ep_size ? id + static_cast<i32>(expert / own * count) : id | kUnmappedIdBit;
    }
};

}  // namespace moe
