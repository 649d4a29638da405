#!/usr/bin/env python3
"""Time the MoE layer and judge its output in the same run.

    python benchmarks/bench.py
        one rank; on CPU the torch path, on a GPU the kernel
    torchrun --nproc-per-node 2 benchmarks/bench.py
        two ranks: one GPU each, or gloo on CPU
    python benchmarks/bench.py --virtual-ranks 2
        one process plays two ranks, on one GPU or on CPU
    torchrun --nproc-per-node 2 benchmarks/bench.py --case flash64,v3_64,flash256 --tokens 1,8,32,128,512,2048,8192 \\
        --baseline torch,torch-bf16 --results
        the full table of two GPUs, appended to benchmarks/results/
    python benchmarks/bench.py --case flash64 --tokens 8 --routing uniform,zipf,hot --input both
        three routings, with and without input quantization in the timed call
    python benchmarks/bench.py --case tiny,odd --tokens 0,1,33 --check-only
        the verdict alone
    torchrun --nproc-per-node 4 benchmarks/bench.py --suite ep4 --results
        every set of cells that benchmarks/suites.toml lists under that name, in one start

Exit status: 0 when every gate held, 1 when one failed, 2 for a wrong command line.
What is timed and how: benchmarks/timing.py. The cases: benchmarks/cases.toml. The gate: benchmarks/gate.py.
"""

import argparse
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    import checkout  # noqa: F401 (makes this checkout's packages importable; it lies beside this file)
# Multicast objects are not used here; the libraries would otherwise make some by themselves
for _name in ("NCCL_NVLS_ENABLE=0", "TORCH_SYMM_MEM_DISABLE_MULTICAST=1", "NVSHMEM_DISABLE_NVLS=1"):
    os.environ.setdefault(*_name.split("="))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks import cases as case_list  # noqa: E402
from benchmarks.baselines import NAMES as BASELINES  # noqa: E402
from benchmarks.implementations import Setup  # noqa: E402
from benchmarks.inputs import ROUTINGS  # noqa: E402
from benchmarks.links import Counter  # noqa: E402
from benchmarks.record import machine  # noqa: E402
from benchmarks.results import RESULTS_DIR, append_result, as_json, check_folders  # noqa: E402
from benchmarks.run import Outcome, Plan, run_cases, spec_against_float64  # noqa: E402
from benchmarks.table import Table  # noqa: E402
from benchmarks.timing import PROTOCOLS, Meet, pick_protocol  # noqa: E402
from megamoe.ranks import init_process_group, rank_from_env  # noqa: E402

