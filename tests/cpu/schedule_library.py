"""csrc/sched and csrc/sync/ring.cuh built by the host's compiler, for the tests of schedule, replicas and protocol."""

import ctypes
import re
from functools import cache
from pathlib import Path

from tests.cpu.host_library import CSRC, build_library

SOURCE = """
#include "sched/order.cuh"
#include "sched/replica.cuh"
using namespace moe;
extern "C" {
u32 num_tiles(u32 blocks, u32 n1, u32 n2, u32 group, u32 lag) {
    return TileOrder{blocks, n1, n2, group, lag}.num_tiles();
}
void all_tiles(u32 blocks, u32 n1, u32 n2, u32 group, u32 lag, u32* out) {
    const TileOrder order{blocks, n1, n2, group, lag};
    for (u32 i = 0; i < order.num_tiles(); ++i) {
        const Tile tile = order.at(i);
        out[3 * i] = tile.is_linear2, out[3 * i + 1] = tile.m_block, out[3 * i + 2] = tile.n_block;
    }
}
u32 merged(u32 count, u32 ratio) { return merged_first(count, ratio); }
u32 expert_of(const u32* offsets, u32 count, u32 x) { return find_expert(offsets, count, x); }
u32 pack(u32 src_rank, u32 token, u32 slot) { return pack_row(src_rank, token, slot); }
u32 unpack(u32 row, u32 field) {
    return field == 0 ? row_src_rank(row) : field == 1 ? row_token(row) : row_slot(row);
}
void copy_begins(const u32* words, const u32* count, u32 slots_per_rank, u32* begin) {
    const ReplicaMap map{words};
    RankLevels levels{};
    for (u32 i = 0; i < map.num_copies(); ++i) begin[i] = 0;
    for (u32 e = 0; e < map.num_logical(); ++e) {
        if (map.first(e + 1) - map.first(e) > 1) continue;
        const u32 rows = map.choice() == kChoice_balanced ? count[e] : min_u32(count[e], 1);
        levels.level[map.copy(map.first(e)) / slots_per_rank] += rows;
    }
    share_rows(map, levels, count, begin);
    for (u32 e = 0; e < map.num_logical(); ++e) begins_of(map, e, count[e], begin);
}
u32 slot_of_row(const u32* words, const u32* begin, u32 e, u32 n) {
    return ReplicaMap{words}.copy(find_copy(ReplicaMap{words}, begin, e, n));
}
u32 slot_by_source(const u32* words, u32 src, u32 e) { return ReplicaMap{words}.by_source(src, e); }
u32 expert_in(const u32* words, u32 slot, u32 ep_size) { return ReplicaMap{words}.expert_in(slot, ep_size); }
u32 swizzle(u32 row, u32 byte) { return swizzle_128b(row, byte); }
}
static_assert(ceil_div(0, 8) == 0 && ceil_div(1, 8) == 1 && ceil_div(16, 8) == 2 && align_up(17, 8) == 24);
"""


