"""python -m megamoe.testing.soak: the same few calls over and over, in changing order, bit for bit the same for ever.

A set of cases (two layers, changing token counts and routings, two placements of the experts' weights) is run once,
held against the specification, and its digest compared with that of every earlier run in the state file. Then calls of
them follow each other at random, by launch or by graph replay, with `load_weights` in between (a rebalance), at an
uneven pace of the ranks, and every output must be the first one's bits. Runs add up in the state file.

One process plays virtual ranks; under torchrun each process is a rank with its own GPU (or a gloo rank).
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
from megamoe.exchange import LocalExchange
from megamoe.ranks import init_process_group, rank_from_env
from megamoe.steps import moe_layer
from megamoe.testing.compare import row_limit, verdict_ranks
from megamoe.testing.data import ROUTINGS, make_case
from megamoe_cuda.gather import gather

GPU_SHAPES = (MoEConfig(2048, 1024, 16, 6), MoEConfig(384, 640, 8, 3, swiglu_limit=1.0))
CPU_SHAPES = (MoEConfig(256, 128, 8, 3), MoEConfig(128, 256, 4, 2, swiglu_limit=1.0))
SEED, PLACEMENTS = 11, 2


class Prepared(NamedTuple):
    """One case on the ranks held here. expected: its output with each placement; graph: None, or a capture of it."""

    layer: int
    arguments: dict
    outs: list[torch.Tensor]
    expected: list[list[torch.Tensor]]
    graph: object


class Soak:
    """Layers, cases and their expected bits."""

    def __init__(self, device: str, num_cases: int):
        self.info = rank_from_env()
        self.several = self.info.ep_size > 1
        if self.several:
            init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout_s=120.0)
        self.group = dist.group.WORLD if self.several else None
        self.device, self.ep_size = device, self.info.ep_size if self.several else 2
        self.ranks = (self.info.ep_rank,) if self.several else tuple(range(self.ep_size))
        self.shapes, self.capacity = (GPU_SHAPES, 256) if device == "cuda" else (CPU_SHAPES, 12)
        ep_config = EPConfig(self.capacity, None if self.several else self.ep_size, 60.0, 20.0)
        self.workspace = Workspace(list(self.shapes), ep_config, group=self.group, device=device)
        self.layers = [MoELayer(config, self.workspace) for config in self.shapes]
        weights = [[make_case(SEED + p, config, self.ep_size, 0, device=device).weights for p in range(PLACEMENTS)]
                   for config in self.shapes]  # fmt: skip
        self.weights, self.placed = weights, [0] * len(self.shapes)
        r = random.Random(SEED)
        self.cases = [self._draw(r, number) for number in range(num_cases)]
        for placement in range(PLACEMENTS):
            for layer in range(len(self.layers)):
                self.place(layer, placement)
            for case in self.cases:
                self._expect(case, placement)
        if device == "cuda":
            self.cases = [self._captured(case) if i % 3 == 0 else case for i, case in enumerate(self.cases)]
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    def _draw(self, r: random.Random, number: int) -> Prepared:
        layer = number % len(self.shapes)
        counts = [r.choice((0, 1, 7, self.capacity, r.randint(0, self.capacity))) for _ in range(self.ep_size)]
        self.drawn = make_case(SEED + number, self.shapes[layer], self.ep_size, counts, r.choice(ROUTINGS), self.device,
                               prequantized=r.random() < 0.5)  # fmt: skip
        mine = [self.drawn.inputs[rank] for rank in self.ranks]
        one = (lambda values: values[0]) if self.several else list
        arguments = {
            "hidden_states": one([i.x if i.x_sf is None else (i.x, i.x_sf) for i in mine]),
            "topk_idx": one([i.topk_idx for i in mine]), "topk_weights": one([i.topk_weights for i in mine]),
            "num_tokens_bound": r.choice((None, max(counts))), "inputs": self.drawn.inputs,
        }  # fmt: skip
        outs = [torch.empty(i.x.shape, dtype=torch.bfloat16, device=self.device) for i in mine]
        return Prepared(layer, arguments, outs, [], None)

    def _expect(self, case: Prepared, placement: int) -> None:
        """First output of a case, held against the specification."""
        config, inputs = self.shapes[case.layer], case.arguments["inputs"]
        self.call(case)
        self.settle()
        spec = moe_layer(config, LocalExchange(self.ep_size), self.weights[case.layer][placement], inputs)
        limit = row_limit(config.intermediate)
        found = verdict_ranks(case.outs, [spec[rank] for rank in self.ranks], max_row_rel_l2=limit)
        if not found.ok:
            raise AssertionError(f"a case is wrong before the soak begins: {found.text}")
        case.expected.append([out.clone() for out in case.outs])

    def _captured(self, case: Prepared) -> Prepared:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.call(case)
        return case._replace(graph=graph)

    def place(self, layer: int, placement: int) -> None:
        mine = [self.weights[layer][placement][rank] for rank in self.ranks]
        columns = [[getattr(w, name) for w in mine] for name in ("linear1", "linear2", "linear1_sf", "linear2_sf")]
        self.layers[layer].load_weights(*(column[0] if self.several else column for column in columns))
        self.placed[layer] = placement

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
            case = self.cases[r.randrange(len(self.cases))]
            if r.random() < 0.01:
                self.place(case.layer, r.randrange(PLACEMENTS))
                tally["rebalances"] += 1
            if self.device == "cuda" and own.random() < 0.02:
                torch.cuda._sleep(100_000)  # some 50 us: the other rank runs ahead
            for out in case.outs:
                out.fill_(float("nan"))
            if case.graph is not None and r.random() < 0.5:
                case.graph.replay()
                tally["replays"] += 1
            else:
                self.call(case)
            for out, expected in zip(case.outs, case.expected[self.placed[case.layer]], strict=True):
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
        self.workspace.close()


def soak(device: str, minutes: float, state_file: Path, num_cases: int, calls_a_round: int) -> dict:
    """Runs for some minutes and adds to the state file, which is then returned. AssertionError when bits differ from
    this run's first calls, or from an earlier run's; ValueError when the file is of other cases."""
    begin = time.monotonic()
    made = Soak(device, num_cases)
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts = {"device": where, "ranks": made.ep_size, "rank": made.info.ep_rank, "processes": made.several,
             "cases": num_cases}  # fmt: skip
    state = {**facts, "digest": made.digest(), "runs": 0, "rounds": 0, "calls": 0, "replays": 0, "rebalances": 0,
             "seconds": 0.0}  # fmt: skip
    if state_file.exists():
        earlier = json.loads(state_file.read_text())
        other = [name for name, value in facts.items() if earlier.get(name) != value]
        if other:
            raise ValueError(f"{state_file} is of another soak: {other[0]}={earlier.get(other[0])!r} there, "
                             f"{facts[other[0]]!r} here; name another file")  # fmt: skip
        if earlier["digest"] != state["digest"]:
            raise AssertionError(f"digest {state['digest'][:16]}, in {state_file} {earlier['digest'][:16]}")
        state = earlier
    done = False
    while not done:
        made.round(state["rounds"], calls_a_round, state)
        state["rounds"] += 1
        done = time.monotonic() - begin > 60 * minutes
        if made.several:  # all ranks stop after the same round
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
    print(json.dumps(soak(given.device, given.minutes, path, given.cases, 1000 if given.device == "cuda" else 20)))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
