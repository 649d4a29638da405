"""scaling.py as mpirun starts it, with 1, 2 and 4 ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks.test_mpi import mpirun

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_mpirun_measures_every_size_of_one_start(num_ranks, tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [mpirun(), "-n", str(num_ranks), "--oversubscribe", sys.executable, str(SCRIPT), "--device", "cpu"]
    options = ["--mode", "strong" if num_ranks == 2 else "weak", "--tokens", "4", "--results", str(tmp_path)]
    if num_ranks == 4:
        options += ["--ranks-per-domain", "2", "--max-domains", "1"]  # ranks 1 and 2 are one domain, 4 are two
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sizes = [size for size in (1, 2, 4) if size <= num_ranks]
    assert [row["ep_size"] for row in rows] == sizes
    assert all(row["ok"] and row["us"] > 0 for row in rows)
    assert [sum(row["tokens_per_rank"]) for row in rows] == [4 if num_ranks == 2 else 4 * size for size in sizes]
    assert [row["ranks_per_domain"] for row in rows] == [min(size, 2 if num_ranks == 4 else size) for size in sizes]
    assert f"rank {num_ranks - 1}: domain 0" in done.stdout and "verdict: PASS" in done.stdout
