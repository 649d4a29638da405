"""The host's faults, on three CPU ranks over gloo. Rank 2 does what is wrong; see table.py for how rows are judged."""

import os
import time

import torch

from megamoe import MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.exchange import DistExchange, Header, LocalExchange
from megamoe.steps import moe_layer
from megamoe.testing.faults import preparation
from megamoe.testing.faults.host_ranks import (
    CONFIG,
    DEADLINE_S,
    OTHER,
    START_S,
    WAITED,
    all_live,
    case_of,
    group,
    meet,
    open_workspace,
    replaced,
    variable,
)  # fmt: skip
from megamoe.testing.faults.table import FAULTY, NUM_RANKS, Fault, Said, timed, words
from megamoe_cuda.gather import gather


def make_layer(workspace: Workspace, config: MoEConfig, rank: int) -> MoELayer:
    layer = MoELayer(config, workspace)
    w = case_of(config).weights[rank]
    layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
    return layer


def call(layer: MoELayer, rank: int, tokens: int = 5) -> torch.Tensor:
    """Into an output that held numbers before."""
    i = case_of(layer.config, tokens).inputs[rank]
    layer.out = torch.ones(i.x.shape, dtype=torch.bfloat16)
    return layer(i.x, i.topk_idx, i.topk_weights, out=layer.out)


def wrong_output(layer: MoELayer, rank: int) -> str:
    expected = moe_layer(layer.config, LocalExchange(NUM_RANKS), *case_of(layer.config)[3:])[rank]
    meet(layer.workspace.group)
    return "" if torch.equal(call(layer, rank), expected) else "the output is not that of the specification"


def in_a_call(faulty_call, *, succeeds: bool = False, resets: bool = True, debug: bool = False):
    """A body: rank 2 runs faulty_call(workspace, layers), the others call the first layer. Afterwards all ranks reset,
    or close and begin anew, and call once more. debug: with MEGAMOE_DEBUG=2."""

    def body(rank: int, everyone) -> Said:
        with variable("MEGAMOE_DEBUG", "2" if debug else "0"):
            return _in_a_call(rank, everyone, faulty_call, succeeds, resets)

    return all_live(body)


def _in_a_call(rank: int, everyone, faulty_call, succeeds: bool, resets: bool) -> Said:
    # Where a rank is slow and in time, a busy machine must not add what is missing to the deadline
    deadline_s = 5 * DEADLINE_S if succeeds else DEADLINE_S
    workspace = open_workspace(everyone, arrive_deadline_s=deadline_s, step_deadline_s=deadline_s)
    layers = [make_layer(workspace, config, rank) for config in (CONFIG, OTHER)]
    problem = wrong_output(layers[0], rank)
    action = (lambda: faulty_call(workspace, layers)) if rank == FAULTY else (lambda: call(layers[0], rank))
    _, error, seconds = timed(action, MegaMoEError, ValueError, RuntimeError)
    if isinstance(error, MegaMoEError) and rank != FAULTY:
        if not layers[0].out.isnan().all():
            problem += "a failed call left numbers in its output; "
        if timed(lambda: call(layers[0], rank), MegaMoEError)[1] is None:
            problem += "the poisoned workspace took a call; "
    elif succeeds:
        problem += wrong_output(layers[0], rank)
    gather(everyone, "faults", None, 30.0)
    if not resets:
        workspace.close()
        workspace = open_workspace(everyone)
        layers = [make_layer(workspace, config, rank) for config in (CONFIG, OTHER)]
    workspace.reset()
    problem += wrong_output(layers[0], rank) or wrong_output(layers[1], rank)
    workspace.close()
    return Said(words(error), seconds, problem)


def late(seconds: float):
    def faulty(workspace, layers):
        time.sleep(seconds)
        return call(layers[0], FAULTY)

    return faulty


