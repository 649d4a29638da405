"""Which copy serves which row: the numpy arithmetic, the kernel's own built for the host, and the torch spec agree."""

import ctypes

import numpy as np
import pytest
import torch

from megamoe.exchange import LocalExchange
from megamoe.plan import plan_experts, popularity, sample_topk
from megamoe.plan.choice import CHOICES, choose_rows, copy_begins, replica_map, words
from megamoe.plan.oracle import lp_rank_load
from megamoe.plan.report import make_load
from megamoe.route.replica import choose_replicas
from tests.cpu import schedule_library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    built = schedule_library.build(tmp_path_factory.mktemp("replica"))
    if built is None:
        pytest.skip("not run: no host compiler (g++)")
    return built


def u32(values):
    return np.ascontiguousarray(values, np.uint32).ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))


def random_map(rng, choice):
    ranks, slots = int(rng.integers(1, 33)), int(rng.integers(1, 9))
    experts = int(rng.integers(max(1, slots), ranks * slots + 1))
    load = rng.lognormal(0, 1.5, (1, experts))
    plan = plan_experts(load, num_ranks=ranks, num_redundant_experts=ranks * slots - experts)
    # Empty slots, as spare ones are: a rank's slots then need not all hold an expert.
    placed = np.full((ranks, slots + 1), -1)
    placed[:, :slots] = plan.placed[0]
    placed = rng.permuted(placed, axis=1).ravel()
    return replica_map(placed, experts, ranks, choice, load=load[0]), load[0], placed


@pytest.mark.parametrize("choice", CHOICES)
def test_kernel_arithmetic_is_the_numpy_arithmetic(library, choice):
    rng = np.random.default_rng(CHOICES.index(choice))
    for _ in range(60):
        replicas, load, placed = random_map(rng, choice)
        experts, table = replicas.num_logical_experts, words(replicas)
        held = [library.expert_in(u32(table), slot, replicas.num_ranks) for slot in range(len(placed))]
        assert held == placed.tolist()
        count = rng.poisson(load / load.mean() * rng.choice([0.3, 3, 100, 4000]))
        for source in range(replicas.num_ranks):
            expert = int(rng.integers(experts))
            assert library.slot_by_source(u32(table), source, expert) == replicas.by_source[source, expert]
        if choice == "static":
            continue
        got = np.zeros(len(replicas.copy), np.uint32)
        library.copy_begins(u32(table), u32(count), replicas.slots_per_rank, u32(got))
        want = copy_begins(replicas, count)
        assert (got == want).all()
        expert = int(count.argmax())
        topk_idx = np.full((int(count[expert]), 1), expert)
        slots = choose_rows(replicas, [topk_idx])[0].ravel() if count.sum() == count[expert] else None
        for n in range(0, int(count[expert]), max(1, int(count[expert]) // 50)):
            slot = library.slot_of_row(u32(table), u32(got), expert, n)
            own = slice(replicas.first[expert], replicas.first[expert + 1])
            inside = np.flatnonzero(want[own] <= n).max()
            assert slot == replicas.copy[own][inside]
            assert slots is None or slots[n] == slot


@pytest.mark.parametrize("choice", CHOICES)
def test_every_row_goes_to_a_copy_of_its_expert_and_torch_agrees(choice):
    rng = np.random.default_rng(4)
    placed = plan_experts(popularity("zipf", 1, 24, 1), num_ranks=4, num_redundant_experts=8).physical_to_logical[0]
    replicas = replica_map(placed, 24, 4, choice)
    topk_idx = [sample_topk(popularity("zipf", 1, 24, 1), n, 4, 2 + n)[0] for n in (50, 0, 33, 7)]
    topk_idx = [np.where(rng.random(one.shape) < 0.1, -1, one) for one in topk_idx]
    chosen = choose_rows(replicas, topk_idx)
    for one, slots in zip(topk_idx, chosen):
        assert (slots[one < 0] == -1).all() and (placed[slots[one >= 0]] == one[one >= 0]).all()
    got = choose_replicas(LocalExchange(4), replicas, [torch.from_numpy(one) for one in topk_idx])
    assert all((a.numpy() == b).all() for a, b in zip(got, chosen))
    active = [len(np.unique(np.concatenate([s[s // 8 == rank] for s in chosen]))) for rank in range(4)]
    experts = len(np.unique(np.concatenate([one[one >= 0] for one in topk_idx])))
    if choice == "min_active":
        assert sum(active) == experts and max(active) - min(active) <= 1


@pytest.mark.parametrize("redundant", [32, 64])
def test_balanced_choice_comes_within_two_percent_of_the_lp_on_the_next_batch(redundant):
    load, later = make_load("lognormal", 4, 256, 1), make_load("lognormal", 4, 256, 1, drift_sigma=0.3)
    plan = plan_experts(load, num_ranks=32, num_redundant_experts=redundant)
    for layer in range(4):
        placed = plan.physical_to_logical[layer]
        replicas = replica_map(placed, 256, 32, load=load[layer])
        count = later[layer].astype(np.int64)
        slots = choose_rows(replicas, [np.repeat(np.arange(256), count)[:, None]])[0]
        got = np.bincount(slots.ravel() // replicas.slots_per_rank, minlength=32)
        assert got.sum() == count.sum()
        assert got.max() <= lp_rank_load(placed, 32, later[layer]) / 0.98


def test_static_choice_prefers_the_own_rank_then_the_own_node():
    replicas = replica_map([0, 1, 0, 2, 3, 1, 3, 4], 5, 4, "static", num_nodes=2)
    assert replicas.by_source[:, 0].tolist() == [0, 2, 0, 2]  # copies on ranks 0 and 1, none on node 1
    assert replicas.by_source[:, 1].tolist() == [1, 1, 5, 5]  # a copy on each node
    assert replicas.by_source[:, 4].tolist() == [7] * 4


@pytest.mark.parametrize(("arguments", "message"), [
    (([0, 1, 2], 3, 2), "num_ranks=2"),
    (([0, 1, 2, 2], 3, 2), "expert 2 is twice on rank 1"),
    (([0, 1, 0, 1], 3, 2), "logical expert 2 has no slot"),
    (([0, 1, 3, 1], 3, 2), r"outside -1\.\.2"),
    (([0, 1, -2, 2], 3, 2), r"holds -2\.\.2, outside -1\.\.2"),
    (([0, 1], 2, 2, "fastest"), "choice='fastest'"),
])
def test_impossible_maps_name_the_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        replica_map(*arguments)
