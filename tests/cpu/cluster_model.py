"""The inside of a pair of CTAs as a state machine: its mbarriers, its rings of stages, tile slots, staging buffers and
tickets, and the roles that use them, as in csrc/gemm, csrc/pipeline and csrc/sync/ring.cuh. See protocol_model.py.

What a slot holds names its tile and k block. Data read before they are there, or overwritten before every reader let go
of them, are a Violation; so is a barrier that gets more arrivals than it expects.
"""

import random
from dataclasses import dataclass, field

from tests.cpu.protocol_model import Deadlock, Violation

TILE_SLOTS, TICKET_SLOTS = 4, 8
HALF, TOKENS_WARPS, MATH_GROUPS = 1, 2, 2  # of the tokens warps one loads images, one names the tile's rows


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes (here halves of an image) have come."""

    arrivals: int
    phase: int = 0
    pending: int = field(default=-1)
    bytes: int = 0

    def __post_init__(self):
        self.pending = self.arrivals

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity

    def arrive(self, count: int = 1, expect: int = 0) -> None:
        self.bytes += expect
        self.pending -= count
        if self.pending < 0:
            raise Violation(f"{-self.pending} arrivals too many in phase {self.phase}")
        self._settle()

    def land(self, count: int) -> None:
        self.bytes -= count
        self._settle()

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.arrivals


@dataclass
class Mistakes:
    """What the model can be told to do wrong."""

    release_to_own_only: bool = False  # stages are released to their own CTA's loader, not to the partner's
    ticket_slots: int = TICKET_SLOTS
    math_releases_early: bool = False
    store_skips_staging: bool = False
    names_not_waited_for: bool = False


class Cta:
    def __init__(self, stages: int):
        self.weights_full = [Barrier(1) for _ in range(stages)]
        self.tokens_full = [Barrier(1) for _ in range(stages)]
        self.stage_empty = [Barrier(MATH_GROUPS * 2) for _ in range(stages)]
        self.tile_full = [Barrier(1) for _ in range(TILE_SLOTS)]
        self.tile_empty = [Barrier(MATH_GROUPS + TOKENS_WARPS + 1) for _ in range(TILE_SLOTS)]
        self.names_full = [Barrier(1) for _ in range(TILE_SLOTS)]
        self.staging_full = [Barrier(1) for _ in range(MATH_GROUPS)]
        self.staging_empty = [Barrier(1) for _ in range(MATH_GROUPS)]
        self.ticket_full = [Barrier(1) for _ in range(TICKET_SLOTS)]
        self.weights = [[None, None] for _ in range(stages)]  # two halves of an image: (tile, k)
        self.tokens: list = [None] * stages
        self.names: list = [None] * TILE_SLOTS
        self.tiles: list = [None] * TILE_SLOTS  # (number, ticket or None for the end)
        self.staging: list = [None] * MATH_GROUPS
        self.partner_ticket: list = [None] * TICKET_SLOTS
        self.stored: list = []
        self.summed: list = []


class Interleaving:
    """Runs self.roles (generators that yield conditions to wait for, or None) in random order, or adversarially: the
    first that can go on does, until the order changes now and then. Deadlock where none can."""

    def __init__(self, seed: int, adversarial: bool):
        self.random, self.adversarial = random.Random(seed), adversarial

    def start(self, roles: list) -> None:
        self.waiting = [[role, None] for role in roles]

    def step(self, entry: list) -> bool:
        role, condition = entry
        if condition is not None and not condition():
            return False
        try:
            entry[1] = next(role)
        except StopIteration:
            self.waiting.remove(entry)
        return True

    def run(self) -> None:
        order = list(self.waiting)
        self.random.shuffle(order)
        while self.waiting:
            if self.adversarial:
                order = [entry for entry in order if entry in self.waiting]
                if self.random.random() < 0.02:
                    order.append(order.pop(self.random.randrange(len(order))))
            else:
                order = list(self.waiting)
                self.random.shuffle(order)
            if not any(self.step(entry) for entry in order):
                raise Deadlock(f"{len(self.waiting)} roles wait")
        self.check_end()


def announce(cta, number: int, ticket: int | None):
    """The weights role's: tile `number` into its slot; ticket None: the end."""
    slot, parity = number % TILE_SLOTS, (number // TILE_SLOTS & 1) ^ 1
    yield lambda: cta.tile_empty[slot].passed(parity)
    cta.tiles[slot] = (number, ticket)
    yield
    cta.tile_full[slot].arrive()


class PairModel(Interleaving):
    """num_pairs pairs share one ticket counter. ring: positions of a ring of `stages` slots, (slot, consumer parity,
    producer parity). k_blocks: of each ticket. next_ticket: for each number of k blocks, the stages behind which the
    next ticket is drawn and announced. shares: whether a ticket's CTAs share their weights."""

    def __init__(self, seed: int, num_pairs: int, stages: int, ring: list, k_blocks: list[int], next_ticket: dict,
                 shares: list[bool], mistakes: Mistakes, adversarial: bool):  # fmt: skip
        super().__init__(seed, adversarial)
        self.ring, self.k_blocks, self.shares, self.mistakes = ring, k_blocks, shares, mistakes
        self.num_pairs, self.counter, self.next_ticket = num_pairs, 0, next_ticket
        self.pairs = [[Cta(stages), Cta(stages)] for _ in range(num_pairs)]
        roles = []
        for p, pair in enumerate(self.pairs):
            for c in range(2):
                roles += [self.weights(p, c), self.store(pair[c])]
                roles += [self.load_images(pair[c]), self.name_rows(pair[c])]
                roles += [self.math(pair, c, group) for group in range(MATH_GROUPS)]
        self.start(roles)

    def weights(self, p: int, c: int):
        pair, cta, tickets = self.pairs[p], self.pairs[p][c], len(self.k_blocks)
        slots, position = self.mistakes.ticket_slots, 0
        ticket = p if p < tickets else None
        yield from announce(cta, 0, ticket)
        number = 0
        while ticket is not None:
            draw_at, announce_at, _ = self.next_ticket[self.k_blocks[ticket]]
            drawn = None
            for k in range(self.k_blocks[ticket]):
                slot, _, parity = self.ring[position]
                position += 1
                yield lambda slot=slot, parity=parity: cta.stage_empty[slot].passed(parity)
                cta.weights_full[slot].arrive(expect=2 * HALF)
                yield
                for half in (c,) if self.shares[ticket] else (0, 1):
                    for target in pair if self.shares[ticket] else (cta,):
                        target.weights[slot][half] = (ticket, k)
                        yield  # in flight: written, and counted later
                        target.weights_full[slot].land(HALF)
                if k == draw_at and c == 0:
                    drawn = self.num_pairs + self.counter
                    self.counter += 1
                    yield
                if k == announce_at:
                    at = number % slots
                    if c == 0:
                        pair[1].partner_ticket[at] = drawn
                        yield
                        pair[1].ticket_full[at].arrive()
                    else:
                        parity = number // slots & 1
                        yield lambda at=at, parity=parity: cta.ticket_full[at].passed(parity)
                        drawn = cta.partner_ticket[at]
                    following = drawn if drawn < tickets else None
                    yield from announce(cta, number + 1, following)
            ticket, number = following, number + 1

    def tiles(self, cta: Cta):
        """Waits for tile after tile; yields conditions, then ("tile", slot, ticket); ends at the last."""
        for number in range(1 << 30):
            slot = number % TILE_SLOTS
            yield lambda slot=slot, number=number: cta.tile_full[slot].passed(number // TILE_SLOTS & 1)
            found, ticket = cta.tiles[slot]
            if found != number:
                raise Violation(f"tile slot {slot} holds tile {found}, its reader is at {number}")
            if ticket is None:
                return
            yield "tile", slot, ticket

    def load_images(self, cta: Cta):
        position = 0
        for step in self.tiles(cta):
            if not isinstance(step, tuple):
                yield step
                continue
            _, tile_slot, ticket = step
            for k in range(self.k_blocks[ticket]):
                slot, _, parity = self.ring[position]
                position += 1
                yield lambda slot=slot, parity=parity: cta.stage_empty[slot].passed(parity)
                cta.tokens[slot] = (ticket, k)
                yield
                cta.tokens_full[slot].arrive()
            cta.tile_empty[tile_slot].arrive()

    def name_rows(self, cta: Cta):
        for step in self.tiles(cta):
            if not isinstance(step, tuple):
                yield step
                continue
            _, tile_slot, ticket = step
            cta.names[tile_slot] = ticket
            yield
            cta.names_full[tile_slot].arrive()
            cta.tile_empty[tile_slot].arrive()

    def check_names(self, cta: Cta, tile_slot: int, ticket: int) -> None:
        if cta.names[tile_slot] != ticket:
            raise Violation(f"the names are of tile {cta.names[tile_slot]}, their reader is at {ticket}")

    def math(self, pair: list[Cta], c: int, group: int):
        cta, position, number = pair[c], 0, 0
        for step in self.tiles(cta):
            if not isinstance(step, tuple):
                yield step
                continue
            _, tile_slot, ticket = step
            for k in range(self.k_blocks[ticket]):
                slot, parity, _ = self.ring[position]
                position += 1
                for barrier in (cta.weights_full[slot], cta.tokens_full[slot]):
                    yield lambda barrier=barrier, parity=parity: barrier.passed(parity)
                if self.mistakes.math_releases_early:
                    self.release(pair, c, slot)
                    yield
                for moment in range(2):  # read from begin to end: nothing may change meanwhile
                    held = [*cta.weights[slot], cta.tokens[slot]]
                    if any(what != (ticket, k) for what in held):
                        raise Violation(f"stage {slot} holds {held}, math is at {(ticket, k)}")
                    if moment == 0:
                        yield
                if not self.mistakes.math_releases_early:
                    self.release(pair, c, slot)
            if not self.mistakes.names_not_waited_for:
                parity = number // TILE_SLOTS & 1
                yield lambda at=tile_slot, parity=parity: cta.names_full[at].passed(parity)
            self.check_names(cta, tile_slot, ticket)
            if not self.mistakes.store_skips_staging:
                parity = (number & 1) ^ 1
                yield lambda parity=parity: cta.staging_empty[group].passed(parity)
            cta.staging[group] = ticket
            number += 1
            yield
            cta.staging_full[group].arrive()
            cta.tile_empty[tile_slot].arrive()
            cta.summed.append(ticket)

    def release(self, pair: list[Cta], c: int, slot: int) -> None:
        for target in (pair[c], pair[c]) if self.mistakes.release_to_own_only else pair:
            target.stage_empty[slot].arrive()

    def store(self, cta: Cta):
        parity = 0
        for step in self.tiles(cta):
            if not isinstance(step, tuple):
                yield step
                continue
            _, tile_slot, ticket = step
            for group in range(MATH_GROUPS):
                yield lambda group=group, parity=parity: cta.staging_full[group].passed(parity)
                self.check_names(cta, tile_slot, ticket)
                if cta.staging[group] != ticket:
                    raise Violation(f"staging holds tile {cta.staging[group]}, store is at {ticket}")
                yield
                if cta.staging[group] != ticket:
                    raise Violation(f"staging of tile {ticket} was overwritten by {cta.staging[group]}")
                cta.staging_empty[group].arrive()
            cta.stored.append(ticket)
            cta.tile_empty[tile_slot].arrive()
            parity ^= 1

    def check_end(self) -> None:
        for c in range(2):
            for name, times in (("stored", 1), ("summed", MATH_GROUPS)):
                done = sorted(ticket for pair in self.pairs for ticket in getattr(pair[c], name))
                if done != sorted(list(range(len(self.k_blocks))) * times):
                    raise Violation(f"CTA {c} of the pairs has {name} {done}")
        for pair in self.pairs:
            if pair[0].stored != pair[1].stored:
                raise Violation("the CTAs of a pair went through other tickets")
