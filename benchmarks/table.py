"""What a person reads while the benchmark runs: one line a measurement, then the verdict. Only the first rank
prints."""

from benchmarks.cases import Case
from benchmarks.record import Row

HEADER = (
    f"{'tokens':>6} {'implementation':<23} {'input':<12} {'protocol':<8} {'us':>10} {'us min':>10} {'TFLOPS':>7} "
    f"{'W TB/s':>7} {'experts':>7} {'floor us':>9} {'of floor':>8} {'rel L2':>8}  check"
)


class Table:
    """quiet: print nothing."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet

    def say(self, text: str = "") -> None:
        if not self._quiet:
            print(text, flush=True)

    def case(self, case: Case, setup, routing: str, capacity: int) -> None:
        ranks = f"{setup.ep_size} {'virtual ' if setup.virtual_ranks else ''}rank{'s' * (setup.ep_size > 1)}"
        self.say(
            f"\n{case.name}: hidden {case.hidden}, intermediate {case.intermediate}, {case.num_experts} experts"
            f"{' in MXFP4' * (case.weight_format == 'mxfp4')}, top {case.topk}, {routing} routing; {ranks}, "
            f"capacity {capacity}"
        )
        self.say(HEADER)

    def row(self, row: Row) -> None:
        checked = f"{row.rows_checked}/{sum(row.tokens_per_rank)} rows"
        fraction = "-" if row.roofline_fraction is None else f"{row.roofline_fraction:.0%}"
        cells = [
            f"{row.num_tokens:>6} {row.impl:<23} {row.input:<12} {row.protocol:<8}",
            f"{_num(row.us, 1):>10} {_num(row.us_min, 1):>10} {_num(row.tflops, 1):>7} {_num(row.weight_tbs, 2):>7}",
            f"{_num(row.active_experts_max, 1):>7} {_num(row.roofline_us, 1):>9} {fraction:>8} {row.rel_l2:>8.1e} ",
            "ok " + checked if row.ok else "FAILED: " + row.reason,
        ]
        self.say(" ".join(cells))

    def finish(self, outcome, spec_verdicts) -> bool:
        """Print what the columns mean, what was not run, the comparison with the baselines and the verdict; True if
        every gate held."""
        rows = outcome.rows
        if rows and rows[0].us is not None:
            self.say(
                "\nus: median of one layer call, max over ranks (benchmarks/timing.py); experts: those with a row on "
                "the busiest GPU; W TB/s: their weight bytes / us;\nfloor: HBM, tensor or NVLink at practical "
                "rates, no latency; rel L2: against the specification, rows as checked."
            )
        for entry in outcome.not_run:
            self.say(f"not run: {entry['case']}, {entry['impl']}: {entry['reason']}")
        for line in [*ratios(rows), *nvlink_lines(rows)]:
            self.say(line)
        spent = sorted(outcome.seconds.items(), key=lambda item: -item[1])
        self.say("seconds: " + ", ".join(f"{what} {seconds:.1f}" for what, seconds in spent if seconds >= 0.05))
        failed = [row for row in rows if not row.ok]
        self.say()
        for verdict in filter(None, spec_verdicts):
            self.say(f"specification against the float64 loop: {verdict[1]}")
        for error in outcome.errors:
            self.say(f"error: {error}")
        ours = [row for row in rows if row.impl.startswith("megamoe")]
        if ours:
            worst = max(ours, key=lambda row: row.rel_l2)
            good = sum(row.ok for row in ours)
            self.say(
                f"layer against the specification: {good} of {len(ours)} cells hold, worst relative L2 "
                f"{worst.rel_l2:.1e} ({worst.case}, {worst.num_tokens} tokens), limits 1e-02 whole, 3e-02 a row"
            )
        rivals_failed = [row for row in failed if row.impl.startswith("sgl")]
        ok = (
            bool(ours)
            and len(failed) == len(rivals_failed)
            and not outcome.errors
            and all(v[0] for v in filter(None, spec_verdicts))
        )
        self.say(f"verdict: {'PASS' if ok else 'FAIL'}" + ("" if ours else ": nothing of megamoe was run"))
        return ok


def ratios(rows: list[Row]) -> list[str]:
    """'against X: faster in n of m cells' for each other implementation timed in cells of the fused layer.

    Like with like: the same input, or prequantized ours where the other takes bf16 only and ours was not timed so.
    """
    ours = {(*_cell(row), row.input): row.us for row in rows if row.impl == "megamoe" and row.us}
    pairs: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.us and row.ok and not row.impl.startswith("megamoe"):
            mine = ours.get((*_cell(row), row.input)) or ours.get((*_cell(row), "prequantized"))
            if mine:
                pairs.setdefault(f"{row.impl}, {row.input} in", []).append((row.us / mine, row))
    lines = []
    for name, found in pairs.items():
        (low, worst), (high, best) = min(found, key=lambda p: p[0]), max(found, key=lambda p: p[0])
        faster = sum(ratio > 1 for ratio, _ in found)
        lines.append(
            f"against {name}: faster in {faster} of {len(found)} cells, {low:.2f}x ({worst.case}, {worst.num_tokens} "
            f"tokens) to {high:.2f}x ({best.case}, {best.num_tokens} tokens)"
        )
    return lines


def nvlink_lines(rows: list[Row]) -> list[str]:
    """For the layer's largest call of each case: MB over NVLink, rank by rank, beside the roofline's."""
    largest: dict[tuple, Row] = {}
    for row in rows:
        key = row.impl, row.case, row.weight_format, row.routing
        if row.nvlink_sent and row.us and row.num_tokens >= getattr(largest.get(key), "num_tokens", 0):
            largest[key] = row
    lines = []
    for row in largest.values():
        counted = f", counted by the links {_megabytes(row.nvlink_counted)}" if row.nvlink_counted else ""
        lines.append(
            f"NVLink, {row.case}, {row.weight_format}, {row.routing}, {row.num_tokens} tokens: MB a call sent by rank "
            f"{_megabytes(row.nvlink_sent)}{counted}; roofline, busiest rank {row.bytes_nvlink / 1e6:.1f}"
        )
    return lines


def _megabytes(values: list[int]) -> str:
    return " ".join(f"{value / 1e6:.1f}" for value in values)


def _cell(row: Row) -> tuple:
    return row.case, row.routing, row.num_tokens, row.protocol


def _num(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
