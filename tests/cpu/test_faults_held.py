"""The device's fault rows, on stand-ins: what a fault leaves behind is found, and the count begins before it."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

from megamoe import MegaMoEError
from megamoe.errors import ErrorRecord
from megamoe.testing.faults import device, device_ranks, held
from megamoe.testing.faults.table import Said
from megamoe_cuda import nvshmem

FAULT = next(fault for fault in device.FAULTS if fault.name == "head: never raised")
LATE = next(fault for fault in device.FAULTS if fault.said is None)
RECORD = ErrorRecord(0, 0, "plan", "dispatch", 2, 0, 1)


@pytest.fixture
def gpu(monkeypatch):
    """Bytes of a GPU that torch and others hold, as the counts will find them."""
    state = SimpleNamespace(allocated=100 << 20, reserved=128 << 20, others=1 << 30)
    for name, value in {
        "synchronize": lambda *_: None, "memory_allocated": lambda: state.allocated, "empty_cache": lambda: None,
        "memory_reserved": lambda: state.reserved, "mem_get_info": lambda: (
            (80 << 30) - state.reserved - state.others, 80 << 30),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def leaks(gpu, kept: list) -> dict:
    """What a fault may leave behind, by what must be said of it."""

    def grow(name: str, count: int):
        return lambda: setattr(gpu, name, getattr(gpu, name) + count)

    return {
        "": lambda: None, "1 descriptors": lambda: kept.append(os.fdopen(os.dup(1))),
        "512 torch bytes": grow("allocated", 512), "driver bytes": grow("others", held.DRIVER_SLACK + 1),
    }  # fmt: skip


def test_each_thing_is_counted(gpu, monkeypatch):
    before = held.held()
    assert before.torch_bytes == 100 << 20 and before.driver_bytes == 1 << 30
    gpu.reserved += 64 << 20  # torch's own, live tensors or not
    gpu.others += held.DRIVER_SLACK
    assert not held.not_given_back(before, held.held())
    for number, name in enumerate(held.Held._fields):
        more = before._replace(**{name: before[number] + held.DRIVER_SLACK + 1})
        assert held.not_given_back(before, more).startswith(f"{held.DRIVER_SLACK + 1} {name.replace('_', ' ')} were")
        assert not held.not_given_back(more, before)
    monkeypatch.setattr(nvshmem, "_session", SimpleNamespace(users=before.arenas + 1))
    assert "1 arenas were not given back" in held.not_given_back(before, held.held())


class FaultyLayer:
    """Fails while it misbehaves, and takes something with it."""

    def __init__(self, leak, fails: bool):
        self.leak, self.fails, self.kind, self.poisoned = leak, fails, "none", False
        self.outs, self.workspace = [torch.zeros(2, 2)], SimpleNamespace(reset=self.reset)

    def reset(self) -> None:
        self.poisoned = False

    def misbehave(self, kind: str, point: str, argument: int) -> None:
        self.kind = kind

    def wrong(self) -> str:
        return ""

    def call(self) -> None:
        if self.kind != "none":
            self.leak()
            if self.fails:
                self.poisoned = True
                self.outs[0].fill_(float("nan"))
        if self.poisoned:
            raise MegaMoEError("no routing table from rank 2", RECORD)


@pytest.mark.parametrize("fault", [FAULT, LATE], ids=lambda fault: fault.name)
@pytest.mark.parametrize("said", ["", "1 descriptors", "512 torch bytes", "driver bytes"])
def test_a_row_finds_what_its_fault_left(gpu, said, fault):
    kept = []
    row = device.try_fault(FaultyLayer(leaks(gpu, kept)[said], fault.said is not None), fault, "stand-in")
    assert row.ok is (said == "") and said in row.problem, row.problem
    for file in kept:
        file.close()


@pytest.fixture
def ranks(gpu, monkeypatch):
    """Rank 1 of two, whose calls do nothing: the layer's output is right at once."""
    layer = SimpleNamespace(out=torch.zeros(2, dtype=torch.bfloat16))
    workspace = SimpleNamespace(reset=lambda: None)
    for name, value in {
        "group": lambda: None, "gather": lambda *_: None, "call": lambda layer, rank: None, "_rehearsed": [],
        "make_layer": lambda workspace, rank: layer,
        "open_workspace": lambda *_: contextlib.nullcontext(workspace),
    }.items():  # fmt: skip
        monkeypatch.setattr(device_ranks, name, value)
    return workspace


@pytest.mark.parametrize("said", ["", "1 descriptors", "512 torch bytes", "driver bytes"])
def test_two_ranks_find_it_too(gpu, ranks, said):
    kept = []
    leak = leaks(gpu, kept)[said]
    for body in (device_ranks.in_a_call(lambda layer: leak()),
                 device_ranks.all_live(lambda rank, everyone: leak() or Said("no error", 0.0))):  # fmt: skip
        answer = body(1)
        assert answer.text == "no error" and (said in answer.problem) and bool(answer.problem) is bool(said)
    assert len(device_ranks._rehearsed) == 1 and not device_ranks._rehearsed[0].problem
    for file in kept:
        file.close()


def test_reset_does_not_hide_what_came_before_it(gpu, ranks):
    """The count begins before the fault, not after reset()."""
    ranks.reset = lambda: None
    answer = device_ranks.in_a_call(lambda layer: setattr(gpu, "allocated", gpu.allocated + 1))(1)
    assert answer.problem.count("1 torch bytes were not given back") == 2  # with the workspace open, and closed


def test_every_fault_that_both_outlive_is_counted():
    for fault in device_ranks.FAULTS:
        assert (fault.body.__qualname__ == "all_live.<locals>.counted") is not fault.own_ranks, fault.name
