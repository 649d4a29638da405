"""python -m megamoe plan: plan a recorded or generated load, beside the published greedy."""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .cost import CostModel
from .greedy import greedy_physical_to_logical
from .load import GENERATORS, balancedness
from .planner import plan_experts, update_plan
from .predict import fit_measured, read_measured
from .relabel import relabel
from .report import draw, even_plan, fit_text, make_load, picture, table
from .show import promises
from .simulate import predict, replay, token_nodes

CHECKOUT = Path(__file__).resolve().parents[2]
# Layers shown in the table; --json has all of them.
SHOWN = 16
VERDICT = {True: "✓", False: "✗"}


def build_parser():
    """Arguments of the verb."""
    parser = argparse.ArgumentParser(prog="python -m megamoe plan", description=__doc__)
    parser.add_argument("load", nargs="?", help=".npy or .npz (key 'load'): rows per expert, [layers, experts] or "
                        "[steps, layers, experts], summed over steps; default of --simulate: the first of "
                        "benchmarks/traces/*.npz of this checkout")
    parser.add_argument("--generate", choices=GENERATORS, help="use a generated load instead of a file")
    of_load, of_layer = "of a generated load; default %(default)s", "of the predicted layer; default %(default)s"
    parser.add_argument("--layers", type=int, default=4, help=of_load)
    parser.add_argument("--experts", "--num-experts", type=int, default=256, help=of_load)
    parser.add_argument("--seed", type=int, default=1, help=of_load)
    parser.add_argument("--ranks", type=int, default=8, help="that share the experts; default %(default)s")
    parser.add_argument("--nodes", type=int, default=1, help="that the ranks lie in, as many in each; default "
                        "%(default)s")
    parser.add_argument("--redundant", type=int, default=0, help="slots for copies, over all ranks; default "
                        "%(default)s")
    parser.add_argument("--groups", type=int, default=1, help="expert groups of a group-limited routing; default "
                        "%(default)s")
    parser.add_argument("--max-nodes", type=int, help="nodes a token may touch, with --groups")
    parser.add_argument("--phase", choices=("prefill", "decode"), default="prefill", help="what is balanced: rows, or "
                        "times by --cost, where weights cost too; default %(default)s")
    parser.add_argument("--cost", nargs=3, type=float, metavar=("ROW_US", "EXPERT_US", "ROWS_PER_STEP"),
                        help="cost model of --phase decode; default: fitted to --measured")
    parser.add_argument("--then", help="a later load (file as above): update the plan for it within --budget")
    parser.add_argument("--budget", type=float, default=0.03, help="part of the slots that --then, or a step of "
                        "--simulate, may change; default %(default)s")
    parser.add_argument("--simulate", action="store_true", help="replay a recording step by step, count the nodes of "
                        "its tokens, and predict layer times for 8 to 512 ranks")
    parser.add_argument("--window", type=int, default=4, help="steps that a plan of --simulate is made from, "
                        "and used; default %(default)s")
    parser.add_argument("--measured", nargs="+", default=None, metavar="JSONL", help="calls to fit the times of "
                        "--simulate and --phase decode to; default: benchmarks/results/*.jsonl of this checkout, and "
                        "results/scaling/*.jsonl to check the fit with")
    parser.add_argument("--gpu", default="H100", help="a word of the name of the GPUs whose calls are taken; "
                        "default H100")
    parser.add_argument("--hidden", type=int, default=4096, help=of_layer)
    parser.add_argument("--intermediate", type=int, default=2048, help=of_layer)
    parser.add_argument("--topk", type=int, default=6, help=of_layer)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 2048], help="per rank, of the predicted "
                        "calls; default 128 2048")
    parser.add_argument("--png", help="draw load per rank before and after to this file (needs matplotlib)")
    parser.add_argument("--compare", action="store_true",
                        help="every promise of the planner beside the published greedy and an LP (needs scipy)")
    parser.add_argument("--traces", nargs="*", help="recordings for --compare (npz); default: benchmarks/traces/*.npz "
                        "of this checkout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of --compare; default 1 2")
    parser.add_argument("--json", action="store_true", help="print the plan and its figures as JSON")
    parser.add_argument("--out", help="write the plan as JSON to this file")
    return parser


def read_arrays(path):
    """{name: array} of a .npy or .npz with key "load"; ValueError naming what is in it otherwise."""
    try:
        data = np.load(path, allow_pickle=False)
    except ValueError:  # NumPy's words are about pickles, which are never read
        raise ValueError(f"{path} is neither .npy nor .npz; python -m megamoe record writes one") from None
    if isinstance(data, np.lib.npyio.NpzFile):
        if "load" not in data:
            raise ValueError(f"{path}: no array 'load', only {', '.join(data.files) or 'nothing'}")
        return {name: data[name] for name in data.files}
    return {"load": data}


def read_load(path):
    """float64 [layers, num_logical_experts] from a file, summed over steps if it has them."""
    load = np.asarray(read_arrays(path)["load"], np.float64)
    return load.sum(0) if load.ndim == 3 else load


