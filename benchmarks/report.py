#!/usr/bin/env python3
"""Render the result tables of README.md and megamoe/integrations/GUIDE.md from benchmarks/results/*.jsonl.

    python benchmarks/report.py                 rewrite what stands between the two markers
    python benchmarks/report.py --check         change nothing; exit 1 if one of them is stale
    python benchmarks/report.py --print         the tables to stdout

The markers are lines of their own: <!-- results:begin --> and <!-- results:end -->. Where <!-- scaling:begin --> and
<!-- scaling:end --> are there too, scaling.py's tables (results/scaling/*.jsonl) go between them, with a plot; between
<!-- replicas:begin --> and <!-- replicas:end --> those of replicas.py (results/replicas/*.jsonl); between
<!-- prediction:begin --> and <!-- prediction:end --> the planner's fit to these times and its error. In the guide,
between <!-- in_model:begin --> and <!-- in_model:end -->, those of in_model.py (results/in_model/*.jsonl).
A cell is the median over the runs of the newest commit that measured it; two or more also show lowest and highest.
results/prove/README.md is written too, from what launch/prove.py left there.
results/times.png is drawn where matplotlib is installed, and shown while it is the picture of these results.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # a script's own folder must not shadow packages of the same names
    sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]

from benchmarks import in_model_report, picture, prove_report, replicas_report, scaling_report  # noqa: E402
from benchmarks.cases import load_cases  # noqa: E402
from benchmarks.overview import MAIN_LINE, against_bar, bar_of, is_main, median_us, overview_of, plain  # noqa: E402
from benchmarks.results import RESULTS_DIR, read_results  # noqa: E402
from megamoe.plan.predict import MIN_CALLS, fit_measured, read_measured  # noqa: E402
from megamoe.plan.report import fit_text  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SCALING = "<!-- scaling:begin -->", "<!-- scaling:end -->"
REPLICAS = "<!-- replicas:begin -->", "<!-- replicas:end -->"
PREDICTION = "<!-- prediction:begin -->", "<!-- prediction:end -->"
IN_MODEL = "<!-- in_model:begin -->", "<!-- in_model:end -->"
README, GUIDE = ROOT / "README.md", ROOT / "megamoe/integrations/GUIDE.md"
MAIN_GPUS = 2
# as in timing.py, which needs torch; a test compares the two
GRAPH_MAX_TOKENS = 512
OLDER = "sgl-deep-gemm 0.1.5"
EMPTY = (
    "No results yet: `python benchmarks/bench.py --results` appends some, `python benchmarks/report.py` renders them."
)


def cells_of(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(table, line, tokens) -> the rows behind one number: those of the newest commit that measured it.

    table: (device, num_gpus, ep_size, virtual_ranks, case, routing, idle ranks, capacity, format: "mxfp4" or "" for all
    others); line: (impl, manner: its input, the protocol where it is not the one that auto picks, SMs where not all).
    """
    sizes: dict[tuple, set[bool]] = {}
    for row in rows:
        sizes.setdefault((row["run"], row["case"]), set()).add(row["capacity"] == max(row["num_tokens"], 1))
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("us") is None or not row.get("ok", True):
            continue
        own = row.get("own_capacity")
        if own is None:  # rows from before the field
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
            "mxfp4" if row["weight_format"] == "mxfp4" else "",
        )
        cells.setdefault((table, (row["impl"], _manner(row)), row["num_tokens"]), []).append(row)
    for key, found in cells.items():
        newest = max(found, key=lambda row: row["date"])
        cells[key] = [row for row in found if _source(row) == _source(newest)]
    return cells


def _source(row: dict) -> str:
    return row["commit"][:12] + " with local changes" * bool(row["dirty"])


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
            t[1] != MAIN_GPUS,
            t[1] == 1,
            t[1],
            t[2],
            t[3],
            not is_main(t),
            t[6],
            t[7] == 0,
            t[7],
            t[8],
            t[5] != "uniform",
            t[5],
            case_order.get(t[4], len(case_order)),
            t[4],
        ),
    )
    out, section, overview = [], None, []
    for table in tables:
        device, num_gpus, ep_size, virtual_ranks, *_ = table
        of_table = {key[1:]: found for key, found in cells.items() if key[0] == table}
        if section != table[:4]:
            section = table[:4]
            machine = f"{num_gpus} x {device}" if num_gpus else device
            ranks = f"{ep_size} virtual ranks in one process" if virtual_ranks else f"EP{ep_size}"
            out.append(f"### {machine}, {ranks}\n")
            of_section = {key: found for key, found in cells.items() if key[0][:4] == section}
            overview = overview_of(of_section, cases)
            out += against_bar(of_section, cases) + overview
        head, body = _table(table, of_table, cases.get(table[4]))
        if is_main(table) and not overview:
            out += [f"**{table[4]}** {head}\n", body]
        else:
            out += [f"<details><summary><b>{table[4]}</b> {head}</summary>\n", body, "</details>\n"]
    return "\n".join(out).rstrip()


