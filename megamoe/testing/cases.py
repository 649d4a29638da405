"""Named sizes, and random cases that meet every edge the layer must get right."""

import random
from typing import NamedTuple

import torch

from megamoe.config import MoEConfig
from megamoe.testing.data import ROUTINGS, Case, make_case

CONFIGS = {
    "tiny": MoEConfig(hidden=256, intermediate=128, num_experts=8, topk=2),
    "small": MoEConfig(hidden=512, intermediate=256, num_experts=16, topk=4),
    "flash64": MoEConfig(hidden=4096, intermediate=2048, num_experts=64, topk=6),
    "v3_64": MoEConfig(hidden=7168, intermediate=2048, num_experts=64, topk=8),
    "flash256": MoEConfig(hidden=4096, intermediate=2048, num_experts=256, topk=6),
}


class Drawn(NamedTuple):
    """case: ready to run; capacity: smallest legal num_max_tokens_per_rank; text: what was drawn, for a failing
    test."""

    case: Case
    capacity: int
    text: str


def random_case(
    seed: int,
    *,
    ep_sizes: tuple[int, ...] = (1, 2, 4, 8),
    sizes: tuple[int, ...] = (128, 256, 384),
    max_tokens: int = 40,
    max_local_experts: int = 8,
    weight_format: str = "fp8",
    device: torch.device | str = "cpu",
) -> Drawn:
    """One case from a seed: different token counts on each rank, some zero; any routing; sometimes NaN or infinity in
    a token, sometimes num_tokens below the rows given, prequantized x, int64 ids, bf16 weights, a SwiGLU clamp."""
    draw = random.Random(seed)
    ep_size = draw.choice(ep_sizes)
    config = MoEConfig(
        hidden=draw.choice(sizes),
        intermediate=draw.choice(sizes),
        num_experts=ep_size * draw.randint(1, max_local_experts),
        topk=draw.choice((1, 2, 3, 4, 6, 8, 16)),
        weight_format=weight_format,
        swiglu_limit=draw.choice((None, None, 0.5, 7.0)),
    )
    counts = [draw.choice((0, 1, draw.randint(0, max_tokens), max_tokens)) for _ in range(ep_size)]
    routing = draw.choice(ROUTINGS)
    prequantized = config.has_e4m3_activations and draw.random() < 0.3
    case = make_case(seed, config, ep_size, counts, routing, device, prequantized=prequantized)
    poisoned, partial = draw.random() < 0.3, draw.random() < 0.4
    wide_ids, narrow_weights = draw.random() < 0.5, draw.random() < 0.5
    inputs = []
    for rank_input, count in zip(case.inputs, counts, strict=True):
        if poisoned and count and not prequantized:
            rank_input.x[draw.randrange(count), draw.randrange(config.hidden)] = draw.choice(
                (float("nan"), float("inf"))
            )
        if partial:
            num_tokens = torch.tensor([draw.randint(0, count)], dtype=torch.int32, device=device)
            rank_input = rank_input._replace(num_tokens=num_tokens)
        if wide_ids:
            rank_input = rank_input._replace(topk_idx=rank_input.topk_idx.long())
        if narrow_weights:
            rank_input = rank_input._replace(topk_weights=rank_input.topk_weights.bfloat16())
        inputs.append(rank_input)
    text = (
        f"seed={seed} ep_size={ep_size} {config} num_tokens={counts} routing={routing} prequantized={prequantized} "
        f"poisoned={poisoned} partial={partial}"
    )
    return Drawn(case._replace(inputs=inputs), max(*counts, 1), text)
