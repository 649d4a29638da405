// From ticket to tile: what this CTA does next. With clusters a ticket is a pair of tiles of one linear, so that both
// CTAs walk their stages in step: two token blocks of an expert against one weight block, or, where an expert has a
// block left over, that block against two weight blocks. Both kinds advance together: pairs are bound by the tensor
// cores and left-over blocks by their weights, and what both need of an expert meets in the L2 cache. Where the pair
// splits weight blocks, a ticket is one tile for both.
#pragma once
#include "config.cuh"
#include "sched/order.cuh"
#include "sync/launch.cuh"

namespace moe {

// The stage of a tile behind which the next ticket is announced; it is drawn two stages before. Early, or late, so that
// whoever is done first takes what is left: drawn a tile ahead, the last tickets wait for the slowest CTAs (one token:
// 2 to 12 % of a call). Not everywhere: many rows lose up to 2.5 % (benchmarks/notes/0012).
template <class C>
MOE_DEVICE u32 announce_at(u32 k_blocks) {
    return C::kDrawsLate ? k_blocks - min_u32(k_blocks, 4) : min_u32(2, k_blocks - 1);
}
template <class C>
MOE_DEVICE u32 draw_at(u32 k_blocks) {
    const u32 at = announce_at<C>(k_blocks);
    return at - min_u32(at, 2);
}
// The stage behind which gather_tokens looks up the next tile's rows. It waits for the announcement there: much before
// it would be for ever, since the weights role needs the tokens of the stages up to there.
template <class C>
MOE_DEVICE u32 look_up_at(u32 k_blocks) {
    return C::kDrawsLate ? announce_at<C>(k_blocks) : k_blocks / 2;
}

// One thread, once a launch.
template <class C>
MOE_DEVICE void count_tickets(const Launch& l, SharedStorage<C>& s) {
    const u32 n1 = l.n_blocks1(), n2 = l.n_blocks2();
    if constexpr (!C::kPairsBlocks) {
        s.num_tickets = s.num_m_blocks * (n1 + n2);
    } else {
        const u32 pairs = s.pair_offset[kMaxLocalExperts] * (n1 + n2);
        const u32 singles = s.single_offset[kMaxLocalExperts] * (ceil_div(n1, 2) + ceil_div(n2, 2));
        s.num_tickets = pairs + singles;
        s.only_pairs = singles == 0;
        s.pair_ratio =
            singles == 0 ? 0 : static_cast<u32>(((u64(pairs) << 32) + pairs + singles - 1) / (pairs + singles));
    }
}

// Into a tile slot, in shared memory: the weights role has no registers for a copy.
template <class C>
MOE_DEVICE void tile_of_ticket(const Launch& l, const SharedStorage<C>& s, u32 ticket, TileSlot& t) {
    TileOrder order{s.num_m_blocks, l.n_blocks1(), l.n_blocks2(), l.p.order_group, l.p.order_lag};
    const u16* offsets = s.block_offset;
    bool single = false;
    if constexpr (C::kPairsBlocks) {
        const u32 pairs = merged_first(ticket, s.pair_ratio);
        single = !s.only_pairs && merged_first(ticket + 1, s.pair_ratio) == pairs;
        offsets = single ? s.single_offset : s.pair_offset;
        order.num_m_blocks = offsets[kMaxLocalExperts];
        if (!s.only_pairs) ticket = single ? ticket - pairs : pairs;
        if (single) {
            order.n_blocks1 = ceil_div(order.n_blocks1, 2), order.n_blocks2 = ceil_div(order.n_blocks2, 2);
        }
    }
    const Tile tile = order.at(ticket);
    const u32 expert = find_expert(offsets, kMaxLocalExperts, tile.m_block), half = l.cta % C::kCluster;
    u32 m_block = tile.m_block, n_block = tile.n_block, idle = 0;
    if constexpr (C::kPairsBlocks) {
        m_block =
            single ? s.block_offset[expert + 1] - 1 : s.block_offset[expert] + 2 * (m_block - offsets[expert]) + half;
        if (single) {
            const u32 last = (tile.is_linear2 ? l.n_blocks2() : l.n_blocks1()) - 1;
            n_block = 2 * n_block + half;
            idle = n_block > last;  // an odd weight block: this CTA only keeps step
            n_block = min_u32(n_block, last);
        }
    }
    t.kind = tile.is_linear2 ? kTile_linear2 : kTile_linear1;
    t.expert = expert, t.m_block = m_block, t.n_block = n_block;
    const u32 row_begin = s.row_offset[expert] + (m_block - s.block_offset[expert]) * C::kBlockTokens;
    t.row_begin = row_begin;
    t.row_count = idle ? 0 : min_u32(C::kBlockTokens, s.row_offset[expert + 1] - row_begin);
    t.shares_weights = C::kPairsBlocks && !single;
    t.only_block = s.block_offset[expert + 1] - s.block_offset[expert] == 1;
}

}  // namespace moe
