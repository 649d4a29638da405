"""python -m megamoe plan: plan a recorded or generated load, beside the published greedy."""

import argparse
import json
import sys

import numpy as np

from .cost import CostModel
from .greedy import greedy_physical_to_logical
from .load import GENERATORS, balancedness
from .planner import plan_experts, update_plan
from .relabel import relabel
from .report import even_plan, make_load, picture, table
from .show import promises

# Layers shown in the table; --json has all of them.
SHOWN = 16
VERDICT = {True: "✓", False: "✗", "-": "-"}


def build_parser():
    """Arguments of the verb."""
    parser = argparse.ArgumentParser(prog="python -m megamoe plan", description=__doc__)
    parser.add_argument("load", nargs="?", help=".npy or .npz (key 'load'): rows per expert, [layers, experts] or "
                        "[steps, layers, experts], summed over steps")
    parser.add_argument("--generate", choices=GENERATORS, help="use a generated load instead of a file")
    parser.add_argument("--layers", type=int, default=4, help="of a generated load")
    parser.add_argument("--experts", "--num-experts", type=int, default=256, help="of a generated load")
    parser.add_argument("--seed", type=int, default=1, help="of a generated load")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--redundant", type=int, default=0)
    parser.add_argument("--groups", type=int, default=1, help="expert groups of a group-limited routing")
    parser.add_argument("--max-nodes", type=int, help="nodes a token may touch, with --groups")
    parser.add_argument("--phase", choices=("prefill", "decode"), default="prefill")
    parser.add_argument("--cost", nargs=3, type=float, metavar=("ROW_US", "EXPERT_US", "ROWS_PER_STEP"),
                        help="cost model of --phase decode")
    parser.add_argument("--then", help="a later load (file as above): update the plan for it within --budget")
    parser.add_argument("--budget", type=float, default=0.03, help="part of the slots --then may change")
    parser.add_argument("--compare", action="store_true",
                        help="every promise of the planner beside the published greedy and an LP (needs scipy)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of --compare")
    parser.add_argument("--json", action="store_true", help="print the plan and its figures as JSON")
    parser.add_argument("--out", help="write the plan as JSON to this file")
    return parser


def read_load(path):
    """float64 [layers, num_logical_experts] from a file; ValueError naming what is in it otherwise."""
    data = np.load(path, allow_pickle=False)
    if isinstance(data, np.lib.npyio.NpzFile):
        if "load" not in data:
            raise ValueError(f"{path}: no array 'load', only {', '.join(data.files) or 'nothing'}")
        data = data["load"]
    if data.ndim == 3:
        data = data.sum(0)
    return np.asarray(data, np.float64)


def main(argv=None):
    """Run the verb; returns the exit status: 0, or 2 with one line on stderr for input that cannot be planned."""
    args = build_parser().parse_args(argv)
    try:
        return _compare(args) if args.compare else _plan(args)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _compare(args):
    seeds = tuple(args.seeds)
    shown, failed = [], 0
    for row in promises(seeds):
        shown.append(row)
        failed += row["ok"] is False
        if not args.json:
            oracle = row["oracle"] if row["oracle"] == "-" else f"{row['oracle']:.4f}"
            print(f"{VERDICT[row['ok']]} {row['line']:<16} {row['case']:<28} eplb {row['eplb']:8.4f}  ours "
                  f"{row['ours']:8.4f}  oracle {oracle:>7}  needs {row['needs']}{_more(row)}", flush=True)
    if args.json:
        print(json.dumps(shown))
    else:
        print(f"{len(shown)} lines, {failed} not met; seeds {', '.join(map(str, seeds))}; -: shown, nothing promised")
    return 1 if failed else 0


def _more(row):
    named = list(row)[list(row).index("ok") + 1:]
    return "".join(f"; {name} {row[name]:.4g}" for name in named)


def _plan(args):
    if (args.load is None) == (args.generate is None):
        raise ValueError("give either a file with the load or --generate KIND")
    load = read_load(args.load) if args.load else make_load(args.generate, args.layers, args.experts, args.seed)
    plan = plan_experts(load, num_ranks=args.ranks, num_nodes=args.nodes, num_redundant_experts=args.redundant,
                        num_groups=args.groups, phase=args.phase, max_nodes_per_token=args.max_nodes,
                        cost=CostModel(*args.cost) if args.cost else None)
    greedy = greedy_physical_to_logical(plan.load, num_ranks=args.ranks, num_nodes=args.nodes,
                                        num_redundant_experts=args.redundant, num_groups=args.groups)
    rival = even_plan(greedy, plan)
    before = rival.rank_cost
    rows = [{"layer": layer, "eplb": float(rival.balancedness[layer]), "plan": float(plan.balancedness[layer]),
             "bound": float(plan.bound[layer]), "gap": float(plan.gap[layer]),
             "node_balance": float(balancedness(plan.node_load[layer])),
             "most_replicas": int(plan.num_replicas[layer].max())} for layer in range(plan.num_layers)]
    report = {"layers": rows, "unit": "rows" if plan.cost is None else "us"}
    shown = plan.rank_cost
    if args.then:
        later = read_load(args.then)
        changed = update_plan(plan, later, int(args.budget * plan.num_physical_experts))
        fresh = relabel(greedy_physical_to_logical(later, num_ranks=args.ranks, num_nodes=args.nodes,
                                                   num_redundant_experts=args.redundant, num_groups=args.groups),
                        greedy, args.ranks)
        slots = plan.num_physical_experts
        report["then"] = {
            "kept": float(update_plan(plan, later, 0).balancedness.mean()),
            "updated": float(changed.balancedness.mean()), "moved": float(changed.moves_from(plan).mean() / slots),
            "eplb_replanned": float(even_plan(fresh, changed).balancedness.mean()),
            "eplb_moved": float((fresh != greedy).mean())}
        plan = changed
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(plan.as_dict(), file)
    if args.json:
        print(json.dumps(report | {"plan": plan.as_dict()}))
        return 0
    print(f"{plan.num_layers} layers, {plan.num_logical_experts} experts + {plan.num_redundant_experts} redundant = "
          f"{plan.num_physical_experts} slots, {plan.num_local_experts} on each of {args.ranks} ranks, {args.nodes} "
          f"nodes; balancedness = mean / largest rank, bound in {report['unit']}")
    print(table(rows[:SHOWN]))
    if len(rows) > SHOWN:
        print(f"... {len(rows) - SHOWN} more layers, in --json")
    worst = int(np.argmax([row["gap"] for row in rows]))
    print(f"\nlayer {worst} (largest gap): the greedy before, this plan after")
    print(picture(before[worst], shown[worst]))
    if args.then:
        print("\nlater load")
        print(table([report["then"]]))
    return 0
