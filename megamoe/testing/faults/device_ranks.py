"""The device's faults that need two processes, each with a GPU of its own. Rank 1 does what is wrong. After those that
both outlive each must have given back what it took."""

import os
import time

import torch
import torch.distributed as dist

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.ranks import init_process_group
from megamoe.testing.data import make_case
from megamoe.testing.faults.held import held, not_given_back
from megamoe.testing.faults.table import Fault, Said, timed, words
from megamoe_cuda.gather import gather

CONFIG = MoEConfig(hidden=512, intermediate=512, num_experts=8, topk=4)
RANKS, FAULTY, TOKENS = 2, 1, 30
DEADLINE_S = 3.0
_first: list[Workspace] = []
_rehearsed: list[Said] = []
ANYTHING = "MegaMoEError: rank 0"


def group():
    init_process_group("cpu:gloo,cuda:nccl", timeout_s=60.0)
    gather(dist.group.WORLD, "faults", None, 120.0)
    if not _first:  # stays open, so that NVSHMEM starts once and not with every fault
        _first.append(open_workspace(dist.group.WORLD, 60.0))
    return dist.group.WORLD


def case_of(rank: int):
    return make_case(7, CONFIG, RANKS, TOKENS, "uniform", "cuda", ranks=[rank])


def open_workspace(group_, seconds: float = DEADLINE_S) -> Workspace:
    return Workspace(CONFIG, EPConfig(TOKENS, arrive_deadline_s=seconds, step_deadline_s=seconds), group=group_)


def make_layer(workspace: Workspace, rank: int) -> MoELayer:
    layer, w = MoELayer(CONFIG, workspace), case_of(rank).weights[0]
    layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
    return layer


def launch(layer: MoELayer, rank: int) -> None:
    i = case_of(rank).inputs[0]
    layer.out = torch.ones(i.x.shape, dtype=torch.bfloat16, device="cuda")
    layer(i.x, i.topk_idx, i.topk_weights, out=layer.out)


def call(layer: MoELayer, rank: int) -> None:
    launch(layer, rank)
    torch.cuda.synchronize()
    layer.check()


def all_live(body):
    """A fault's body out of body(rank, group), after which both ranks live and must hold no more than before it."""

    def counted(rank: int) -> Said:
        everyone = group()
        if not _rehearsed:  # what is loaded or built at its first use is so afterwards
            _rehearsed.append(_in_a_call(rank, everyone, lambda layer: None))
        gather(everyone, "faults", None, 60.0)
        before = held()
        said = body(rank, everyone)
        return said._replace(problem=said.problem + not_given_back(before, held()))

    return counted


def in_a_call(faulty_call):
    """A body: rank 1 runs faulty_call(layer) where rank 0 calls; then both reset and the next call is as the first."""
    return all_live(lambda rank, everyone: _in_a_call(rank, everyone, faulty_call))


def _in_a_call(rank: int, everyone, faulty_call) -> Said:
    with open_workspace(everyone) as workspace:
        layer, _other = make_layer(workspace, rank), make_layer(workspace, rank)
        call(layer, rank)
        first, before, problem = layer.out.clone(), held(), ""
        gather(everyone, "faults", None, 60.0)
        action = (lambda: faulty_call(layer)) if rank == FAULTY else (lambda: call(layer, rank))
        _, error, seconds = timed(action, MegaMoEError, ValueError)
        said = words(error)
        if isinstance(error, MegaMoEError) and not layer.out.isnan().all():
            problem = "a failed call left numbers in its output; "
        error = None  # its traceback holds what the call did
        gather(everyone, "faults", None, 60.0)
        workspace.reset()
        for _ in range(3):
            call(layer, rank)
            if not torch.equal(layer.out.view(torch.int16), first.view(torch.int16)):
                problem += "after reset the output differs; "
        problem += not_given_back(before, held())
    return Said(said, seconds, problem)


def late(seconds: float):
    def faulty(layer):
        time.sleep(seconds)
        call(layer, FAULTY)

    return faulty


def too_many_tokens(layer):
    i = make_case(7, CONFIG, RANKS, TOKENS + 1, "uniform", "cuda", ranks=[FAULTY]).inputs[0]
    layer(i.x, i.topk_idx, i.topk_weights)


def another_layer(layer):
    other = layer.workspace.layers[1]()
    try:
        call(other, FAULTY)
    finally:
        layer.out, other.out = other.out, None  # what is held is counted


