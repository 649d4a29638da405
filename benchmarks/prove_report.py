"""benchmarks/results/prove/README.md from what launch/prove.py left beside it. No torch."""

import json
from pathlib import Path

EMPTY = "Nothing yet: `python launch/prove.py benchmarks/results/prove` leaves its reports here.\n"
HEAD = """# Proofs

Rendered by `./launch/do table` from the files beside it, which `launch/prove.py` wrote: it tells what each step is.
"""
MARKS = {True: "ok", False: "**WRONG**", None: "not run"}


def page(folder: Path) -> str:
    """The whole file; the same files give the same text. ValueError if a file does not parse."""
    path = folder / "summary.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    parts = [HEAD, _steps(rows), _suppressed(rows), _explained(rows), _doctor(rows), _faults(folder, rows),
             _traces(rows)]  # fmt: skip
    return "\n".join(filter(None, parts)) if rows else f"{HEAD}\n{EMPTY}"


def write(folder: Path, check: bool) -> bool:
    """folder/README.md, where there is such a folder; check: only compare. -> it was up to date"""
    if not folder.is_dir():
        return True
    path, text = folder / "README.md", page(folder)
    current = path.is_file() and path.read_text() == text
    if not current and not check:
        path.write_text(text)
    return current


def _steps(rows: list[dict]) -> str:
    out = ["## Steps\n", "| step | | seconds | counted | on | commit, date |", "|--|--|--|--|--|--|"]
    for row in rows:
        counted = row.get("reason", "") if row["ok"] is None else _counted(row)
        machine = f"{row['num_gpus']} x {row['device']}" if row["num_gpus"] else row["device"]
        commit = row["commit"][:12] + " with local changes" * bool(row["dirty"])
        out.append(f"| {row['step']} | {MARKS[row['ok']]} | {row.get('seconds', '')} | {counted} | {machine} | "
                   f"{commit}, {row['date'][:10]} |")  # fmt: skip
    drivers = sorted({row["driver"] for row in rows if row["driver"]})
    torches = sorted({row["torch"] for row in rows if row["ok"] is not None})
    return "\n".join(out) + f"\n\n<sub>torch {', '.join(torches)}" + (
        f"; driver {', '.join(drivers)}.</sub>\n" if drivers else ".</sub>\n"
    )


def _counted(row: dict) -> str:
    if "faults" in row:
        return ", ".join(f"{count} {word}" for word, count in row["faults"].items())
    if "findings" in row:
        hazards = [count for order in row.get("explained", {}).values() for count in order["pairs"].values()]
        explained = f", {len(hazards)} pairs explained ({sum(hazards)} hazards)" if hazards else ""
        return f"{row['findings']} findings{explained}"
    if "total_us" in row:
        return f"{row['total_us']:.0f} us"
    found = row.get("counted", {})
    if "sequences" in found:
        last = found["first_seed"] + found["seeds"] - 1
        return f"seeds {found['first_seed']} to {last}: {found['sequences']} sequences, {found['calls']} calls"
    if "replays" in found:
        loads = found.get("loads", found["rebalances"])  # which it was called where no plans were among the cases
        said = f"{found['calls']} calls, {found['replays']} of them replays, {loads} loads of weights; "
        if "planned" in found:
            said += (f"{found['planned']} calls under plans, {found['mxfp4']} with MXFP4, {found['rebalances']} "
                     f"rebalances in {found['steps']} steps; ")  # fmt: skip
        return f"{said}{found['runs']} runs, {found['seconds']:.0f} s; digest {found['digest'][:12]}"
    return ""


def _suppressed(rows: list[dict]) -> str:
    found = {option: why for row in rows for option, why in row.get("suppressed", {}).items()}
    return "".join(f"The sanitizers run with `{option}`: {why}.\n" for option, why in found.items())


def _explained(rows: list[dict]) -> str:
    """What a step's tool called a race and launch/explained.py has a reason for."""
    out = []
    for row in (row for row in rows if row.get("explained")):
        out += [f"### {row['step']}: explained\n",
                "Pairs of functions whose accesses the tool calls a race, and the order that holds between them.\n",
                "| order | why it holds, and why the tool does not see it | writer and reader: hazards |",
                "|--|--|--|"]  # fmt: skip
        for name, order in row["explained"].items():
            pairs = "<br>".join(f"`{pair}`: {count}" for pair, count in sorted(order["pairs"].items()))
            out.append(f"| {name} | {order['reason']} | {pairs} |")
        out.append("")
    return "\n".join(out)


def _doctor(rows: list[dict]) -> str:
    said = [text for row in rows for text in row.get("said", [])]
    return "## Doctor between two ranks\n\n```\n{}\n```\n".format("\n".join(said)) if said else ""


def _faults(folder: Path, rows: list[dict]) -> str:
    out = []
    for row in (row for row in rows if "faults" in row):
        out += [f"### {row['step']}\n", "| fault | step | what the ranks said | seconds | |", "|--|--|--|--|--|"]
        for name in row["files"]:
            out += map(_fault, map(json.loads, (folder / name).read_text().splitlines()))
        out.append("")
    return "\n".join(["## Faults\n", *out]) if out else ""


def _fault(fault: dict) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, text in fault["said"].items():
        ranks.setdefault(text, []).append(rank)
    said = "<br>".join(f"{', '.join(of)}: {_cell(text, 240)}" for text, of in ranks.items())
    problem = f": {_cell(fault['problem'], 240)}" if fault["problem"] else ""
    return f"| {fault['fault']} | {fault['step']} | {said} | {fault['seconds']:.1f} | {MARKS[fault['ok']]}{problem} |"


def _cell(text: str, most: int) -> str:
    text = " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _traces(rows: list[dict]) -> str:
    found = sorted((row for row in rows if "total_us" in row), key=lambda row: int(row["step"].partition("-")[2]))
    if not found:
        return ""
    exposed = list(found[0]["exposed_us"])
    out = ["## Where a call's time goes\n",
           "Microseconds of a traced call, and of an average CTA of it by what it was waiting for or doing "
           "(`exposed` in `megamoe/trace.py`).\n",
           "| tokens a rank | whole call | " + " | ".join(exposed) + " |",
           "|--" * (len(exposed) + 2) + "|"]  # fmt: skip
    for row in found:
        values = " | ".join(f"{row['exposed_us'][name]:.1f}" for name in exposed)
        out.append(f"| {row['step'].partition('-')[2]} | {row['total_us']:.1f} | {values} |")
    for row in found:
        pictures = [name for name in row["files"] if name.endswith(".png")]
        out.append(f"\n{row['case']}:\n" + "".join(f"\n![{row['step']}]({name})" for name in pictures))
    return "\n".join(out) + "\n"
