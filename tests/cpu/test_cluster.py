"""CTAs in pairs and alone: tickets, and their rings under any interleaving (cluster_model.py, gather_model.py)."""

import ctypes
import random

import pytest

from tests.cpu import gather_model, schedule_library
from tests.cpu.cluster_model import Deadlock, Mistakes, PairModel, Violation

SEEDS = range(60)
WORDS = 7
BLOCK = 128
LINEAR1, LINEAR2 = 0, 1


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = schedule_library.build_tickets(tmp_path_factory.mktemp("tickets"))
    if built is None:
        pytest.skip("not run: no host compiler (g++)")
    return built


def tickets(library, rows: list[int], n1: int, n2: int, group: int, lag: int, kind: str = "pair") -> list[list[tuple]]:
    """Of each ticket, what both CTAs do: (kind, expert, m_block, n_block, row_begin, row_count, shares_weights)."""
    room = 20000
    out = (ctypes.c_uint32 * (room * 2 * WORDS))()
    fill = library[f"{kind}_tickets"]
    count = fill((ctypes.c_uint32 * len(rows))(*rows), len(rows), n1, n2, group, lag, room, out)
    assert count <= room
    flat = [tuple(out[i : i + WORDS]) for i in range(0, count * 2 * WORDS, WORDS)]
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def ring(library, slots: int, count: int) -> list[tuple[int, int, int]]:
    out = (ctypes.c_uint32 * (3 * count))()
    library.ring(slots, count, out)
    return [tuple(out[i : i + 3]) for i in range(0, 3 * count, 3)]