def _table(table: tuple, cells: dict[tuple, list[dict]], case) -> tuple[str, str]:
    """(what the table is of, without the case's name; the table)"""
    device, num_gpus, ep_size, virtual_ranks, name, routing, idle, capacity, weight_format = table
    tokens = sorted({count for _, count in cells})
    lines = sorted({line for line, _ in cells}, key=lambda line: (not line[0].startswith("megamoe"), line))
    shown = next(iter(cells.values()))[0]
    shape = "/".join(str(shown[key]) for key in ("hidden", "intermediate", "num_experts", "topk"))
    head = f"({shape}), " + "MXFP4 experts, " * bool(weight_format) + f"{routing} routing"
    head += f", {idle} rank{'s' * (idle > 1)} idle" * bool(idle)
    head += f", workspace capacity {capacity}" if capacity else ", workspace capacity as the tokens"
    symmetric = {_symmetric(row) for found in cells.values() for row in found} - {""}
    if len(symmetric) == 1:
        head += f", {symmetric.pop()} MiB symmetric a GPU"
    out = [
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
    main = MAIN_LINE if MAIN_LINE in lines else lines[0]

    def of_main(text_of):
        found = {count: cells[main, count] for count in tokens if (main, count) in cells}
        return lambda count: text_of(found[count][0], median_us(found[count])) if count in found else ""

    bar, older = bar_of(table, case), {}
    if bar:
        rival = "sgl-deep-gemm 0.2.5" + ", FP8" * bool(weight_format)
        add(f"{rival}, recorded", lambda count: plain(bar.get(count)))
        if "H100" in device:
            if any(line[0].startswith(OLDER) for line in lines):
                older = case.older_us
                add(f"{OLDER}, recorded", lambda count: plain(older.get(count)))
            goal = case.goal_mxfp4_us if weight_format else case.goal_us
            add("goal", lambda count: plain(goal.get(count)))
    if case and is_main(table) and ep_size in (4, 8) and not virtual_ranks and "H100" in device:
        add(f"8 x H100, published ({case.published_from})", lambda count: plain(case.published_us.get(count)))
    if num_gpus:
        add("floor", of_main(lambda row, us: plain(row["roofline_us"])))
        add(
            f"of floor, {main[0]}",
            of_main(lambda row, us: f"{row['roofline_us'] / us:.0%}" if row["roofline_us"] else ""),
        )
        add("TFLOPS a GPU", of_main(lambda row, us: f"{row['flops'] / us / 1e6:.3g}"))
        add("weight TB/s", of_main(lambda row, us: f"{row['bytes_weights'] / us / 1e6:.2f}"))
    if num_gpus > 1:
        add("NVLink MB sent, busiest GPU: roofline / kernel / counted", of_main(lambda row, us: _nvlink(row)))
        if len(symmetric) > 1:
            add("symmetric MiB a GPU", of_main(lambda row, us: _symmetric(row)))
    add("experts with a row, busiest GPU", of_main(lambda row, us: f"{row['active_experts_max']:.4g}"))
    add(
        "relative L2 to the specification",
        lambda count: f"{max(row['rel_l2'] for row in cells[main, count]):.1e}" if (main, count) in cells else "",
    )
    ratios = [median_us(cells[main, count]) / bar[count] for count in tokens if (main, count) in cells and count in bar]
    if ratios:
        out.append(
            f"\n{main[0]} / sgl-deep-gemm 0.2.5: geometric mean {statistics.geometric_mean(ratios):.3f}, "
            f"worst {max(ratios):.3f}, over {len(ratios)} cells."
        )
    today = [
        median_us(found) / older[count]
        for (line, count), found in cells.items()
        if count in older and line[0].startswith(OLDER) and line[1] == MAIN_LINE[1]
    ]
    if today:
        out.append(
            f"\nThe machine of the day: {OLDER} in the run / recorded {statistics.geometric_mean(today):.3f}, "
            f"{min(today):.3f} to {max(today):.3f} over {len(today)} cells."
        )
    return head, "\n".join(out) + "\n\n" + _certificate(cells) + "\n"


def _nvlink(row: dict) -> str:
    if not row.get("nvlink_sent"):
        return ""
    counted = row.get("nvlink_counted")
    values = row["bytes_nvlink"], max(row["nvlink_sent"]), max(counted) if counted else None
    return " / ".join("-" if value is None else f"{value / 1e6:.3g}" for value in values)


def _symmetric(row: dict) -> str:
    # Rows without own_capacity gave the workspace of all cases of their run
    bytes_ = row.get("symmetric_bytes") if row.get("own_capacity") is not None else None
    return f"{bytes_ / 2**20:.0f}" if bytes_ else ""


def _certificate(cells: dict[tuple, list[dict]]) -> str:
    """Where the numbers come from: every commit (with its lines, if there are several), driver and torch behind them,
    protocols by token count, dates."""
    rows = [row for found in cells.values() for row in found]
    by_commit: dict[str, set[str]] = {}
    for (line, _), found in cells.items():
        by_commit.setdefault(_source(found[0]), set()).add(", ".join(line))
    commits = [
        commit + (f" ({'; '.join(sorted(lines))})" if len(by_commit) > 1 else "")
        for commit, lines in sorted(by_commit.items())
    ]
    counts = [len(found) for found in cells.values()]
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
        + f"; {dates[0]}{' to ' + dates[-1] if len(dates) > 1 else ''}; "
        + ("single runs" if max(counts) == 1 else f"median (lowest-highest) of up to {max(counts)} runs a cell")
        + ".</sub>"
    )


