"""Real ranks over gloo, started without a launcher."""

import json
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamoe import MegaMoEError
from megamoe.exchange import DistExchange
from megamoe.testing.spawn import spawn_ranks

JOBS = Path(__file__).with_name("rank_jobs.py")


@pytest.fixture(autouse=True)
def _no_launcher_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "SLURM_"))]:
        monkeypatch.delenv(name)


def run(job: str, num_ranks: int) -> list[dict]:
    results = spawn_ranks([JOBS, job], num_ranks, timeout_s=120)
    for result in results:
        assert result.returncode == 0, f"rank {result.ep_rank} of {job}:\n{result.output}"
    return [json.loads(result.output.strip().splitlines()[-1]) for result in results]


def test_two_ranks_equal_the_one_process_oracle_bit_for_bit():
    for result in run("equal", 2):
        assert result["launcher"] == "torchrun"
        assert result["calls"] == result["equal"] == 10


def test_plans_and_their_steps_keep_the_bits_over_the_wire():
    results = run("plans", 2)
    assert all(result["calls"] == result["equal"] >= 6 for result in results)
    assert sum(result["served"] for result in results) > 0


def test_configurations_that_differ_are_refused_on_every_rank():
    for result in run("config_differs", 2):
        topk, level = result["errors"]
        assert topk.startswith("moe_configs[0].topk differs between ranks: 2 on rank 0, 3 on rank 1")
        assert level.startswith("MEGAMOE_DEBUG differs between ranks: '0' on rank 0, '2' on rank 1")


def test_a_rank_that_cannot_start_is_named_on_every_rank():
    for result in run("one_cannot", 2):
        assert result["error"].startswith("rank 1: device=cuda:99")


def test_the_rank_that_compiles_is_waited_for_and_its_failure_is_told():
    for result in run("lead_cannot_compile", 2):
        assert result["error"] == "rank 0 could not compile the kernel: OSError: no space left"


def test_a_refused_rank_is_named_by_the_others_at_their_deadline():
    first, second, last = run("refused", 3)
    assert last["kind"] == "ValueError"
    assert "topk_idx[0, 0]=6 must be an expert id from 0 to 5" in last["error"]
    assert last["check"] is None  # it was refused before the call began
    for result in (first, second):
        assert result["kind"] == "MegaMoEError"
        assert "rank 2 did not come within 1.5 s" in result["error"]
        assert result["record"][2:] == ["exchange", "dispatch", 2, 2, 3]
        assert 1.4 < result["seconds"] < 3.5
        assert "call workspace.reset()" in result["check"]
    assert all(result["after_reset"] for result in (first, second, last))


def test_no_rank_is_through_a_reset_before_all_have_connected():
    """Who is through may close, and that would break connections which its peers still make."""
    for rank, result in enumerate(run("reset_together", 3)):
        assert result["seconds"] > 0.9
        begin = f"rank {rank} role host step connections: ranks could not connect within"
        assert result["error"].startswith(begin), result["error"]
        assert "rank 2: no file descriptor left (index 2, have 2, want 3)" in result["error"]


def test_ranks_left_alone_end_by_themselves_and_with_a_status():
    """What a program that catches nothing does when a rank dies: no wait at exit, no status 0."""
    begin = time.monotonic()
    results = spawn_ranks([JOBS, "left_alone"], 3, timeout_s=60)
    assert [result.returncode for result in results] == [1, 1, 9], "\n".join(result.output for result in results)
    assert time.monotonic() - begin < 60
    for result in results[:2]:
        last = result.output.strip().splitlines()[-1]
        assert re.search(r"MegaMoEError: rank \d role exchange step dispatch: rank 2|first to give up .* rank 2", last)


class Dropping:
    """A connection and its work, to a peer that stays away: as gloo's, a wait drops fractions of a millisecond."""

    def recv(self, tensors, peer, tag):
        return self

    def wait(self, timeout):
        end = time.monotonic() + timeout // timedelta(milliseconds=1) / 1000
        while time.monotonic() < end:
            pass
        raise RuntimeError("[unbound_buffer.cc] Timed out waiting for recv operation to complete. Advice")


def test_a_late_rank_is_not_said_to_have_left():
    exchange = object.__new__(DistExchange)
    exchange.ep_rank, exchange.ep_size, exchange.wait_s, exchange.step_deadline_s = 0, 2, 0.0, 1.0
    exchange._connections, exchange._store, exchange._number, exchange._resets = Dropping(), dist.HashStore(), 1, 0
    for deadline_s in (0.0099, 0.01, 0.01099):
        with pytest.raises(MegaMoEError, match=f"rank 1 did not come within {deadline_s} s: Timed out waiting"):
            exchange._point_to_point({}, {1: torch.zeros(1)}, deadline_s, "dispatch", "did not come")


def test_a_workspace_listens_nowhere_until_a_reset_connects_anew():
    for result in run("ports", 2):
        group, called, reset, closed = result["listening"]
        assert group == called == closed and reset == group + 1
