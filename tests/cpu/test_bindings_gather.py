"""How hosts meet (bindings/gather.py), ranks as threads on one store: who is named, who is waited for, what is told."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megamoe_cuda import gather as module
from megamoe_cuda.gather import AbsentRankError, agree, gather, told


class Group:
    def __init__(self, rank: int, store):
        self.rank, self.store = rank, store


@pytest.fixture
def groups(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda group: group.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(module.distributed_c10d, "_get_process_group_store", lambda group: group.store)
    store = dist.HashStore()
    return [Group(rank, store) for rank in range(3)]


def together(groups, work):
    """work(group) of each at once: what it returns or raises."""
    def safely(group):
        try:
            return work(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(safely, groups))


def test_every_rank_gets_every_value_by_rank_and_rounds_do_not_mix(groups):
    for number in range(3):
        met = together(groups, lambda g, number=number: gather(g, "here", [g.rank, number], 20))
        assert met == [[[0, number], [1, number], [2, number]]] * 3
    assert together(groups, lambda g: gather(g, "one", g.rank, 20, reader=1)) == [[], [0, 1, 2], []]
    keys = [f"megamoe/here/{number}/{rank}" for number in range(3) for rank in range(3)]
    assert [groups[0].store.check([key]) for key in keys] == [False] * 6 + [True] * 3  # old rounds take no room


def test_one_ranks_problem_is_raised_on_all_with_the_remedy(groups):
    def meet(group, problems):
        agree(group, problems[group.rank], "cannot start", "install it", OSError, deadline_s=20)

    assert together(groups, lambda g: meet(g, [None] * 3)) == [None] * 3
    for error in together(groups, lambda g: meet(g, [None, "no library", ""])):
        assert type(error) is OSError
        assert str(error) == "cannot start: rank 1: no library; rank 2: \n  remedy: install it"


def test_absent_ranks_are_named_on_all_that_came_and_join_the_next_round(groups):
    first, second = together(groups[:2], lambda g: gather(g, "here", None, 0.6))
    assert str(first) == str(second) and "at here for rank 2, which was not seen yet" in str(first)
    for rank, error in enumerate((first, second)):
        assert isinstance(error, AbsentRankError)
        assert (error.rank, error.absent, error.step, error.num_ranks) == (rank, (2,), "here", 3)
    assert together(groups, lambda g: gather(g, "here", g.rank, 20)) == [[0, 1, 2]] * 3
    with pytest.raises(AbsentRankError):
        gather(groups[2], "elsewhere", None, 0.01)
    with pytest.raises(AbsentRankError, match="rank 1, which was last seen at here, its number 2 and "
                                              "rank 2, which was last seen at elsewhere, its number 1"):  # fmt: skip
        gather(groups[0], "here", None, 0.1)


def test_a_collective_that_lasts_is_told_with_where_each_peer_is(groups, capsys):
    with pytest.raises(AbsentRankError):
        gather(groups[2], "elsewhere", None, 0.01)
    with told(groups[1], "nvshmem_init", 60):
        pass
    assert not capsys.readouterr().err
    said, end = "", time.monotonic() + 20
    with told(groups[1], "nvshmem_init", 0.05):
        while "remedy" not in said and time.monotonic() < end:
            time.sleep(0.02)
            said += capsys.readouterr().err
    assert "megamoe: rank 1 is in nvshmem_init for " in said and "rank 1 was" not in said
    assert "waits for all ranks: rank 0 was not seen yet, rank 2 was last seen at elsewhere, its number 1\n" in said
