"""Tables of replicas.py's rows (results/replicas/*.jsonl): time without and with redundant experts. No torch."""

import statistics

LINES = {
    "none": "no room for plans",
    "room": "room, no plan",
    "static": "plan, by source rank",
    "balanced": "plan, balanced by counts",
    "min_active": "plan, one copy an expert",
    "rebalance": "a rebalance step and a call",
}
EMPTY = "No results yet: `benchmarks/replicas.py --results` on two GPUs or more appends some."


def markdown(rows: list[dict]) -> str:
    """A table for each machine, case, weight format, routing and number of redundant experts: medians of the newest
    commit's rows."""
    tables: dict[tuple, dict[int, list[dict]]] = {}
    for row in rows:
        key = (row["device"], row["num_gpus"], row["ranks"], row["virtual_ranks"] or 0, row["case"], row["format"],
               row["routing"], row["redundant"])  # fmt: skip
        tables.setdefault(key, {}).setdefault(row["tokens"], []).append(row)
    out = []
    for (device, num_gpus, ranks, virtual, case, weight_format, routing, redundant), cells in sorted(tables.items()):
        cells = {tokens: _newest(found) for tokens, found in sorted(cells.items())}
        machine = f"{num_gpus} x {device}" if num_gpus else device
        form = weight_format.upper()
        head = (f"**{case}, {form} experts, {routing} routing, {redundant} redundant experts**, EP{ranks}"
                + " (virtual)" * bool(virtual))  # fmt: skip
        out += [f"{head} on {machine}\n", "| us per call, tokens per rank: | " + " | ".join(map(str, cells)) + " |",
                "|--" * (len(cells) + 1) + "|"]  # fmt: skip
        for name, label in LINES.items():
            medians = [statistics.median(row[name] for row in found) for found in cells.values()]
            out.append(f"| {label} | " + " | ".join(f"{us:.4g}" for us in medians) + " |")
        for name, label, digits in (
            ("moved_mb", "MB that such a step brings a rank", ".3g"),
            ("balancedness_without", "mean / busiest rank's rows, no plan", ".2f"),
            ("planned_balancedness", "the same, planned", ".2f"),
        ):
            out.append(f"| {label} | " + " | ".join(f"{found[0][name]:{digits}}" for found in cells.values()) + " |")
        every = [row for found in cells.values() for row in found]
        commits = sorted({row["commit"][:12] + " with local changes" * bool(row["dirty"]) for row in every})
        dates = sorted({row["date"][:10] for row in every})
        out.append(f"\n<sub>Bits equal without and with plans. Commit {', '.join(commits)}; torch {every[0]['torch']}; "
                   f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}.</sub>\n")  # fmt: skip
    return "\n".join(out).rstrip() if out else EMPTY


def _newest(rows: list[dict]) -> list[dict]:
    newest = max(rows, key=lambda row: row["date"])
    return [row for row in rows if (row["commit"], row["dirty"]) == (newest["commit"], newest["dirty"])]