def damaged_count(workspace, layers):
    good = Header.of

    def of(*words_):
        header = good(*words_)
        return header._replace(num_rows=header.num_rows + 1)

    with replaced(Header, "of", of):
        return call(layers[0], FAULTY)


def rows_at_combine(change):
    """change(send) -> what happens to rank 2's rows on their way back."""

    def faulty(workspace, layers):
        real = DistExchange._point_to_point

        def point_to_point(self, sends, receives, deadline_s, step, fault):
            if step == "combine" and fault == "did not send its rows":
                sends = change(sends)
            return real(self, sends, receives, deadline_s, step, fault)

        with replaced(DistExchange, "_point_to_point", point_to_point):
            return call(layers[0], FAULTY)

    return faulty


def delayed(sends):
    time.sleep(DEADLINE_S / 2)
    return sends


def closed_early(workspace, layers):
    workspace.close()
    return call(layers[0], FAULTY)


def dies(where: str):
    """A body: rank 2 ends without a word, before the workspace, or before, during or after a call."""

    def body(rank: int) -> Said:
        everyone = group()
        leave = lambda *_: os._exit(9)  # noqa: E731
        meet(everyone)
        if rank == FAULTY and where == "workspace":
            leave()
        workspace, error, seconds = timed(lambda: open_workspace(everyone), MegaMoEError)
        if where == "workspace":
            return Said(words(error), seconds)
        layer = make_layer(workspace, CONFIG, rank)
        meet(everyone)
        if where == "after":
            call(layer, rank)
        if rank == FAULTY:
            if where == "during":
                rows_at_combine(leave)(workspace, [layer])
            leave()
        _, error, seconds = timed(lambda: call(layer, rank), MegaMoEError)
        workspace.close()
        return Said(words(error), seconds, "" if layer.out.isnan().all() else "a failed call left numbers")

    return body


