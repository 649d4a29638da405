// The weights role: takes tickets, announces tiles, and streams weight images, one bulk copy a stage. It does not wait
// for tokens (but see wait_first_tokens), so HBM keeps streaming while rows travel.
#pragma once
#include "config.cuh"
#include "debug/trace.cuh"
#include "gemm/decode_ahead.cuh"
#include "gemm/split_rows.cuh"
#include "ptx/copy.cuh"
#include "roles.cuh"
#include "sched/tickets.cuh"
#include "sync/ring.cuh"
#include "sync/wait.cuh"

namespace moe {

MOE_DEVICE u32 k_blocks_of(const Launch& l, const TileSlot& t) {
    return (t.kind == kTile_linear2 ? l.p.intermediate : l.p.hidden) / kKBlock;
}

template <class C>
MOE_DEVICE const u8* first_image(const Launch& l, const TileSlot& t) {
    const bool second = t.kind == kTile_linear2;
    const u32 n_blocks = second ? l.n_blocks2() : l.n_blocks1();
    if constexpr (C::kDecodesAhead) return decoded_image(l, second, t.expert, t.n_block * k_blocks_of(l, t));
    return reinterpret_cast<const u8*>(second ? l.me.linear2 : l.me.linear1) +
           (u64(t.expert) * n_blocks + t.n_block) * k_blocks_of(l, t) * u64(C::kImagePitchBytes);
}

// Only a hint, given while the plan is made: asks the L2 cache for the first images of what is this CTA's first tile if
// every expert has one block of rows (megamoe/plan/tiles.py says when that is likely). Not before the heads are here:
// HBM would be busy with this when they are read (measured: the plan took 8 us longer).
template <class C>
MOE_DEVICE void prefetch_first_tile(const Launch& l) {
    const u32 n_blocks = l.n_blocks1(), experts = l.p.num_local_experts, k_blocks = l.p.hidden / kKBlock;
    u32 expert = l.cta / n_blocks, n_block = l.cta % n_blocks;
    if constexpr (C::kSplitsWeights) expert = l.cta / 2 / n_blocks, n_block = l.cta / 2 % n_blocks;
    if constexpr (C::kPairsBlocks) {
        const u32 n_pairs = ceil_div(n_blocks, 2);
        expert = l.cta / 2 / n_pairs, n_block = l.cta / 2 % n_pairs * 2 + l.cta % 2;
    }
    const u32 stages = min_u32(static_cast<u32>(l.p.prefetch_stages), k_blocks);
    if (C::kDecodesAhead || stages == 0 || expert >= experts || n_block >= n_blocks) return;
    ptx::bulk_prefetch_l2(
        reinterpret_cast<const u8*>(l.me.linear1) + (u64(expert) * n_blocks + n_block) * k_blocks * C::kImagePitchBytes,
        stages * C::kImagePitchBytes);
}

// Partner: DecodeAhead::publish. A lost launch may stream what is not decoded, also to the partner of a pair: store.cuh
// publishes none of it.
template <class C>
MOE_DEVICE void wait_decoded(const Launch& l, SharedStorage<C>& s, const TileSlot& t) {
    if constexpr (C::kDecodesAhead) {
        const bool second = t.kind == kTile_linear2;
        if (!wait_acquire_gpu(l, l.decoded_ready(weight_block(l, second, t.expert, t.n_block)),
                              2 * l.p.step_deadline_ns,
                              {kRole_weights, second ? kStep_linear2 : kStep_linear1, t.expert}))
            s.healthy = 0;
        ptx::fence_proxy_async_global();  // acquired by a generic load, read by the copy engine next
    }
}

// Announces tile `number`, or the end. Readers: every other role of linear1 and linear2.
template <class C>
MOE_DEVICE void announce(const Launch& l, SharedStorage<C>& s, u32 ticket, u32 number) {
    wait_mbarrier(&s.tile_empty[number % kTileSlots], (number / kTileSlots & 1) ^ 1);
    TileSlot& t = s.tiles[number % kTileSlots];
    t.number = number;
    // A lost launch takes no further tile; those announced before run to their end. In a cluster both CTAs keep step.
    if (ticket < s.num_tickets && (s.healthy || C::kCluster > 1)) {
        tile_of_ticket(l, s, ticket, t);
        t.weights = first_image<C>(l, t);
    } else {
        t.kind = kTile_end;
    }
    ptx::mbarrier_arrive(&s.tile_full[number % kTileSlots]);
}

// One image, or in a pair half of it for both CTAs: the other half comes from the partner. Both halves count on this
// CTA's barrier, and both CTAs' math warps have released the stage before either is sent. What no other tile
// reads goes from the L2 cache first: rows, h and y are to stay (96 rows an expert: 1 %).
template <class C>
MOE_DEVICE void load_image(const Launch& l, SharedStorage<C>& s, const TileSlot& t, const u8* image, u32 stage) {
    const u64 policy = C::kWeightsOnM || t.only_block ? ptx::policy_evict_first() : ptx::policy_evict_normal();
    u64* full = &s.weights_full[stage];
    u8* to = s.stages[stage].weights;
    ptx::mbarrier_arrive_expect_tx(full, C::kImageCopyBytes);
    if (C::kCluster == 1 || !t.shares_weights) {
        ptx::bulk_load_hint(to, image, C::kImageCopyBytes, full, policy);
    } else {
        constexpr u32 kHalf = C::kImageSfOffset / 2;
        const u32 begin = l.cta % 2 ? kHalf : 0;
        ptx::bulk_load_pair(to + begin, image + begin, begin ? C::kImageCopyBytes - kHalf : kHalf, full, policy);
    }
}

// This CTA's half of one: two pieces of the codes, the scales of all.
template <class C>
MOE_DEVICE void load_half_image(const Launch& l, SharedStorage<C>& s, const u8* image, u32 stage, bool second) {
    constexpr u32 kTail = kMxfp4ImageCopyBytes - kMxfp4ScalesOffset;
    u64* full = &s.weights_full[stage];
    u8* to = s.stages[stage].weights;
    ptx::mbarrier_arrive_expect_tx(full, 2 * kPieceBytes + kTail);
    for (u32 i = 0; i < 2; ++i)
        ptx::bulk_load(to + i * kPieceBytes, image + SplitRows::piece_begin(second, l.cta % 2, i), kPieceBytes, full);
    ptx::bulk_load(to + 2 * kPieceBytes, image + kMxfp4ScalesOffset, kTail, full);
}

// The next ticket. Drawn, not dealt: tickets then start in their order, so that the token blocks of a group meet each
// weight block in the L2 cache (dealt round robin they drift apart: 5.2 instead of 3.5 GB from HBM a call, in an
// earlier order of tiles, benchmarks/notes/0002). In a pair the first CTA draws and tells the second.
template <class C>
struct Tickets {
    u32 drawn = 0;

