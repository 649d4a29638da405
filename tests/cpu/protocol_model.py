"""The launch protocol of csrc/ as a state machine: ranks x CTAs x roles as coroutines, interleaved at random.

Memory is a dictionary from (region, rank, address) to what was written there, addressed as in csrc/sync/launch.cuh but
in units: a row of x or y is `hidden` units long. What is written names its launch and its row, and every reader knows
what it must find: data read too early, overwritten too early, or taken for that of another launch is a Violation. No
coroutine able to go on is a Deadlock. Each rank starts its next launch as soon as its own CTAs have left the last.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

BLOCK_TOKENS, SLICE_TOKENS, TILE_SLOTS = 2, 2, 4


class Violation(AssertionError):
    pass


class Deadlock(AssertionError):
    pass


class Layer(NamedTuple):
    """n_blocks1: h columns in units of a block; hidden: columns of y in units of a block. Order: of the tiles.
    tokens_on_m: rows are copied into expert order first."""

    num_local_experts: int
    topk: int
    n_blocks1: int
    hidden: int
    group: int
    lag: int
    tokens_on_m: bool = False


@dataclass
class Protocol:
    """What the model can be told to do wrong."""

    num_banks: int = 2
    flags_hold_epoch: bool = True
    reverse_tiles: bool = False
    flag_after_first_tile: bool = False
    image_before_row: bool = False


class Launch(NamedTuple):
    """One rank's view of one launch."""

    layer: Layer
    epoch: int
    routing: list[list[list[int]]]  # [rank][token][slot] -> expert or -1