NAMES_2 = rf"dispatch: rank 2 did not come within {DEADLINE_S} s"
LEFT_2 = r"step {0}: rank 2 (left|did not \w+)|the first to give up was rank \d at {0}: rank 2"
FAULTS = (
    Fault("a rank comes late, within the deadline", "dispatch", in_a_call(late(DEADLINE_S / 2), succeeds=True),
          "no error", "no error", DEADLINE_S),
    Fault("a rank comes after the deadline", "dispatch", in_a_call(late(DEADLINE_S + 0.4)),
          NAMES_2, r"the first to give up was rank [01] at dispatch: rank 2 did not come", DEADLINE_S),
    Fault("a rank makes no call", "dispatch", in_a_call(lambda workspace, layers: None),
          NAMES_2, "no error", DEADLINE_S),
    Fault("a rank calls another layer", "dispatch", in_a_call(lambda workspace, layers: call(layers[1], FAULTY)),
          "rank 2 is in dispatch of call 2, layer 1.*this rank in dispatch of call 2, layer 0",
          "rank 0 is in dispatch of call 2, layer 0", DEADLINE_S),
    Fault("a rank calls another layer, MEGAMOE_DEBUG=2", "call",
          in_a_call(lambda workspace, layers: call(layers[1], FAULTY), debug=True),
          *[r"rank 0 calls layer 0 of workspace (\d+);.* rank 2 calls layer 1 of workspace \1\."] * 2, DEADLINE_S),
    Fault("a rank makes no call, MEGAMOE_DEBUG=2", "call", in_a_call(lambda workspace, layers: None, debug=True),
          rf"role host step call: rank [01] {WAITED} at call for rank 2", "no error", DEADLINE_S),
    Fault("a rank has more tokens than the capacity", "dispatch",
          in_a_call(lambda workspace, layers: call(layers[0], FAULTY, 9)),
          NAMES_2, r"ValueError: hidden_states has 9 tokens, above num_max_tokens_per_rank=8", DEADLINE_S),
    Fault("a count is damaged on its way", "dispatch", in_a_call(damaged_count),
          "step dispatch: the header from rank 2 is damaged", None, DEADLINE_S),
    Fault("rows are lost on their way back", "combine", in_a_call(rows_at_combine(lambda sends: {})),
          LEFT_2.format("combine"), None, DEADLINE_S),
    Fault("rows are slow, within the deadline", "combine", in_a_call(rows_at_combine(delayed), succeeds=True),
          "no error", "no error", DEADLINE_S),
    Fault("a rank comes late to the workspace", "places", preparation.at_workspace,
          rf"role host step places: rank [01] {WAITED} at places for rank 2", "rank 0.*and rank 1",
          DEADLINE_S),
    Fault("a rank has another configuration", "workspace", preparation.other_configuration,
          *["ep_config.step_deadline_s differs between ranks: 8.0 on rank 0, 9.0 on rank 2"] * 2, DEADLINE_S),
    Fault("a rank does not come to reset()", "reset", preparation.at_reset,
          rf"role host step reset: rank [01] {WAITED} at reset for rank 2, which was last seen at faults",
          "no error", 2 * DEADLINE_S),
    Fault("compilation fails on one rank", "preparation", preparation.preparing(preparation.broken_source),
          "step preparation: rank 2 could not prepare its workspace: CompileError", "CompileError", 30.0),
    Fault("compilation takes longer than the deadline", "preparation",
          preparation.preparing(lambda: time.sleep(3 * DEADLINE_S)), "no error", "no error", 4 * DEADLINE_S),
    Fault("memory runs out on one rank", "preparation", preparation.preparing(lambda: torch.empty(1 << 60)),
          "step preparation: rank 2 could not prepare its workspace: RuntimeError.*memory", "RuntimeError",
          DEADLINE_S),
    Fault("NVSHMEM is missing on one rank", "NVSHMEM", preparation.nvshmem_of("missing"),
          *["MissingLibraryError: NVSHMEM is missing: rank 2: nvshmem4py is not installed: pip install"] * 2,
          DEADLINE_S),
    Fault("NVSHMEM has another version on one rank", "NVSHMEM", preparation.nvshmem_of("newer"),
          *["version differs between the ranks: rank 0 has 3.4.5, rank 1 has 3.4.5, rank 2 has 3.8.0"] * 2, DEADLINE_S),
    Fault("the disk under the cache is full", "compilation", preparation.in_the_cache(preparation.full_disk),
          "no error", "cannot be used .*too large.*Set MEGAMOE_CACHE_DIR", 30.0),
    Fault("a cubin in the cache is cut short", "compilation", preparation.in_the_cache(preparation.truncated),
          "no error", "refused and compiled again: its digest does not match", 30.0),
    Fault("a cubin in the cache is from elsewhere", "compilation", preparation.in_the_cache(preparation.foreign),
          "no error", "refused and compiled again: it is not a kernel cache entry", 30.0),
    Fault("a rank closes its workspace early", "dispatch", in_a_call(closed_early, resets=False),
          NAMES_2, "MegaMoEError: the workspace is closed", DEADLINE_S),
    Fault("a rank is never started", "start", preparation.never_started,
          r"TimeoutError: rank [01] waited (1\.[5-9]|[2-6]\.\d) s at start for rank 2 of 3", None, START_S, True,
          NUM_RANKS, (0, 1)),
    Fault("a rank dies before its workspace", "places", dies("workspace"),
          rf"step places: rank [01] {WAITED} at places for rank 2", None, DEADLINE_S, True),
    Fault("a rank dies before a call", "dispatch", dies("before"),
          LEFT_2.format("dispatch"), None, DEADLINE_S, True),
    Fault("a rank dies during a call", "combine", dies("during"), LEFT_2.format("combine"), None, DEADLINE_S, True),
    Fault("a rank dies after a call", "dispatch", dies("after"), LEFT_2.format("dispatch"), None, DEADLINE_S, True),
)  # fmt: skip
