"""Launcher variables, and the hosts of a SLURM list."""

import pytest
import torch.distributed as dist

from megamoe.ranks import RankInfo, first_host, init_process_group, rank_from_env

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "2"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, RankInfo(0, 1, 0, "none")),
        (TORCHRUN, RankInfo(3, 8, 1, "torchrun")),
        (OPENMPI, RankInfo(2, 4, 0, "openmpi")),
        (HYDRA, RankInfo(1, 2, 1, "pmi")),
        (SLURM, RankInfo(5, 6, 2, "slurm")),
        (SLURM | OPENMPI | TORCHRUN, RankInfo(3, 8, 1, "torchrun")),
        (SLURM | OPENMPI, RankInfo(2, 4, 0, "openmpi")),
        # The script of a batch job is no rank, though SLURM sets these two for it
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, RankInfo(0, 1, 0, "none")),
    ],
)
def test_rank_from_env(env, expected):
    assert rank_from_env(env) == expected


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set though other torchrun variables are"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is not an integer"),
        (TORCHRUN | {"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set but none of LOCAL_RANK"),
    ],
)
def test_bad_variables_are_named(env, text):
    with pytest.raises(ValueError) as raised:
        rank_from_env(env)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-07,12],other", "node03"),
        ("rack[2,4]-gpu[10-12]", "rack2-gpu10"),
        ("login,node[1-2]", "login"),
    ],
)
def test_first_host(hosts, first):
    assert first_host(hosts) == first


def test_one_rank_without_launcher(monkeypatch):
    for name in [*TORCHRUN, *OPENMPI, *HYDRA, *SLURM]:
        monkeypatch.delenv(name, raising=False)
    assert init_process_group("gloo") == RankInfo(0, 1, 0, "none")
    try:
        assert dist.get_world_size() == 1
        assert init_process_group("gloo").ep_size == 1  # again: nothing to do
    finally:
        dist.destroy_process_group()
