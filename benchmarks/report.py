#!/usr/bin/env python3
"""Render the result tables of README.md from benchmarks/results/*.jsonl.

    python benchmarks/report.py                 rewrite what stands between the two markers
    python benchmarks/report.py --check         change nothing; exit 1 if the README is stale
    python benchmarks/report.py --print         the tables to stdout

The markers are lines of their own: <!-- results:begin --> and <!-- results:end -->. Where <!-- scaling:begin --> and
<!-- scaling:end --> are there too, scaling.py's tables (results/scaling/*.jsonl) go between them, with a plot.
A cell is the median over the runs of the newest commit that measured it; three or more runs also give a spread.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # a script's own folder must not shadow packages of the same names
    sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]

from benchmarks import scaling_report  # noqa: E402
from benchmarks.cases import load_cases  # noqa: E402
from benchmarks.results import RESULTS_DIR, read_results  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SCALING = "<!-- scaling:begin -->", "<!-- scaling:end -->"
# as in timing.py, which needs torch; a test compares the two
GRAPH_MAX_TOKENS = 512
EMPTY = (
    "No results yet: `python benchmarks/bench.py --results` appends some, `python benchmarks/report.py` renders them."
)


def cells_of(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(table, line, tokens) -> the rows behind one number: those of the newest commit that measured it.

    table: (device, num_gpus, ep_size, virtual_ranks, case, routing, idle ranks, capacity); line: (impl, manner: its
    input, the protocol where it is not the one that auto picks, SMs where not all).
    """
    sizes: dict[tuple, set[bool]] = {}
    for row in rows:
        sizes.setdefault((row["run"], row["case"]), set()).add(row["capacity"] == max(row["num_tokens"], 1))
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("us") is None or not row.get("ok", True):
            continue
        own = sizes[row["run"], row["case"]] == {True}
        idle = sum(count == 0 for count in row["tokens_per_rank"]) if row["num_tokens"] else 0
        table = (
            row["device"],
            row["num_gpus"],
            row["ep_size"],
            row["virtual_ranks"] or 0,
            row["case"],
            row["routing"],
            idle,
            0 if own else row["capacity"],
        )
        cells.setdefault((table, (row["impl"], _manner(row)), row["num_tokens"]), []).append(row)
    for key, found in cells.items():
        newest = max(found, key=lambda row: row["date"])
        cells[key] = [row for row in found if row["commit"] == newest["commit"]]
    return cells


def _manner(row: dict) -> str:
    usual = "wall" if not row["num_gpus"] else "graph" if row["num_tokens"] <= GRAPH_MAX_TOKENS else "isolated"
    manner = f"{row['input']} in" + f", {row['protocol']} protocol" * (row["protocol"] != usual)
    return manner + (f", {row['num_sms']} SMs" if row.get("num_sms") else "")


def render(rows: list[dict], cases: dict) -> str:
    """The Markdown between the markers; the same rows in any order give the same text."""
    cells = cells_of(rows)
    if not cells:
        return EMPTY
    case_order = {name: place for place, name in enumerate(cases)}
    tables = sorted(
        {table for table, _, _ in cells},
        key=lambda t: (
            t[0].startswith("CPU"),
            t[0],
            -t[1],
            t[2],
            t[3],
            t[6],
            t[7],
            t[5] != "uniform",
            t[5],
            case_order.get(t[4], len(case_order)),
            t[4],
        ),
    )
    out, section = [], None
    for table in tables:
        device, num_gpus, ep_size, virtual_ranks, *_ = table
        if section != table[:4]:
            section = table[:4]
            machine = f"{num_gpus} x {device}" if num_gpus else device
            ranks = f"{ep_size} virtual ranks in one process" if virtual_ranks else f"EP{ep_size}"
            out.append(f"### {machine}, {ranks}\n")
        out.append(
            _table(table, {key[1:]: found for key, found in cells.items() if key[0] == table}, cases.get(table[4]))
        )
    return "\n".join(out).rstrip()