# What a set of suites.toml may say
SET_OPTIONS = (
    "case", "tokens", "routing", "protocol", "input", "weight_format", "baseline", "baseline_tokens", "capacity",
    "idle_ranks", "check_rows",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    doc = __doc__.partition("\n")
    out = argparse.ArgumentParser(
        description=doc[0], epilog=doc[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = out.add_argument
    add("--case", help="names of cases.toml separated by commas (default: tiny on CPU, flash64 on a GPU)")
    add("--tokens", help="tokens per rank, separated by commas (default: 1,8,32 on CPU, 1,8,32,128,512 on a GPU)")
    add("--routing", default="uniform", help=f"some of {','.join(ROUTINGS)} (default: uniform)")
    add(
        "--protocol",
        default="auto",
        choices=("auto", *PROTOCOLS),
        help="auto: graph up to 512 tokens, isolated above; wall clock on CPU",
    )
    add(
        "--input",
        default="prequantized",
        choices=("prequantized", "bf16", "both"),
        help="what the timed call is given: e4m3 with scale factors, or bf16 to be quantized (default: prequantized)",
    )
    add(
        "--weight-format",
        default="fp8",
        choices=("fp8", "mxfp4"),
        help="of the layer's experts; the baselines have no MXFP4 (default: fp8)",
    )
    add("--baseline", help=f"some of {','.join(BASELINES)}, or none (default: torch on CPU, torch,torch-bf16 on a GPU)")
    add("--baseline-tokens", help="token counts that baselines run at (default: those of --tokens)")
    add("--virtual-ranks", type=int, metavar="R", help="this one process plays R ranks")
    add(
        "--capacity",
        default="max",
        help="tokens per rank the workspace is built for: max (of --tokens), cell (each its own), or a number",
    )
    add("--idle-ranks", type=int, default=0, metavar="K", help="the last K ranks bring no tokens (default: 0)")
    add("--suite", help="of benchmarks/suites.toml: its sets say what is measured, in the place of the options above")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    add("--num-sms", type=int, metavar="N", help="SMs the kernel may use (default: all)")
    add(
        "--check-rows",
        type=int,
        default=64,
        metavar="N",
        help="rows of each rank compared with the specification (default: 64)",
    )
    add("--check-only", action="store_true", help="no timing")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write everything as one JSON object")
    add(
        "--results",
        type=Path,
        nargs="?",
        const=RESULTS_DIR,
        metavar="DIR",
        help="append each row that passed to a .jsonl file of DIR as soon as it is measured (DIR: benchmarks/results)",
    )
    add("--commit", help="commit hash to record, '-dirty' at its end if it is (default: ask git)")
    return out


def make_setup(args) -> Setup:
    """Find the device and the other ranks. ValueError where the command line asks for what the machine has not."""
    info = rank_from_env()
    on_gpu = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible; use --device cpu")
    if args.virtual_ranks is not None and info.ep_size > 1:
        raise ValueError(
            f"--virtual-ranks {args.virtual_ranks} is for one process and {info.ep_size} were launched; "
            "drop one of the two"
        )
    if args.virtual_ranks is not None and args.virtual_ranks < 1:
        raise ValueError(f"--virtual-ranks {args.virtual_ranks} must be at least 1")
    if on_gpu and info.ep_size > torch.cuda.device_count() and args.virtual_ranks is None:
        raise ValueError(
            f"{info.ep_size} ranks were launched and {torch.cuda.device_count()} GPUs are visible; launch one a GPU, "
            f"or one process with --virtual-ranks {info.ep_size}"
        )
    if info.ep_size > 1:
        init_process_group(None if on_gpu else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    ep_size = args.virtual_ranks or info.ep_size
    ranks_here = tuple(range(ep_size)) if args.virtual_ranks else (info.ep_rank,)
    units = 1 if args.virtual_ranks else info.ep_size
    return Setup(
        device=device,
        ep_size=ep_size,
        ranks_here=ranks_here,
        virtual_ranks=args.virtual_ranks,
        num_gpus=units if on_gpu else 0,
        num_units=units,
        meet=Meet(device),
        seed=args.seed,
        counter=Counter(device) if on_gpu and units > 1 else None,
    )


def plans_of(args, setup: Setup) -> list[Plan]:
    """One plan, or those of the suite's sets. ValueError names what is wrong, before anything runs."""
    if args.suite is None:
        return [make_plan(args, setup)]
    suites, plain = case_list.load_suites(), parser().parse_args([])
    if args.suite not in suites:
        raise ValueError(f"--suite {args.suite!r} is not in suites.toml; choose from {', '.join(suites)}")
    given = [name for name in SET_OPTIONS if getattr(args, name) != getattr(plain, name)]
    if given:
        option = given[0].replace("_", "-")
        raise ValueError(f"--{option} is for the sets of --suite {args.suite} to say; drop one of the two")
    plans = []
    for number, options in enumerate(suites[args.suite], 1):
        unknown = sorted(set(options) - set(SET_OPTIONS))
        if unknown:
            known = ", ".join(SET_OPTIONS)
            raise ValueError(f"suites.toml, {args.suite}, set {number}: {unknown[0]!r} is none of {known}")
        try:
            plans.append(make_plan(argparse.Namespace(**{**vars(args), **options}), setup))
        except ValueError as error:
            raise ValueError(f"suites.toml, {args.suite}, set {number}: {error}") from error
    return plans


def make_plan(args, setup: Setup) -> Plan:
    """The cells to run. ValueError names the option that is wrong."""
    on_gpu = setup.device.type == "cuda"
    if not 0 <= args.idle_ranks < max(setup.ep_size, 1):
        raise ValueError(f"--idle-ranks {args.idle_ranks} must lie in 0..{setup.ep_size - 1}")
    tokens = case_list.parse_tokens(args.tokens or ("1,8,32,128,512" if on_gpu else "1,8,32"))
    if args.capacity not in ("max", "cell") and not (args.capacity.isdigit() and int(args.capacity) >= max(tokens)):
        raise ValueError(
            f"--capacity {args.capacity!r} must be max, cell, or a number of at least {max(tokens)} tokens"
        )
    for option, value in (("--check-rows", args.check_rows), ("--num-sms", args.num_sms)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} must be at least 1")
    pick_protocol(args.protocol, max(tokens), on_gpu)
    baselines = args.baseline or ("none" if args.weight_format != "fp8" else "torch,torch-bf16" if on_gpu else "torch")
    if args.weight_format != "fp8" and baselines != "none":
        raise ValueError(f"--baseline {baselines} has no {args.weight_format}; give --baseline none")
    cases = case_list.parse_cases(args.case or ("flash64" if on_gpu else "tiny"), case_list.load_cases())
    return Plan(
        cases=[replace(case, weight_format=args.weight_format) for case in cases],
        tokens=tokens,
        routings=case_list.parse_choices("--routing", args.routing, ROUTINGS),
        inputs=["prequantized", "bf16"] if args.input == "both" else [args.input],
        baselines=case_list.parse_choices("--baseline", baselines, (*BASELINES, "none")),
        protocol=args.protocol,
        capacity=args.capacity,
        idle_ranks=args.idle_ranks,
        check_rows=args.check_rows,
        check_only=args.check_only,
        num_sms=args.num_sms,
        baseline_tokens=case_list.parse_tokens(args.baseline_tokens) if args.baseline_tokens else None,
    )


def describe(setup: Setup, facts: dict) -> str:
    """Which of the ways to run was chosen, and why."""
    if setup.device.type == "cpu":
        how = "the torch path on CPU: " + (
            f"{setup.virtual_ranks} virtual ranks in one process"
            if setup.virtual_ranks
            else f"{setup.ep_size} rank{'s' * (setup.ep_size > 1)}{' over gloo' * (setup.ep_size > 1)}"
        )
        how += "" if torch.cuda.is_available() else " (no GPU is visible)"
    elif setup.virtual_ranks:
        how = f"the fused kernel with {setup.virtual_ranks} virtual ranks on one GPU"
    else:
        how = f"the fused kernel, {setup.ep_size} rank{'s' * (setup.ep_size > 1)}, one GPU each"
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    dirty = {True: " with local changes", False: "", None: ""}[facts["dirty"]]
    return f"{how}\n{facts['device']}{driver}, torch {facts['torch']}, commit {facts['commit'][:12]}{dirty}"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        setup = make_setup(args)
        plans = plans_of(args, setup)
        check_folders(setup.is_first, args.json, args.results)
    except ValueError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    facts = machine(setup.device, setup.num_gpus, args.commit)
    table = Table(quiet=not setup.is_first)
    table.say(describe(setup, facts))
    if setup.counter is not None and setup.counter.reason:
        table.say(f"not run: bytes counted by the links: {setup.counter.reason}")
    outcome = Outcome(keep=(lambda row: append_result(row, args.results)) if args.results and setup.is_first else None)
    ok = False
    try:
        different = {case: None for plan in plans for case in plan.cases} if setup.device.type == "cpu" else {}
        served = [case for case in different if not case.num_experts % setup.ep_size]  # run_cases says why not the rest
        spec_verdicts = [spec_against_float64(setup, case) for case in served]
        for plan in plans:
            run_cases(setup, plan, facts, table, outcome)
        ok = table.finish(outcome, spec_verdicts)
    finally:  # also what was measured before an exception
        if args.json and setup.is_first:
            rows = [as_json(row) for row in outcome.rows]
            report = {"ok": ok, "machine": facts, "rows": rows, "not_run": outcome.not_run, "errors": outcome.errors}
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    if dist.is_initialized():
        setup.meet.barrier()
        dist.destroy_process_group()
    return 0 if ok else 1


def run_script(main) -> None:
    """Ends the process with main()'s status. An exception ends it at once: the peers may be gone, and a collective in a
    clean-up would hang and hide it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)
    sys.exit(status)


if __name__ == "__main__":
    run_script(main)