# tickets.cuh with what it needs of config.cuh and sync/launch.cuh, which are device code as a whole.
TICKETS = """
#include "sync/ring.cuh"
#define MOE_DEVICE inline
#include "sched/tickets.cuh"
using namespace moe;
template <class C>
u32 tickets(const u32* rows, u32 experts, u32 n1, u32 n2, u32 group, u32 lag, u32 room, u32* out) {
    static SharedStorage<C> s;
    u32 row = 0, block = 0, pair = 0, single = 0;
    for (u32 e = 0; e <= kMaxLocalExperts; ++e) {
        s.row_offset[e] = row, s.block_offset[e] = block, s.pair_offset[e] = pair, s.single_offset[e] = single;
        const u32 blocks = e < experts ? ceil_div(rows[e], C::kBlockTokens) : 0;
        row += e < experts ? rows[e] : 0, block += blocks, pair += blocks / 2, single += blocks % 2;
    }
    s.num_m_blocks = block;
    Launch launch{0, n1, n2, {group, lag}};
    count_tickets(launch, s);
    for (u32 ticket = 0; ticket < min_u32(s.num_tickets, room); ++ticket)
        for (launch.cta = 0; launch.cta < 2; ++launch.cta) {
            TileSlot t;
            tile_of_ticket(launch, s, ticket, t);
            const u32 words[] = {t.kind, t.expert, t.m_block, t.n_block, t.row_begin, t.row_count, t.shares_weights};
            for (u32 word : words) *out++ = word;
        }
    return s.num_tickets;
}
extern "C" {
// rows: of each local expert. out: of each ticket and both CTAs kind, expert, m_block, n_block, row_begin, row_count,
// shares_weights. Returns the number of tickets; at most `room` are written.
u32 pair_tickets(const u32* rows, u32 experts, u32 n1, u32 n2, u32 group, u32 lag, u32 room, u32* out) {
    return tickets<Pair>(rows, experts, n1, n2, group, lag, room, out);
}
u32 split_tickets(const u32* rows, u32 experts, u32 n1, u32 n2, u32 group, u32 lag, u32 room, u32* out) {
    return tickets<Split>(rows, experts, n1, n2, group, lag, room, out);
}
// The stages of a tile behind which the next ticket is drawn, and announced, and its rows are looked up.
void next_ticket_at(u32 late, u32 k_blocks, u32* out) {
    out[0] = late ? draw_at<Late>(k_blocks) : draw_at<Pair>(k_blocks);
    out[1] = late ? announce_at<Late>(k_blocks) : announce_at<Pair>(k_blocks);
    out[2] = late ? look_up_at<Late>(k_blocks) : look_up_at<Pair>(k_blocks);
}
// Slot and parities of the first `count` positions of a ring of `slots`.
void ring(u32 slots, u32 count, u32* out) {
    RingPosition<4> four;
    RingPosition<5> five;
    for (u32 i = 0; i < count; ++i, four.advance(), five.advance()) {
        *out++ = slots == 4 ? four.slot() : five.slot();
        *out++ = slots == 4 ? four.consumer_parity() : five.consumer_parity();
        *out++ = slots == 4 ? four.producer_parity() : five.producer_parity();
    }
}
}
"""
SHIM = """
#pragma once
#include "prelude.cuh"
namespace moe {
constexpr u32 kMaxLocalExperts = %(experts)s;
%(tile_slot)s
struct Late { static constexpr bool kDrawsLate = true; };
struct Pair {
    static constexpr u32 kCluster = 2, kBlockTokens = 128;
    static constexpr bool kPairsBlocks = true, kDrawsLate = false;
};
struct Split { static constexpr u32 kCluster = 2, kBlockTokens = 192; static constexpr bool kPairsBlocks = false; };
template <class C> struct SharedStorage {
    u32 num_m_blocks, num_tickets, only_pairs, pair_ratio, row_offset[kMaxLocalExperts + 1];
    u16 block_offset[kMaxLocalExperts + 1], pair_offset[kMaxLocalExperts + 1], single_offset[kMaxLocalExperts + 1];
};
struct Launch {
    u32 cta, blocks1, blocks2;
    struct { u32 order_group, order_lag; } p;
    u32 n_blocks1() const { return blocks1; }
    u32 n_blocks2() const { return blocks2; }
};
}
"""


def build_tickets(folder: Path) -> ctypes.CDLL | None:
    """TICKETS as a library, or None where there is no host compiler."""
    config, header = (CSRC / "config.cuh").read_text(), (CSRC / "params.gen.cuh").read_text()
    slot = re.search(r"struct TileSlot \{.*?enum TileKind[^}]*\};", config, re.DOTALL)[0]
    experts = re.search(r"kMaxLocalExperts = (\d+)", header)[1]
    (folder / "sync").mkdir()
    (folder / "config.cuh").write_text(SHIM % {"tile_slot": slot, "experts": experts})
    (folder / "sync" / "launch.cuh").write_text('#include "config.cuh"\n')
    return build_library(folder, TICKETS, include=(folder,))


@cache
def build(folder: Path) -> ctypes.CDLL | None:
    """The library, or None where there is no host compiler."""
    return build_library(folder, SOURCE, std="c++17")


def tiles(library: ctypes.CDLL, *order: int) -> list[tuple[int, int, int]]:
    """(is_linear2, m_block, n_block) in ticket order. order: blocks, n1, n2, group, lag."""
    count = library.num_tiles(*order)
    out = (ctypes.c_uint32 * (3 * count))()
    library.all_tiles(*order, out)
    flat = list(out)
    return list(zip(flat[::3], flat[1::3], flat[2::3]))
