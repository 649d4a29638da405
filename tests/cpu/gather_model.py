"""The inside of a CTA that works alone, as cluster_model.py has that of a pair: the weights role, which draws tickets
and announces them, and the two tokens warps, which gather each tile's rows and, somewhere in it, look up those of the
next one (csrc/gemm/load_weights.cuh, gather_tokens.cuh)."""

from dataclasses import dataclass

from tests.cpu.cluster_model import MATH_GROUPS, TILE_SLOTS, TOKENS_WARPS, Barrier, Interleaving, announce
from tests.cpu.protocol_model import Violation


@dataclass
class Mistakes:
    """What the model can be told to do wrong. look_up_early: the tokens warps wait for the next tile halfway.
    waits_for_stage: whose tokens the third stage waits for."""

    look_up_early: bool = False
    waits_for_stage: int = 2
    announce_again: bool = False


class Cta:
    def __init__(self, stages: int):
        self.weights_full = [Barrier(1) for _ in range(stages)]
        self.tokens_full = [Barrier(TOKENS_WARPS) for _ in range(stages)]
        self.stage_empty = [Barrier(MATH_GROUPS) for _ in range(stages)]
        self.tile_full = [Barrier(1) for _ in range(TILE_SLOTS)]
        self.tile_empty = [Barrier(MATH_GROUPS + TOKENS_WARPS + 1) for _ in range(TILE_SLOTS)]
        self.weights: list = [None] * stages  # (ticket, k)
        self.tokens = [[None] * TOKENS_WARPS for _ in range(stages)]
        self.tiles: list = [None] * TILE_SLOTS  # (number, ticket or None for the end)
        self.names = [[None] * TOKENS_WARPS for _ in range(TILE_SLOTS)]
        self.summed: list = []
        self.drawn_at: list = []  # of each ticket, how many tiles this CTA had begun


class GatherModel(Interleaving):
    """CTAs that share a ticket counter. k_blocks, next_ticket, ring: as in PairModel. waits_for_tokens: before its
    first tile's third stage the weights role waits for that stage's tokens."""

    def __init__(self, seed: int, num_ctas: int, stages: int, ring: list, k_blocks: list[int], next_ticket: dict,
                 waits_for_tokens: bool, mistakes: Mistakes, adversarial: bool):  # fmt: skip
        super().__init__(seed, adversarial)
        self.ring, self.k_blocks, self.next_ticket, self.mistakes = ring, k_blocks, next_ticket, mistakes
        self.num_ctas, self.counter, self.waits_for_tokens = num_ctas, 0, waits_for_tokens
        self.ctas = [Cta(stages) for _ in range(num_ctas)]
        roles = []
        for c, cta in enumerate(self.ctas):
            roles += [self.weights(c), self.store(cta)]
            roles += [self.gather(cta, warp) for warp in range(TOKENS_WARPS)]
            roles += [self.math(cta) for _ in range(MATH_GROUPS)]
        self.start(roles)

    def weights(self, c: int):
        cta, position, number = self.ctas[c], 0, 0
        ticket = c if c < len(self.k_blocks) else None
        yield from announce(cta, 0, ticket)
        while ticket is not None:
            draw_at, announce_at, _ = self.next_ticket[self.k_blocks[ticket]]
            for k in range(self.k_blocks[ticket]):
                slot, _, parity = self.ring[position]
                position += 1
                yield lambda slot=slot, parity=parity: cta.stage_empty[slot].passed(parity)
                if self.waits_for_tokens and number == 0 and k == 2:
                    yield lambda: cta.tokens_full[self.mistakes.waits_for_stage].passed(0)
                cta.weights[slot] = (ticket, k)
                yield
                cta.weights_full[slot].arrive()
                if k == draw_at:
                    drawn = self.num_ctas + self.counter
                    self.counter += 1
                    yield
                if k == announce_at:
                    following = drawn if drawn < len(self.k_blocks) else None
                    for _ in range(1 + self.mistakes.announce_again):
                        yield from announce(cta, number + 1, following)
            ticket, number = following, number + 1

    def wait_tile(self, cta: Cta, number: int):
        slot = number % TILE_SLOTS
        yield lambda: cta.tile_full[slot].passed(number // TILE_SLOTS & 1)
        found, ticket = cta.tiles[slot]
        if found != number:
            raise Violation(f"tile slot {slot} holds tile {found}, its reader is at {number}")
        return ticket

    def prepare(self, cta: Cta, warp: int, number: int):
        ticket = yield from self.wait_tile(cta, number)
        cta.names[number % TILE_SLOTS][warp] = ticket

    def gather(self, cta: Cta, warp: int):
        position, number = 0, 0
        yield from self.prepare(cta, warp, 0)
        while (ticket := (yield from self.wait_tile(cta, number))) is not None:
            look_up_at = self.next_ticket[self.k_blocks[ticket]][2]
            if self.mistakes.look_up_early:
                look_up_at = self.k_blocks[ticket] // 2
            for k in range(self.k_blocks[ticket]):
                slot, _, parity = self.ring[position]
                position += 1
                yield lambda slot=slot, parity=parity: cta.stage_empty[slot].passed(parity)
                if cta.names[number % TILE_SLOTS][warp] != ticket:
                    raise Violation(f"rows of tile {ticket} are gathered by other names")
                cta.tokens[slot][warp] = (ticket, k)
                yield
                cta.tokens_full[slot].arrive()
                if k == look_up_at:
                    yield from self.prepare(cta, warp, number + 1)
            cta.tile_empty[number % TILE_SLOTS].arrive()
            number += 1

    def math(self, cta: Cta):
        position, number = 0, 0
        while (ticket := (yield from self.wait_tile(cta, number))) is not None:
            for k in range(self.k_blocks[ticket]):
                slot, parity, _ = self.ring[position]
                position += 1
                for barrier in (cta.weights_full[slot], cta.tokens_full[slot]):
                    yield lambda barrier=barrier, parity=parity: barrier.passed(parity)
                for moment in range(2):  # read from begin to end: nothing may change meanwhile
                    held = [cta.weights[slot], *cta.tokens[slot]]
                    if any(what != (ticket, k) for what in held):
                        raise Violation(f"stage {slot} holds {held}, math is at {(ticket, k)}")
                    if moment == 0:
                        yield
                cta.stage_empty[slot].arrive()
            cta.summed.append(ticket)
            cta.tile_empty[number % TILE_SLOTS].arrive()
            number += 1

    def store(self, cta: Cta):
        number = 0
        while (yield from self.wait_tile(cta, number)) is not None:
            cta.tile_empty[number % TILE_SLOTS].arrive()
            number += 1

    def check_end(self) -> None:
        done = sorted(ticket for cta in self.ctas for ticket in cta.summed)
        if done != sorted(list(range(len(self.k_blocks))) * MATH_GROUPS):
            raise Violation(f"the CTAs have summed {done}")
