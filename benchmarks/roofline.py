"""The time of a MoE layer call at practical rates, from the routing that was actually drawn.

Per GPU, three resources work at once and the slowest sets the floor:
  HBM      every active expert's weights once, plus activations that do not stay in L2
  tensor   6 * hidden * intermediate operations a (token, expert) pair: linear1 has 2 * intermediate outputs, linear2
           hidden, 2 per MAC
  NVLink   a token's FP8 row leaves once for each other rank that holds one of its experts and one bf16 row returns
No latency, launch or synchronisation is counted. The rates are what is reached in practice, not peaks: a cell can beat
the floor slightly.
"""

from dataclasses import dataclass
from math import comb

import torch

from megamoe.plan.predict import FP8_ROW_BYTES, row_bytes, row_flop, token_bytes

BLOCK = 128
# e4m3 with one fp32 scale per 128x128 block; e2m1 with one byte of scale per 32
WEIGHT_BYTES = {"fp8": 1 + 4 / (BLOCK * BLOCK), "mxfp4": 1 / 2 + 1 / 32}
# activations below this are taken to stay in the 50 MB L2 beside the streaming weights
L2_KEEP_BYTES = 25e6


@dataclass(frozen=True)
class Rates:
    """What the hardware reaches in practice: bytes/s of HBM, dense FP8 operations/s, bytes/s of NVLink one way."""

    hbm_bytes: float
    fp8_flops: float
    nvlink_bytes: float


RATES = {"H100": Rates(3.0e12, 1400e12, 380e9), "H200": Rates(4.3e12, 1400e12, 380e9)}


def rates_of(device_name: str) -> Rates | None:
    """Rates for a device's name, or None where none are known (a CPU, another GPU)."""
    return next((rates for key, rates in RATES.items() if key in device_name), None)


@dataclass(frozen=True)
class Work:
    """One call's work on the busiest GPU (flops: the mean over GPUs, as a rate is quoted)."""

    flops: float
    flops_busiest: float
    weight_bytes: float
    activation_bytes: float
    nvlink_bytes: float
    active_experts_max: float


def count_work(case, topk_idx: list[torch.Tensor], num_gpus: int) -> Work:
    """Count from the routing of all ranks.

    topk_idx: one int tensor [num_tokens, topk] a rank, -1 = unused. num_gpus: ep_size when every rank has its GPU, 1
    when one GPU plays all. active_experts_max counts the experts with a row on the busiest GPU.
    """
    ep_size = len(topk_idx)
    experts_per_gpu = case.num_experts // num_gpus
    ranks_per_gpu = ep_size // num_gpus
    pairs, active, egress, tokens = [0] * num_gpus, [set() for _ in range(num_gpus)], [0.0] * num_gpus, [0] * num_gpus
    for ep_rank, idx in enumerate(topk_idx):
        gpu, idx = ep_rank // ranks_per_gpu, idx.cpu().long()
        tokens[gpu] += idx.shape[0]
        used = idx >= 0
        for other in range(num_gpus):
            here = used & (idx // experts_per_gpu == other)
            pairs[other] += int(here.sum())
            active[other].update(idx[here].unique().tolist())
            if other != gpu:
                crossing = int(here.any(dim=-1).sum()) if idx.shape[0] else 0
                egress[gpu] += crossing * case.hidden * FP8_ROW_BYTES
                egress[other] += crossing * case.hidden * 2
    expert_bytes = 3 * case.hidden * case.intermediate * WEIGHT_BYTES[case.weight_format]
    pair_flops, pair_bytes = (of_row(case.hidden, case.intermediate) for of_row in (row_flop, row_bytes))
    activations = max(p * pair_bytes + t * token_bytes(case.hidden) for p, t in zip(pairs, tokens))
    return Work(
        flops=sum(pairs) * pair_flops / num_gpus,
        flops_busiest=max(pairs) * pair_flops,
        weight_bytes=max(map(len, active)) * expert_bytes,
        activation_bytes=activations if activations > L2_KEEP_BYTES else 0.0,
        nvlink_bytes=max(egress),
        active_experts_max=max(map(len, active)),
    )


def mean_work(works: list[Work]) -> Work:
    """The mean over the routings a measurement cycles through."""
    return Work(*(sum(getattr(work, name) for work in works) / len(works) for name in Work.__dataclass_fields__))


def floor_us(work: Work, rates: Rates) -> tuple[float, str]:
    """(us, the resource that binds: 'hbm', 'tensor' or 'nvlink')."""
    times = {
        "hbm": (work.weight_bytes + work.activation_bytes) / rates.hbm_bytes,
        "tensor": work.flops_busiest / rates.fp8_flops,
        "nvlink": work.nvlink_bytes / rates.nvlink_bytes,
    }
    bound = max(times, key=times.get)
    return times[bound] * 1e6, bound


def expected_active_experts(case, ep_size: int, num_tokens: int) -> float:
    """Experts of one rank that get a row, uniform routing, num_tokens on every rank: each expert is missed by a token
    with 1 - topk/E."""
    return case.num_experts / ep_size * (1 - (1 - case.topk / case.num_experts) ** (num_tokens * ep_size))


def expected_ranks_per_token(case, ep_size: int) -> float:
    """Different ranks among a token's topk distinct experts, uniform routing: ep_size times one less the chance that a
    rank has none."""
    per_rank = case.num_experts // ep_size
    return ep_size * (1 - comb(case.num_experts - per_rank, case.topk) / comb(case.num_experts, case.topk))
