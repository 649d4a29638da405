"""A picture of one traced call: time from left to right, a line a role of some CTAs of each rank. Needs matplotlib; if
it is missing, `python -m megamoe.trace_picture FILE.json FILE.png` draws what `trace --png` kept, elsewhere."""

import importlib.util
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

from megamoe.layout import TRACE_ROLES
from megamoe.trace import EXPOSED, Record, Span, write_chrome_trace

CTAS, ALL_CTAS = 6, 24  # at most, of each rank and of all, evenly picked; two of a rank at least
WORK = {"tensor": "tab:blue", "epilogue": "tab:orange", "rows": "tab:green", "weights": "tab:purple",
        "store": "tab:red", "plan": "tab:olive", "dispatch": "tab:cyan", "combine": "tab:pink"}  # fmt: skip
WAIT = "0.85"


def kind_of(span: Span) -> str | None:
    """A key of WORK, or None for a wait."""
    if span.role.startswith("math"):
        return EXPOSED.get(span.name)
    by_end = {
        ("tokens", "k_loop"): "rows", ("weights", "k_loop"): "weights", ("store", "stored"): "store",
        ("plan", "list"): "plan", ("exchange", "pushed"): "dispatch", ("exchange", "combined"): "combine",
    }  # fmt: skip
    return by_end.get((span.role, span.end.event))


def pick(spans: list[Span]) -> list[Span]:
    """Those of a few CTAs of each rank."""
    ctas = defaultdict(set)
    for span in spans:
        ctas[span.rank].add(span.cta)
    most = max(2, min(CTAS, ALL_CTAS // max(len(ctas), 1)))
    kept = {(rank, sorted(some)[i * len(some) // min(most, len(some))])
            for rank, some in ctas.items() for i in range(min(most, len(some)))}  # fmt: skip
    return [span for span in spans if (span.rank, span.cta) in kept]


def picture(spans: list[Span], title: str, path: str | Path) -> Path:
    """Draws to `path`, or without matplotlib keeps beside it, as JSON, what draw_kept needs. -> the file written."""
    if importlib.util.find_spec("matplotlib"):
        draw(pick(spans), title, path)
        return Path(path)
    kept = Path(path).with_suffix(".picture.json")
    write_chrome_trace(pick(spans), title, kept)
    return kept


def draw_kept(source: str | Path, path: str | Path) -> None:
    """source: a Chrome trace of trace.write_chrome_trace, of few CTAs."""
    trace, spans, title = json.loads(Path(source).read_text()), [], ""
    for event in trace["traceEvents"]:
        if event["name"] == "process_labels":
            title = event["args"]["labels"]
        if event["ph"] == "X":
            cta, role = divmod(event["tid"], len(TRACE_ROLES))
            first, _, last = event["name"].partition(" > ")
            begin = round(event["ts"] * 1000)
            end = Record(begin + round(event["dur"] * 1000), last, event["args"]["tile"])
            spans.append(Span(event["pid"], cta, TRACE_ROLES[role], Record(begin, first, 0), end))
    draw(spans, title, path)


def draw(spans: list[Span], title: str, path: str | Path) -> None:
    """PNG, or what the path's suffix says; all CTAs given. ValueError without a span."""
    if not spans:
        raise ValueError("spans is empty: nothing was traced")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    zero = min(span.begin.ns for span in spans)
    picked = sorted({(span.rank, span.cta) for span in spans})
    lines = [(rank, cta, role) for rank, cta in picked for role in TRACE_ROLES]
    at = {line: i for i, line in enumerate(lines)}
    height = 1.5 + 0.13 * len(lines)  # inches
    figure, axes = pyplot.subplots(figsize=(14, height))
    bars = defaultdict(list)
    for span in spans:
        line = at.get((span.rank, span.cta, span.role))
        if line is not None:
            bars[line, kind_of(span)].append(((span.begin.ns - zero) / 1000, span.us))
    for (line, kind), some in bars.items():
        axes.broken_barh(some, (line - 0.4, 0.8), color=WORK.get(kind, WAIT), linewidth=0)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    middle = [at[rank, cta, TRACE_ROLES[len(TRACE_ROLES) // 2]] for rank, cta in picked]
    axes.set_yticks(middle, [f"rank {rank} CTA {cta}" for rank, cta in picked])
    for first in range(0, len(lines), len(TRACE_ROLES)):
        axes.axhline(first - 0.5, color="0.6", linewidth=0.5)
    axes.set_xlabel(f"microseconds; lines of a CTA from above: {', '.join(TRACE_ROLES)}")
    axes.set_title("\n".join(textwrap.wrap(title, 150)), fontsize=9)
    legend = [Patch(color=color, label=name) for name, color in (*WORK.items(), ("waits", WAIT))]
    axes.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.7 / height), ncols=len(legend), fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    draw_kept(*sys.argv[1:3])
