"""results/*.jsonl: one measurement a line (record.Row), appended by bench.py, read by report.py; results/scaling/ the
same of scaling.py (record.ScalingRow), results/replicas/ of replicas.py, results/in_model/ of in_model.py (with fields
of their own). Needs no torch, but to ask all ranks."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

RESULTS_DIR = Path(__file__).with_name("results")
SCALING_DIR = RESULTS_DIR / "scaling"
REPLICAS_DIR = RESULTS_DIR / "replicas"
IN_MODEL_DIR = RESULTS_DIR / "in_model"


def as_json(row) -> dict:
    """A record.Row as plain values. NaN is not JSON, so it becomes null; floats keep six digits."""
    return {key: _plain(value) for key, value in asdict(row).items()}


def _plain(value):
    if isinstance(value, float):
        return None if value != value else float(f"{value:.6g}")
    return value


def append_result(row, directory: Path = RESULTS_DIR) -> Path:
    """Append the row to the one file of its kind of machine and month: results/<device>-x<gpus>-<year-month>.jsonl."""
    return append_json(as_json(row), directory)


def append_json(row: dict, directory: Path) -> Path:
    """append_result for plain values with at least device, num_gpus and date."""
    directory.mkdir(parents=True, exist_ok=True)
    slug = "-".join("".join(char if char.isalnum() else " " for char in row["device"].lower()).split())
    path = directory / f"{slug}-x{max(row['num_gpus'], 1)}-{row['date'][:7]}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return path


def check_folder(option: str, folder: Path, make: bool = False) -> None:
    """ValueError, before anything is measured, where nothing can be written to `folder`. make: it need not be there
    yet."""
    there = next(one for one in (folder, *folder.resolve().parents) if one.exists()) if make else folder
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 14))
    except OSError as error:
        raise ValueError(f"{option}: cannot write to the folder {folder}: {error.strerror}") from error


def check_folders(is_first: bool, json_file: Path | None = None, results: Path | None = None) -> None:
    """ValueError on every rank, before anything is measured, where the first, which writes, cannot. Collective."""
    import torch.distributed as dist

    from megamoe_cuda.gather import gather

    problem = None
    try:
        if json_file and is_first:
            check_folder(f"--json {json_file}", json_file.resolve().parent)
        if results and is_first:
            check_folder("--results", results, make=True)
    except ValueError as error:
        problem = str(error)
    if dist.is_initialized():
        problem = gather(dist.group.WORLD, "folders", problem)[0]
    if problem is not None:
        raise ValueError(problem)


def read_results(directory: Path = RESULTS_DIR) -> list[dict]:
    """Every object of results/*.jsonl. ValueError names the file and line that does not parse."""
    rows = []
    for path in sorted(directory.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path.name} line {number} is not a JSON object: {error}") from error
    return rows
