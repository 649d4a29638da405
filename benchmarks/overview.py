"""What report.py says of a section ahead of its tables: all cells against the rival, and one line a main table."""

import statistics

MAIN_LINE = "megamoe", "prequantized in"


def is_main(table: tuple) -> bool:
    """Shown at once, or a line of the section's overview; the others unfold."""
    return table[5] == "uniform" and not table[6] and table[7] > 0


def bar_of(table: tuple, case) -> dict[int, float]:
    """The rival's recorded times, where they were taken on such a machine in such a way; else none."""
    device, num_gpus, ep_size, virtual_ranks, _, routing, idle = table[:7]
    if case is None or (num_gpus, ep_size, virtual_ranks, routing, idle) != (2, 2, 0, "uniform", 0):
        return {}
    return case.bar_us if "H100" in device else case.bar_h200_us if "H200" in device else {}


def against_bar(cells: dict[tuple, list[dict]], cases: dict) -> list[str]:
    """One paragraph on all FP8 cells of a section that have a bar; none without."""
    ratios, reached = [], 0
    for (table, line, count), found in cells.items():
        case = cases.get(table[4])
        bar = bar_of(table, case) if is_main(table) and not table[8] and line == MAIN_LINE else {}
        if count in bar:
            ratios.append((count, median_us(found) / bar[count]))
            reached += "H100" in table[0] and median_us(found) <= case.goal_us.get(count, 0)
    if len(ratios) < 2:
        return []
    ones = [ratio for count, ratio in ratios if count == 1]
    at_one = f", {statistics.geometric_mean(ones):.3f} at 1 token" if ones else ""
    return [
        f"FP8, uniform routing, all {len(ratios)} cells, megamoe / sgl-deep-gemm 0.2.5: geometric mean "
        f"{statistics.geometric_mean(ratio for _, ratio in ratios):.3f}{at_one}; at most 1.02 in "
        f"{sum(ratio <= 1.02 for _, ratio in ratios)}; at the goal in {reached}.\n"
    ]


def overview_of(cells: dict[tuple, list[dict]], cases: dict) -> list[str]:
    """One line a main table of a section: times, and what they are of the rival's recorded FP8 ones; with it, all
    tables unfold. None for a single table."""
    lines: dict[tuple, dict[int, float]] = {}
    for (table, line, count), found in cells.items():
        if is_main(table) and line == MAIN_LINE:
            lines.setdefault(table, {})[count] = median_us(found)
    if len(lines) < 2:
        return []
    tokens = sorted({count for us in lines.values() for count in us})
    bars = {table: bar_of(table, cases.get(table[4])) for table in lines}
    head = "us per call" + " (of sgl-deep-gemm 0.2.5's with FP8, recorded)" * any(bars.values())
    out = [f"| {head}, tokens per rank: | " + " | ".join(map(str, tokens)) + " |", "|--" * (len(tokens) + 1) + "|"]
    for table in sorted(lines, key=lambda t: (list(cases).index(t[4]) if t[4] in cases else len(cases), t[8])):
        us, bar = lines[table], bars[table]
        texts = [
            plain(us[count]) + (f" ({us[count] / bar[count]:.2f})" if count in bar else "") if count in us else "-"
            for count in tokens
        ]
        out.append(f"| {table[4]}, {'MXFP4' if table[8] else 'FP8'} | " + " | ".join(texts) + " |")
    return ["\n".join(out) + "\n"]


def median_us(rows: list[dict]) -> float:
    return statistics.median(row["us"] for row in rows)


def plain(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