def test_ring_positions_are_slot_and_phase(library):
    for slots in (4, 5):
        for i, (slot, consumer, producer) in enumerate(ring(library, slots, 10 * slots)):
            assert (slot, consumer, producer) == (i % slots, i // slots % 2, 1 - i // slots % 2)


def test_pairs_do_every_tile_once_in_step_and_linear1_first(library):
    r = random.Random(0)
    for _ in range(300):
        rows = [r.choice((0, 0, 1, BLOCK, BLOCK + 1, 3 * BLOCK, r.randint(0, 700))) for _ in range(r.randint(1, 12))]
        n1, n2 = r.randint(1, 7), r.randint(1, 9)
        group, lag = r.choice(((8, 2), (1, 1), (2, 3), (1, 1 << 20)))
        blocks = [-(-count // BLOCK) for count in rows]
        first = [sum(blocks[:e]) for e in range(len(rows) + 1)]
        seen, ready = set(), set()
        for pair in tickets(library, rows, n1, n2, group, lag):
            assert pair[0][0] == pair[1][0] and pair[0][1] == pair[1][1]  # one linear, one expert: equal stages
            assert pair[0][6] == pair[1][6]
            if pair[0][6]:  # one weight block, two token blocks
                assert pair[0][3] == pair[1][3] and pair[0][2] + 1 == pair[1][2] and pair[0][5] and pair[1][5]
            fresh = []
            for kind, expert, m_block, n_block, row_begin, row_count, _ in pair:
                assert first[expert] <= m_block < first[expert + 1] and n_block < (n2 if kind == LINEAR2 else n1)
                if not row_count:  # keeps step only
                    continue
                inside = m_block - first[expert]
                assert row_begin == sum(rows[:expert]) + inside * BLOCK
                assert row_count == min(BLOCK, rows[expert] - inside * BLOCK)
                assert (kind, m_block, n_block) not in seen
                if kind == LINEAR2:
                    assert all((m_block, n) in ready for n in range(n1)), "linear2 before its linear1"
                else:
                    fresh.append((m_block, n_block))
                seen.add((kind, m_block, n_block))
            ready.update(fresh)
        assert len(seen) == sum(blocks) * (n1 + n2)


def test_where_a_pair_splits_weight_blocks_both_ctas_take_each_tile(library):
    r = random.Random(1)
    for _ in range(50):
        rows = [r.choice((0, 1, 192, 193, r.randint(0, 700))) for _ in range(r.randint(1, 12))]
        n1, n2 = r.randint(1, 7), r.randint(1, 9)
        blocks = [(e, begin) for e, count in enumerate(rows) for begin in range(0, count, 192)]
        wanted = {
            (kind, e, m, n, sum(rows[:e]) + begin, min(192, rows[e] - begin))
            for m, (e, begin) in enumerate(blocks)
            for kind, count in ((LINEAR1, n1), (LINEAR2, n2)) for n in range(count)
        }  # fmt: skip
        found = tickets(library, rows, n1, n2, 8, 2, "split")
        assert all(first == second and not first[6] for first, second in found)
        assert len(found) == len(wanted) and {first[:6] for first, _ in found} == wanted


def next_ticket(library, late: bool, k_blocks: int) -> tuple[int, int, int]:
    """The stages behind which the next ticket is drawn and announced, and its rows are looked up."""
    out = (ctypes.c_uint32 * 3)()
    library.next_ticket_at(late, k_blocks, out)
    return tuple(out)


def test_tickets_are_drawn_late_or_early_in_a_tile(library):
    assert [next_ticket(library, True, k) for k in (1, 4, 5, 6, 16, 56)] == [
        (0, 0, 0), (0, 0, 0), (0, 1, 1), (0, 2, 2), (10, 12, 12), (50, 52, 52)
    ]  # fmt: skip
    assert [next_ticket(library, False, k) for k in (1, 2, 3, 16, 56)] == [
        (0, 0, 0), (0, 1, 1), (0, 2, 1), (0, 2, 8), (0, 2, 28)
    ]  # fmt: skip


K_BLOCKS = (1, 2, 3, 6, 9)


def draw(library, seed: int, mistakes: Mistakes) -> PairModel:
    r = random.Random(seed)
    stages, num_tickets = r.choice((4, 5)), r.randint(0, 14)
    k_blocks = [r.choice(K_BLOCKS) for _ in range(num_tickets)]
    at = {k: next_ticket(library, False, k) for k in K_BLOCKS}
    shares = [r.random() < 0.7 for _ in k_blocks]
    positions = ring(library, stages, sum(k_blocks) + 1)
    return PairModel(seed, r.choice((1, 1, 2)), stages, positions, k_blocks, at, shares, mistakes, seed % 2 == 1)


def test_no_slot_is_read_early_or_overwritten_and_nobody_waits_for_ever(library):
    for seed in SEEDS:
        try:
            draw(library, seed, Mistakes()).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("mistakes", [
    Mistakes(release_to_own_only=True), Mistakes(ticket_slots=1), Mistakes(math_releases_early=True),
    Mistakes(store_skips_staging=True), Mistakes(names_not_waited_for=True),
], ids=["stages not released to the partner", "one ticket slot", "stages released before they are read",
        "staging not waited for", "names not waited for"])  # fmt: skip
def test_the_model_finds_what_is_wrong(library, mistakes):
    found = 0
    for seed in SEEDS:
        try:
            draw(library, seed, mistakes).run()
        except (Violation, Deadlock):
            found += 1
    assert found >= 3, f"{found} of {len(SEEDS)} interleavings met it"


def draw_alone(library, seed: int, mistakes: gather_model.Mistakes, late: bool = True) -> gather_model.GatherModel:
    r = random.Random(seed)
    stages, num_tickets, sizes = r.choice((4, 5)), r.randint(0, 12), (*K_BLOCKS, 16, 24)
    k_blocks = [r.choice(sizes) for _ in range(num_tickets)]
    at = {k: next_ticket(library, late, k) for k in sizes}
    positions = ring(library, stages, sum(k_blocks) + 1)
    return gather_model.GatherModel(
        seed, r.choice((1, 2, 3)), stages, positions, k_blocks, at, late and r.random() < 0.8, mistakes, seed % 2 == 1
    )


@pytest.mark.parametrize("late", [True, False])
def test_a_lone_cta_gathers_each_tile_by_its_names_and_never_waits_for_ever(library, late):
    for seed in SEEDS:
        try:
            draw_alone(library, seed, gather_model.Mistakes(), late).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("mistakes", [
    gather_model.Mistakes(look_up_early=True), gather_model.Mistakes(announce_again=True),
    gather_model.Mistakes(waits_for_stage=0),
], ids=["the next tile looked up before it is announced", "a tile announced twice",
        "a barrier waited for that can turn twice"])
def test_the_model_of_a_lone_cta_finds_what_is_wrong(library, mistakes):
    found = 0
    for seed in SEEDS:
        try:
            draw_alone(library, seed, mistakes).run()
        except (Violation, Deadlock):
            found += 1
    assert found >= 3, f"{found} of {len(SEEDS)} interleavings met it"