def _table(table: tuple, cells: dict[tuple, list[dict]], case) -> str:
    device, num_gpus, ep_size, virtual_ranks, name, routing, idle, capacity = table
    tokens = sorted({count for _, count in cells})
    lines = sorted({line for line, _ in cells}, key=lambda line: (not line[0].startswith("megamoe"), line))
    shown = next(iter(cells.values()))[0]
    shape = "/".join(str(shown[key]) for key in ("hidden", "intermediate", "num_experts", "topk"))
    head = f"**{name}** ({shape}), {routing} routing"
    head += f", {idle} rank{'s' * (idle > 1)} idle" * bool(idle)
    head += f", workspace capacity {capacity}" if capacity else ", workspace capacity as the tokens"
    out = [
        head + "\n",
        "| us per call, tokens per rank: | " + " | ".join(map(str, tokens)) + " |",
        "|--" * (len(tokens) + 1) + "|",
    ]

    def add(label: str, text_of) -> None:
        texts = [text_of(count) for count in tokens]
        if any(texts):
            out.append(f"| {label} | " + " | ".join(text or "-" for text in texts) + " |")

    for line in lines:
        label = f"**{line[0]}**" if line[0].startswith("megamoe") else line[0]
        add(f"{label}, {line[1]}", lambda count, line=line: _us_text(cells.get((line, count))))
    main = next((line for line in lines if line[0] == "megamoe" and line[1] == "prequantized in"), lines[0])

    def of_main(text_of):
        return lambda count: text_of(cells[main, count][0], _us(cells[main, count])) if (main, count) in cells else ""

    comparable = (
        case
        and "H100" in device
        and num_gpus == 2
        and ep_size == 2
        and not virtual_ranks
        and routing == "uniform"
        and not idle
    )
    if comparable and case.bar_us:
        add("sgl-deep-gemm 0.2.5, recorded", lambda count: _plain(case.bar_us.get(count)))
        if any(line[0].startswith("sgl-deep-gemm 0.1.5") for line in lines):
            add("sgl-deep-gemm 0.1.5, recorded", lambda count: _plain(case.older_us.get(count)))
        add("goal", lambda count: _plain(case.goal_us.get(count)))
    if num_gpus:
        add("floor", of_main(lambda row, us: _plain(row["roofline_us"])))
        add(
            f"of floor, {main[0]}",
            of_main(lambda row, us: f"{row['roofline_us'] / us:.0%}" if row["roofline_us"] else ""),
        )
        add("TFLOPS a GPU", of_main(lambda row, us: f"{row['flops'] / us / 1e6:.3g}"))
        add("weight TB/s", of_main(lambda row, us: f"{row['bytes_weights'] / us / 1e6:.2f}"))
    add("experts with a row, busiest GPU", of_main(lambda row, us: f"{row['active_experts_max']:.4g}"))
    add(
        "relative L2 to the specification",
        lambda count: f"{max(row['rel_l2'] for row in cells[main, count]):.1e}" if (main, count) in cells else "",
    )
    if comparable and case.bar_us:
        ratios = [
            _us(cells[main, count]) / case.bar_us[count]
            for count in tokens
            if (main, count) in cells and count in case.bar_us
        ]
        if ratios:
            out.append(
                f"\n{main[0]} / sgl-deep-gemm 0.2.5: geometric mean {statistics.geometric_mean(ratios):.3f}, "
                f"worst {max(ratios):.3f}, over {len(ratios)} cells."
            )
    return "\n".join(out) + "\n\n" + _certificate([row for found in cells.values() for row in found]) + "\n"


def _certificate(rows: list[dict]) -> str:
    """Where the numbers come from: every commit, driver and torch behind them, protocols by token count, dates."""
    commits = sorted({row["commit"][:12] + (" with local changes" if row["dirty"] else "") for row in rows})
    drivers = sorted({str(row["driver"]) for row in rows if row["driver"]})
    by_protocol = {}
    for row in rows:
        by_protocol.setdefault(row["protocol"], set()).add(row["num_tokens"])
    protocols = "; ".join(
        f"{name}: {', '.join(map(str, sorted(counts)))} tokens" for name, counts in sorted(by_protocol.items())
    )
    dates = sorted({row["date"][:10] for row in rows})
    return (
        f"<sub>{protocols}. Commit {', '.join(commits)}; torch {', '.join(sorted({row['torch'] for row in rows}))}"
        + (f"; driver {', '.join(drivers)}" if drivers else "")
        + f"; {dates[0]}{' to ' + dates[-1] if len(dates) > 1 else ''}; {len({row['run'] for row in rows})} run(s)."
        + "</sub>"
    )


def _us(rows: list[dict]) -> float:
    return statistics.median(row["us"] for row in rows)


def _us_text(rows: list[dict] | None) -> str:
    if not rows:
        return ""
    us, times = _us(rows), [row["us"] for row in rows]
    spread = f" ± {(max(times) - min(times)) / 2 / us:.1%}" if len(times) > 2 else ""
    return _plain(us) + spread


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def splice(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """text with what stands between the markers replaced. ValueError if they are not there exactly once, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one line {begin} and after it one line {end}")
    return text[: text.index(begin) + len(begin)] + "\n" + block + "\n" + text[text.index(end) :]


def render_scaling(directory: Path, readme: Path, draw: bool) -> str:
    """The Markdown of results/scaling, with the plot that lies there; draw: make it anew."""
    rows, picture = read_results(directory), directory / "scaling.png"
    if draw and rows:
        print(scaling_report.plot(rows, picture))
    block = scaling_report.markdown(rows).rstrip()
    if rows and picture.is_file():
        block += f"\n\n![scaling]({picture.resolve().relative_to(readme.resolve().parent)})"
    return block


def main(argv: list[str] | None = None) -> int:
    doc = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=doc[0], epilog=doc[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the file is stale")
    parser.add_argument("--print", action="store_true", dest="show", help="write the tables to stdout instead")
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="the file with the markers"
    )
    parser.add_argument("--results", type=Path, default=RESULTS_DIR, metavar="DIR", help="where the .jsonl files are")
    args = parser.parse_args(argv)
    try:
        block = render(read_results(args.results), load_cases())
        if args.show:
            print(block)
            return 0
        before = args.readme.read_text()
        after = splice(before, block)
        if SCALING[0] in before:
            after = splice(after, render_scaling(args.results / "scaling", args.readme, not args.check), *SCALING)
    except (OSError, ValueError) as error:
        print(f"report.py: {args.readme.name}: {error}", file=sys.stderr)
        return 2
    if args.check:
        if after != before:
            print(f"report.py: {args.readme.name} is stale; run python benchmarks/report.py", file=sys.stderr)
            return 1
        print(f"{args.readme.name} is up to date")
        return 0
    args.readme.write_text(after)
    print(f"{args.readme.name} {'is up to date' if after == before else 'rewritten'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
