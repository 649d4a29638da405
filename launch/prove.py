#!/usr/bin/env python3
"""What only GPUs can show, in one go: python launch/prove.py FOLDER [--seconds 60] [--only WORD]

With one GPU: the device's fault table, compute-sanitizer over every tile size, the debug build, fuzzing, a soak, and
traces with pictures. With two or more, also the faults, the soak and the doctor between two ranks. Each step leaves its
report in FOLDER, and a line in FOLDER/summary.json; a step that lacks its means is "not run" with the reason. Exit
status 1 if a step failed. A soak adds to the state file of earlier runs in the same folder.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEP_LIMIT_S = 900
CASE = str(ROOT / "tests" / "gpu" / "memcheck_case.py")
# Of compute-sanitizer: tool -> arguments of the case. Races and initialisation are looked for inside one rank: across
# ranks, memory is shared by design and ordered by system-scope accesses, which racecheck does not follow.
SANITIZER = {"memcheck": ["--ranks", "2"], "synccheck": ["--ranks", "2"], "racecheck": ["--ranks", "1"],
             "initcheck": ["--ranks", "1"]}  # fmt: skip
# Every option that keeps a finding from being reported, and why.
SUPPRESSED = {
    "--report-api-errors no": "cuda-bindings asks the driver for the address of every function it knows; one that this "
    "driver lacks would be reported as an error of the program",
}
TRACES = {8: [], 512: [], 8192: []}


def environment(**more: str) -> dict[str, str]:
    site = subprocess.run([sys.executable, ROOT / "launch" / "link.py"], capture_output=True, text=True, check=True)
    paths = [str(ROOT), site.stdout.strip(), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


class Steps:
    def __init__(self, folder: Path, only: str | None):
        self.folder, self.only, self.rows = folder, only, []
        folder.mkdir(parents=True, exist_ok=True)

    def wanted(self, name: str) -> bool:
        return self.only is None or re.search(self.only, name) is not None

    def run(self, name: str, command: list[str], *, missing: str | None = None, check=None, **variables: str) -> None:
        """check: (output) -> facts for the summary, with "ok" False if the output says so."""
        if not self.wanted(name):
            return
        row = {"step": name, "command": " ".join(command).replace(str(ROOT) + os.sep, ""), **variables}
        if missing:
            row |= {"ok": None, "reason": missing}
        else:
            begin = time.monotonic()
            try:
                done = subprocess.run(command, cwd=ROOT, env=environment(**variables), stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True, timeout=STEP_LIMIT_S)  # fmt: skip
                output, status = done.stdout, done.returncode
            except subprocess.TimeoutExpired as error:
                output, status = (error.stdout or b"").decode(errors="replace"), f"ended after {STEP_LIMIT_S} s"
            row |= {"ok": status == 0, "status": status, "seconds": round(time.monotonic() - begin, 1)}
            facts = check(output) if check else {}
            row |= facts | {"ok": row["ok"] and facts.get("ok", True)}
            if not row["ok"]:
                row["output"] = output[-4000:]
        self.rows.append(row)
        mark = {True: "ok", False: "WRONG", None: "not run"}[row["ok"]]
        print(f"{mark:<8} {name:<28} {row.get('seconds', 0):7.1f} s  {row.get('reason', '')}", flush=True)
        if row["ok"] is False:
            print(row["output"][-1500:], flush=True)
        (self.folder / "summary.json").write_text(json.dumps(self.rows, indent=1) + "\n")


def sanitizer_facts(output: str) -> dict:
    """Errors and warnings as the tool counts them: 0 expected."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazards? displayed)", output)
    errors = [int(a or b) for a, b in found]
    return {"findings": sum(errors) if errors else None, "ok": bool(errors) and not any(errors)}


def ranks_of_two(*command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of fuzzing and of soak; default %(default)s")
    parser.add_argument("--seed", default="1", help="of fuzzing; default %(default)s")
    parser.add_argument("--only", metavar="PATTERN", help="steps whose name has this regular expression")
    given = parser.parse_args()
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    no_gpu = None if gpus else "no GPU"
    no_pair = None if gpus > 1 else f"needs 2 GPUs, found {gpus}"
    folder, minutes, python = given.folder.resolve(), str(given.seconds / 60), sys.executable
    steps = Steps(folder, given.only)
    where = "2gpu" if gpus > 1 else "1gpu"

    def cuda(name: str, *arguments: str, **more) -> None:
        steps.run(name, [python, *arguments], missing=no_gpu, **more)

    cuda("faults", "-m", "megamoe.testing.faults", "--side", "device", "--json", str(folder / f"faults-{where}.jsonl"))
    sanitizer = shutil.which("compute-sanitizer")
    suppressions = [word for option in SUPPRESSED for word in option.split()]
    for tool, arguments in SANITIZER.items():
        options = ["--tool", tool, *suppressions, "--error-exitcode", "1"]
        command = [sanitizer or "compute-sanitizer", *options, python, CASE]
        missing = no_gpu or (None if sanitizer else "compute-sanitizer is not on PATH (CUDA toolkit's bin)")
        steps.run(f"sanitizer {tool}", [*command, *arguments], missing=missing, check=sanitizer_facts)
    cuda("debug build", CASE, MEGAMOE_DEBUG="1")
    fuzz = ["-m", "megamoe.testing.fuzz", "--device", "cuda", "--seed", given.seed, "--minutes"]
    cuda("debug build, fuzz", *fuzz, str(given.seconds / 180), "--json", str(folder / "fuzz-debug.json"),
         MEGAMOE_DEBUG="1")  # fmt: skip
    cuda("fuzz", *fuzz, minutes, "--json", str(folder / "fuzz.json"))
    soak = ["-m", "megamoe.testing.soak", "--device", "cuda", "--minutes", minutes, "--state"]
    cuda("soak, virtual ranks", *soak, str(folder / "soak-virtual.json"), CUDA_VISIBLE_DEVICES="0")
    for tokens in TRACES:
        name = f"trace-{tokens}"
        out = ["--out", str(folder / f"{name}.perfetto.json"), "--png", str(folder / f"{name}.png"), "--json"]
        sizes = ["--virtual-ranks", "2", "--experts", "64", "--tokens", str(tokens)]

        def keep(output: str, name=name) -> dict:
            (folder / f"{name}.json").write_text(output[output.index("{") : output.rindex("}") + 1] + "\n")
            return {"picture": (folder / f"{name}.png").exists()}

        cuda(name, "-m", "megamoe", "trace", *sizes, *out, check=keep)
    steps.run("soak, two GPUs", ranks_of_two(*soak, str(folder / "soak-ranks.json")), missing=no_pair)
    said = lambda output: {"said": re.findall(r"between ranks\n(.*?)\n\n", output, re.DOTALL)[:1]}  # noqa: E731
    steps.run("doctor between ranks", ranks_of_two("-m", "megamoe", "doctor", "--ranks"), missing=no_pair, check=said)
    return int(any(row["ok"] is False for row in steps.rows))


if __name__ == "__main__":
    sys.exit(main())
