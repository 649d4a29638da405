"""Ranks started by mpirun, which meet through mpi4py."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).with_name("rank_jobs.py")


def mpirun() -> str:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("not run: mpi4py is not installed")
    beside = Path(sys.executable).with_name("mpirun")  # that of the environment belongs to its mpi4py
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("not run: no mpirun")
    return found


def test_two_mpi_ranks_equal_the_one_process_oracle_bit_for_bit():
    # Open MPI asks for both to run as root, as containers do, and for more ranks than cores
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [mpirun(), "-n", "2", "--oversubscribe", sys.executable, str(JOBS), "equal"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert sorted(result["rank"] for result in results) == [0, 1], done.stdout
    for result in results:
        assert result["launcher"] == "openmpi"
        assert result["calls"] == result["equal"] == 10
