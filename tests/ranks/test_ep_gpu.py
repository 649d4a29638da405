"""Two, four and eight ranks, a GPU each, over NVSHMEM. One set of processes runs all jobs of gpu_jobs.py: NVSHMEM
starts once."""

import json
import os
from pathlib import Path

import pytest

from megamoe.testing.spawn import RankResult, spawn_ranks

SCRIPT = Path(__file__).with_name("gpu_jobs.py")
ROOT = SCRIPT.parents[2]
JOBS = ("workspace", "random_cases", "back_to_back", "uneven_pace", "graph_replay", "layers_take_turns",
        "live_rebalance", "different_configurations", "weights_split_in_pairs", "weights_decoded_ahead",
        "absent_rank", "refused_rank")  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.gpus(n), id=f"ep{n}") for n in (2, 4, 8)])
def ranks(request) -> list[tuple[RankResult, dict[str, dict]]]:
    """Of each rank: how it ended, and its jobs' reports by name."""
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    results = spawn_ranks([SCRIPT], request.param, timeout_s=400, env=env)
    reports = []
    for result in results:
        lines = [line for line in result.output.splitlines() if line.startswith('{"job"')]
        reports.append((result, {line["job"]: line for line in map(json.loads, lines)}))
    return reports


@pytest.mark.parametrize("job", JOBS)
def test_job_on_all_ranks(job, ranks):
    ranks = sorted(ranks, key=lambda rank: rank[0].returncode is None)  # those that failed, before those ended for it
    for result, jobs in ranks:
        assert job in jobs, f"rank {result.ep_rank} did not get to it:\n{result.output[-6000:]}"
        print(f"rank {result.ep_rank}: {jobs[job]['seconds']:.1f} s, {jobs[job]['text']}")
        assert jobs[job]["ok"], f"rank {result.ep_rank}:\n{jobs[job]['text']}"


def test_the_memory_was_nvshmems(ranks):
    assert all(jobs["workspace"]["text"] == "NvshmemMemory" for _, jobs in ranks)


def test_all_ranks_left_in_order(ranks):
    for result, _ in sorted(ranks, key=lambda rank: rank[0].returncode is None):
        assert result.returncode == 0, f"rank {result.ep_rank}:\n{result.output[-6000:]}"
