#!/usr/bin/env python3
"""What only GPUs can show, in one go: python launch/prove.py FOLDER [--seconds 60] [--only PATTERN] [--commit HASH]

With one GPU: the device's fault table, compute-sanitizer over every tile size and kind of build, the debug build,
fuzzing, a soak, and traces with pictures; with two or more, also the faults, the soak and the doctor between two ranks.
On any machine: the host's fault table. Steps are spread over the GPUs: of two ranks first, on two GPUs each, then one
or two a GPU. What lacks its means is "not run" with the reason. Exit status 1 if a step failed.

Each step leaves its report in FOLDER and a row in FOLDER/summary.json: a later run of a step replaces its row, and a
step that was not run replaces none. --merge OTHER... only takes over what other folders hold. What is shown in
benchmarks/results/prove/README.md is that folder, by `./launch/do table`. A soak adds to the state of earlier runs, in
FOLDER or in that folder, of the same device sources and cases on the same kind of GPU.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import sanitizers  # beside this file

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "results" / "prove"
CASE = str(ROOT / "tests" / "gpu" / "memcheck_case.py")
TRACES = (8, 512, 8192)
LEAVES = "a rank (dies|closes)"  # faults of two GPUs whose ranks are processes of their own
CASES = ("soak.py", "data.py")  # under megamoe/testing: what the soak's cases are made by
SHARE = 2  # steps that time nothing, on one GPU


class Step(NamedTuple):
    """gpus: as many, named to it by CUDA_VISIBLE_DEVICES; alone: no other step on them. expected_s: about so long, for
    the order. missing: why it cannot run. facts(output) -> fields of its row, with "ok" False if the output says so,
    and with "output" where a failure leaves more to keep than the last lines.
    files: what it leaves in the folder that is worth keeping. variables: of its environment."""

    name: str
    command: Sequence[str]
    gpus: int = 1
    alone: bool = False
    expected_s: float = 0
    missing: str | None = None
    facts: Callable[[str], dict] | None = None
    files: tuple[str, ...] = ()
    variables: dict[str, str] | None = None


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(folder: Path) -> list[dict]:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else []


def merged(rows: Iterable[dict], new: dict) -> list[dict]:
    """rows with `new` in place of its step's, unless that one ran and `new` did not, or is newer."""
    by_step = {row["step"]: row for row in rows}
    old = by_step.get(new["step"])
    if old is None or (new["ok"] is not None, new["date"]) >= (old["ok"] is not None, old["date"]):
        by_step[new["step"]] = new
    return sorted(by_step.values(), key=lambda row: row["step"])


def write_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")


def merge_folder(folder: Path, other: Path) -> None:
    """Rows of `other`, and the files of those that are taken over; ValueError if it has none, or lacks a file."""
    found = read_rows(other)
    if not found:
        raise ValueError(f"{other} has no summary.json with rows")
    for row in found:
        before = read_rows(folder)
        after = merged(before, row)
        if row in before or row not in after:
            continue
        files = row.get("files", [])
        if lacking := [name for name in files if not (other / name).exists()]:
            raise ValueError(f"{other} has a row of {row['step']!r} without its {', '.join(lacking)}")
        for old in (old for old in before if old["step"] == row["step"]):
            for name in old.get("files", []):
                (folder / name).unlink(missing_ok=True)
        for name in files:
            shutil.copy2(other / name, folder / name)
        write_rows(folder, after)


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine(commit: str | None, num_gpus: int) -> dict:
    """Fields of every row: from what, and where. '-dirty' at the end of a given commit is said apart."""
    if commit is None:
        commit = _said("git", "rev-parse", "--verify", "-q", "HEAD") or "unknown"
        commit += "-dirty" * bool(_said("git", "status", "--porcelain", "--", ".", ":!benchmarks/results"))
    gpus = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") if num_gpus else ""
    name, _, driver = (gpus.splitlines() or [""])[0].partition(", ")
    return {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty"), "device": name or "CPU",
            "num_gpus": num_gpus, "driver": driver or None, "torch": version("torch")}  # fmt: skip


