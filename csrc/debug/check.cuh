// Debug builds only (-DDEBUG_CHECKS, made when MEGAMOE_DEBUG is set): every address of a region that an accessor of
// sync/launch.cuh hands out lies inside that region of an existing rank. One that does not ends the launch with a
// record of region and byte, and the region's first bytes are used in its place. What an access then runs past its own
// length, the canaries behind each region show (megamoe/canaries.py).
#pragma once
#include "params.gen.cuh"
#include "ptx/ld_st.cuh"

namespace moe {

#ifdef DEBUG_CHECKS
extern "C" __device__ u64 mega_moe_region_bytes[kNumRegions];  // without the canaries; written by the host

// `address` of `bytes` bytes in `region` of the arena or workspace at `base`, or the region's first byte.
MOE_DEVICE u64 checked(const KernelParams& p, const RankParams& me, u32 region, u64 base, u64 address, u64 bytes) {
    const u64 first = base + (&p.off_abort)[region], size = mega_moe_region_bytes[region];
    if (base != 0 && address >= first && address - first + bytes <= size) return address;
    u32* abort_word = reinterpret_cast<u32*>(p.arena[me.ep_rank] + p.off_abort);
    if (ptx::atom_cas_relaxed_sys(abort_word, 0, 1 + me.ep_rank) == 0) {
        u32* record = reinterpret_cast<u32*>(me.local + p.off_record);
        record[0] = kCode_out_of_bounds, record[1] = blockIdx.x % p.ctas_per_rank, record[2] = kRole_none,
        record[3] = kStep_none, record[4] = region, record[5] = static_cast<u32>(address - first),
        record[6] = static_cast<u32>(size), record[7] = *reinterpret_cast<const u32*>(me.local + p.off_control);
    }
    return base != 0 ? first : p.arena[me.ep_rank] + p.off_abort;
}
#endif

// In an accessor: `address`, of `bytes` bytes in `region` of `rank` (local regions: 0). A macro, so that without checks
// the compiler sees the very text of the address.
#ifdef DEBUG_CHECKS
#define MOE_REGION(region, rank, bytes, ...) checked_in(kRegion_##region, rank, __VA_ARGS__, bytes)
#else
#define MOE_REGION(region, rank, bytes, ...) __VA_ARGS__
#endif

}  // namespace moe
