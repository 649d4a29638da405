#!/usr/bin/env python3
"""Strong and weak scaling of the layer over 1, 2, ... ranks, each point judged against the specification.

    launch/mpirun.sh 4 benchmarks/scaling.py
        ranks 1, 2 and 4 of one start (mpi4py); torchrun and srun do as well
    python benchmarks/scaling.py --virtual-ranks 8 --case flash64 --tokens 512 --results
        one GPU plays 1, 2, 4 and 8 ranks; rows are appended to benchmarks/results/scaling/
    launch/scale.sh 8 --case flash64 --tokens 512 --results
        one start for each number of GPUs: NVSHMEM keeps its ranks for the life of a process
    launch/mpirun.sh 4 benchmarks/scaling.py --sizes 4 --ranks-per-domain 2 --max-domains 1
        two domains of two ranks, a token's experts in one of them
    python benchmarks/scaling.py --report --predict --plot scaling.png
        tables and plot of what benchmarks/results/scaling/ holds, and the planner's prediction for up to 512 ranks

strong: --tokens are those of all ranks together. weak: --tokens are those of each rank.
--experts held: the model is the same at every size. --experts scaled: experts per rank are, and the largest size has
the model's. --max-domains M, with --ranks-per-domain: a token's experts lie in at most M domains at every size; without
it, uniform routing spreads over ever more.
What is timed and how: benchmarks/timing.py. What is expected: benchmarks/scaling_report.py.
Exit status: 0 when every output was right, 1 when one was not, 2 for a wrong command line.
"""

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":
    import checkout  # noqa: F401 (makes this checkout's packages importable; it lies beside this file)
from benchmarks import bench  # first: it sets what the libraries read when they are loaded

# isort: split
import torch
import torch.distributed as dist

from benchmarks import cases as case_list
from benchmarks import prediction, scaling_report
from benchmarks.implementations import Setup
from benchmarks.inputs import ROUTINGS, make_tokens
from benchmarks.record import ScalingRow, machine
from benchmarks.results import RESULTS_DIR, SCALING_DIR, append_result, check_folder, check_folders, read_results
from benchmarks.run import Outcome, Plan, run_cases
from benchmarks.table import Table
from benchmarks.timing import PROTOCOLS, Meet
from megamoe.domains.places import domains_of, explain, gather_places
from megamoe.domains.traffic import copies_between
from megamoe.ranks import init_process_group, rank_from_env

MODES = ("strong", "weak")


