"""Four gloo ranks as two domains of two and four of one: the layer against the specification, and what goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from megamoe.testing.spawn import spawn_ranks

JOBS = Path(__file__).with_name("domain_jobs.py")
ROOT = JOBS.parents[2]


@pytest.fixture(autouse=True)
def _no_launcher_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "SLURM_"))]:
        monkeypatch.delenv(name)


def parse(output: str) -> dict[str, dict]:
    return {line["job"]: line for line in map(json.loads, (x for x in output.splitlines() if x.startswith('{"job"')))}


@pytest.fixture(scope="module")
def jobs() -> list[dict[str, dict]]:
    """The reports of each rank by job: one start for all, since starting is most of the time."""
    names = ("equal", "with_redundancy", "refused", "bounds_differ", "other_layers", "vanished")
    results = spawn_ranks([JOBS, *names], 4, timeout_s=240, env={"PYTHONPATH": path_with_root()})
    for result in results:
        assert result.returncode == 0, f"rank {result.ep_rank}:\n{result.output[-4000:]}"
    return [parse(result.output) for result in results]


def path_with_root() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def test_every_routing_is_the_specification_bit_for_bit(jobs):
    for rank in jobs:
        assert rank["equal"]["wrong"] == [] and rank["equal"]["calls"] == 28


def test_a_node_limited_token_crosses_at_most_max_nodes_times(jobs):
    for rank in jobs:
        told = rank["with_redundancy"]
        assert told["same"]
        assert told["most_nodes"] == told["most_copies"] == 1  # max_nodes of the plan and of the routing
        assert told["sent"] == told["counted"] > 0


def test_configurations_that_cannot_be_are_told_to_every_rank(jobs):
    for rank in jobs:
        texts = rank["refused"]
        assert "ranks_per_domain=3 leaves 1 of ep_size=4 ranks in no whole domain" in texts["unequal"]
        assert "nearest 2, 4" in texts["unequal"]
        assert texts["differs"].startswith("ep_config.ranks_per_domain differs between ranks: 1 on rank 0, 2 on rank 2")
        assert texts["rounds differ"].startswith("ep_config.domain_tokens differs between ranks: 4 on rank 0, 5 on")
        assert texts["capacity"].startswith("ep_config.num_max_tokens_per_rank differs between ranks: 16 on rank 0, 17")


def test_bounds_that_differ_are_told_on_both_sides(jobs):
    for number, rank in enumerate(jobs):
        other, due = 1 - number // 2, 4 + number // 2
        said = f"domain {other} sent {4 + other} rows where {due} were due; give every rank the same num_tokens_bound"
        assert said in rank["bounds_differ"]["told"] and rank["bounds_differ"]["mended"]


def test_domains_that_call_different_layers_are_told(jobs):
    for number, rank in enumerate(jobs):
        here = number // 2
        for limit in ("None", "4"):
            found = rank["other_layers"][limit]
            assert f"domain {1 - here} sent what does not fit" in found["told"], found
            assert f"call 1, layer {1 - here}, " in found["told"] and f"layer {here}, " in found["told"]
            assert found["spoiled"] and found["mended"]


def test_a_domain_that_stays_away_is_named_in_time_and_reset_mends(jobs):
    for number, rank in enumerate(jobs):
        for limit in ("None", "4"):
            told = rank["vanished"][limit]
            assert told["mended"]
            if number < 2:
                told = told["told"]
                assert f"domain 1 did not come within 2.0 s: no word from its rank of index {number}" in told["error"]
                assert told["record"] == [number, -1, "exchange", "dispatch", number + 2, 1, 2]
                assert 1.9 < told["seconds"] < 8.0 and "call workspace.reset()" in told["check"]
                assert told["spoiled"]


HOSTS = """
set -e
ip link set lo up
unshare --net sleep 300 & a=$!
unshare --net sleep 300 & b=$!
for host in $a $b; do  # until both have left this namespace
    while [ "$(readlink /proc/$host/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
done
ip link add ea type veth peer name eb
ip link set ea netns $a
ip link set eb netns $b
nsenter --net --target $a ip address add 10.99.0.1/24 dev ea
nsenter --net --target $b ip address add 10.99.0.2/24 dev eb
nsenter --net --target $a ip link set ea up
nsenter --net --target $b ip link set eb up
nsenter --net --target $a ip link set lo up
nsenter --net --target $b ip link set lo up
echo $a $b
wait
"""


@pytest.fixture
def hosts():
    """Process ids in two network namespaces that a virtual cable joins: 10.99.0.1 on ea, 10.99.0.2 on eb."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"not run: no {tool}")
    command = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--net", "bash", "-c", HOSTS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    try:
        line = process.stdout.readline()
        if not line:
            pytest.skip(f"not run: no network namespaces here: {process.stderr.read().strip()[-200:]}")
        yield process.pid, [int(pid) for pid in line.split()]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_two_hosts_are_two_domains(hosts, tmp_path):
    """The same jobs with each domain in a network namespace of its own: no loopback, no shared address."""
    _, namespaces = hosts
    shared = {**os.environ, "PYTHONPATH": path_with_root(), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "10.99.0.1",
              "MASTER_PORT": "29511", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
    with ExitStack() as stack:
        running = []
        for rank in range(4):
            host, local = divmod(rank, 2)
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(local), "GLOO_SOCKET_IFNAME": ("ea", "eb")[host]}
            enter = ["nsenter", *user, "--net", "--target", str(namespaces[host])]
            log = stack.enter_context((tmp_path / f"rank{rank}").open("w+"))
            command = [*enter, sys.executable, str(JOBS), "equal_by_host"]
            running.append((subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env), log))
        deadline = time.monotonic() + 180
        try:
            for process, _ in running:
                process.wait(max(deadline - time.monotonic(), 1))
        finally:
            for process, _ in running:
                process.kill()
                process.wait()
        for rank, (process, log) in enumerate(running):
            log.seek(0)
            output = log.read()
            assert process.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
            told = parse(output)["equal_by_host"]
            assert told["wrong"] == [] and told["calls"] == 14
