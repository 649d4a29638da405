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
    "others"}. A machine has one colour; MXFP4 is dashed, floors are dotted. -> what became of it, in words."""
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
    names = {name for lines in panels.values() for name, line in lines.items() if line["style"] == "line"}
    machines = sorted({name.partition(",")[0] for name in names})
    colours, legend = {machine: f"C{number}" for number, machine in enumerate(machines)}, {}
    for axis, (case, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, line in lines.items():
            tokens, us, low, high = zip(*line["points"], strict=True)
            machine, _, weight_format = name.removesuffix(", floor").partition(", ")
            colour, dashes = colours.get(machine, "black"), "--" if weight_format == "MXFP4" else "-"
            if line["style"] == "floor":
                axis.plot(tokens, us, linestyle=":", linewidth=0.6, color=colour, alpha=0.7)
            elif line["style"] == "others":
                marker = "x" if name.startswith("sgl") else "+"
                axis.plot(tokens, us, linestyle="", marker=marker, markersize=6, color="black", label=name)
            else:
                axis.plot(tokens, us, linestyle=dashes, marker="o", markersize=3, color=colour, label=name)
                axis.fill_between(tokens, low, high, color=colour, alpha=0.25)
        axis.set_title(case)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_xlabel("tokens per rank")
        axis.set_ylabel("us per call (dotted: floor)")
        axis.grid(alpha=0.3, which="both")
        legend |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Description": digest_of(panels)})
    pyplot.close(figure)
    return f"picture: {path}"
