"""csrc/sched/order.cuh and replica.cuh built by the host's compiler, for the tests of schedule and replicas."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
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
u32 swizzle(u32 row, u32 byte) { return swizzle_128b(row, byte); }
}
static_assert(ceil_div(0, 8) == 0 && ceil_div(1, 8) == 1 && ceil_div(16, 8) == 2 && align_up(17, 8) == 24);
"""


@cache
def build(folder: Path) -> ctypes.CDLL | None:
    """The library, or None where there is no host compiler. Warnings are errors."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    source, library = folder / "order.cpp", folder / "order.so"
    source.write_text(SOURCE)
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([*command, f"-I{CSRC}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def tiles(library: ctypes.CDLL, *order: int) -> list[tuple[int, int, int]]:
    """(is_linear2, m_block, n_block) in ticket order. order: blocks, n1, n2, group, lag."""
    count = library.num_tiles(*order)
    out = (ctypes.c_uint32 * (3 * count))()
    library.all_tiles(*order, out)
    flat = list(out)
    return list(zip(flat[::3], flat[1::3], flat[2::3]))