def parser() -> argparse.ArgumentParser:
    doc = __doc__.partition("\n")
    out = argparse.ArgumentParser(
        description=doc[0], epilog=doc[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = out.add_argument
    add("--mode", default="strong,weak", help="some of strong,weak (default: both)")
    add("--case", help="names of cases.toml separated by commas (default: tiny on CPU, flash64 on a GPU)")
    add("--tokens", default="64", help="separated by commas: of all ranks (strong) or of each (weak) (default: 64)")
    add("--sizes", help="numbers of ranks separated by commas (default: 1, 2, 4, ... up to all)")
    add("--experts", default="held", choices=("held", "scaled"), help="with the ranks (default: held)")
    add("--routing", default="uniform", help=f"some of {','.join(ROUTINGS)} (default: uniform)")
    add("--virtual-ranks", type=int, metavar="R", help="this one process plays up to R ranks")
    add("--ranks-per-domain", type=int, metavar="K", help="as in EPConfig; smaller sizes are one domain (default: all)")
    add("--domain-tokens", type=int, metavar="N", help="as in EPConfig: rounds of N rows")
    add("--max-domains", type=int, metavar="M", help="domains a token's experts may lie in (default: any)")
    add("--protocol", default="auto", choices=("auto", *PROTOCOLS), help="as bench.py")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--check-rows", type=int, default=16, metavar="N", help="rows of each rank that are judged (default: 16)")
    add("--seed", type=int, default=0)
    add("--commit", help="commit hash to record, '-dirty' at its end if it is (default: ask git)")
    add("--results", type=Path, nargs="?", const=SCALING_DIR, metavar="DIR", help=f"append rows ({SCALING_DIR.name}/)")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--plot", type=Path, metavar="FILE.png", help="draw efficiency and time over ranks; needs matplotlib")
    add("--predict", action="store_true", help="also the planner's prediction for up to 512 ranks")
    add("--report", action="store_true", help="measure nothing: report --results (default: benchmarks/results/scaling)")
    return out


def sizes_of(text: str | None, most: int) -> list[int]:
    """Numbers of ranks, ascending. ValueError names one that is out of range."""
    if text is None:
        return [size for size in (2**i for i in range(most.bit_length())) if size < most] + [most]
    sizes = sorted(set(case_list.parse_tokens(text)))
    wrong = [size for size in sizes if not 1 <= size <= most]
    if wrong:
        raise ValueError(f"--sizes {text!r}: {wrong[0]} must be between 1 and the {most} ranks there are")
    return sizes


def case_at(case: case_list.Case, size: int, largest: int, experts: str) -> case_list.Case:
    """The model at this number of ranks. ValueError where it has too few experts."""
    if experts == "held":
        return case
    if case.num_experts % largest:
        raise ValueError(f"--experts scaled: {case.num_experts} experts of {case.name} do not divide by {largest}")
    return replace(case, num_experts=case.num_experts // largest * size)


def tokens_at(mode: str, tokens: int, size: int) -> int:
    """Tokens of each rank. ValueError where they cannot be even."""
    if mode == "weak":
        return tokens
    if tokens % size:
        raise ValueError(f"--tokens {tokens} of all ranks together do not divide by {size} ranks; strong mode needs it")
    return tokens // size


def setup_at(setup: Setup, size: int) -> Setup | None:
    """The first `size` ranks as a setup of their own; None on the others. Collective over all ranks."""
    if setup.ranks_per_domain is not None and setup.ranks_per_domain >= size:
        setup = replace(setup, ranks_per_domain=size, domain_tokens=None)
    if setup.virtual_ranks is not None:
        return replace(setup, ep_size=size, ranks_here=tuple(range(size)), virtual_ranks=size)
    if size == setup.ep_size:
        return setup
    group = dist.new_group(list(range(size)))
    if setup.ranks_here[0] >= size:
        return None
    units = size if setup.num_gpus else 0
    return replace(
        setup, ep_size=size, num_gpus=units, num_units=size, meet=Meet(setup.device, group), group=group
    )


def points(args, setup: Setup, sizes: list[int]) -> tuple[list[tuple], list[dict]]:
    """((mode, case, tokens, size, the case at this size, tokens per rank) ..., what cannot be run and why)."""
    default = "flash64" if setup.device.type == "cuda" else "tiny"
    cases = case_list.parse_cases(args.case or default, case_list.load_cases())
    if 0 in case_list.parse_tokens(args.tokens):
        raise ValueError(f"--tokens {args.tokens!r}: a call without tokens has no efficiency; give 1 or more")
    found, not_run = [], []
    for mode in case_list.parse_choices("--mode", args.mode, MODES):
        for case in cases:
            for tokens in case_list.parse_tokens(args.tokens):
                for size in sizes:
                    name = {"case": f"{case.name}, {mode}, {size} ranks", "impl": "megamoe"}
                    try:
                        at = case_at(case, size, sizes[-1], args.experts), tokens_at(mode, tokens, size)
                    except ValueError as error:
                        not_run.append({**name, "reason": str(error)})
                        continue
                    found.append((mode, case, tokens, size, *at))
    return found, not_run


def why_not(setup: Setup, size: int) -> str | None:
    """Why one start cannot measure this size, or None."""
    domains, part = setup.ranks_per_domain, 1 < size < setup.ep_size and setup.virtual_ranks is None
    if domains is not None and size > domains and size % domains:
        return f"--ranks-per-domain {domains} does not divide {size} ranks"
    if part and setup.device.type == "cuda":
        return f"NVSHMEM keeps its {setup.ep_size} ranks for a process's life; launch/scale.sh starts one a size"
    if part and domains is not None and size > domains:
        return "several domains need all ranks that were started; launch/scale.sh starts one a size"
    return None


def routing_at(setup: Setup, routing: str, max_domains: int | None) -> str:
    """The routing's name for make_tokens."""
    num_domains = setup.ep_size // (setup.ranks_per_domain or setup.ep_size)
    if max_domains is None or num_domains <= max_domains:
        return routing
    return f"{max_domains}of{num_domains}"


def measure_point(args, setup: Setup, point: tuple, routing: str, facts: dict, table: Table, outcome: Outcome) -> None:
    """Time and judge one point with this rank taking part; its ScalingRow goes to outcome.rows."""
    mode, base, tokens, size, case, per_rank = point
    label, routing = routing, routing_at(setup, routing, args.max_domains)
    per_domain = setup.ranks_per_domain or size
    plan = Plan(
        cases=[case], tokens=[per_rank], routings=[routing], inputs=["prequantized"], baselines=[],
        protocol=args.protocol, capacity="cell", idle_ranks=0, check_rows=args.check_rows, check_only=False,
        num_sms=None,
    )  # fmt: skip
    inner = Outcome()
    run_cases(setup, plan, facts, table, inner)
    outcome.not_run += inner.not_run
    for row in inner.rows:
        fields = {**vars(row), "routing": label}
        if per_domain < size:  # NVLink's rate says nothing of what lies between domains
            fields |= {"roofline_us": None, "roofline_bound": None, "roofline_fraction": None}
        everyone = [
            make_tokens(case, rank, per_rank, routing, 0, setup.seed, setup.device).topk_idx for rank in range(size)
        ]
        outcome.add(
            ScalingRow(
                **fields, mode=mode, base_experts=base.num_experts, experts=args.experts, base_tokens=tokens,
                num_units=setup.num_units, ranks_per_domain=per_domain, series_per_domain=args.ranks_per_domain,
                domain_tokens=args.domain_tokens, max_domains=args.max_domains,
                copies_between=copies_between(everyone, case.num_experts, per_domain),
            )
        )


def run(args) -> tuple[bool, list, Setup]:
    """Measure every point. -> (all held, rows as dicts, the whole setup)."""
    if rank_from_env().ep_size > 1 and args.virtual_ranks is None:
        # Idle ranks wait here while others measure: longer than the default
        init_process_group(None if args.device != "cpu" and torch.cuda.is_available() else "gloo", timeout_s=3600)
    args.idle_ranks = 0
    setup = bench.make_setup(args)
    setup = replace(setup, ranks_per_domain=args.ranks_per_domain, domain_tokens=args.domain_tokens)
    if args.check_rows < 1:
        raise ValueError(f"--check-rows {args.check_rows} must be at least 1")
    check_folders(setup.is_first, results=args.results)
    sizes = sizes_of(args.sizes, setup.ep_size)
    routings = case_list.parse_choices("--routing", args.routing, ROUTINGS)
    if args.max_domains is not None and (args.ranks_per_domain is None or routings != ["uniform"]):
        raise ValueError(f"--max-domains {args.max_domains} needs --ranks-per-domain and uniform routing")
    found, not_run = points(args, setup, sizes)
    facts = machine(setup.device, setup.num_gpus, args.commit)
    table = Table(quiet=not setup.is_first)
    table.say(bench.describe(setup, facts))
    places = gather_places(dist.group.WORLD if dist.is_initialized() else None, setup.device)
    table.say(explain(places, domains_of(places)))
    keep = (lambda row: append_result(row, args.results)) if args.results and setup.is_first else None
    outcome = Outcome(keep=keep, not_run=not_run)
    here = {size: setup_at(setup, size) for size in sizes if not why_not(setup, size)}
    for point in found:
        size = point[3]
        reason = why_not(setup, size)
        if reason:
            outcome.not_run.append({"case": f"{point[1].name}, {size} ranks", "impl": "megamoe", "reason": reason})
            continue
        for routing in routings:
            if here[size] is not None:
                label = {**facts, "num_gpus": here[size].num_gpus}
                measure_point(args, here[size], point, routing, label, table, outcome)
            if dist.is_initialized():
                dist.all_reduce(torch.zeros(1))  # on CPU, so that idle ranks sleep and no GPU spins
    for entry in outcome.not_run:
        table.say(f"not run: {entry['case']}: {entry['reason']}")
    ok = bool(outcome.rows) and all(row.ok for row in outcome.rows)
    return (ok or not setup.is_first), [scaling_report.plain(row) for row in outcome.rows], setup


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    ok, is_first, rows = True, True, []
    try:
        for option, path in (("--markdown", args.markdown), ("--plot", args.plot)):
            if path and not rank_from_env().ep_rank:
                check_folder(f"{option} {path}", path.resolve().parent)
        if args.report:
            if args.results and not args.results.is_dir():
                raise ValueError(f"--results {args.results} is no folder; --report shows the rows that one holds")
            rows = read_results(args.results or SCALING_DIR)
        else:
            ok, rows, setup = run(args)
            is_first = setup.is_first
    except ValueError as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        return 2
    if is_first:
        text = scaling_report.markdown(rows)
        if args.predict:
            text += "\n" + prediction.markdown(rows + read_results(RESULTS_DIR))
        print("\n" + text)
        if args.markdown:
            args.markdown.write_text(text)
        if args.plot:
            print(scaling_report.plot(rows, args.plot))
        print(f"verdict: {'PASS' if ok else 'FAIL'} ({len(rows)} points, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC)")
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()
    return 0 if ok else 1


if __name__ == "__main__":
    bench.run_script(main)
