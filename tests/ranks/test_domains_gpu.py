"""Two GPUs as two domains of one rank, NCCL between them: one pair of processes runs all jobs of domain_gpu_jobs.py."""

import json
import os
from pathlib import Path

import pytest

from megamoe.testing.spawn import spawn_ranks

SCRIPT = Path(__file__).with_name("domain_gpu_jobs.py")
ROOT = SCRIPT.parents[2]

pytestmark = pytest.mark.gpus(2)


@pytest.fixture(scope="module")
def ranks():
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "NCCL_NVLS_ENABLE": "0"}
    results = spawn_ranks([SCRIPT], 2, timeout_s=400, env=env)
    reports = [[line for line in result.output.splitlines() if line.startswith('{"job"')] for result in results]
    return [(result, {line["job"]: line for line in map(json.loads, lines)})
            for result, lines in zip(results, reports, strict=True)]  # fmt: skip


@pytest.mark.parametrize("job", ["fixed", "rounds", "overlapped", "graph_replay"])
def test_job_on_both_ranks(job, ranks):
    for result, jobs in ranks:
        assert job in jobs, f"rank {result.ep_rank} did not get to it:\n{result.output[-6000:]}"
        print(f"rank {result.ep_rank}: {jobs[job]['seconds']:.1f} s, {jobs[job]['text']}")
        assert jobs[job]["ok"], f"rank {result.ep_rank}:\n{jobs[job]['text']}"
