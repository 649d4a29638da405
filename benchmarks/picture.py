"""The picture of the README: time over tokens per rank, one panel a case. Drawing needs matplotlib, knowing whether it
is the picture of these rows does not: it carries a digest of what was drawn."""

import hashlib
import json
import statistics
from pathlib import Path

PANELS_A_ROW = 3


def panels_of(cells: dict[tuple, list[dict]], cases: dict) -> dict:
    """What `draw` draws: a panel a case with each line's times, its floor, the rival's and what others published.

    cells: (case, ep_size, weight format, device, tokens) -> the rows behind one number. Published times of eight GPUs
    stand only beside lines of four and more.
    """
    found: dict[str, dict[str, dict[int, list[dict]]]] = {}
    for (case, ep_size, weight_format, device, tokens), rows in sorted(cells.items(), key=lambda cell: cell[0]):
        name = f"{device.split('80GB')[0].removeprefix('NVIDIA').strip()} EP{ep_size}, {weight_format.upper()}"
        found.setdefault(case, {}).setdefault(name, {})[tokens] = rows
    panels: dict[str, dict[str, dict]] = {}
    for case in (name for name in cases if name in found):
        lines = panels[case] = {}
        for name, points in found[case].items():
            times = {tokens: [row["us"] for row in rows] for tokens, rows in points.items()}
            floors = {tokens: [rows[0]["roofline_us"]] for tokens, rows in points.items()}
            lines[name] = _line("line", times)
            if all(us for (us,) in floors.values()):
                lines[f"{name}, floor"] = _line("floor", floors)
        others = {"sgl-deep-gemm 0.2.5, EP2, H100": cases[case].bar_us}
        if any(key[0] == case and key[1] >= 4 for key in cells):
            others["8 x H100, published"] = cases[case].published_us
        for name, times in others.items():
            if times:
                lines[name] = _line("others", {tokens: [us] for tokens, us in times.items()})
    return panels


def _line(style: str, times: dict[int, list[float]]) -> dict:
    points = [[tokens, statistics.median(us), min(us), max(us)] for tokens, us in times.items()]
    return {"style": style, "points": points}


def digest_of(panels: dict) -> str:
    """Of what `draw` is given; floats as results/*.jsonl keeps them."""
    return hashlib.sha256(json.dumps(panels, sort_keys=True).encode()).hexdigest()


def is_current(panels: dict, path: Path) -> bool:
    """The file shows these panels."""
    return path.is_file() and digest_of(panels).encode() in path.read_bytes()


def draw(panels: dict, path: Path) -> str:
    """Draw panels[case][line] = {"points": [[tokens, median, lowest, highest], ...], "style": "line", "floor" or
    "others"}; "floor" is dashed in the colour of the line before it. -> what became of it, in words."""
    try:
        import matplotlib
    except ImportError:
        return "picture not drawn: matplotlib is not installed; pip install 'megamoe[plot]'"
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    across = min(PANELS_A_ROW, len(panels))
    down = -(-len(panels) // across)
    size = (4.6 * across, 4.4 * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (case, lines) in zip(axes.flat, panels.items(), strict=False):
        colour = None
        for name, line in lines.items():
            tokens, us, low, high = zip(*line["points"], strict=True)
            if line["style"] == "floor":
                axis.plot(tokens, us, linestyle="--", linewidth=0.8, color=colour)
            elif line["style"] == "others":
                axis.plot(tokens, us, linestyle=":", marker="x", linewidth=0.8, label=name)
            else:
                (drawn,) = axis.plot(tokens, us, marker="o", markersize=3, label=name)
                colour = drawn.get_color()
                axis.fill_between(tokens, low, high, color=colour, alpha=0.25)
        axis.set_title(case)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("tokens per rank")
        axis.set_ylabel("us per call (dashed: floor)")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=90, metadata={"Description": digest_of(panels)})
    pyplot.close(figure)
    return f"picture: {path}"
