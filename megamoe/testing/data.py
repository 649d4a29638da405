"""Seeded weights, tokens and routings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megamoe.config import MoEConfig
from megamoe.quant import mxfp4
from megamoe.quant.fp8 import quantize_blocks, quantize_rows
from megamoe.steps import ExpertWeights, RankInput

ROUTINGS = ("uniform", "zipf", "one_expert", "none", "holes", "duplicates", "few_experts")


class Case(NamedTuple):
    """weights, inputs: one per rank made (all of ep_size unless `ranks` chose some), in the order of ``ranks``."""

    config: MoEConfig
    ep_size: int
    ranks: tuple[int, ...]
    weights: list[ExpertWeights]
    inputs: list[RankInput]


def make_case(
    seed: int,
    config: MoEConfig,
    ep_size: int,
    num_tokens: int | Sequence[int],
    routing: str = "uniform",
    device: torch.device | str = "cpu",
    *,
    ranks: Sequence[int] | None = None,
    prequantized: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Weights and inputs of all ranks, or of ``ranks`` only: each rank has its own stream, so that processes agree.

    num_tokens: one number for all ranks, or one per rank. prequantized: x as (e4m3, sf) instead of ``dtype``.
    dtype: of x, and of the weights in bf16 format. The same seed gives other numbers on another device type.
    routing: see make_routing.
    """
    ranks = tuple(range(ep_size)) if ranks is None else tuple(ranks)
    counts = [num_tokens] * ep_size if isinstance(num_tokens, int) else list(num_tokens)
    weights = [make_weights(seed, config, ep_size, rank, device, dtype) for rank in ranks]
    inputs = [make_input(seed, config, rank, counts[rank], routing, device, prequantized, dtype) for rank in ranks]
    return Case(config, ep_size, ranks, weights, inputs)


def _generator(device, *key: int) -> torch.Generator:
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator(device=device).manual_seed(seed)


def make_weights(
    seed: int, config: MoEConfig, ep_size: int, ep_rank: int, device="cpu", dtype: torch.dtype = torch.bfloat16
) -> ExpertWeights:
    """Normal weights scaled by 1 / sqrt(fan-in), one expert at a time so that no fp32 copy of all experts exists.

    Shared experts are others on each rank, unlike a model's: a token that went to another rank's shows."""
    generator = _generator(device, seed, 1, ep_rank)
    parts = ([], [], [], [])
    for _ in range(config.num_local_experts(ep_size) + config.num_shared_experts):
        shapes = (2 * config.intermediate, config.hidden), (config.hidden, config.intermediate)
        for i, shape in enumerate(shapes):
            matrix = torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5
            values, sf = _QUANTIZE[config.weight_format](matrix, dtype)
            parts[2 * i].append(values)
            parts[2 * i + 1].append(sf)
    weights = ExpertWeights(*(None if part[0] is None else _stack(part) for part in parts))
    if not config.bias:
        return weights
    biases = [
        torch.randn(len(parts[0]), columns, generator=generator, device=device) / 2
        for columns in (2 * config.intermediate, config.hidden)
    ]
    return weights._replace(linear1_bias=biases[0], linear2_bias=biases[1])


_QUANTIZE = {
    "fp8": lambda matrix, dtype: quantize_blocks(matrix),
    "mxfp4": lambda matrix, dtype: mxfp4.quantize(matrix),
    "bf16": lambda matrix, dtype: (matrix.to(dtype), None),
}


def _stack(tensors: list[Tensor]) -> Tensor:
    dtype = tensors[0].dtype
    return (
        torch.stack([t.view(torch.uint8) for t in tensors]).view(dtype) if dtype.itemsize == 1 else torch.stack(tensors)
    )


def make_input(
    seed: int, config: MoEConfig, ep_rank: int, num_tokens: int, routing: str = "uniform", device="cpu",
    prequantized: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> RankInput:  # fmt: skip
    """Normal tokens and a routing for one rank; topk_weights sum to 1 over a token's slots, as a router's do."""
    generator = _generator(device, seed, 2, ep_rank)
    x = torch.randn(num_tokens, config.hidden, generator=generator, device=device).to(dtype)
    x, x_sf = quantize_rows(x) if prequantized else (x, None)
    topk_idx = make_routing(generator, config, num_tokens, routing, seed)
    topk_weights = torch.rand(num_tokens, config.topk, generator=generator, device=device) + 0.05
    return RankInput(x, x_sf, topk_idx, topk_weights / topk_weights.sum(1, keepdim=True))


def make_routing(generator: torch.Generator, config: MoEConfig, num_tokens: int, routing: str, seed: int = 0) -> Tensor:
    """topk_idx int32 [num_tokens, topk].

    uniform: distinct experts, all equally likely. zipf: distinct experts drawn without replacement, the i-th most
    popular with weight 1 / i; popularity is the same on all ranks. one_expert: every slot names the same expert. none:
    every slot -1.
    holes: uniform with a third of the slots -1 and every fourth token without any. duplicates: drawn with replacement.
    few_experts: only a quarter of the experts get tokens. Slots beyond num_experts are -1.
    """
    device, num_experts = generator.device, config.num_experts
    shape = (num_tokens, config.topk)
    if routing == "none":
        return torch.full(shape, -1, dtype=torch.int32, device=device)
    if routing == "one_expert":
        return torch.full(shape, seed % num_experts, dtype=torch.int32, device=device)
    if routing == "duplicates":
        return torch.randint(num_experts, shape, generator=generator, device=device, dtype=torch.int32)
    if routing not in ROUTINGS:
        raise ValueError(f"routing={routing!r} must be one of {', '.join(ROUTINGS)}")
    popularity = torch.zeros(num_experts, device=device)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)).to(device)
    if routing == "zipf":
        popularity[order] = -torch.arange(1, num_experts + 1, device=device).log()
    if routing == "few_experts":
        popularity[order[max(num_experts // 4, 1) :]] = float("-inf")
    # Gumbel top-k: adding Gumbel noise to log-weights and taking the largest is drawing without replacement
    noise = torch.rand(num_tokens, num_experts, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
    keys = popularity - torch.log(-torch.log(noise))
    best = keys.topk(min(config.topk, num_experts), dim=1)
    topk_idx = torch.full(shape, -1, dtype=torch.int32, device=device)
    picked = best.indices.masked_fill(best.values.isinf(), -1).to(torch.int32)
    topk_idx[:, : picked.shape[1]] = picked
    if routing == "holes":
        topk_idx[torch.rand(shape, generator=generator, device=device) < 1 / 3] = -1
        topk_idx[3::4] = -1
    return topk_idx
