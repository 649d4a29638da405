"""The schedule's arithmetic, csrc/sched/order.cuh, built by the host's compiler: the very lines the kernel runs."""

import ctypes
import itertools
import random

import numpy as np
import pytest

from megamoe.layout import MAX_EP_SIZE, MAX_LOCAL_EXPERTS, MAX_TOKENS, MAX_TOPK
from tests.cpu import schedule_library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = schedule_library.build(tmp_path_factory.mktemp("order"))
    if built is None:
        pytest.skip("not run: no host compiler (g++)")
    return built


ENGINE_ORDERS = ((1, 1 << 20), (4, 3), (8, 3))  # (group, lag) of few rows an expert and of many


def orders():
    small = itertools.product((0, 1, 2, 3, 7, 8, 9, 17), (1, 2, 3), (1, 2, 5), (1, 2, 8), (0, 1, 3, 1 << 20))
    r = random.Random(0)
    for _ in range(200):
        small = itertools.chain(
            small, [(r.randint(0, 70), r.randint(1, 16), r.randint(1, 28), r.randint(1, 12), r.randint(0, 9))]
        )
    large = [(blocks, 16, 28, *order) for blocks in (255, 256, 777) for order in ENGINE_ORDERS]
    return itertools.chain(small, large)


def test_every_tile_exactly_once_and_linear2_after_its_linear1(library):
    """What makes tickets free of deadlock: a tile waits only for tiles of lower tickets."""
    for order in orders():
        blocks, n1, n2, _, _ = order
        tiles = schedule_library.tiles(library, *order)
        wanted = {(0, m, n) for m in range(blocks) for n in range(n1)} | {
            (1, m, n) for m in range(blocks) for n in range(n2)
        }
        assert len(tiles) == len(wanted) and set(tiles) == wanted, order
        seen = [0] * blocks
        for is_linear2, m_block, _ in tiles:
            seen[m_block] += not is_linear2
            assert not is_linear2 or seen[m_block] == n1, order


def test_linear2_follows_its_linear1_by_the_lag(library):
    """With groups of 8 and lag 3, three groups of linear1 run before the first linear2, and not more."""
    tiles = schedule_library.tiles(library, 80, 4, 6, 8, 3)
    first = next(i for i, tile in enumerate(tiles) if tile[0])
    assert first == (3 + 1) * 8 * 4  # the fourth group's linear1 comes just before
    assert tiles[first][1] == 0
    tiles = schedule_library.tiles(library, 80, 4, 6, 1, 1 << 20)
    assert [tile[0] for tile in tiles] == [0] * (80 * 4) + [1] * (80 * 6)


def test_a_token_block_is_done_before_the_next_begins(library):
    """Inside a group the weight block is innermost."""
    tiles = schedule_library.tiles(library, 16, 4, 6, 8, 3)
    assert [tile[1:] for tile in tiles[:5]] == [(0, n) for n in range(4)] + [(1, 0)]


def test_merged_sequences_lose_nothing_and_stay_in_proportion(library):
    """Pairs and left-over blocks of the 128-row tile: each ticket is the next of one of them, and both end together."""
    r = random.Random(1)
    counts = [(1, 1), (1, 50000), (50000, 1), (65535, 65535)]
    counts += [(r.randint(1, 3000), r.randint(1, 3000)) for _ in range(50)]
    for first, second in counts:
        both = first + second
        ratio = -(-(first << 32) // both)  # count_tickets in csrc/sched/tickets.cuh
        taken = [library.merged(i, ratio) for i in range(both + 1)]
        assert taken[0] == 0 and taken[-1] == first
        assert all(b - a in (0, 1) for a, b in itertools.pairwise(taken))
        assert all(abs(t - i * first / both) <= 1 for i, t in enumerate(taken))


def test_find_expert_is_a_binary_search_that_skips_empty_experts(library):
    r = np.random.default_rng(0)
    for count in (1, 2, 3, 8, 64, MAX_LOCAL_EXPERTS):
        for empty in (0.0, 0.5, 0.95):
            blocks = r.integers(1, 6, count) * (r.random(count) >= empty)
            offsets = np.concatenate([[0], np.cumsum(blocks)]).astype(np.uint32)
            pointer = offsets.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
            for x in range(int(offsets[-1])):
                expert = library.expert_of(pointer, count, x)
                assert expert == np.searchsorted(offsets, x, side="right") - 1
                assert offsets[expert] <= x < offsets[expert + 1]


def test_row_names_keep_every_field(library):
    library.pack.restype = library.unpack.restype = ctypes.c_uint32
    edges = [(0, MAX_EP_SIZE - 1), (0, 1, MAX_TOKENS // 2, MAX_TOKENS - 1), (0, MAX_TOPK - 1)]
    r = random.Random(0)
    drawn = [(r.randrange(MAX_EP_SIZE), r.randrange(MAX_TOKENS), r.randrange(MAX_TOPK)) for _ in range(2000)]
    names = {}
    for fields in itertools.chain(itertools.product(*edges), drawn):
        row = library.pack(*fields)
        assert tuple(library.unpack(row, i) for i in range(3)) == fields
        assert names.setdefault(row, fields) == fields


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128, 256])
def test_swizzle_is_a_bijection_that_spreads_banks(library, rows):
    places = np.array([[library.swizzle(row, byte) for byte in range(128)] for row in range(rows)])
    assert np.array_equal(np.sort(places.ravel()), np.arange(rows * 128))
    assert np.array_equal(places // 128, np.repeat(np.arange(rows)[:, None], 128, 1))  # stays in its row
    chunks = places.reshape(rows, 8, 16)
    assert (chunks - chunks[..., :1] == np.arange(16)).all()  # 16-byte chunks stay whole
    # Eight rows, the same column: eight different chunks, so that a column of 16-byte reads meets no bank twice
    for base in range(0, rows, 8):
        assert len(set(places[base : base + 8, 0] % 128 // 16)) == 8