@all_live
def out_of_memory(rank: int, everyone) -> Said:
    """Rank 1's GPU is full when the workspace wants its local memory."""
    hog = []
    config = MoEConfig(hidden=7168, intermediate=2048, num_experts=64, topk=8)
    if rank == FAULTY:
        size = torch.cuda.mem_get_info()[0] - (300 << 20)
        hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    _, error, seconds = timed(lambda: Workspace(config, EPConfig(8192, arrive_deadline_s=30.0), group=everyone),
                              MegaMoEError, RuntimeError)  # fmt: skip
    hog.clear()
    torch.cuda.empty_cache()
    gather(everyone, "faults", None, 60.0)
    open_workspace(everyone).close()
    return Said(words(error), seconds)


@all_live
def at_workspace(rank: int, everyone) -> Said:
    if rank == FAULTY:
        time.sleep(DEADLINE_S + 1.0)
    _, error, seconds = timed(lambda: open_workspace(everyone), MegaMoEError)
    gather(everyone, "faults", None, 60.0)
    open_workspace(everyone, 30.0).close()
    return Said(words(error), seconds)


def dies(where: str):
    """A body: rank 1 ends without a word before, during (its kernel runs) or after a call."""

    def body(rank: int) -> Said:
        everyone = group()
        workspace = open_workspace(everyone)
        layer = make_layer(workspace, rank)
        if where != "before":
            call(layer, rank)
        if rank == FAULTY:
            if where == "during":
                launch(layer, rank)
            os._exit(9)
        time.sleep(0.5)
        _, error, seconds = timed(lambda: call(layer, rank), MegaMoEError)
        problem = "" if layer.out.isnan().all() else "a failed call left numbers in its output; "
        _, closing, more = timed(workspace.close, MegaMoEError)
        if closing is None or more > DEADLINE_S + 5:
            problem += f"close() without rank 1: {words(closing)} after {more:.1f} s"
        return Said(words(error), seconds, problem)

    return body


def closes_early(rank: int) -> Said:
    """Rank 1 gives its arena back while rank 0 calls; its close() must not take the memory from under the call."""
    workspace = open_workspace(group())
    layer = make_layer(workspace, rank)
    call(layer, rank)
    if rank == FAULTY:
        _, error, seconds = timed(workspace.close, MegaMoEError)
        return Said(words(error), seconds)
    _, error, seconds = timed(lambda: call(layer, rank), MegaMoEError)
    return Said(words(error), seconds, "" if layer.out.isnan().all() else "a failed call left numbers in its output")


GONE = "no routing table from rank 1"
FAULTS = (
    Fault("two GPUs: a rank comes late, within the deadline", "dispatch", in_a_call(late(DEADLINE_S / 2)),
          "no error", "no error", DEADLINE_S, num_ranks=RANKS),
    Fault("two GPUs: a rank comes after the deadline", "dispatch", in_a_call(late(DEADLINE_S + 1)),
          GONE, "was ended by rank 0", DEADLINE_S, num_ranks=RANKS),
    Fault("two GPUs: a rank makes no call", "dispatch", in_a_call(lambda layer: None),
          GONE, "no error", DEADLINE_S, num_ranks=RANKS),
    Fault("two GPUs: more tokens than the capacity", "dispatch", in_a_call(too_many_tokens),
          GONE, "ValueError: hidden_states has 31 tokens", DEADLINE_S, num_ranks=RANKS),
    Fault("two GPUs: a rank calls another layer", "dispatch", in_a_call(another_layer),
          "rank 1 called layer 1 of the workspace, this rank layer 0|was ended by rank 1",
          "rank 0 called layer 0 of the workspace, this rank layer 1|was ended by rank 0", DEADLINE_S, num_ranks=RANKS),
    Fault("two GPUs: memory runs out on one", "preparation", out_of_memory,
          "step preparation: rank 1 could not prepare its workspace: .*[Oo]ut of memory|allocating symmetric memory",
          "[Oo]ut of memory|allocating symmetric memory", 30.0, num_ranks=RANKS),
    Fault("two GPUs: a rank comes late to the workspace", "workspace", at_workspace,
          r"rank 0 waited [3-8]\.\d s at places for rank 1", "rank 0", DEADLINE_S, num_ranks=RANKS),
    Fault("two GPUs: a rank closes its workspace early", "dispatch", closes_early,
          GONE, r"rank 1 waited [3-8]\.\d s at arena for rank 0", DEADLINE_S, True, RANKS),
    Fault("two GPUs: a rank dies before a call", "dispatch", dies("before"), GONE, None, DEADLINE_S, True, RANKS),
    Fault("two GPUs: a rank dies during a call", "combine", dies("during"), ANYTHING, None, DEADLINE_S, True, RANKS),
    Fault("two GPUs: a rank dies after a call", "dispatch", dies("after"), GONE, None, DEADLINE_S, True, RANKS),
)  # fmt: skip
