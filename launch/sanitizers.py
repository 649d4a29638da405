"""compute-sanitizer's tools as launch/prove.py runs them, and what their reports say.

Nothing of racecheck is switched off; what it calls a race is compared, function by function, with EXPLAINED
(explained.py). All else is a finding: another pair, a report without a source line (the case must run with --lineinfo),
a report or a summary that cannot be read.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from explained import EXPLAINED  # beside this file

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Tool -> arguments of tests/gpu/memcheck_case.py. Races and initialisation are looked for inside one rank: across
# ranks, memory is shared by design and ordered by system-scope accesses, which racecheck does not follow.
CASE_ARGUMENTS = {"memcheck": ["--ranks", "2"], "synccheck": ["--ranks", "2"],
                  "racecheck": ["--ranks", "1", "--runs", "1", "--lineinfo"],
                  "initcheck": ["--ranks", "1"]}  # fmt: skip
# Every option that keeps a finding from being reported, and why.
SUPPRESSED = {
    "--report-api-errors no": "cuda-bindings asks the driver for the address of every function it knows; one that this "
    "driver lacks would be reported as an error of the program",
}
# Unlike the others, racecheck counts only what it displays, 100 reports unless told.
OPTIONS = {"racecheck": ["--print-limit", "100000"]}
MOST_CHARACTERS = 20_000  # of the reports that a failed step's row keeps


# --- sources ----------------------------------------------------------------------------------------------------------


def functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of each device function of a source, lines from 1."""
    lines = [re.sub(r"//.*", "", line) for line in text.splitlines()]
    for first, line in enumerate(lines):
        if not re.match(r'\s*(MOE_DEVICE|MOE_HOST_DEVICE|extern "C" __global__)\b', line):
            continue
        depth, opened = 0, False
        for last in range(first, len(lines)):
            opened |= "{" in lines[last]
            depth += lines[last].count("{") - lines[last].count("}")
            if opened and depth == 0:
                name = re.search(r"\b(?!__)(\w+)\(", " ".join(lines[first : last + 1]))
                if name:
                    yield name[1], first + 1, last + 1
                break


def place(path: str, line: int, root: Path = CSRC) -> str | None:
    """'file:function' of a line, the file found by its name, which is unique in csrc; None if it is not known."""
    found = list(root.rglob(Path(path).name))
    if len(found) != 1:
        return None
    names = [name for name, first, last in functions(found[0].read_text()) if first <= line <= last]
    return f"{found[0].relative_to(root).as_posix()}:{names[-1]}" if names else None


# --- reports ----------------------------------------------------------------------------------------------------------


def reports(output: str) -> list[list[str]]:
    """What the tool printed between the program's own lines, as the lines of each report without mark and heading.
    Reports are set apart by empty lines, races also by their first words."""
    found: list[list[str]] = []
    following = False
    for line in output.splitlines():
        _, mark, text = line.partition("=========")
        text = text.strip()
        if not mark or text == "COMPUTE-SANITIZER":
            continue
        if text and following and not re.search(r"Race reported between|SUMMARY:", text):
            found[-1].append(text)
        elif text:
            found.append([text])
        following = bool(text)
    return found


def each_kind(texts: Iterable[str]) -> list[str]:
    """Those that differ in numbers only are of one kind: the first of each, and how many they are."""
    kinds, first = Counter(), {}
    for text in texts:
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", text)
        kinds[kind] += 1
        first.setdefault(kind, text)
    return [f"{kinds[kind]} x {text}" for kind, text in first.items()]


def distinct(output: str) -> str:
    """Each kind of the reports once."""
    text = "\n\n".join(each_kind("\n".join(lines[:12]) for lines in reports(output)))
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "\n... and more"


class Pair(NamedTuple):
    """One line of a report of racecheck. writer, reader: 'file:function'; None where they are not known, or the pair is
    not of one writer and one reader."""

    writer: str | None
    reader: str | None
    hazards: int
    text: str


def pairs(report: list[str]) -> list[Pair]:
    """The first access of a race with each of the others. ValueError if it does not read as such."""
    text = " ".join(report)
    accesses = re.findall(r"(Read|Write) access at\s+(.*?)(?=\s+and (?:Read|Write) access at|$)", text)
    counts = [re.search(r"\[(\d+) hazards?\]", where) for _, where in accesses[1:]]
    if "Race reported between" not in text or not counts or not all(counts):
        raise ValueError(text)
    found = []
    for (kind, where), count in zip(accesses[1:], counts):
        both = [accesses[0], (kind, where)]
        at = {}
        for access, described in both:
            line = re.search(r'([^\s":]+\.cuh?)"?(?::|,? line )\s*(\d+)', described)
            at[access] = place(line[1], int(line[2])) if line else None
        said = " and ".join(f"{access} access at {described}" for access, described in both)
        found.append(Pair(at.get("Write"), at.get("Read"), int(count[1]), said))
    return found


def order_of(pair: Pair) -> str | None:
    return next((name for name, order in EXPLAINED.items()
                 if pair.writer in order.writers and pair.reader in order.readers), None)  # fmt: skip


# --- facts of a step --------------------------------------------------------------------------------------------------


def facts(output: str) -> dict:
    """Errors and warnings as the tool counts them: 0 expected. "output": what to keep if the step failed."""
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", output)]
    return {"findings": sum(errors) if errors else None, "suppressed": SUPPRESSED, "output": distinct(output),
            "ok": bool(errors) and not any(errors)}  # fmt: skip


def race_facts(output: str) -> dict:
    """findings: what EXPLAINED does not explain, `unexplained` in words. explained: of each order that was met its
    reason and the hazards of each pair."""
    unexplained, met, read, displayed = [], {}, 0, None
    for report in reports(output):
        summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed(?: \((\d+) errors?, (\d+) warnings?\))?",
                            " ".join(report))  # fmt: skip
        if summary:
            displayed = (displayed or 0) + int(summary[1])
            if summary[2] and int(summary[2]) + int(summary[3]) > int(summary[1]):
                unexplained.append("not all were displayed: " + summary[0])
            continue
        read += 1
        try:
            found = pairs(report)
        except ValueError as error:
            unexplained.append(f"not read: {error}")
            continue
        for pair in found:
            name = order_of(pair)
            if name is None:
                unexplained.append(f"{pair.writer or '?'} and {pair.reader or '?'}: {pair.text}")
            else:
                hazards = met.setdefault(name, {"reason": EXPLAINED[name].reason, "pairs": {}})["pairs"]
                said = f"{pair.writer} and {pair.reader}"
                hazards[said] = hazards.get(said, 0) + pair.hazards
    if displayed is not None and displayed > read:
        unexplained.append(f"{displayed} hazards displayed, {read} reports read")
    return {"findings": None if displayed is None else len(unexplained), "explained": met,
            "suppressed": SUPPRESSED, "output": "\n".join(each_kind(unexplained))[:MOST_CHARACTERS],
            "ok": displayed is not None and not unexplained}  # fmt: skip
