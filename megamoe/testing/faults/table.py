"""python -m megamoe.testing.faults: makes one thing go wrong at a time and prints what every rank said about it.

Each row is a fault of host.py (CPU ranks over gloo) or device.py (GPUs; "not run" without). A row is ok when
every surviving rank ended within its deadline and five seconds, with the words that name who waited for whom and at
which step, its output spoiled, and nothing left behind. Ranks are processes of this file's own, so that one that dies
takes no other down with it.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megamoe.testing.spawn import launcher_variables

GRACE_S = 5.0
HOST_AT_ONCE = 3
NUM_RANKS = 3  # of the host side
FAULTY = 2  # the rank at which things go wrong: always the last


class Fault(NamedTuple):
    """name, step: columns of the table. body(rank) -> Said, or ends its process; for a fault that it cannot meet here
    it returns a text. survivors, faulty: patterns of what the last rank, and the others, must say; faulty None: it
    is gone, or says nothing. deadline_s: of the wait that must end. own_ranks: in processes of its own, since one dies.
    num_ranks: as many; started: those of them that are started, None for all."""

    name: str
    step: str
    body: Callable
    survivors: str
    faulty: str | None
    deadline_s: float
    own_ranks: bool = False
    num_ranks: int = NUM_RANKS
    started: tuple[int, ...] | None = None


class Said(NamedTuple):
    """What a rank said, after how many seconds, and what else was looked at: problems that it found itself, "" if
    none."""

    text: str
    seconds: float
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. said: one text a rank, as far as it lived; ok None: not run, `problem` says why."""

    side: str
    fault: str
    step: str
    said: dict[int, str]
    seconds: float
    ok: bool | None
    problem: str


def judge(fault: Fault, side: str, answers: dict[int, Said | str], exits: dict[int, int | None] | None = None) -> Row:
    """answers: of each rank that answered, a text for "not run". exits: exit codes, where ranks had processes of their
    own: survivors of a death must not leave as if nothing had been."""
    reasons = [answer for answer in answers.values() if isinstance(answer, str)]
    if reasons:
        return Row(side, fault.name, fault.step, {}, 0.0, None, reasons[0])
    problems = []
    for rank in range(fault.num_ranks):
        pattern = fault.faulty if rank == fault.num_ranks - 1 else fault.survivors
        if pattern is None:
            continue
        if rank not in answers:
            problems.append(f"rank {rank} said nothing" + (f", exit {exits[rank]}" if exits else ""))
            continue
        answer = answers[rank]
        if not re.search(pattern, answer.text, re.DOTALL):
            problems.append(f"rank {rank} did not say {pattern!r}")
        if answer.problem:
            problems.append(f"rank {rank}: {answer.problem[-1500:]}")
        if answer.seconds > fault.deadline_s + GRACE_S:
            problems.append(f"rank {rank} took {answer.seconds:.1f} s, its deadline was {fault.deadline_s} s")
        if exits is not None and rank < fault.num_ranks - 1 and not exits[rank]:
            problems.append(f"rank {rank} left with status {exits[rank]}")
    seconds = max((answer.seconds for answer in answers.values()), default=0.0)
    said = {rank: answer.text for rank, answer in sorted(answers.items())}
    return Row(side, fault.name, fault.step, said, seconds, not problems, "; ".join(problems))


