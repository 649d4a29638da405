"""How a launch is cut up: the token block, the order of the tiles, the size of a combine item.

All choices come from values that are equal on all ranks, or concern one rank alone.
"""

import math

BLOCK_TOKENS = (8, 16, 32, 64, 128)
"""Tokens of a tile. Up to 64 the weights lie on the wgmma M side and tokens on N; 128 puts the tokens on M."""

MAX_WEIGHTS_ON_M = 64
COMBINE_STEP = 256
"""Columns that a warp sums at once."""


def choose_block_tokens(config, ep_size: int, num_tokens_bound: int) -> int:
    """Tokens of a tile for a call of at most num_tokens_bound tokens on each of ep_size ranks.

    With r rows an expert on average, the smallest block that holds r and 1.5 standard deviations of a uniform routing:
    a second block of the same expert reads its weights again. Beyond 64, tokens go to the wgmma M side.
    """
    rows = max(num_tokens_bound, 1) * ep_size * config.topk / config.num_experts
    wanted = rows + 1.5 * math.sqrt(rows)
    return next((block for block in BLOCK_TOKENS if block >= wanted), BLOCK_TOKENS[-1])


def tile_order(block_tokens: int) -> tuple[int, int]:
    """(group, lag) of csrc/sched/order.cuh.

    Few rows an expert: all of linear1, then all of linear2. Many: waves of 8 pairs of blocks (two rounds of the GPU at
    intermediate 2048), linear2 two waves behind.
    """
    return (1, 1 << 20) if block_tokens <= MAX_WEIGHTS_ON_M else (8, 2)


def prefetch_stages(config, ep_size: int, num_tokens_bound: int) -> int:
    """Stages of a CTA's likely first tile to ask the L2 cache for while the plan is made; 0 where the guess is poor.

    The guess is one token block an expert: most experts have a row, and few have more than a block. 8 stages of 132
    CTAs are 35 MB, what HBM brings in 12 us, and fit the L2 cache.
    """
    rows = max(num_tokens_bound, 1) * ep_size * config.topk / config.num_experts
    return 8 if 1.2 <= rows <= BLOCK_TOKENS[-1] else 0


def combine_columns(hidden: int, num_tokens_bound: int, num_warps: int) -> int:
    """Columns of one combine item, a multiple of COMBINE_STEP: two items or more for each of num_warps warps, since
    most tokens become complete with the last experts and the call ends when the slowest warp has summed its own."""
    steps = math.ceil(hidden / COMBINE_STEP)
    steps_a_warp = max(1, math.ceil(max(num_tokens_bound, 1) * hidden / COMBINE_STEP / (2 * num_warps)))
    chunks = math.ceil(steps / min(steps_a_warp, steps))
    return math.ceil(steps / chunks) * COMBINE_STEP
