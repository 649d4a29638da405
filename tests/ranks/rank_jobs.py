"""What one rank runs in test_gloo and test_mpi: ``python rank_jobs.py JOB``. Prints one line of JSON."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, plan_experts, warmup
from megamoe.exchange import LocalExchange
from megamoe.plan import popularity
from megamoe.ranks import init_process_group
from megamoe.steps import moe_layer
from megamoe.testing.data import make_case

SMALL = MoEConfig(hidden=256, intermediate=128, num_experts=8, topk=3)
SIX = MoEConfig(hidden=128, intermediate=128, num_experts=6, topk=3)  # for three ranks too
OTHER = MoEConfig(hidden=128, intermediate=384, num_experts=4, topk=16, weight_format="bf16")


def equal(info):
    """Two layers of different shape alternate on one workspace; each call equals the one-process oracle bit for bit."""
    calls = equal_calls = 0
    with Workspace([SMALL, OTHER], EPConfig(16), device="cpu") as workspace:
        layers = {config: MoELayer(config, workspace) for config in (SMALL, OTHER)}
        for seed, routing in enumerate(("uniform", "one_expert", "none", "holes", "duplicates")):
            counts = [(5 * seed + 7 * rank) % 17 for rank in range(info.ep_size)]  # seed 0: rank 0 has none
            for config, layer in layers.items():
                case = make_case(seed, config, info.ep_size, counts, routing)
                weights, (x, _, topk_idx, topk_weights, _) = case.weights[info.ep_rank], case.inputs[info.ep_rank]
                layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf)
                y = layer(x, topk_idx, topk_weights)
                expected = moe_layer(config, LocalExchange(info.ep_size), case.weights, case.inputs)[info.ep_rank]
                calls += 1
                equal_calls += torch.equal(y, expected) and y.shape == x.shape
    return {"calls": calls, "equal": equal_calls}


def plans(info):
    """A plan with redundant experts and a rebalance, weights over the wire: the oracle's bits at every step."""
    config, calls, equal_calls = SMALL, 0, 0
    ep_config = EPConfig(16, num_redundant_slots_per_rank=2)
    with Workspace(config, ep_config, device="cpu") as workspace, MoELayer(config, workspace) as layer:
        case = make_case(3, config, info.ep_size, [16, 9][: info.ep_size], "holes")
        expected = moe_layer(config, LocalExchange(info.ep_size), case.weights, case.inputs)[info.ep_rank]
        weights, (x, _, topk_idx, topk_weights, _) = case.weights[info.ep_rank], case.inputs[info.ep_rank]
        layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf)
        for seed, choice in enumerate(("balanced", "static", "min_active")):
            plan = plan_experts(popularity("zipf", 1, 8, seed), num_ranks=info.ep_size, num_redundant_experts=4)
            rebalance = layer.rebalance(plan, choice=choice, max_bytes=200_000)
            while not rebalance.step():
                equal_calls += torch.equal(layer(x, topk_idx, topk_weights), expected)
                calls += 1
            equal_calls += torch.equal(layer(x, topk_idx, topk_weights), expected)
            calls += 1
        served = layer.load_counts().logical
    return {"calls": calls, "equal": equal_calls, "served": int(served.sum())}


