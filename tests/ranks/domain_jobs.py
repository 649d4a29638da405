"""What one of four ranks runs in test_domains: ``python domain_jobs.py JOB``. One line of JSON for each job."""

import json
import os
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, plan_experts
from megamoe.domains.rows import row_format
from megamoe.domains.traffic import domains_of_tokens
from megamoe.exchange import LocalExchange
from megamoe.plan import choose_replicas, nodes_per_token
from megamoe.ranks import init_process_group
from megamoe.route.node_limit import limit_nodes
from megamoe.steps import ExpertWeights, moe_layer
from megamoe.testing.data import ROUTINGS, Case, make_case

SMALL = MoEConfig(hidden=256, intermediate=128, num_experts=8, topk=3)
PLAIN = MoEConfig(hidden=128, intermediate=128, num_experts=8, topk=5, weight_format="bf16")
CAPACITY = 16


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def serve(layer, case, rank, bound=None, out=None):
    weights, (x, x_sf, topk_idx, topk_weights, num_tokens) = case.weights[rank], case.inputs[rank]
    layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf)
    x = x if x_sf is None else (x, x_sf)
    return layer(x, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=bound, out=out)


def agrees(layer, case, info, num_domains):
    y = serve(layer, case, info.ep_rank)
    exchange = LocalExchange(info.ep_size)
    expected = moe_layer(case.config, exchange, case.weights, case.inputs, num_domains=num_domains)[info.ep_rank]
    return y.shape == expected.shape and torch.equal(bits(y), bits(expected))