def run_ranks(
    module: str, names: Sequence[str], num_ranks: int, started: Sequence[int], timeout_s: float
) -> tuple[dict, dict]:
    """Runs the faults `names` of `module`, one after the other, in one process a rank of `started`.

    -> ({name: {rank: answer}}, {rank: exit code, None if it had to be ended}). Nothing outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module])
    # The store lives here and not in rank 0: it outlasts a rank that dies
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=timeout_s))
    with tempfile.TemporaryDirectory() as folder:
        processes = {
            rank: context.Process(target=_rank_main, args=(module, list(names), rank, num_ranks, store.port, folder))
            for rank in started
        }
        for process in processes.values():
            process.start()
        end = time.monotonic() + timeout_s
        for process in processes.values():
            process.join(max(end - time.monotonic(), 0.01))
        exits = {rank: process.exitcode for rank, process in processes.items()}
        for process in processes.values():
            process.kill()
            process.join()
        answers: dict[str, dict] = {name: {} for name in names}
        for rank in started:
            path = Path(folder, f"rank{rank}.jsonl")
            for line in path.read_text().splitlines() if path.exists() else ():
                name, answer = json.loads(line)
                answers[name][rank] = answer if isinstance(answer, str) else Said(*answer)
    return answers, exits


def _rank_main(module: str, names: list[str], rank: int, num_ranks: int, port: int, folder: str) -> None:
    log = os.open(Path(folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ |= launcher_variables(rank, num_ranks, port)
    faults = {fault.name: fault for fault in import_module(module).FAULTS}
    status = 0
    with open(Path(folder, f"rank{rank}.jsonl"), "w", buffering=1) as file:
        for name in names:
            try:
                answer = faults[name].body(rank)
            except BaseException:
                answer = Said("", 0.0, traceback.format_exc(chain=False))
            file.write(json.dumps([name, answer]) + "\n")
            # A rank that lost another leaves at once and without collective clean-up
            lost = isinstance(answer, str) or answer.text != "no error"
            status = status or int(faults[name].own_ranks and lost)
    os._exit(status)


def timed(action: Callable, *expected: type[Exception]) -> tuple[object, Exception | None, float]:
    """-> (result or None, exception or None, seconds)"""
    begin = time.monotonic()
    try:
        return action(), None, time.monotonic() - begin
    except expected as error:
        return None, error, time.monotonic() - begin


def words(error: Exception | None) -> str:
    return "no error" if error is None else f"{type(error).__name__}: {error}".replace("\n", " ")


def tell(text: str) -> None:
    """How far it is, for who waits; the table comes at the end."""
    print(text, file=sys.stderr, flush=True)


def run_module(module: str, side: str, only: str | None) -> list[Row]:
    """All rows of one module; faults that leave every rank alive share their processes."""
    picked = [fault for fault in import_module(module).FAULTS if only is None or re.search(only, fault.name)]
    together = [fault for fault in picked if not fault.own_ranks]
    rows = {}
    if together:
        limit_s, num_ranks = sum(fault.deadline_s + 2 * GRACE_S for fault in together), together[0].num_ranks
        names = [fault.name for fault in together]
        tell(f"{side}: {len(names)} faults, one after the other, in {num_ranks} processes; at most {limit_s:.0f} s")
        answers, _ = run_ranks(module, names, num_ranks, range(num_ranks), limit_s)
        rows |= {fault.name: judge(fault, side, answers[fault.name]) for fault in together}

    def alone(fault: Fault) -> Row:
        started = fault.started or range(fault.num_ranks)
        tell(f"{side}: {fault.name}")
        answers, exits = run_ranks(module, [fault.name], fault.num_ranks, started, fault.deadline_s + 12 * GRACE_S)
        return judge(fault, side, answers[fault.name], exits)

    # They mostly wait; on a GPU two of them would be in each other's way
    with ThreadPoolExecutor(HOST_AT_ONCE if side == "host" else 1) as pool:
        rows |= {row.fault: row for row in pool.map(alone, [fault for fault in picked if fault.own_ranks])}
    return [rows[fault.name] for fault in picked]


def render(rows: list[Row]) -> str:
    marks = {True: "✓", False: "✗", None: "–"}
    lines = []
    for row in rows:
        lines.append(f"{marks[row.ok]} {row.side:<6} {row.fault:<44} {row.step:<12} {row.seconds:5.1f} s")
        groups: dict[str, list[int]] = {}
        for rank, text in row.said.items():
            groups.setdefault(text, []).append(rank)
        for text, ranks in groups.items():
            lines.append(f"      rank {', '.join(map(str, ranks))}: {text[:400]}")
        if row.problem:
            lines.append(f"      {'not run: ' if row.ok is None else 'WRONG: '}{row.problem}")
    counts = [sum(row.ok is state for row in rows) for state in (True, False, None)]
    return "\n".join([*lines, "{} ok, {} wrong, {} not run".format(*counts)])


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if a row is wrong, 2 if none was asked for."""
    parser = argparse.ArgumentParser(prog="python -m megamoe.testing.faults", description=__doc__.partition(": ")[2])
    parser.add_argument("--side", choices=("host", "device", "both"), default="both",
                        help="host: CPU ranks; device: what the GPUs here can show; default: %(default)s")  # fmt: skip
    parser.add_argument("--only", metavar="PATTERN", help="faults whose name has this regular expression")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there, one JSON object a line")
    given = parser.parse_args(argv)
    try:
        re.compile(given.only or "")
    except re.error as error:
        parser.error(f"--only {given.only!r} is no regular expression: {error}")
    if given.json and not Path(given.json).resolve().parent.is_dir():
        parser.error(f"--json {given.json}: its folder is not there; make it first")
    rows = []
    if given.side != "device":
        rows += run_module("megamoe.testing.faults.host", "host", given.only)
    if given.side != "host":
        from megamoe.testing.faults import device

        rows += device.rows(given.only)
    if not rows:
        parser.error(f"--only {given.only!r} is in no fault's name")
    print(render(rows))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    return int(any(row.ok is False for row in rows))
