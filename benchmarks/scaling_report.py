"""Series of scaling.py's rows: efficiency, what was expected, as markdown and as a plot. Needs no torch.

throughput    tokens of all ranks / us / units, a unit being a GPU (all virtual ranks share one) or a CPU rank
efficiency    throughput at this size / that at the series' smallest size
expected      the same ratio of the roofline's times (benchmarks/roofline.py), which know weights, rows and NVLink bytes
              of the routing that was drawn; "-" where no rates are known, as for CPUs. A line below its expectation has
              lost time to what the roofline leaves out: latency, waiting, skew.
"""

import statistics
from dataclasses import asdict
from pathlib import Path

SERIES = (
    "device", "impl", "mode", "case", "base_experts", "experts", "base_tokens", "routing", "protocol", "virtual",
    "per_domain", "domain_tokens", "max_domains",
)  # fmt: skip
EMPTY = "No scaling results yet: `launch/mpirun.sh 4 benchmarks/scaling.py --results` appends some.\n"


def plain(row) -> dict:
    """A record.ScalingRow as a dict."""
    return asdict(row)


def key_of(row: dict) -> tuple:
    """What the points of one line have in common."""
    own = {"virtual": row["virtual_ranks"] is not None, "per_domain": row["series_per_domain"]}
    return tuple(own[name] if name in own else row[name] for name in SERIES)


def series_of(rows: list[dict]) -> dict[tuple, list[dict]]:
    """key -> one dict a size, ascending: the median row of the newest commit, with efficiency and expected added.

    Rows without a time, without tokens or with a wrong output make no point.
    """
    found: dict[tuple, dict[int, list[dict]]] = {}
    for row in rows:
        if row.get("us") and row.get("ok") and sum(row["tokens_per_rank"]):
            found.setdefault(key_of(row), {}).setdefault(row["ep_size"], []).append(row)
    return {key: _with_efficiency([_median(sizes[size]) for size in sorted(sizes)]) for key, sizes in found.items()}


def _median(rows: list[dict]) -> dict:
    newest = max(rows, key=lambda row: row["date"])["commit"]
    rows = [row for row in rows if row["commit"] == newest]
    return {**rows[-1], "us": statistics.median(row["us"] for row in rows), "runs": len(rows)}


def _with_efficiency(points: list[dict]) -> list[dict]:
    def throughput(row: dict, us: float) -> float:
        return sum(row["tokens_per_rank"]) / us / row["num_units"]

    first = points[0]
    out = []
    for row in points:
        floors = row["roofline_us"], first["roofline_us"]
        expected = throughput(row, floors[0]) / throughput(first, floors[1]) if all(floors) else None
        out.append({**row, "efficiency": throughput(row, row["us"]) / throughput(first, first["us"]),
                    "expected": expected})  # fmt: skip
    return out


def title(row: dict) -> str:
    """What one series is."""
    ranks = "virtual ranks of one process" if row["virtual_ranks"] is not None else "ranks"
    tokens = f"{row['base_tokens']} tokens " + ("in all" if row["mode"] == "strong" else "a rank")
    experts = f"{row['base_experts']} experts" if row["experts"] == "held" else "experts per rank held"
    domains = "" if row["ranks_per_domain"] == row["ep_size"] else f", domains of {row['ranks_per_domain']}"
    domains += f", {row['domain_tokens']} rows a round" if domains and row["domain_tokens"] else ""
    domains += f", at most {row['max_domains']} domains a token" if row["max_domains"] else ""
    return f"{row['mode']}: {row['case']}, {tokens}, {experts}, {row['routing']} routing, {ranks}{domains}"


def markdown(rows: list[dict]) -> str:
    """One table a series."""
    out = []
    for points in series_of(rows).values():
        last = points[-1]
        out.append(f"**{title(last)}**, {last['impl']} on {last['device']}\n")
        out.append(
            "| ranks | units | tokens a rank | experts a rank | us | ktokens/s a unit | efficiency | expected "
            "| of floor | copies to other domains | relative L2 |"
        )
        out.append("|--" * 11 + "|")
        for row in points:
            rate = sum(row["tokens_per_rank"]) / row["us"] / row["num_units"] * 1e3
            cells = (
                row["ep_size"], row["num_units"], row["num_tokens"], row["num_experts"] // row["ep_size"],
                f"{row['us']:.1f}", f"{rate:.1f}", _percent(row["efficiency"]), _percent(row["expected"]),
                _percent(row["roofline_fraction"]), f"{row['copies_between']:.2f}", f"{row['rel_l2']:.1e}",
            )  # fmt: skip
            out.append("| " + " | ".join(map(str, cells)) + " |")
        commits = sorted({row["commit"][:12] + " with local changes" * bool(row["dirty"]) for row in points})
        dates = sorted({row["date"][:10] for row in points})
        out.append(
            f"\n<sub>{last['protocol']} protocol; medians of {min(row['runs'] for row in points)} run(s); commit "
            f"{', '.join(commits)}; torch {last['torch']}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.</sub>\n"
        )
    return "\n".join(out) if out else EMPTY


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def plot(rows: list[dict], path: Path) -> str:
    """Draw efficiency (solid) beside its expectation (dashed), and us a call; what became of it, in words."""
    try:
        import matplotlib
    except ImportError:
        return "plot not drawn: matplotlib is not installed; pip install 'megamoe[plot]'"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [points for points in series_of(rows).values() if len(points) > 1]
    if not lines:
        return "plot not drawn: no series has two sizes"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5 + 0.2 * len(lines)), layout="constrained")
    for points in lines:
        sizes = [row["ep_size"] for row in points]
        (drawn,) = left.plot(sizes, [row["efficiency"] for row in points], marker="o", label=title(points[-1]))
        if all(row["expected"] for row in points):
            left.plot(sizes, [row["expected"] for row in points], linestyle="--", color=drawn.get_color())
        right.plot(sizes, [row["us"] for row in points], marker="o", color=drawn.get_color())
    for axis, label in ((left, "efficiency (dashed: expected)"), (right, "us a call")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("ranks")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"plot: {path}"
