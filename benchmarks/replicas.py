"""What redundant experts cost and save: a layer's time without and with them, by replica choice, and while rebalancing.

    launch/torchrun.sh 2 benchmarks/replicas.py --results
    python benchmarks/replicas.py --virtual-ranks 2

Popularity-weighted routing; the plan is made from the routing before the one that is timed. Every output is compared
bit for bit with the layer's without a plan: exit status 1 if one differs. "room": slots and maps are there, no plan.
"rebalance": one step of a rebalance and one call, timed together; its copies are bounded by --max-experts a rank.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

if __name__ == "__main__":
    import checkout  # noqa: F401 (makes this checkout's packages importable; it lies beside this file)
from benchmarks.bench import make_setup, run_script  # first: it sets what the libraries read when they are loaded

# isort: split
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.cases import load_cases, parse_cases, parse_tokens
from benchmarks.inputs import make_tokens, make_weights
from benchmarks.record import machine
from benchmarks.results import REPLICAS_DIR, append_json, check_folders
from benchmarks.run import config_of
from benchmarks.timing import measure, num_routings, pick_protocol
from megamoe import EPConfig, MoELayer, Workspace, plan_experts
from megamoe.layout import CHOICES
from megamoe.plan import balancedness

REBALANCE_STEPS = 24
HOST_CYCLES = 10_000_000  # about 5 ms, in which the host enqueues a step and a call


class Bench:
    """One layer and the routings of one token count; every number is the maximum over ranks."""

    def __init__(self, setup, case, weights, workspace, routings, num_tokens):
        self.setup, self.num_tokens = setup, num_tokens
        self.layer = MoELayer(config_of(case), workspace)
        self.layer.load_weights(*(self.per_rank(list(column)) for column in
                                  (zip(*((w.linear1, w.linear2, w.linear1_sf, w.linear2_sf) for w in weights)))))
        self.outs = [[torch.empty_like(t.hidden_states) for t in tokens] for tokens in routings]
        self.calls = [self.call_of(tokens, out) for tokens, out in zip(routings, self.outs)]

    def per_rank(self, values):
        return values if self.setup.virtual_ranks is not None else values[0]

    def call_of(self, tokens, out):
        arguments = [self.per_rank(list(column)) for column in zip(*(t.for_layer("prequantized") for t in tokens))]
        return lambda: self.layer(*arguments, num_tokens_bound=self.num_tokens, out=self.per_rank(out))

    def poison(self):
        for out in chain(*self.outs):
            out.fill_(float("nan"))

    def time(self) -> float:
        cuda = self.setup.device.type == "cuda"
        us = measure(pick_protocol("auto", self.num_tokens, cuda), self.calls, self.poison, self.setup.meet).us
        self.layer.check()
        return us

    def bits(self) -> torch.Tensor:
        return torch.cat([out.view(torch.int16).flatten() for out in chain(*self.outs)])

    def rebalance(self, plans, expected) -> tuple[float, float, bool]:
        """(us of a step that moves weights and a call, weights in MB that a step moves, bits kept), medians."""
        meet, device, times, same, moved, number = self.setup.meet, self.setup.device, [], True, [], 0
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        while len(times) < REBALANCE_STEPS:
            under_way = self.layer.rebalance(plans[number % 2])
            moved.append(under_way.moved_bytes / max(1, under_way.num_steps - 1) / 1e6)
            number, finished = number + 1, False
            while not finished:
                meet.barrier()
                for out in self.outs[0]:
                    out.fill_(float("nan"))
                if device.type == "cuda":
                    torch.cuda._sleep(HOST_CYCLES)
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    finished = under_way.step()
                    self.calls[0]()
                    end.record()
                    torch.cuda.synchronize(device)
                    times.append(begin.elapsed_time(end) * 1e3)
                else:
                    finished = under_way.step()
                    self.calls[0]()
                    times.append(0.0)
                got = torch.cat([out.view(torch.int16).flatten() for out in self.outs[0]])
                wrong += (got != expected[: len(got)]).sum()
        self.layer.check()
        same = sum(meet.max([float(wrong)])) == 0
        return max(meet.max([statistics.median(times)])), statistics.median(moved), same


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = out.add_argument
    add("--case", default="flash64", help="of cases.toml (default flash64)")
    add("--tokens", default="8,128,2048", help="per rank (default 8,128,2048)")
    add("--redundant", type=int, default=8, help="redundant experts over all ranks (default 8)")
    add("--max-experts", type=int, default=1, help="moved to a rank in a step of the rebalance (default 1)")
    add("--routing", default="zipf")
    add("--weight-format", default="fp8", choices=("fp8", "mxfp4"))
    add("--virtual-ranks", type=int)
    add("--device", default="auto")
    add("--seed", type=int, default=0)
    add("--json", type=Path)
    add("--results", type=Path, nargs="?", const=REPLICAS_DIR, metavar="DIR",
        help="append each row whose bits are right to a .jsonl file of DIR (DIR: benchmarks/results/replicas)")
    add("--commit", help="commit hash to record, '-dirty' at its end if it is (default: ask git)")
    return out


def main(argv=None) -> int:
    given = parser().parse_args(argv)
    try:
        setup = make_setup(given)
        if len(cases := parse_cases(given.case, load_cases())) > 1:
            raise ValueError(f"--case {given.case}: one at a time")
        case, tokens = cases[0], parse_tokens(given.tokens)
        plan_experts(np.ones((1, case.num_experts)), num_ranks=setup.ep_size, num_redundant_experts=given.redundant)
        check_folders(setup.is_first, given.json, given.results)
    except ValueError as error:
        print(f"replicas.py: {error}", file=sys.stderr)
        return 2
    facts = machine(setup.device, setup.num_gpus, given.commit)
    case = replace(case, weight_format=given.weight_format)
    weights = [make_weights(case, setup.experts_of(case, rank), setup.seed, setup.device) for rank in setup.ranks_here]
    rows, failed = [], False
    for num_tokens in tokens:
        count = num_routings(pick_protocol("auto", num_tokens, setup.device.type == "cuda"), num_tokens)
        routings = [[make_tokens(case, rank, num_tokens, given.routing, i, setup.seed, setup.device)
                     for rank in setup.ranks_here] for i in range(count)]  # fmt: skip
        loads = [_load(setup, case, num_tokens, given.routing, 100 + i) for i in range(2)]
        plans = [plan_experts(load, num_ranks=setup.ep_size, num_redundant_experts=given.redundant) for load in loads]
        row = {"case": case.name, "format": case.weight_format, "tokens": num_tokens, "ranks": setup.ep_size,
               "virtual_ranks": setup.virtual_ranks, "redundant": given.redundant,
               "routing": given.routing}  # fmt: skip
        row["planned_balancedness"] = float(plans[0].balancedness[0])
        row["balancedness_without"] = float(balancedness(loads[0].reshape(setup.ep_size, -1).sum(1)))
        ep_config = EPConfig(num_tokens, setup.virtual_ranks)
        with Workspace(config_of(case), ep_config, device=setup.device) as workspace:
            bench = Bench(setup, case, weights, workspace, routings, num_tokens)
            row["none"], expected = bench.time(), bench.bits()
            bench.layer.close()
        ep_config = EPConfig(num_tokens, setup.virtual_ranks, num_staged_experts=given.max_experts,
                             num_redundant_slots_per_rank=-(-given.redundant // setup.ep_size))  # fmt: skip
        with Workspace(config_of(case), ep_config, device=setup.device) as workspace:
            bench = Bench(setup, case, weights, workspace, routings, num_tokens)
            row["room"] = bench.time()
            same = {"room": torch.equal(bench.bits(), expected)}
            for choice in CHOICES:
                bench.layer.load_plan(plans[0], choice=choice)
                row[choice] = bench.time()
                same[choice] = torch.equal(bench.bits(), expected)
            row["rebalance"], row["moved_mb"], same["rebalance"] = bench.rebalance(plans[::-1], expected)
            bench.layer.close()
        everyone = setup.meet.gather(same)
        row["bits_differ"] = sorted({name for one in everyone for name, ok in one.items() if not ok})
        failed |= bool(row["bits_differ"])
        rows.append(row)
        if given.results and setup.is_first and not row["bits_differ"]:
            append_json({**row, **facts}, given.results)
        if setup.is_first:
            print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in row.items()), flush=True)  # fmt: skip
    if given.json and setup.is_first:
        given.json.write_text(json.dumps({"machine": facts, "rows": rows}))
    if dist.is_initialized():
        setup.meet.barrier()
        dist.destroy_process_group()
    return 1 if failed else 0


def _load(setup, case, num_tokens, routing, index):
    # Every rank draws all ranks' tokens of another routing: all plan alike
    count = torch.zeros(case.num_experts, dtype=torch.int64)
    for rank in range(setup.ep_size):
        tokens = make_tokens(case, rank, num_tokens, routing, index, setup.seed, setup.device)
        count += torch.bincount(tokens.topk_idx.flatten().cpu(), minlength=case.num_experts)
    return count[None].double().numpy()


if __name__ == "__main__":
    run_script(main)