def main(argv=None):
    """Run the verb; returns the exit status: 0, or 2 with one line on stderr for input that cannot be planned."""
    args = build_parser().parse_args(argv)
    try:
        for name in ("layers", "experts", "window", "hidden", "intermediate", "topk", "tokens"):
            given = getattr(args, name)
            if np.min(given) < 1:
                raise ValueError(f"--{name} {' '.join(map(str, np.atleast_1d(given)))}: at least 1 is needed")
        if args.png and not find_spec("matplotlib"):
            raise ValueError(f"--png {args.png} needs matplotlib, which is missing; pip install 'megamoe[plot]'")
        return _compare(args) if args.compare else _plan(args)
    except BrokenPipeError:
        raise  # its reader has read enough
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _shipped_traces():
    return sorted((CHECKOUT / "benchmarks" / "traces").glob("*.npz"))


def _compare(args):
    seeds = tuple(args.seeds)
    shown, failed = [], 0
    paths = args.traces
    if paths is None:
        paths = _shipped_traces()
    arrays = {Path(path).stem: read_arrays(path) for path in paths}
    traces = {name: (one["load"], one.get("kind", np.full(len(one["load"]), "all"))) for name, one in arrays.items()}
    for row in promises(seeds, traces):
        shown.append(row)
        failed += not row["ok"]
        if not args.json:
            oracle = row["oracle"] if row["oracle"] == "-" else f"{row['oracle']:.4f}"
            print(f"{VERDICT[row['ok']]} {row['line']:<16} {row['case']:<28} eplb {row['eplb']:8.4f}  ours "
                  f"{row['ours']:8.4f}  oracle {oracle:>7}  needs {row['needs']}{_more(row)}", flush=True)
    if args.json:
        print(json.dumps(shown))
    else:
        print(f"{len(shown)} lines, {failed} not met; seeds {', '.join(map(str, seeds))}")
    return 1 if failed else 0


def _more(row):
    named = list(row)[list(row).index("ok") + 1:]
    return "".join(f"; {name} {row[name]:.4g}" for name in named)


def _plan(args):
    if args.simulate and args.load is None and args.generate is None:
        args.load = next(iter(_shipped_traces()), None)
    if (args.load is None) == (args.generate is None):
        raise ValueError("give either a file with the load, as python -m megamoe record writes it, or --generate KIND")
    load = read_load(args.load) if args.load else make_load(args.generate, args.layers, args.experts, args.seed)
    plan = plan_experts(load, num_ranks=args.ranks, num_nodes=args.nodes, num_redundant_experts=args.redundant,
                        num_groups=args.groups, phase=args.phase, max_nodes_per_token=args.max_nodes,
                        cost=_cost(args))
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
    if args.load:
        print(args.load)
    print(f"{plan.num_layers} layers, {plan.num_logical_experts} experts + {plan.num_redundant_experts} redundant = "
          f"{plan.num_physical_experts} slots, {plan.num_local_experts} on each of {args.ranks} ranks, {args.nodes} "
          f"nodes; balancedness = mean / largest rank, bound in {report['unit']}")
    print(table(rows[:SHOWN]))
    if len(rows) > SHOWN:
        print(f"... {len(rows) - SHOWN} more layers, in --json")
    worst = int(np.argmax([row["gap"] for row in rows]))
    print(f"\nlayer {worst} (largest gap): the greedy before, this plan after")
    print(picture(before[worst], shown[worst]))
    if args.png:
        draw(args.png, before[worst], shown[worst], f"layer {worst}")
    if args.then:
        print("\nlater load")
        print(table([report["then"]]))
    if args.simulate:
        _simulate(args, load, plan)
    return 0


def _measured(args):
    """(calls to fit, calls to check the fit with)."""
    folder = CHECKOUT / "benchmarks" / "results"
    paths = sorted(folder.glob("*.jsonl")) if args.measured is None else args.measured
    checked = sorted((folder / "scaling").glob("*.jsonl")) if args.measured is None else []
    calls = read_measured(paths, args.gpu)
    if not calls:
        raise ValueError(f"--gpu {args.gpu}: no call on such a GPU in {len(paths)} files; see --measured")
    return calls, read_measured(checked, args.gpu)


def _cost(args):
    if args.cost:
        return CostModel(*args.cost)
    if args.phase == "prefill":
        return None
    model = fit_measured(_measured(args)[0])
    return model.cost(args.hidden, args.intermediate, args.tokens[0] * args.topk * args.ranks)


def _simulate(args, load, plan):
    arrays = read_arrays(args.load) if args.load else {"load": load}
    if arrays["load"].ndim == 3:
        rows = replay(arrays["load"].astype(np.float64), num_ranks=args.ranks, num_nodes=args.nodes,
                      num_redundant=args.redundant, window=args.window, budget=args.budget)
        print(f"\nbalancedness of later steps, plans from the {args.window} steps before; moved: part of the slots")
        print(table(rows))
    for name in [name for name in arrays if name.startswith("prefill_")]:
        chosen, first = token_nodes(arrays[name][0].astype(np.int64), plan)
        print(f"nodes a token of {name}, layer 0: {chosen:.2f} with balanced copies, {first:.2f} with first copies")
    fitted, checked = _measured(args)
    model = fit_measured(fitted)
    print(f"\npredicted us of a layer {args.hidden}/{args.intermediate}, top {args.topk}, experts as popular as these"
          f"\nmore ranks than measured are taken to cost no more for their links\n{fit_text(model, fitted, checked)}\n")
    for tokens in args.tokens:
        print(f"{tokens} tokens a rank")
        print(table(predict(load, model, hidden=args.hidden, intermediate=args.intermediate, topk=args.topk,
                            tokens_per_rank=tokens, num_redundant=args.redundant)))
