#!/usr/bin/env python3
"""The same ranks as one NVLink domain and as several, side by side: times, correctness, bytes between domains.

    launch/torchrun.sh 2 benchmarks/domains.py --results
        two GPUs: as one domain (the fused kernel over NVLink), as two domains of one rank with NCCL between them, fixed
        pieces in a CUDA graph, and in rounds of --domain-tokens rows with counts on the host
    python benchmarks/domains.py --virtual-ranks 4 --ranks-per-domain 2
        one GPU or a CPU plays all ranks; what lies between domains is a copy in memory
    launch/torchrun.sh 4 benchmarks/domains.py --device cpu --ranks-per-domain 2
        CPU ranks over gloo

Every output is judged against the specification (benchmarks/gate.py); "rounds" reads counts on the host and is
therefore timed call by call. KB a token: what a rank enqueued for other domains in one call, over its tokens; least:
what the routing asks for. Exit status: 0 when every output was right, 1 when one was not, 2 for a wrong command line.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    import checkout  # noqa: F401 (makes this checkout's packages importable; it lies beside this file)
from benchmarks import bench  # first: it sets what the libraries read when they are loaded

# isort: split
import torch
import torch.distributed as dist

from benchmarks import cases as case_list
from benchmarks.implementations import MegaMoE, Setup
from benchmarks.inputs import make_tokens
from benchmarks.record import ScalingRow, machine
from benchmarks.results import SCALING_DIR, append_result, check_folders
from benchmarks.run import Plan, config_of, make_cell, run_one
from megamoe import EPConfig, Workspace, plan_memory
from megamoe.domains.traffic import bytes_per_token, copies_between
from megamoe.support import support


class Variant(NamedTuple):
    name: str
    ranks_per_domain: int
    domain_tokens: int | None


class Measured(NamedTuple):
    row: ScalingRow
    bytes_per_token: float | None


def parser() -> argparse.ArgumentParser:
    doc = __doc__.partition("\n")
    out = argparse.ArgumentParser(
        description=doc[0], epilog=doc[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = out.add_argument
    add("--case", help="one of cases.toml (default: tiny on CPU, flash64 on a GPU)")
    add("--tokens", help="per rank, separated by commas (default: 2,8 on CPU, 8,128,2048,8192 on a GPU)")
    add("--ranks-per-domain", type=int, default=1, metavar="K", help="of the several domains (default: 1)")
    add("--domain-tokens", type=int, default=2048, metavar="N", help="rows of a round (default: 2048)")
    add("--virtual-ranks", type=int, metavar="R", help="this one process plays R ranks")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--num-sms", type=int, metavar="N", help="SMs the kernel may use, in every variant (default: all)")
    add("--seed", type=int, default=0)
    add("--commit", help="commit hash to record, '-dirty' at its end if it is (default: ask git)")
    add("--results", type=Path, nargs="?", const=SCALING_DIR, metavar="DIR", help=f"append rows ({SCALING_DIR.name}/)")
    return out


def variants(ep_size: int, ranks_per_domain: int, domain_tokens: int, capacity: int) -> list[Variant]:
    """One domain; several with fixed pieces; several with rounds. ValueError where that is no division."""
    if not 1 <= ranks_per_domain < ep_size:
        raise ValueError(f"--ranks-per-domain {ranks_per_domain}: several domains of {ep_size} ranks have fewer each; "
                         "start more ranks, or give --virtual-ranks")
    EPConfig(1, ranks_per_domain=ranks_per_domain).num_domains(ep_size)
    name = f"{ep_size // ranks_per_domain} domains of {ranks_per_domain}"
    return [
        Variant("one domain", ep_size, None),
        Variant(f"{name}, fixed", ranks_per_domain, None),
        Variant(f"{name}, rounds", ranks_per_domain, min(domain_tokens, capacity)),
    ]


def measure(setup: Setup, plan: Plan, variant: Variant, facts: dict) -> list[Measured]:
    """All token counts of one variant, on a workspace of its own."""
    case, capacity = plan.cases[0], max(plan.tokens)
    ep_config = EPConfig(
        capacity, setup.virtual_ranks, num_sms=plan.num_sms, ranks_per_domain=variant.ranks_per_domain,
        domain_tokens=variant.domain_tokens,
    )  # fmt: skip
    report = support(config_of(case), ep_config, setup.device, ep_size=setup.ep_size)
    if not report.ok:
        raise ValueError("; ".join(report.reasons))
    memory = plan_memory(config_of(case), ep_config, setup.ep_size, device=setup.device)
    workspace = Workspace(config_of(case), ep_config, device=setup.device)  # closed on success only, as in run.py
    impl = MegaMoE(setup, case, config_of(case), workspace)
    if setup.device.type == "cuda":
        plan = replace(plan, protocol="isolated" if variant.domain_tokens else "graph")
    found = []
    for tokens in plan.tokens:
        cell = make_cell(setup, plan, case, "uniform", tokens, capacity)
        row = run_one(setup, plan, facts, cell, impl, "prequantized", memory.symmetric_bytes or None)
        counted = bytes_of_call(workspace, impl, cell, setup) if workspace.domains is not None else None
        everyone = [
            make_tokens(case, rank, tokens, "uniform", 0, setup.seed, setup.device).topk_idx
            for rank in range(setup.ep_size)
        ]
        fields = vars(row) | ({"roofline_us": None, "roofline_fraction": None} if workspace.domains else {})
        scaling = ScalingRow(
            **fields, mode="weak", base_experts=case.num_experts, experts="held", base_tokens=tokens,
            num_units=setup.num_units, ranks_per_domain=variant.ranks_per_domain,
            series_per_domain=variant.ranks_per_domain, domain_tokens=variant.domain_tokens, max_domains=None,
            copies_between=copies_between(everyone, case.num_experts, variant.ranks_per_domain),
        )  # fmt: skip
        found.append(Measured(scaling, counted))
    impl.close()
    workspace.close()
    return found


def bytes_of_call(workspace: Workspace, impl: MegaMoE, cell, setup: Setup) -> float:
    """Bytes that one call enqueues for other domains, over the tokens of the ranks held here; largest over ranks."""
    tokens = cell.tokens[0]
    outs = [torch.empty(len(t.x), cell.case.hidden, dtype=torch.bfloat16, device=setup.device) for t in tokens]
    (call,) = impl.calls([tokens], cell.num_tokens, "prequantized", [outs])
    transport = workspace.domains.transport
    before = transport.bytes_sent
    call()
    setup.meet.barrier()
    return setup.meet.max([(transport.bytes_sent - before) / max(sum(len(t.x) for t in tokens), 1)])[0]


def table(found: dict[str, list[Measured]]) -> str:
    """us and relative L2 of every variant, one line a number of tokens."""
    names = list(found)
    out = ["| tokens a rank | " + " | ".join(f"{name}, us" for name in names)
           + " | fixed / one domain | fixed: KB a token | rounds: KB a token | least | worst relative L2 |",
           "|--" * (len(names) + 6) + "|"]  # fmt: skip
    for one, fixed, rounds in zip(*found.values(), strict=True):
        case = fixed.row
        least = bytes_per_token(case.copies_between, case.hidden, case.topk)
        times = [_us(m.row.us) for m in (one, fixed, rounds)]
        ratio = "-" if not (one.row.us and fixed.row.us) else f"{fixed.row.us / one.row.us:.2f}"
        kilo = [f"{value / 1e3:.1f}" for value in (fixed.bytes_per_token, rounds.bytes_per_token, least)]
        worst = max(m.row.rel_l2 for m in (one, fixed, rounds))
        out.append("| " + " | ".join([str(case.num_tokens), *times, ratio, *kilo, f"{worst:.1e}"]) + " |")
    return "\n".join(out)


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.idle_ranks = 0
    try:
        setup = bench.make_setup(args)
        on_gpu = setup.device.type == "cuda"
        tokens = case_list.parse_tokens(args.tokens or ("8,128,2048,8192" if on_gpu else "2,8"))
        (case,) = case_list.parse_cases(args.case or ("flash64" if on_gpu else "tiny"), case_list.load_cases())
        chosen = variants(setup.ep_size, args.ranks_per_domain, args.domain_tokens, max(tokens))
        check_folders(setup.is_first, results=args.results)
    except ValueError as error:
        print(f"domains.py: {error}", file=sys.stderr)
        return 2
    plan = Plan(
        cases=[case], tokens=tokens, routings=["uniform"], inputs=["prequantized"], baselines=[], protocol="auto",
        capacity="max", idle_ranks=0, check_rows=64, check_only=False, num_sms=args.num_sms,
    )  # fmt: skip
    facts = machine(setup.device, setup.num_gpus, args.commit)
    if setup.is_first:
        print(bench.describe(setup, facts), flush=True)
    found, ok = {}, True
    for variant in chosen:
        found[variant.name] = measure(setup, plan, variant, facts)
        for measured in found[variant.name]:
            row = measured.row
            ok &= row.ok
            if setup.is_first:
                said = "ok" if row.ok else f"FAILED: {row.reason}"
                print(f"{variant.name}: {row.num_tokens} tokens, {row.protocol}, {_us(row.us)} us, {said}", flush=True)
                if args.results and row.ok and row.us:
                    append_result(row, args.results)
    if setup.is_first:
        print(f"\n{case.name}, {setup.ep_size} ranks\n\n{table(found)}\n")
        print(f"verdict: {'PASS' if ok else 'FAIL'}", flush=True)
    if dist.is_initialized():
        setup.meet.barrier()
        dist.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    bench.run_script(main)