    MOE_DEVICE void draw(const Launch& l) {
        if (C::kCluster == 1 || l.cta % 2 == 0)
            drawn = l.num_ctas / C::kCluster + ptx::atom_add_relaxed_gpu(l.ticket_counter(), 1);
    }
    MOE_DEVICE u32 take(const Launch& l, SharedStorage<C>& s, u32 number) {
        if constexpr (C::kCluster > 1) {
            const u32 slot = number % kTicketSlots;
            if (l.cta % 2 == 0) {
                ptx::st_shared_cluster(&s.partner_ticket[slot], 1, drawn);
                ptx::mbarrier_arrive_release_cluster(&s.ticket_full[slot], 1);
            } else {
                wait_mbarrier_acquire_cluster(&s.ticket_full[slot], number / kTicketSlots & 1);
                return s.partner_ticket[slot];
            }
        }
        return drawn;
    }
};

// A call's third stage waits for its tokens. What leads to them, flags and rows in the L2 cache, took 3 us an access
// behind full rings of all CTAs, and where weights are decoded in the loop that is what a short call waits for. An
// earlier stage's barrier could turn twice unseen: the tokens role and the math warps can go on up to this stage.
template <class C>
MOE_DEVICE void wait_first_tokens(SharedStorage<C>& s, const TileSlot& t, u32 k) {
    constexpr u32 kStage = 2;
    if (C::kDecodesInLoop && C::kDrawsLate && t.number == 0 && k == kStage && t.kind == kTile_linear1)
        wait_mbarrier(&s.tokens_full[kStage], 0);
}

// One thread. What lasts longer than a stage stays in shared memory: the registers are for tile_of_ticket.
template <class C>
MOE_DEVICE void load_weights(const Launch& l, SharedStorage<C>& s) {
    count_tickets(l, s);
    RingPosition<kStages<C>> stage;
    Tickets<C> draws;
    announce(l, s, s.healthy ? l.cta / C::kCluster : s.num_tickets, 0);
    for (u32 number = 0;; ++number) {
        const TileSlot& t = s.tiles[number % kTileSlots];
        if (t.kind == kTile_end) return;
        trace(l, s, kTrace_weights, kEvent_tile, number);
        const u32 k_blocks = k_blocks_of(l, t);
        wait_decoded(l, s, t);
#pragma unroll 1
        for (u32 k = 0; k < k_blocks; ++k, stage.advance()) {
            wait_first_tokens(s, t, k);
            wait_mbarrier(&s.stage_empty[stage.slot()], stage.producer_parity());
            const u8* image = t.weights + u64(k) * C::kImagePitchBytes;
            if constexpr (C::kSplitsWeights) load_half_image(l, s, image, stage.slot(), t.kind == kTile_linear2);
            else load_image(l, s, t, image, stage.slot());
            if (k == draw_at<C>(k_blocks)) draws.draw(l);
            if (k == announce_at<C>(k_blocks)) {
                const u32 current = computed_here(number);
                announce(l, s, draws.take(l, s, current), current + 1);
            }
        }
        trace(l, s, kTrace_weights, kEvent_k_loop, number);
    }
}

}  // namespace moe
