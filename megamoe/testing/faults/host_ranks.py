"""What the host's faults share: three CPU ranks' group and workspace, and whether they gave back what they took."""

import contextlib
import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megamoe import EPConfig, MoEConfig, Workspace
from megamoe.ranks import init_process_group
from megamoe.testing.data import Case, make_case
from megamoe.testing.faults.held import descriptors
from megamoe.testing.faults.table import NUM_RANKS, Said
from megamoe_cuda.gather import gather

DEADLINE_S = 0.8
WAITED = r"waited (0\.[89]|[1-5]\.\d) s"  # the deadline, or what a busy machine makes of it
PATIENT_S = 20.0  # where ranks come by themselves, on a machine that may be busy
START_S = 1.5
CONFIG = MoEConfig(hidden=128, intermediate=128, num_experts=6, topk=3)
OTHER = MoEConfig(hidden=256, intermediate=128, num_experts=6, topk=2)
_groups: list = []


def group():
    """A group of its own for each fault: gloo closes a group's connections when one of its waits runs out."""
    init_process_group("gloo", timeout_s=30.0)
    gather(dist.group.WORLD, "faults", None, 60.0)
    for old in _groups:
        dist.destroy_process_group(old)
    _groups[:] = [dist.new_group(timeout=timedelta(seconds=30))]
    return _groups[0]


def meet(everyone) -> None:
    """So that the short deadline which follows judges the fault, not how far the machine had let ranks drift apart."""
    gather(everyone, "faults", None, 60.0)


def case_of(config: MoEConfig, tokens: int = 5) -> Case:
    return make_case(3, config, NUM_RANKS, tokens, "uniform")


def open_workspace(everyone, **fields) -> Workspace:
    deadlines = {"arrive_deadline_s": DEADLINE_S, "step_deadline_s": DEADLINE_S} | fields
    return Workspace([CONFIG, OTHER], EPConfig(8, **deadlines), group=everyone, device="cpu")


def tensors() -> int:
    gc.collect()
    return sum(torch.is_tensor(thing) for thing in gc.get_objects())


def all_live(body):
    """A fault's body out of body(rank, group), after which every rank lives and must have given back what it took."""

    def counted(rank: int) -> Said | str:
        everyone = group()
        before = descriptors(), tensors()
        meet(everyone)
        said = body(rank, everyone)
        after = descriptors(), tensors()
        if isinstance(said, Said) and any(now > then for now, then in zip(after, before)):
            return said._replace(problem=f"{said.problem} descriptors and tensors {before} before, {after} after")
        return said

    return counted


@contextlib.contextmanager
def variable(name: str, value: str):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


@contextlib.contextmanager
def replaced(target, name: str, value):
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)