# --- running ----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    site = subprocess.run([sys.executable, ROOT / "launch" / "link.py"], capture_output=True, text=True, check=True)
    paths = [str(ROOT), site.stdout.strip(), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def pick(waiting: Sequence[Step], free: dict[str, int]) -> tuple[Step, list[str], int] | None:
    """The first step that can start, its GPUs and how many shares of each; None if none can. While one of two GPUs
    waits, no other takes a GPU: it would wait for ever."""
    blocked = False
    for step in waiting:
        if step.missing or not step.gpus:
            return step, [], 0
        shares = SHARE if step.alone or step.gpus > 1 else 1
        places = sorted((gpu for gpu in free if free[gpu] >= shares), key=lambda gpu: -free[gpu])[: step.gpus]
        if not blocked and len(places) == step.gpus:
            return step, places, shares
        blocked |= step.gpus > 1
    return None


def spread(steps: Iterable[Step], gpus: Sequence[str], run: Callable[[Step, list[str]], None]) -> None:
    """Calls run(step, its GPUs) for every step, in threads: those of two GPUs first, then the longest first. Steps that
    are not `alone` share a GPU by SHARE."""
    waiting = sorted(steps, key=lambda step: (-step.gpus, not step.alone, -step.expected_s))
    free, changed, threads = dict.fromkeys(gpus, SHARE), threading.Condition(), []

    def body(step: Step, places: list[str], shares: int) -> None:
        try:
            run(step, places)
        finally:
            with changed:
                for gpu in places:
                    free[gpu] += shares
                changed.notify()

    while waiting:
        with changed:
            while (picked := pick(waiting, free)) is None:
                changed.wait()
            for gpu in picked[1]:
                free[gpu] -= picked[2]
        waiting.remove(picked[0])
        threads.append(threading.Thread(target=body, args=picked))
        threads[-1].start()
    for thread in threads:
        thread.join()


class Runner:
    """Runs steps and keeps their rows. limit_s: of each; then it and its children are ended."""

    def __init__(self, folder: Path, facts: dict, limit_s: float):
        self.folder, self.facts, self.limit_s = folder, facts, limit_s
        self.lock, self.failed, self.environment = threading.Lock(), False, environment()
        folder.mkdir(parents=True, exist_ok=True)

    def output_of(self, step: Step, gpus: list[str]) -> tuple[str, int | str]:
        variables = {**self.environment, "CUDA_VISIBLE_DEVICES": ",".join(gpus), **(step.variables or {})}
        # A file and not a pipe: what outlives its parent would keep a pipe open
        with tempfile.TemporaryFile("w+", errors="replace") as file:
            child = subprocess.Popen(step.command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=file,
                                     stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            status: int | str = f"ended after {self.limit_s:g} s"
            try:
                status = child.wait(self.limit_s)
            except subprocess.TimeoutExpired:
                for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun ends its ranks on the first
                    os.killpg(child.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(20)
                        break
            file.seek(0)
            return file.read(), status

    def run(self, step: Step, gpus: list[str]) -> None:
        program, *words = step.command
        shown = " ".join([Path(program).name, *words]).replace(sys.executable, "python")
        shown = shown.replace(str(self.folder), "FOLDER").replace(str(ROOT) + os.sep, "")
        row, output = {"step": step.name, "command": shown, **(step.variables or {})}, ""
        if step.missing:
            row |= {"ok": None, "reason": step.missing}
        else:
            begin = time.monotonic()
            output, status = self.output_of(step, gpus)
            row |= {"ok": status == 0, "status": status, "seconds": round(time.monotonic() - begin, 1)}
            try:
                found = step.facts(output) if step.facts else {}
            except (OSError, ValueError) as error:
                found = {"ok": False, "unread": f"{type(error).__name__}: {error}"}
            kept = found.pop("output", "")
            row |= found | {"ok": row["ok"] and found.get("ok", True)}
            if not row["ok"]:
                row["output"] = f"{kept}\n\n{output[-1000:]}" if kept else output[-4000:]
        row["files"] = [name for name in step.files if not step.missing and (self.folder / name).exists()]
        row |= self.facts | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        mark = {True: "ok", False: "WRONG", None: "not run"}[row["ok"]]
        with self.lock:
            self.failed |= row["ok"] is False
            write_rows(self.folder, merged(read_rows(self.folder), row))
            print(f"{mark:<8} {step.name:<28} {row.get('seconds', 0):7.1f} s  {row.get('reason', '')}", flush=True)
            if row["ok"] is False:
                print(row["output"][-4000:], flush=True)


# --- steps ------------------------------------------------------------------------------------------------------------


def ranks_of_two(*command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]


def soak_state(folder: Path, name: str, device: str) -> str:
    """Name of the state file, brought from the kept folder if this one has none: another for other device sources, and
    for other cases."""
    sources = hashlib.sha256()
    for path in [*sorted((ROOT / "csrc").rglob("*.cu*")), *(ROOT / "megamoe" / "testing" / file for file in CASES)]:
        sources.update(path.read_bytes())
    found = re.search(r"\b[A-Z]\d+", device)
    stem = f"soak-{name}-{found[0].lower() if found else 'gpu'}-{sources.hexdigest()[:8]}"
    for kept in KEPT.glob(f"{stem}*.json"):
        if not (folder / kept.name).exists():
            shutil.copy2(kept, folder / kept.name)
    return f"{stem}.json"


def steps(folder: Path, seconds: float, seed: str, gpus: int, device: str) -> list[Step]:
    no_gpu = None if gpus else "no GPU"
    no_pair = None if gpus > 1 else f"needs 2 GPUs, found {gpus}"
    minutes, python = str(seconds / 60), sys.executable

    def faults(name: str, file: str, side: str, only: str | None = None, **more) -> Step:
        def counted(_: str) -> dict:
            rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
            return {"faults": {word: sum(row["ok"] is ok for row in rows)
                               for word, ok in (("ok", True), ("wrong", False), ("not run", None))}}  # fmt: skip

        command = [python, "-m", "megamoe.testing.faults", "--side", side, "--json", str(folder / file)]
        return Step(name, command + (["--only", only] if only else []), facts=counted, files=(file,), **more)

    def kept(file: str) -> Callable[[str], dict]:
        return lambda output: {"counted": json.loads((folder / file).read_text())}

    def fuzz(name: str, file: str, share: float, **more) -> Step:
        command = [python, "-m", "megamoe.testing.fuzz", "--device", "cuda", "--seed", seed, "--minutes"]
        return Step(name, [*command, str(share * seconds / 60), "--json", str(folder / file)], missing=no_gpu,
                    expected_s=share * seconds + 10, facts=kept(file), **more)  # fmt: skip

    def trace(tokens: int) -> Step:
        name = f"trace-{tokens}"

        def summary(output: str) -> dict:
            found = json.loads(output[output.index("{") : output.rindex("}") + 1]) | {"file": f"{name}.perfetto.json"}
            (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            return {key: found[key] for key in ("case", "total_us", "exposed_us")}

        out = ["--out", str(folder / f"{name}.perfetto.json"), "--png", str(folder / f"{name}.png"), "--json"]
        sizes = ["--virtual-ranks", "2", "--experts", "64", "--tokens", str(tokens)]
        return Step(name, [python, "-m", "megamoe", "trace", *sizes, *out], alone=True, expected_s=15, missing=no_gpu,
                    facts=summary, files=(f"{name}.json", f"{name}.png", f"{name}.picture.json"))  # fmt: skip

    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    no_tool = no_gpu or (None if sanitizer else "compute-sanitizer is not on PATH (CUDA toolkit's bin)")
    options = [word for option in sanitizers.SUPPRESSED for word in option.split()]

    def check(tool: str, more: list[str]) -> Step:
        # racecheck's findings are those of its facts, which know the explained ones
        races, status = tool == "racecheck", ["--error-exitcode", "1"]
        command = [sanitizer or "compute-sanitizer", "--tool", tool, *([] if races else status),
                   *options, *sanitizers.OPTIONS.get(tool, []), python, CASE]
        return Step(f"sanitizer {tool}", [*command, *more], expected_s=50, missing=no_tool,
                    facts=sanitizers.race_facts if races else sanitizers.facts)  # fmt: skip

    checks = [check(tool, more) for tool, more in sanitizers.CASE_ARGUMENTS.items()]
    soak = ["-m", "megamoe.testing.soak", "--device", "cuda", "--minutes", minutes, "--state"]
    alone, ranks = soak_state(folder, "virtual", device), soak_state(folder, "ranks", device)
    of_rank = [f"{Path(ranks).stem}.rank{rank}.json" for rank in range(2)]
    said = lambda output: {"said": re.findall(r"between ranks\n(.*?)\n\n", output, re.DOTALL)[:1]}  # noqa: E731
    return [
        faults("faults, host", "faults-host.jsonl", "host", gpus=0, expected_s=60),
        faults("faults, virtual ranks", "faults-virtual.jsonl", "device", "^(?!two GPUs)", alone=True, expected_s=40,
               missing=no_gpu),
        faults("faults, two GPUs", "faults-gpus.jsonl", "device", f"two GPUs: (?!{LEAVES})", gpus=2,
               expected_s=70, missing=no_pair),
        faults("faults, a rank leaves", "faults-leaving.jsonl", "device", f"two GPUs: {LEAVES}", gpus=2, expected_s=80,
               missing=no_pair),
        *checks,
        Step("debug build", [python, CASE], expected_s=25, missing=no_gpu, variables={"MEGAMOE_DEBUG": "1"}),
        fuzz("debug build, fuzz", "fuzz-debug.json", 1 / 3, variables={"MEGAMOE_DEBUG": "1"}),
        fuzz("fuzz", "fuzz.json", 1),
        Step("soak, virtual ranks", [python, *soak, str(folder / alone)], expected_s=seconds + 15, missing=no_gpu,
             facts=kept(alone), files=(alone,)),
        *map(trace, TRACES),
        Step("soak, two GPUs", ranks_of_two(*soak, str(folder / ranks)), gpus=2, expected_s=seconds + 20,
             missing=no_pair, facts=kept(of_rank[0]), files=tuple(of_rank)),
        Step("doctor between ranks", ranks_of_two("-m", "megamoe", "doctor", "--ranks"), gpus=2, expected_s=20,
             missing=no_pair, facts=said),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    doc = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=doc[0], epilog=doc[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of fuzzing and of soak; default %(default)s")
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="of a step; default %(default)s")
    parser.add_argument("--seed", default="1", help="of fuzzing; default %(default)s")
    parser.add_argument("--only", metavar="PATTERN", help="steps whose name has this regular expression")
    parser.add_argument("--commit", help="commit hash to record, '-dirty' at its end if it is (default: ask git)")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="OTHER", help="run nothing: take over other folders")
    given = parser.parse_args(argv)
    try:
        re.compile(given.only or "")
    except re.error as error:
        parser.error(f"--only {given.only!r} is no regular expression: {error}")
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if given.merge:
        for other in given.merge:
            merge_folder(folder, other.resolve())
        return 0
    import torch

    count = torch.cuda.device_count()
    gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or map(str, range(count))
    facts = machine(given.commit, count)
    runner = Runner(folder, facts, given.limit)
    there = steps(folder, given.seconds, given.seed, count, facts["device"])
    wanted = [step for step in there if given.only is None or re.search(given.only, step.name)]
    if not wanted:
        parser.error(f"--only {given.only!r} is in no step's name; they are {', '.join(step.name for step in there)}")
    spread(wanted, list(gpus)[:count], runner.run)
    return int(runner.failed)


if __name__ == "__main__":
    sys.exit(main())