def plans_differ(info):
    """Each rank plans from what it served itself, calls for another choice, or only one of them has loaded weights
    since the last plan; then a rank asks for what does not fit. All are told, and no weight has moved."""
    config, errors = SMALL, []
    with Workspace(config, EPConfig(16, num_redundant_slots_per_rank=2), device="cpu") as workspace:
        layer = MoELayer(config, workspace)
        case = make_case(3, config, info.ep_size, [16, 9][: info.ep_size], "holes")
        w, i = case.weights[info.ep_rank], case.inputs[info.ep_rank]
        layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
        expected = layer(i.x, i.topk_idx, i.topk_weights)
        own, same = (plan_experts(popularity("zipf", 1, 8, seed), num_ranks=info.ep_size, num_redundant_experts=4)
                     for seed in (info.ep_rank, 5))  # fmt: skip
        attempts = [lambda: layer.load_plan(own),
                    lambda: layer.load_plan(same, choice=("static", "balanced")[info.ep_rank]),
                    lambda: layer.rebalance(same, max_bytes=(10, 200_000)[info.ep_rank])]  # fmt: skip
        for attempt in attempts:
            try:
                attempt()
            except ValueError as error:
                errors.append(str(error))
        equal = torch.equal(layer(i.x, i.topk_idx, i.topk_weights), expected)
        layer.load_plan(same)
        equal &= torch.equal(layer(i.x, i.topk_idx, i.topk_weights), expected)
        if info.ep_rank == 1:
            layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
        try:
            layer.load_plan(same)
        except ValueError as error:
            errors.append(str(error))
    return {"errors": errors, "equal": equal}


def bounds_differ(info):
    """Rank 1 passes another num_tokens_bound: the call ends on both. Then one is refused another layer's call, and
    after reset() a plan loads at once."""
    with Workspace([SMALL, SIX], EPConfig(16, arrive_deadline_s=1.5), device="cpu") as workspace:
        layers, calls = [], []
        for config in (SMALL, SIX):
            case = make_case(0, config, info.ep_size, 4, ranks=[info.ep_rank])
            w, i = case.weights[0], case.inputs[0]
            layers.append(MoELayer(config, workspace))
            layers[-1].load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
            calls.append((i.x, i.topk_idx, i.topk_weights))
        layers[0](*calls[0], num_tokens_bound=4)
        errors = []
        for layer, call, bound in ((0, calls[0], (8, 16)[info.ep_rank]), (1, calls[(1, 0)[info.ep_rank]], None)):
            try:
                layers[layer](*call, num_tokens_bound=bound)
            except (ValueError, MegaMoEError) as error:
                errors.append(f"{type(error).__name__}: {error}")
            workspace.reset()
        layers[0].load_plan(plan_experts(popularity("zipf", 1, 8, 5), num_ranks=info.ep_size))
        y = layers[0](*calls[0])
    return {"errors": errors, "after": bool(y.isfinite().all() and y.any())}


def config_differs(info):
    """Rank 1 has another topk, then another debug level: every rank must be told."""
    errors = []
    for topk, level in ((2 + info.ep_rank, "0"), (2, "0" if info.ep_rank == 0 else "2")):
        os.environ["MEGAMOE_DEBUG"] = level
        config = MoEConfig(hidden=256, intermediate=128, num_experts=8, topk=topk)
        try:
            Workspace(config, EPConfig(16), device="cpu")
        except ValueError as error:
            errors.append(str(error))
    return {"errors": errors}


def one_cannot(info):
    """Rank 1 asks for a device it lacks: rank 0 must not be left waiting."""
    try:
        Workspace(SMALL, EPConfig(16), device="cpu" if info.ep_rank == 0 else "cuda:99")
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def lead_cannot_compile(info):
    """Rank 0 compiles for longer than the deadline, then fails: rank 1 waits for it and says why."""
    def broken(*_):
        time.sleep(2.5)
        raise OSError("no space left")

    warmup.compile_for = broken
    ep_config = EPConfig(16, arrive_deadline_s=1.0)
    workspace = SimpleNamespace(group=dist.group.WORLD, ep_config=ep_config, moe_configs=(SMALL,), ep_size=info.ep_size)
    try:
        warmup.compile_once_a_node(workspace)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def refused(info):
    """The last rank's input is refused; the others end at their deadline, name it, refuse calls; reset() mends it, also
    where that rank comes to it at once and the others wait in the call until then."""
    workspace = Workspace(SIX, EPConfig(16, arrive_deadline_s=1.5), device="cpu")
    layer = MoELayer(SIX, workspace)
    case = make_case(0, SIX, info.ep_size, 4, ranks=[info.ep_rank])
    weights, rank_input = case.weights[0], case.inputs[0]
    layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf)
    if info.ep_rank == info.ep_size - 1:
        rank_input.topk_idx[0, 0] = SIX.num_experts
    result, begin = {}, time.monotonic()
    try:
        layer(rank_input.x, rank_input.topk_idx, rank_input.topk_weights)
    except (ValueError, MegaMoEError) as error:
        result = {"kind": type(error).__name__, "error": str(error), "seconds": time.monotonic() - begin}
        if isinstance(error, MegaMoEError):
            result["record"] = list(error.record)
    try:
        layer.check()
        result["check"] = None
    except MegaMoEError as error:
        result["check"] = str(error)
    workspace.reset()
    rank_input.topk_idx[0, 0] = 0
    y = layer(rank_input.x, rank_input.topk_idx, rank_input.topk_weights)
    layer.check()
    workspace.close()
    return result | {"after_reset": bool(y.isfinite().all() and y.any())}


