"""The exchange of row maxima between the CTAs of a pair (largest_of_pair in csrc/pipeline/3_swiglu.cuh) as a state
machine, in random interleavings: each CTA finds the other's maxima of the same tile, and none waits for ever.

The CTAs are held together by nothing but the exchange: what their shared stages do on top (cluster_model.py) depends on
the number of k blocks, and a tile with few of them lies in the ring before it is wanted.
"""

import random
from typing import NamedTuple

import pytest

from tests.cpu.cluster_model import Barrier
from tests.cpu.protocol_model import Deadlock, Violation

WARPS, EXCHANGING = 4, 3  # math warps; the first of them have a row each to exchange (192 of 256 threads)
SEEDS = range(150)


class Exchange(NamedTuple):
    """What the model can be told to do wrong."""

    buffers: int = 2
    barriers: int = 2
    arrives_first: bool = False
    turns_early: bool = False


class Cta:
    def __init__(self, how: Exchange):
        self.turn = 0
        self.partner_amax = [[None] * EXCHANGING for _ in range(how.buffers)]  # tiles, for a row of each warp
        self.amax_full = [Barrier(EXCHANGING) for _ in range(how.barriers)]
        self.math, self.met = Barrier(WARPS), 0  # the named barrier of the math warps
        self.found: list = []


def meet(cta: Cta, phase: int):
    cta.math.arrive()
    yield lambda: cta.math.phase > phase


def warp_role(pair: list[Cta], c: int, warp: int, tiles: list[tuple[bool, int]], how: Exchange):
    """tiles: (is linear1, stages). A yield is where another warp may come between; with a condition, a wait."""
    mine, other, meetings = pair[c], pair[c ^ 1], 0
    for number, (is_linear1, stages) in enumerate(tiles):
        for _ in range(stages):
            yield
        if not is_linear1:
            continue
        yield from meet(mine, meetings)
        if warp < EXCHANGING:
            turn = mine.turn
            full, parity = turn % how.barriers, turn // how.barriers % 2
            if how.arrives_first:
                other.amax_full[full].arrive()
                yield
            other.partner_amax[turn % how.buffers][warp] = number
            yield
            if not how.arrives_first:
                other.amax_full[full].arrive()
                yield
            yield lambda full=full, parity=parity: mine.amax_full[full].passed(parity)
            have = mine.partner_amax[turn % how.buffers][warp]
            if have != number:
                raise Violation(f"tile {number} got the maxima of tile {have}")
            mine.found.append(number)
        if how.turns_early and warp == 0:
            mine.turn = (mine.turn + 1) % 4
        yield from meet(mine, meetings + 1)
        meetings += 2
        if not how.turns_early and warp == 0:
            mine.turn = (mine.turn + 1) % 4
        yield


def run(seed: int, how: Exchange) -> None:
    r = random.Random(seed)
    tiles = [(r.random() < 0.7, r.choice((0, 1, 2, 6))) for _ in range(r.randint(1, 12))]
    pair = [Cta(how), Cta(how)]
    weight = {}  # how often a warp goes on: now and then one sleeps while the others run ahead
    waiting = [[warp_role(pair, c, warp, tiles, how), None] for c in range(2) for warp in range(WARPS)]
    while waiting:
        if r.random() < 0.05:
            weight = {id(entry): r.choice((1, 1, 1, 0.001)) for entry in waiting}
        able = [entry for entry in waiting if entry[1] is None or entry[1]()]
        if not able:
            raise Deadlock(f"{len(waiting)} warps wait")
        entry = r.choices(able, [weight.get(id(entry), 1) for entry in able])[0]
        try:
            entry[1] = next(entry[0])
        except StopIteration:
            waiting.remove(entry)
    linear1 = [number for number, (is_linear1, _) in enumerate(tiles) if is_linear1]
    assert all(sorted(cta.found) == sorted(linear1 * EXCHANGING) for cta in pair)


def test_each_cta_finds_the_maxima_of_its_tile_and_nobody_waits_for_ever():
    for seed in SEEDS:
        try:
            run(seed, Exchange())
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("how", [
    Exchange(buffers=1), Exchange(barriers=1), Exchange(arrives_first=True), Exchange(turns_early=True),
], ids=["one buffer", "one mbarrier", "arrival before the store", "turn before all have read it"])  # fmt: skip
def test_the_model_finds_what_is_wrong(how):
    found = 0
    for seed in SEEDS:
        try:
            run(seed, how)
        except (Violation, Deadlock):
            found += 1
    assert found >= 3, f"{found} of {len(SEEDS)} interleavings met it"
