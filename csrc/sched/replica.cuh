// Which copy of an expert serves which of its rows, as integer arithmetic on the counts of the joined routing table.
// The rows of an expert, in the order (source, token, slot), are cut into one interval a copy; every rank that sees the
// same table cuts alike. The same functions in numpy: megamoe/plan/choice.py, bit for bit.
#pragma once
#include "params.gen.cuh"
#include "prelude.cuh"

namespace moe {

// Set in a table entry for an id that names no expert: it can then name no slot either.
constexpr i32 kUnmappedIdBit = 1 << 30;

// What every launch of a layer reads; written by megamoe/replicas.py. Experts with copies on several ranks are flows.
struct ReplicaMap {
    const u32* words;

    MOE_HOST_DEVICE u32 choice() const { return words[0]; }
    MOE_HOST_DEVICE u32 num_logical() const { return words[1]; }
    MOE_HOST_DEVICE u32 num_flows() const { return words[2]; }
    MOE_HOST_DEVICE u32 num_copies() const { return words[3]; }
    // Copies of expert e: copy(first(e)) to copy(first(e + 1) - 1), slots over all ranks, ascending.
    MOE_HOST_DEVICE u32 first(u32 e) const { return words[kReplicaHeaderWords + e]; }
    MOE_HOST_DEVICE u32 copy(u32 i) const { return words[kReplicaHeaderWords + num_logical() + 1 + i]; }
    MOE_HOST_DEVICE const u32* flow(u32 i) const {  // {expert, mask of its copies' ranks}
        return words + kReplicaHeaderWords + num_logical() + 1 + num_copies() + 2 * i;
    }
    // Slot of expert e for rows of `src` when the choice is by source rank.
    MOE_HOST_DEVICE u32 by_source(u32 src, u32 e) const { return flow(num_flows())[src * num_logical() + e]; }
    // Expert in a slot over all ranks; 2^32 - 1: none.
    MOE_HOST_DEVICE u32 expert_in(u32 slot, u32 ep_size) const {
        return flow(num_flows())[ep_size * num_logical() + slot];
    }
};

// One level a rank, for one thread; sched/chosen.cuh has the same over the lanes of a warp.
struct RankLevels {
    u32 level[kMaxEpSize];

    MOE_HOST_DEVICE u32 sum(u32 mask) const {
        u32 s = 0;
        for (u32 r = 0; r < kMaxEpSize; ++r) s += mask >> r & 1 ? level[r] : 0;
        return s;
    }
    MOE_HOST_DEVICE u32 above(u32 mask, u32 height) const {
        u32 found = 0;
        for (u32 r = 0; r < kMaxEpSize; ++r) found |= u32((mask >> r & 1) && level[r] > height) << r;
        return found;
    }
    MOE_HOST_DEVICE u32 lowest(u32 mask) const {
        u32 best = kMaxEpSize;
        for (u32 r = 0; r < kMaxEpSize; ++r)
            if ((mask >> r & 1) && (best == kMaxEpSize || level[r] < level[best])) best = r;
        return best;
    }
    // Adds f(rank, level) to each rank of `mask` and keeps what the n-th got in share[n]; not 0: a share changed.
    template <class F>
    MOE_HOST_DEVICE u32 raise(u32 mask, u32* share, F f) {
        u32 changed = 0;
        for (u32 r = 0, n = 0; r < kMaxEpSize; ++r) {
            if (!(mask >> r & 1)) continue;
            const u32 more = f(r, level[r]);
            changed |= more ^ share[n];
            level[r] += share[n++] = more;
        }
        return changed;
    }
    MOE_HOST_DEVICE void lower(u32 mask, const u32* share) {
        for (u32 r = 0, n = 0; r < kMaxEpSize; ++r)
            if (mask >> r & 1) level[r] -= share[n++];
    }
};

MOE_HOST_DEVICE u32 count_bits(u32 v) {
#ifdef __CUDA_ARCH__
    return __popc(v);
#else
    u32 n = 0;
    for (; v; v &= v - 1) ++n;
    return n;
#endif
}

// Pours `rows` onto the ranks of `allowed` so that the lowest rise first to one common height; the remainder, less than
// one row a rank, goes to the lowest rank numbers. share[n]: rows of the n-th allowed rank.
template <class Levels>
MOE_HOST_DEVICE u32 pour(Levels& levels, u32 allowed, u32 rows, u32* share) {
    u32 wet = allowed, total, height;
    for (;;) {
        const u32 n = count_bits(wet);
        total = levels.sum(wet) + rows, height = total / n;
        const u32 dry = levels.above(wet, height);
        if (dry == 0) break;
        wet &= ~dry;
    }
    const u32 rest = total - height * count_bits(wet);
    return levels.raise(allowed, share, [=](u32 rank, u32 level) {
        if (!(wet >> rank & 1)) return 0u;
        return height - level + (count_bits(wet & ((1u << rank) - 1)) < rest ? 1u : 0u);
    });
}

// Rows (balanced) or 0 and 1 (min_active) of each copy that is one of several: share[i] of copy i, zero on entry, from
// count[e], the rows of expert e in the batch. levels: the rows or active experts of each rank that have no choice.
template <class Levels>
MOE_HOST_DEVICE void share_rows(const ReplicaMap& map, Levels& levels, const u32* count, u32* share) {
    const bool balanced = map.choice() == kChoice_balanced;
    u32 changed = 1;
    for (u32 pass = 0; pass < kChoicePasses && changed; ++pass) {
        changed = 0;
        for (u32 i = 0; i < map.num_flows(); ++i) {
            const u32 expert = map.flow(i)[0], ranks = map.flow(i)[1], rows = count[expert];
            if (rows == 0) continue;
            u32* own = share + map.first(expert);
            if (pass) levels.lower(ranks, own);
            if (balanced) {
                changed |= pour(levels, ranks, rows, own);
            } else {
                const u32 chosen = levels.lowest(ranks);
                changed |= levels.raise(ranks, own, [=](u32 rank, u32) { return rank == chosen ? 1u : 0u; });
            }
        }
    }
}

// First row of each copy of expert e, from the shares of its copies, in place.
MOE_HOST_DEVICE void begins_of(const ReplicaMap& map, u32 e, u32 rows, u32* share) {
    const u32 first = map.first(e), end = map.first(e + 1), scale = map.choice() == kChoice_balanced ? 1 : rows;
    u32 begin = 0;
    for (u32 i = first; i < end; ++i) {
        const u32 own = share[i] * scale;
        share[i] = begin;
        begin += own;
    }
}

// The copy that serves row n of expert e: begin[i] is the first row of copy i. Empty intervals are passed over.
MOE_HOST_DEVICE u32 find_copy(const ReplicaMap& map, const u32* begin, u32 e, u32 n) {
    u32 i = map.first(e + 1) - 1;
    while (begin[i] > n) --i;
    return i;
}

}  // namespace moe