def counts_of(seed, info):
    """Tokens of each rank: some zero, at times a whole domain without any."""
    counts = [(5 * seed + 7 * rank) % (CAPACITY + 1) for rank in range(info.ep_size)]
    if seed % 3 == 1:
        counts[info.ep_size // 2 :] = [0] * (info.ep_size - info.ep_size // 2)
    return counts


def equal(info, sizes=(2, 1)):
    """Every routing on 2 x 2 and 4 x 1, fixed and in rounds: bit for bit the specification with that order of sums."""
    wrong, calls = [], 0
    for size in sizes:
        for limit in (None, 3):
            ep_config = EPConfig(CAPACITY, ranks_per_domain=size, domain_tokens=limit)
            with Workspace([SMALL, PLAIN], ep_config, device="cpu") as workspace:
                layers = {config: MoELayer(config, workspace) for config in (SMALL, PLAIN)}
                for seed, routing in enumerate(ROUTINGS):
                    config = (SMALL, PLAIN, SMALL)[seed % 3]  # two shapes take turns on one workspace
                    quantized = config is SMALL and seed % 2 == 0
                    case = make_case(seed, config, info.ep_size, counts_of(seed, info), routing, prequantized=quantized)
                    calls += 1
                    if not agrees(layers[config], case, info, info.ep_size // size):
                        wrong.append(f"{size} a domain, domain_tokens={limit}, {routing}, {config}")
    return {"calls": calls, "wrong": wrong}


def equal_by_host(info):
    return equal(info, sizes=(2,))


def with_redundancy(info):
    """A plan with copies on two nodes, routing within one node a token: the exchange carries one copy a token."""
    num_logical, num_domains, max_nodes = 12, 2, 1
    rng = np.random.default_rng(3)
    load = rng.integers(1, 100, (1, num_logical)).astype(float)
    plan = plan_experts(load, num_ranks=info.ep_size, num_nodes=num_domains, num_redundant_experts=4, num_groups=2,
                        max_nodes_per_token=max_nodes)  # fmt: skip
    config = replace(SMALL, num_experts=plan.num_physical_experts)
    case = make_case(5, replace(config, num_experts=num_logical), 1, 0)
    logical = case.weights[0]
    inputs, most = [], 0
    for rank in range(info.ep_size):
        generator = torch.Generator().manual_seed(rank)
        logits = torch.randn(CAPACITY - rank, num_logical, generator=generator)
        routed = limit_nodes(logits, config.topk, plan.home_node[0], max_nodes)
        idx = choose_replicas(routed.topk_idx.numpy(), plan.physical_to_logical[0], num_ranks=info.ep_size,
                              num_nodes=num_domains, home_node=plan.home_node[0], max_nodes=max_nodes)  # fmt: skip
        most = max(most, int(nodes_per_token(idx, config.num_experts, num_domains).max()))
        made = make_case(rank, config, 1, len(idx)).inputs[0]
        inputs.append(made._replace(topk_idx=torch.from_numpy(idx), topk_weights=routed.topk_weights))
    placed = torch.from_numpy(plan.physical_to_logical[0].astype(np.int64)).view(info.ep_size, -1)
    tensors = logical[:4]  # no biases
    weights = [
        ExpertWeights(*(t.view(torch.uint8)[own].view(t.dtype) if t.element_size() == 1 else t[own] for t in tensors))
        for own in placed
    ]
    case = Case(config, info.ep_size, tuple(range(info.ep_size)), weights, inputs)
    ep_config = EPConfig(CAPACITY, ranks_per_domain=info.ep_size // num_domains, domain_tokens=5)
    with Workspace(config, ep_config, device="cpu") as workspace:
        layer = MoELayer(config, workspace)
        same = agrees(layer, case, info, num_domains)
        sent = workspace.domains.transport.bytes_sent
    mine = info.ep_rank // (info.ep_size // num_domains)
    copies, back = [], 0
    for rank, rank_input in enumerate(inputs):
        touched = domains_of_tokens(rank_input.topk_idx, config.num_experts, num_domains)
        other = rank // (info.ep_size // num_domains) != mine
        if rank == info.ep_rank:
            copies = touched.sum(1).tolist()
            out = int(touched.sum()) - int(touched[:, mine].sum())
        elif other and rank % (info.ep_size // num_domains) == info.ep_rank % (info.ep_size // num_domains):
            back += int(touched[:, mine].sum())
    counted = out * 4 * row_format(config).words + back * 2 * config.hidden
    return {"same": same, "most_nodes": most, "most_copies": max(copies), "sent": sent, "counted": counted}


def refused(info):
    """Configurations that cannot be: every rank is told, none is left waiting."""
    texts = {}
    wrong = {
        "unequal": dict(ranks_per_domain=3),
        "differs": dict(ranks_per_domain=1 + info.ep_rank // 2),
        "rounds differ": dict(ranks_per_domain=2, domain_tokens=4 + info.ep_rank // 2),
    }
    for name, fields in wrong.items():
        try:
            Workspace(SMALL, EPConfig(CAPACITY, **fields), device="cpu")
        except ValueError as error:
            texts[name] = str(error)
    try:
        Workspace(SMALL, EPConfig(CAPACITY + info.ep_rank // 2, ranks_per_domain=2), device="cpu")
    except ValueError as error:
        texts["capacity"] = str(error)
    return texts


def bounds_differ(info):
    """num_tokens_bound is not what the other domain says: told on both sides before a row is served."""
    with Workspace(SMALL, EPConfig(CAPACITY, ranks_per_domain=2), device="cpu") as workspace:
        layer, case = MoELayer(SMALL, workspace), make_case(0, SMALL, info.ep_size, 4)
        try:
            serve(layer, case, info.ep_rank, bound=4 + info.ep_rank // 2)
        except MegaMoEError as error:
            told = str(error)
        workspace.reset()
        return {"told": told, "mended": agrees(layer, case, info, 2)}


def other_layers(info):
    """Domain 1 calls another layer of the same shape: told on both sides, nothing of it is served; reset() mends."""
    results = {}
    for limit in (None, 4):
        with Workspace(SMALL, EPConfig(CAPACITY, ranks_per_domain=2, domain_tokens=limit), device="cpu") as workspace:
            layers = MoELayer(SMALL, workspace), MoELayer(SMALL, workspace)
            case, told = make_case(0, SMALL, info.ep_size, 4), None
            out = torch.ones(4, SMALL.hidden, dtype=torch.bfloat16)
            try:
                serve(layers[info.ep_rank // 2], case, info.ep_rank, out=out)
            except MegaMoEError as error:
                told = str(error)
            workspace.reset()
            mended = all(agrees(layer, case, info, 2) for layer in layers)
            results[str(limit)] = {"told": told, "spoiled": bool(out.isnan().all()), "mended": mended}
    return results


def vanished(info):
    """Domain 1 stays away from a call: the others end at their deadline and name it; reset() mends all."""
    results = {}
    for limit in (None, 4):  # with the exchange itself, and with the counts before it
        ep_config = EPConfig(CAPACITY, ranks_per_domain=2, domain_tokens=limit, arrive_deadline_s=2.0)
        workspace = Workspace(SMALL, ep_config, device="cpu")
        layer = MoELayer(SMALL, workspace)
        case = make_case(0, SMALL, info.ep_size, 4)
        serve(layer, case, info.ep_rank)
        begin, told, out = time.monotonic(), None, torch.ones(4, SMALL.hidden, dtype=torch.bfloat16)
        if info.ep_rank < 2:
            try:
                serve(layer, case, info.ep_rank, out=out)
            except MegaMoEError as error:
                told = {"error": str(error), "record": list(error.record), "seconds": time.monotonic() - begin,
                        "spoiled": bool(out.isnan().all())}  # fmt: skip
            try:
                layer.check()
            except MegaMoEError as error:
                told["check"] = str(error)
        else:
            time.sleep(2.7)
        workspace.reset()
        results[str(limit)] = {"told": told, "mended": agrees(layer, case, info, 2)}
        workspace.close()
    return results


def main():
    torch.set_num_threads(1)
    info = init_process_group("gloo", timeout_s=60.0)
    for job in sys.argv[1:]:
        result = {"job": job, "rank": info.ep_rank, **globals()[job](info)}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    if "vanished" in sys.argv:
        os._exit(0)  # groups broken by design; a tidy shutdown of them is not under test
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