class Model:
    """order: (blocks, n1, n2, group, lag) -> tiles in ticket order. launches: (layer, routing of every rank)."""

    def __init__(self, seed: int, num_ranks: int, num_ctas: int, capacity: int, launches, order: Callable,
                 protocol: Protocol, adversarial: bool = False):  # fmt: skip
        self.random = random.Random(seed)
        self.adversarial = adversarial
        self.num_ranks, self.num_ctas, self.capacity = num_ranks, num_ctas, capacity
        self.launches = [Launch(layer, 1 + i, routing) for i, (layer, routing) in enumerate(launches)]
        self.order, self.protocol = order, protocol
        self.pitch = {"x": capacity * max(x.layer.hidden for x in self.launches),
                      "head": capacity * max(x.layer.topk for x in self.launches)}  # fmt: skip
        self.memory: dict = {}
        self.flags = defaultdict(int)
        self.counters = defaultdict(int)
        self.executed = defaultdict(list)
        self.combined: set = set()
        self.finished = [0] * num_ranks
        self.waiting: list[list] = [[] for _ in range(num_ranks)]  # [coroutine, condition] of each rank
        self.most_ahead = 0

    # --- memory ------------------------------------------------------------------------------------------------------

    def read(self, place: tuple, wanted) -> None:
        found = self.memory.get(place)
        if found != wanted:
            raise Violation(f"{place} holds {found}, the reader needs {wanted}")

    def flag_value(self, launch: Launch) -> int:
        return launch.epoch if self.protocol.flags_hold_epoch else 1

    def is_up(self, place: tuple, launch: Launch) -> Callable[[], bool]:
        wanted = self.flag_value(launch)
        return lambda: self.flags[place] == wanted

    def bank(self, launch: Launch) -> int:
        return launch.epoch % self.protocol.num_banks

    def head_place(self, dst: int, src: int, launch: Launch, token: int, slot: int) -> tuple:
        at = (self.bank(launch) * self.num_ranks + src) * self.pitch["head"] + token * launch.layer.topk + slot
        return "head", dst, at

    # --- roles: generators that yield None (others may run) or a condition to wait for -------------------------------

    def items(self, count: int, cta: int) -> range:
        return range(cta, count, self.num_ctas)

    def dispatch(self, me: int, cta: int, launch: Launch):
        routing, layer, bank = launch.routing[me], launch.layer, self.bank(launch)
        for part in self.items(max(1, -(-len(routing) // SLICE_TOKENS)), cta):
            for dst in range(self.num_ranks):
                for token in range(part * SLICE_TOKENS, min((part + 1) * SLICE_TOKENS, len(routing))):
                    for slot, expert in enumerate(routing[token]):
                        place = self.head_place(dst, me, launch, token, slot)
                        self.memory[place] = (launch.epoch, me, token, slot, expert)
                    yield
                if part == 0:
                    self.memory["count", dst, bank, me] = (launch.epoch, len(routing))
                    yield
                self.flags["head_ready", dst, bank, me, part] = self.flag_value(launch)
                yield
        for token in self.items(len(routing), cta):
            for dst in {expert // layer.num_local_experts for expert in routing[token] if expert >= 0}:
                for unit in range(layer.hidden):
                    place = "recv_x", dst, me * self.pitch["x"] + token * layer.hidden + unit
                    self.memory[place] = (launch.epoch, me, token, unit)
                yield
                self.flags["x_ready", dst, me * self.capacity + token] = self.flag_value(launch)
                yield

    def combine(self, me: int, cta: int, launch: Launch):
        layer = launch.layer
        for token in self.items(len(launch.routing[me]), cta):
            used = [slot for slot, expert in enumerate(launch.routing[me][token]) if expert >= 0]
            for slot in used:
                yield self.is_up(("combine_ready", me, token * 16 + slot), launch)
            for slot in used:
                for unit in range(layer.hidden):
                    place = "combine_y", me, (token * layer.topk + slot) * layer.hidden + unit
                    self.read(place, (launch.epoch, token, slot, unit))
                yield
            self.combined.add((launch.epoch, me, token))

    def plan(self, me: int, cta: int, launch: Launch, blocks: list):
        """Fills `blocks` with the rows (src, token, slot) of each token block."""
        bank, layer = self.bank(launch), launch.layer
        rows = []
        for src in range(self.num_ranks):
            routing = launch.routing[src]
            yield self.is_up(("head_ready", me, bank, src, 0), launch)
            self.read(("count", me, bank, src), (launch.epoch, len(routing)))
            for part in range(1, -(-len(routing) // SLICE_TOKENS)):
                yield self.is_up(("head_ready", me, bank, src, part), launch)
            for token, experts in enumerate(routing):
                yield
                for slot, expert in enumerate(experts):
                    place = self.head_place(me, src, launch, token, slot)
                    self.read(place, (launch.epoch, src, token, slot, expert))
                    if expert // layer.num_local_experts == me:
                        rows.append((expert, src, token, slot))
        for name in ("range_ready", "list_ready"):
            self.flags[name, me, cta] = self.flag_value(launch)
            for other in range(self.num_ctas):
                yield self.is_up((name, me, other), launch)
        for expert in range(me * layer.num_local_experts, (me + 1) * layer.num_local_experts):
            mine = sorted(row[1:] for row in rows if row[0] == expert)
            blocks += [mine[i : i + BLOCK_TOKENS] for i in range(0, len(mine), BLOCK_TOKENS)]

    def announce(self, me: int, cta: int, launch: Launch, blocks: list, slots: list):
        layer = launch.layer
        tiles = self.order(len(blocks), layer.n_blocks1, layer.hidden, layer.group, layer.lag)
        tiles = tiles[::-1] if self.protocol.reverse_tiles else tiles
        ticket = cta
        while True:
            yield lambda: len(slots) < TILE_SLOTS
            if ticket >= len(tiles):
                slots.append(None)
                return
            slots.append(tiles[ticket])
            yield
            ticket = self.num_ctas + self.counters["ticket", me]
            self.counters["ticket", me] += 1

    def execute(self, me: int, launch: Launch, blocks: list, slots: list):
        while True:
            yield lambda: bool(slots)
            tile = slots[0]
            if tile is None:
                return
            is_linear2, m_block, n_block = tile
            for src, token, slot in blocks[m_block]:  # names and weights of the rows
                expert = launch.routing[src][token][slot]
                self.read(self.head_place(me, src, launch, token, slot), (launch.epoch, src, token, slot, expert))
            yield
            yield from (self.linear2 if is_linear2 else self.linear1)(me, launch, m_block, n_block, blocks[m_block])
            self.executed[me, launch.epoch].append(tile)
            slots.pop(0)

    def permute(self, me: int, cta: int, launch: Launch, blocks: list, planned: list):
        """Tokens on M: received rows into expert order. Waits for this CTA's plan; the rows are every CTA's."""
        yield lambda: bool(planned)
        rows = [(m_block, r, *row) for m_block, block in enumerate(blocks) for r, row in enumerate(block)]
        for i in self.items(len(rows), cta):
            m_block, r, src, token, slot = rows[i]
            if not self.protocol.image_before_row:
                yield self.is_up(("x_ready", me, src * self.capacity + token), launch)
            for unit in range(launch.layer.hidden):
                place = "recv_x", me, src * self.pitch["x"] + token * launch.layer.hidden + unit
                self.read(place, (launch.epoch, src, token, unit))
                at = (m_block * BLOCK_TOKENS + r) * launch.layer.hidden + unit
                self.memory["x_image", me, at] = (launch.epoch, src, token, unit)
            yield
            self.flags["x_image_ready", me, m_block * BLOCK_TOKENS + r] = self.flag_value(launch)
            yield

    def linear1(self, me: int, launch: Launch, m_block: int, n_block: int, rows: list):
        layer = launch.layer
        if layer.tokens_on_m:
            for r in range(len(rows)):
                yield self.is_up(("x_image_ready", me, m_block * BLOCK_TOKENS + r), launch)
            for unit in range(layer.hidden):
                for r, (src, token, _) in enumerate(rows):
                    place = "x_image", me, (m_block * BLOCK_TOKENS + r) * layer.hidden + unit
                    self.read(place, (launch.epoch, src, token, unit))
                yield
            yield from self.store_h(me, launch, m_block, n_block)
            return
        for src, token, _ in rows:
            yield self.is_up(("x_ready", me, src * self.capacity + token), launch)
        for unit in range(layer.hidden):
            for src, token, _ in rows:
                place = "recv_x", me, src * self.pitch["x"] + token * layer.hidden + unit
                self.read(place, (launch.epoch, src, token, unit))
            yield
        yield from self.store_h(me, launch, m_block, n_block)

    def store_h(self, me: int, launch: Launch, m_block: int, n_block: int):
        at = m_block * launch.layer.n_blocks1 + n_block
        self.memory["h", me, at] = (launch.epoch, m_block, n_block)
        yield
        self.flags["h_ready", me, at] = self.flag_value(launch)
        yield

    def linear2(self, me: int, launch: Launch, m_block: int, n_block: int, rows: list):
        layer = launch.layer
        for k in range(layer.n_blocks1):
            yield self.is_up(("h_ready", me, m_block * layer.n_blocks1 + k), launch)
            self.read(("h", me, m_block * layer.n_blocks1 + k), (launch.epoch, m_block, k))
        for src, token, slot in rows:
            place = "combine_y", src, (token * layer.topk + slot) * layer.hidden + n_block
            self.memory[place] = (launch.epoch, token, slot, n_block)
            yield
        self.counters["block_done", me, m_block] += 1
        last = self.counters["block_done", me, m_block] == layer.hidden
        if last:
            self.counters["block_done", me, m_block] = 0
        yield
        if last or self.protocol.flag_after_first_tile:
            for src, token, slot in rows:
                self.flags["combine_ready", src, token * 16 + slot] = self.flag_value(launch)
                yield

    def exchange_warps(self, me: int, cta: int, launch: Launch, blocks: list, planned: list):
        yield from self.dispatch(me, cta, launch)
        if launch.layer.tokens_on_m:
            yield from self.permute(me, cta, launch, blocks, planned)
        yield from self.combine(me, cta, launch)

    def tile_warps(self, me: int, cta: int, launch: Launch, blocks: list, planned: list):
        slots: list = []
        yield from self.plan(me, cta, launch, blocks)
        planned.append(True)
        self.waiting[me].append([self.announce(me, cta, launch, blocks, slots), None])
        yield from self.execute(me, launch, blocks, slots)
        if cta == 0:
            layer = launch.layer
            self.counters["tiles", me] = len(blocks) * (layer.n_blocks1 + layer.hidden)

    # --- the machine -------------------------------------------------------------------------------------------------

    def start(self, me: int) -> None:
        if self.finished[me] < len(self.launches):
            launch = self.launches[self.finished[me]]
            for cta in range(self.num_ctas):
                shared: tuple[list, list] = [], []  # token blocks; whether the plan is done
                self.waiting[me].append([self.exchange_warps(me, cta, launch, *shared), None])
                self.waiting[me].append([self.tile_warps(me, cta, launch, *shared), None])

    def leave(self, me: int) -> None:
        """All CTAs of a rank are through with a launch."""
        epoch = self.launches[self.finished[me]].epoch
        tiles = self.executed[me, epoch]
        if len(set(tiles)) != len(tiles) or len(tiles) != self.counters["tiles", me]:
            raise Violation(f"rank {me} launch {epoch}: {len(tiles)} tiles run, {self.counters['tiles', me]} exist")
        if any(count for (name, *where), count in self.counters.items() if name == "block_done" and where[0] == me):
            raise Violation(f"rank {me} launch {epoch}: block_done was not given back as zero")
        self.counters["ticket", me] = 0
        self.finished[me] += 1
        self.most_ahead = max(self.most_ahead, self.finished[me] - min(self.finished))
        self.start(me)

    def step(self, me: int, which: int) -> bool:
        entry = self.waiting[me][which]
        coroutine, condition = entry
        if condition is not None and not condition():
            return False
        try:
            entry[1] = next(coroutine)
        except StopIteration:
            self.waiting[me].remove(entry)
            if not self.waiting[me]:
                self.leave(me)
        return True

    def run(self) -> None:
        for me in range(self.num_ranks):
            self.start(me)
        speeds = [self.random.choice((1.0, 1.0, 0.2, 0.01)) for _ in range(self.num_ranks)]
        misses = 0
        if self.adversarial:
            self.run_by_priority()
        while any(self.waiting):
            if misses < 40:
                busy = [me for me in range(self.num_ranks) if self.waiting[me]]
                me = self.random.choices(busy, [speeds[me] for me in busy])[0]
                misses = 0 if self.step(me, self.random.randrange(len(self.waiting[me]))) else misses + 1
                continue
            everyone = [(me, i) for me in range(self.num_ranks) for i in range(len(self.waiting[me]))]
            self.random.shuffle(everyone)
            if not any(self.step(*place) for place in everyone):
                raise Deadlock(f"{len(everyone)} roles wait, launches finished by rank: {self.finished}")
            misses = 0
        tokens = {(launch.epoch, me, token) for launch in self.launches for me, routing in enumerate(launch.routing)
                  for token in range(len(routing))}  # fmt: skip
        if self.combined != tokens:
            raise Violation("not every token was combined")
        if any(count for (name, *_), count in self.counters.items() if name in ("ticket", "block_done")):
            raise Violation("a counter did not come back to its start")

    def run_by_priority(self) -> None:
        """The first role that can go on does, again and again, so that the others starve; now and then it becomes the
        last (Burckhardt et al., "A Randomized Scheduler with Probabilistic Guarantees of Finding Bugs")."""
        priority: dict[int, float] = {}
        while any(self.waiting):
            everyone = [(me, entry) for me in range(self.num_ranks) for entry in self.waiting[me]]
            everyone.sort(key=lambda item: priority.setdefault(id(item[1]), self.random.random()))
            for me, entry in everyone:
                if self.step(me, self.waiting[me].index(entry)):
                    if self.random.random() < 0.005:
                        priority[id(entry)] = 1 + self.random.random()
                    break
            else:
                raise Deadlock(f"{len(everyone)} roles wait, launches finished by rank: {self.finished}")


def draw(seed: int, order: Callable, protocol: Protocol, num_launches: int = 5, adversarial: bool = False) -> Model:
    """Two layers of different shape in turn on 1 to 4 ranks of 1 to 3 CTAs, 0 to 5 tokens a rank, ids -1 and twice the
    same included. Half of the cases give every rank only its own experts, so that ranks depend on each other least."""
    r = random.Random(seed)
    num_ranks, num_ctas, capacity = r.choice((1, 2, 2, 3, 4)), r.randint(1, 3), 5
    orders = r.choice(((1, 1 << 20), (2, 1), (2, 2)))
    layers = [Layer(r.randint(1, 3), r.randint(1, 3), r.randint(1, 3), r.randint(1, 3), *orders, seed % 2 == 1)
              for _ in range(2)]  # fmt: skip
    local = r.random() < 0.5
    launches = []
    for i in range(num_launches):
        layer = layers[i % 2]
        routing = []
        for me in range(num_ranks):
            first, count = (me, 1) if local else (0, num_ranks)
            experts = range(first * layer.num_local_experts, (first + count) * layer.num_local_experts)
            routing.append([[r.choice((-1, *experts)) for _ in range(layer.topk)]
                            for _ in range(r.choice((0, 1, r.randint(0, capacity))))])  # fmt: skip
        launches.append((layer, routing))
    return Model(seed, num_ranks, num_ctas, capacity, launches, order, protocol, adversarial)
