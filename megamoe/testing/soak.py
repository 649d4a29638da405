"""python -m megamoe.testing.soak: the same few calls over and over, in changing order, bit for bit the same for ever.

A set of cases (changing token counts and routings, two sets of weights a layer) is run once, held against the
specification, and its digest compared with that of every earlier run in the state file. Then calls of them follow each
other at random, by launch or by graph replay, at an uneven pace of the ranks, and every output must be the first one's
bits. Runs add up in the state file.

Most calls are of two FP8 layers whose weights are loaded anew in between. A few are of three layers, MXFP4 and FP8, in
a workspace with room for plans: between their calls a rebalance moves experts and copies of experts, a step at a time.

One process plays virtual ranks; under torchrun each process is a rank with its own GPU (or a gloo rank).
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megamoe import EPConfig, ExpertPlan, MoEConfig, MoELayer, Workspace, plan_experts
from megamoe.exchange import LocalExchange
from megamoe.layout import CHOICES
from megamoe.plan import popularity
from megamoe.ranks import init_process_group, rank_from_env
from megamoe.steps import moe_layer
from megamoe.testing.compare import row_limit, verdict_ranks
from megamoe.testing.data import ROUTINGS, make_case
from megamoe_cuda.gather import gather


class Sizes(NamedTuple):
    """shapes, capacity: of the layers of most calls. planned, planned_capacity: of the layers under plans, of which
    planned_share of the calls are. Of the MXFP4 layers on a GPU the first is wide; the second's experts have rows
    enough for weights that are decoded ahead, and are small, so that its calls take no longer."""

    shapes: tuple[MoEConfig, ...]
    capacity: int
    planned: tuple[MoEConfig, ...]
    planned_capacity: int
    planned_share: float


GPU = Sizes((MoEConfig(2048, 1024, 16, 6), MoEConfig(384, 640, 8, 3, swiglu_limit=1.0)), 256,
            (MoEConfig(2048, 1024, 16, 6, "mxfp4"), MoEConfig(256, 256, 4, 4, "mxfp4"),
             MoEConfig(384, 640, 8, 3, swiglu_limit=1.0)), 400, 1 / 32)  # fmt: skip
CPU = Sizes((MoEConfig(256, 128, 8, 3), MoEConfig(128, 256, 4, 2, swiglu_limit=1.0)), 12,
            (MoEConfig(256, 128, 8, 3, "mxfp4"), MoEConfig(128, 128, 4, 4, "mxfp4"),
             MoEConfig(128, 256, 4, 2, swiglu_limit=1.0)), 12, 1 / 4)  # fmt: skip
SEED, WEIGHTS, VIRTUAL_RANKS, SAID_S = 11, 2, 2, 10.0
PLANNED_ROUTINGS = ("uniform", "zipf", "holes", "duplicates")
LOAD = 0.01  # chance of other weights before a call of the layer
PLANNED_LOAD, REBALANCE = 0.002, 0.02  # before a call under plans, while no rebalance is under way
FEW_ROWS = 64  # of fewer the whole output may be as far from the specification as a row
SPARE, STAGED, PLANS = 2, 2, 4  # slots for copies a rank, experts it receives a step, plans a layer


class Prepared(NamedTuple):
    """One case on the ranks held here. expected: its output with each set of weights; graph: None, or a capture."""

    layer: int
    arguments: dict
    outs: list[torch.Tensor]
    expected: list[list[torch.Tensor]]
    graph: object


class Drawn(NamedTuple):
    """counts: tokens of each rank; bound: num_tokens_bound."""

    counts: list[int]
    routing: str
    prequantized: bool
    bound: int | None


def draw(r: random.Random, ep_size: int, capacity: int, planned: bool) -> Drawn:
    """planned: on all ranks, of many experts, so that one that moved wrongly shows."""
    few = (7,) if planned else (0, 1, 7)
    counts = [r.choice((*few, capacity, r.randint(capacity // 2 if planned else 0, capacity))) for _ in range(ep_size)]
    routing = r.choice(PLANNED_ROUTINGS if planned else ROUTINGS)
    prequantized, bound = r.random() < 0.5, r.choice((None, max(counts)))
    return Drawn(counts, routing, prequantized, max(counts) if planned and max(counts) in few else bound)


def layer_of(sizes: Sizes, num_cases: int, number: int) -> int:
    """Of case `number`, counted through sizes.shapes + sizes.planned: the first num_cases are not under plans."""
    if number < num_cases:
        return number % len(sizes.shapes)
    return len(sizes.shapes) + (number - num_cases) % len(sizes.planned)


def cases_in_all(sizes: Sizes, num_cases: int) -> int:
    return num_cases + max(num_cases // 2, len(sizes.planned))


class Soak:
    """Layers, cases and their expected bits. inputs: what tells other cases from these."""

    def __init__(self, device: str, num_cases: int):
        self.info = rank_from_env()
        self.several = self.info.ep_size > 1
        if self.several:
            init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout_s=120.0)
        self.group = dist.group.WORLD if self.several else None
        self.device, self.ep_size = device, self.info.ep_size if self.several else VIRTUAL_RANKS
        self.ranks = (self.info.ep_rank,) if self.several else tuple(range(self.ep_size))
        sizes = GPU if device == "cuda" else CPU
        self.sizes, self.shapes, first_planned = sizes, sizes.shapes + sizes.planned, len(sizes.shapes)
        ranks = None if self.several else self.ep_size
        common = {"group": self.group, "device": device}
        roomy = EPConfig(sizes.planned_capacity, ranks, 60.0, 20.0, num_redundant_slots_per_rank=SPARE,
                         num_staged_experts=STAGED)  # fmt: skip
        self.workspaces = [Workspace(list(sizes.shapes), EPConfig(sizes.capacity, ranks, 60.0, 20.0), **common),
                           Workspace(list(sizes.planned), roomy, **common)]  # fmt: skip
        self.layers = [MoELayer(config, self.workspaces[number >= first_planned])
                       for number, config in enumerate(self.shapes)]  # fmt: skip
        self.weights = [[make_case(SEED + w, config, self.ep_size, 0, device=device).weights for w in range(WEIGHTS)]
                        for config in self.shapes]  # fmt: skip
        self.loaded, self.rebalance = [0] * len(self.shapes), None
        self.plans = {number: list(plans_of(config, self.ep_size))
                      for number, config in enumerate(self.shapes) if number >= first_planned}  # fmt: skip
        self.inputs = hashlib.sha256(repr(sizes).encode())
        for w in (one for layer in self.weights for ranks in layer for one in ranks):
            self._tell_apart(w.linear1_sf, w.linear2_sf)
        r, self.num_cases = random.Random(SEED), num_cases
        self.cases = [self._draw(r, number, layer_of(sizes, num_cases, number))
                      for number in range(cases_in_all(sizes, num_cases))]  # fmt: skip
        for w in range(WEIGHTS):
            for layer in range(len(self.layers)):
                self.load(layer, w)
            for case in self.cases:
                self._expect(case, w)
        if device == "cuda":  # of those under plans one of each layer
            replayed = {*range(0, num_cases, 3), *range(num_cases, num_cases + len(sizes.planned))}
            self.cases = [self._captured(case) if i in replayed else case for i, case in enumerate(self.cases)]
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    def _draw(self, r: random.Random, number: int, layer: int) -> Prepared:
        ep_config = self.layers[layer].workspace.ep_config
        drawn = draw(r, self.ep_size, ep_config.num_max_tokens_per_rank, ep_config.takes_plans)
        case = make_case(SEED + number, self.shapes[layer], self.ep_size, drawn.counts, drawn.routing, self.device,
                         prequantized=drawn.prequantized)  # fmt: skip
        mine = [case.inputs[rank] for rank in self.ranks]
        one = (lambda values: values[0]) if self.several else list
        arguments = {
            "hidden_states": one([i.x if i.x_sf is None else (i.x, i.x_sf) for i in mine]),
            "topk_idx": one([i.topk_idx for i in mine]), "topk_weights": one([i.topk_weights for i in mine]),
            "num_tokens_bound": drawn.bound, "inputs": case.inputs,
        }  # fmt: skip
        self.inputs.update(repr((layer, drawn)).encode())
        for i in case.inputs:
            self._tell_apart(i.x, i.topk_idx, i.topk_weights)
        outs = [torch.empty(i.x.shape, dtype=torch.bfloat16, device=self.device) for i in mine]
        return Prepared(layer, arguments, outs, [], None)

    def _tell_apart(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self.inputs.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())

    def _expect(self, case: Prepared, w: int) -> None:
        """First output of a case, held against the specification."""
        config, inputs = self.shapes[case.layer], case.arguments["inputs"]
        self.call(case)
        self.settle()
        spec = moe_layer(config, LocalExchange(self.ep_size), self.weights[case.layer][w], inputs)
        limits = {"max_row_rel_l2": row_limit(config.intermediate)}
        if sum(map(len, case.outs)) < FEW_ROWS:
            limits["max_rel_l2"] = limits["max_row_rel_l2"]
        found = verdict_ranks(case.outs, [spec[rank] for rank in self.ranks], **limits)
        if not found.ok:
            raise AssertionError(f"a case is wrong before the soak begins: {found.text}")
        case.expected.append([out.clone() for out in case.outs])

    def _captured(self, case: Prepared) -> Prepared:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.call(case)
        return case._replace(graph=graph)

    def load(self, layer: int, w: int) -> None:
        mine = [self.weights[layer][w][rank] for rank in self.ranks]
        columns = [[getattr(one, name) for one in mine] for name in ("linear1", "linear2", "linear1_sf", "linear2_sf")]
        self.layers[layer].load_weights(*(column[0] if self.several else column for column in columns))
        self.loaded[layer] = w

    def move(self, layer: int, r: random.Random, tally: dict) -> None:
        """Before a call of a layer under plans: other weights, or a rebalance, begun or a step further. One at a time:
        layers of a workspace share the memory in which experts arrive."""
        if self.rebalance is None and r.random() < PLANNED_LOAD:
            self.load(layer, r.randrange(WEIGHTS))
            tally["loads"] += 1
        elif self.rebalance is None and r.random() < REBALANCE:
            self.rebalance = self.layers[layer].rebalance(r.choice(self.plans[layer]), choice=r.choice(CHOICES))
        if self.rebalance is not None:
            tally["steps"] += 1
            if self.rebalance.step():  # the call that follows lies between this step and the next
                tally["rebalances"] += 1
                tally["moved_bytes"] += self.rebalance.moved_bytes
                self.rebalance = None

    def call(self, case: Prepared) -> None:
        arguments = {name: value for name, value in case.arguments.items() if name != "inputs"}
        self.layers[case.layer](**arguments, out=case.outs[0] if self.several else case.outs)

    def settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        for layer in self.layers:
            layer.check()

    def round(self, number: int, num_calls: int, tally: dict) -> None:
        """Calls in an order that all ranks draw alike; AssertionError when a bit differs."""
        r, own = random.Random(SEED * 1_000_003 + number), random.Random(number * 64 + self.info.ep_rank)
        for _ in range(num_calls):
            planned = r.random() < self.sizes.planned_share
            cases = range(self.num_cases, len(self.cases)) if planned else range(self.num_cases)
            case = self.cases[r.choice(cases)]
            if planned:
                self.move(case.layer, r, tally)
                tally["mxfp4"] += self.shapes[case.layer].weight_format == "mxfp4"
                tally["planned"] += 1
            elif r.random() < LOAD:
                self.load(case.layer, r.randrange(WEIGHTS))
                tally["loads"] += 1
            if self.device == "cuda" and own.random() < 0.02:
                torch.cuda._sleep(100_000)  # some 50 us: the other rank runs ahead
            for out in case.outs:
                out.fill_(float("nan"))
            if case.graph is not None and r.random() < 0.5:
                case.graph.replay()
                tally["replays"] += 1
            else:
                self.call(case)
            for out, expected in zip(case.outs, case.expected[self.loaded[case.layer]], strict=True):
                self.wrong += (out.view(torch.int16) != expected.view(torch.int16)).sum()
            tally["calls"] += 1
        self.settle()
        if int(self.wrong):
            raise AssertionError(f"round {number}: {int(self.wrong)} values differ from the first call's")

    def digest(self) -> str:
        digest = hashlib.sha256()
        for case in self.cases:
            for outs in case.expected:
                for out in outs:
                    digest.update(out.view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        self.cases.clear()  # graphs hold addresses
        for layer in self.layers:
            layer.close()
        for workspace in self.workspaces:
            workspace.close()


def plans_of(config: MoEConfig, ep_size: int) -> Iterator[ExpertPlan]:
    """Of other loads each, with as many copies of experts as the slots hold, half of them, or none."""
    for seed in range(PLANS):
        load = popularity(("zipf", "lognormal")[seed % 2], 1, config.num_experts, seed)
        copies = (SPARE, SPARE // 2, SPARE, 0)[seed % 4] if ep_size > 1 else 0
        yield plan_experts(load, num_ranks=ep_size, num_redundant_experts=copies * ep_size)


def read_state(state_file: Path, facts: dict) -> dict:
    """What earlier runs left, {} if there was none. ValueError where it cannot be read, is of another soak than `facts`
    says, or could not be written again."""
    if not os.access(state_file.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--state {state_file}: {state_file.parent} is no folder that can be written to")
    if not state_file.exists():
        return {}
    try:
        earlier = json.loads(state_file.read_text())
        other = [name for name, value in facts.items() if earlier.get(name) != value]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--state {state_file} is no state of a soak ({error}); name another file") from error
    if other:
        raise ValueError(f"--state {state_file} is of another soak: {other[0]}={earlier.get(other[0])!r} there, "
                         f"{facts[other[0]]!r} here; name another file")  # fmt: skip
    return earlier


def soak(device: str, minutes: float, state_file: Path, num_cases: int, calls_a_round: int) -> dict:
    """Runs for some minutes and adds to the state file, which is then returned. Says every SAID_S seconds on standard
    error how far it is. AssertionError when bits differ from this run's first calls, or from an earlier run's;
    ValueError as read_state."""
    begin = said = time.monotonic()
    info = rank_from_env()
    several = info.ep_size > 1
    facts = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
             "ranks": info.ep_size if several else VIRTUAL_RANKS, "rank": info.ep_rank, "processes": several,
             "cases": num_cases}  # fmt: skip
    read_state(state_file, facts)  # before minutes go into it
    made = Soak(device, num_cases)
    facts["inputs"] = made.inputs.hexdigest()
    counts = dict.fromkeys(("runs", "rounds", "calls", "replays", "loads", "planned", "mxfp4", "rebalances", "steps",
                            "moved_bytes"), 0)  # fmt: skip
    state = {**facts, "digest": made.digest(), **counts, "seconds": 0.0}
    earlier = read_state(state_file, facts)
    if earlier and earlier["digest"] != state["digest"]:
        raise AssertionError(f"digest {state['digest'][:16]}, in {state_file} {earlier['digest'][:16]}")
    state, done, before = earlier or state, False, earlier.get("calls", 0)
    while not done:
        made.round(state["rounds"], calls_a_round, state)
        state["rounds"] += 1
        now = time.monotonic()
        if info.ep_rank == 0 and now - said > SAID_S:
            said = now
            print(f"soak: {now - begin:.0f} of {60 * minutes:.0f} s, {state['calls'] - before} calls, no bit differs",
                  file=sys.stderr, flush=True)  # fmt: skip
        done = now - begin > 60 * minutes
        if several:  # all ranks stop after the same round
            done = any(gather(made.group, "soak", done, 60.0))
    state["runs"] += 1
    state["seconds"] += time.monotonic() - begin
    made.close()
    temporary = state_file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(state) + "\n")
    temporary.replace(state_file)
    return state


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megamoe.testing.soak", description=__doc__.partition(": ")[2])
    parser.add_argument("--minutes", type=float, default=8.0, help="of this run; default %(default)s")
    parser.add_argument("--state", required=True, metavar="FILE", help="runs add up here; a rank adds its number")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=int, default=24, help="default %(default)s")
    given = parser.parse_args(argv)
    info = rank_from_env()
    path = Path(given.state)
    if info.ep_size > 1:
        path = path.with_name(f"{path.stem}.rank{info.ep_rank}{path.suffix}")
    try:
        state = soak(given.device, given.minutes, path, given.cases, 1000 if given.device == "cuda" else 20)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(state))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