def _us_text(rows: list[dict] | None) -> str:
    if not rows:
        return ""
    times = [row["us"] for row in rows]
    spread = f" ({plain(min(times))}-{plain(max(times))})" if len(times) > 1 else ""
    return plain(median_us(rows)) + spread


def splice(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """text with what stands between the markers replaced. ValueError if they are not there exactly once, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one line {begin} and after it one line {end}")
    return text[: text.index(begin) + len(begin)] + "\n" + block + "\n" + text[text.index(end) :]


def panels_of(rows: list[dict], cases: dict) -> dict:
    """The picture's panels: main lines of main tables of several GPUs."""
    main = {}
    for (table, line, count), found in cells_of(rows).items():
        if table[1] > 1 and not table[3] and is_main(table) and line == MAIN_LINE and count:
            main[table[4], table[2], table[8] or "fp8", table[0], count] = found
    return picture.panels_of(main, cases)


def render_picture(rows: list[dict], cases: dict, directory: Path, readme: Path, draw: bool) -> str:
    """A line that shows results/times.png, if that is the picture of these rows; draw: make it anew if it is not."""
    panels, path = panels_of(rows, cases), directory / "times.png"
    if panels and draw and not picture.is_current(panels, path):
        print(picture.draw(panels, path))
    if not panels or not picture.is_current(panels, path):
        return ""
    return f"![time over tokens]({path.resolve().relative_to(readme.resolve().parent)})\n\n"


def render_scaling(directory: Path, readme: Path, draw: bool) -> str:
    """The Markdown of results/scaling, with the plot that lies there; draw: make it anew."""
    rows, picture = read_results(directory), directory / "scaling.png"
    if draw and rows:
        print(scaling_report.plot(rows, picture))
    block = scaling_report.markdown(rows).rstrip()
    if rows and picture.is_file():
        block += f"\n\n![scaling]({picture.resolve().relative_to(readme.resolve().parent)})"
    return block


def render_prediction(directory: Path) -> str:
    """The planner's fit to results/*.jsonl with its error, also on those of results/scaling, as text in Markdown."""
    fitted, checked = (read_measured(sorted(folder.glob("*.jsonl"))) for folder in (directory, directory / "scaling"))
    if len(fitted) < MIN_CALLS:
        return EMPTY
    return f"```text\n{fit_text(fit_measured(fitted), fitted, checked)}\n```"


def main(argv: list[str] | None = None) -> int:
    doc = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=doc[0], epilog=doc[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the file is stale")
    parser.add_argument("--print", action="store_true", dest="show", help="write the tables to stdout instead")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="the file with the markers")
    parser.add_argument(
        "--guide", type=Path, metavar="FILE", help="the one with in_model's (default: the guide, with this README)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS_DIR, metavar="DIR", help="where the .jsonl files are")
    args = parser.parse_args(argv)
    guide = args.guide or (GUIDE if args.readme == README else None)
    file, texts = args.readme, {}
    try:
        rows, cases = read_results(args.results), load_cases()
        block = render(rows, cases)
        if args.show:
            print(block)
            return 0
        block = render_picture(rows, cases, args.results, args.readme, not args.check) + block
        proofs = [] if prove_report.write(args.results / "prove", args.check) else ["prove/README.md"]
        before = args.readme.read_text()
        after = splice(before, block)
        if SCALING[0] in before:
            after = splice(after, render_scaling(args.results / "scaling", args.readme, not args.check), *SCALING)
        if REPLICAS[0] in before:
            after = splice(after, replicas_report.markdown(read_results(args.results / "replicas")), *REPLICAS)
        if PREDICTION[0] in before:
            after = splice(after, render_prediction(args.results), *PREDICTION)
        texts[file] = before, after
        if guide:
            file, before = guide, guide.read_text()
            in_model = in_model_report.markdown(read_results(args.results / "in_model"))
            texts[file] = before, splice(before, in_model, *IN_MODEL)
    except (OSError, ValueError) as error:
        print(f"report.py: {file.name}: {error}", file=sys.stderr)
        return 2
    stale = [file.name for file, (before, after) in texts.items() if after != before]
    if args.check:
        if stale := proofs + stale:
            print(f"report.py: {' and '.join(stale)} is stale; run python benchmarks/report.py", file=sys.stderr)
            return 1
        print(f"{' and '.join(file.name for file in texts)} is up to date")
        return 0
    for file, (_, after) in texts.items():
        file.write_text(after)
        print(f"{file.name} {'rewritten' if file.name in stale else 'is up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