def reset_together(info):
    """The last rank is slow, then unable to connect anew: what reset() is on every rank, and that a third one mends."""
    connect, slow, kept = dist.ProcessGroupGloo, info.ep_rank == info.ep_size - 1, []

    def slowly(*arguments):
        made = connect(*arguments)
        time.sleep(1.0)
        return made

    def broken(*arguments):
        kept.append(connect(*arguments))
        raise RuntimeError("no file descriptor left")

    result = {}
    with Workspace(SIX, EPConfig(16), device="cpu") as workspace:
        dist.ProcessGroupGloo = slowly if slow else connect
        begin = time.monotonic()
        workspace.reset()
        result["seconds"] = time.monotonic() - begin
        dist.ProcessGroupGloo = broken if slow else connect
        try:
            workspace.reset()
        except MegaMoEError as error:
            result["error"] = str(error)
        dist.ProcessGroupGloo = connect
        workspace.reset()
    return result


def left_alone(info):
    """The last rank ends without a word between two calls; the others do not catch what that makes of the second."""
    case = make_case(0, SIX, info.ep_size, 4, ranks=[info.ep_rank])
    w, i = case.weights[0], case.inputs[0]
    with Workspace(SIX, EPConfig(16, arrive_deadline_s=1.5), device="cpu") as workspace:
        layer = MoELayer(SIX, workspace)
        layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
        layer(i.x, i.topk_idx, i.topk_weights)
        if info.ep_rank == info.ep_size - 1:
            os._exit(9)
        layer(i.x, i.topk_idx, i.topk_weights)
    return {}


def ports(info):
    """Sockets of this process that listen: with the process group, a workspace after a call, reset, closed."""
    counts = [listening()]
    workspace = Workspace(SMALL, EPConfig(16), device="cpu")
    layer, case = MoELayer(SMALL, workspace), make_case(0, SMALL, info.ep_size, 4, ranks=[info.ep_rank])
    w, i = case.weights[0], case.inputs[0]
    layer.load_weights(w.linear1, w.linear2, w.linear1_sf, w.linear2_sf)
    layer(i.x, i.topk_idx, i.topk_weights)
    counts.append(listening())
    workspace.reset()
    counts.append(listening())
    workspace.close()
    return {"listening": [*counts, listening()]}


def listening():
    fds = Path("/proc/self/fd")
    mine = {os.readlink(fd)[len("socket:["):-1] for fd in fds.iterdir()
            if fd.is_symlink() and os.readlink(fd).startswith("socket:[")}  # fmt: skip
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    sockets = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return sum(columns[3] == "0A" and columns[9] in mine for columns in sockets)


def main():
    torch.set_num_threads(1)
    info = init_process_group("gloo", timeout_s=60.0)
    result = globals()[sys.argv[1]](info)
    sys.stdout.write(json.dumps({"rank": info.ep_rank, "launcher": info.launcher, **result}) + "\n")
    sys.stdout.flush()
    if sys.argv[1] == "refused":
        os._exit(0)  # its group is broken by design; a tidy shutdown of it is not under test
    dist.destroy_process_group()


main()
