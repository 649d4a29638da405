"""How a launch is cut up: the token block, the order of the tiles, the size of a combine item.

All choices come from values that are equal on all ranks, or concern one rank alone.
"""

import math
from typing import NamedTuple

TOKENS_ON_M = 128
SPLITS_WEIGHTS = 192
TILES = {"fp8": (8, 16, 32, 64, TOKENS_ON_M), "mxfp4": (8, 16, 32, 64, 96, SPLITS_WEIGHTS, TOKENS_ON_M)}
"""Tokens of a tile that the kernel is built for, by weight format, for ever more rows an expert. Weights lie on the
wgmma M side and tokens on N, but in tiles of TOKENS_ON_M. MXFP4 weights are decoded into registers, and only M may
come from there (112 tokens of a whole weight block spill). In tiles of SPLITS_WEIGHTS a pair of CTAs splits a weight
block: it is decoded once for twice the rows (csrc/gemm/mxfp4_split.cuh). For TOKENS_ON_M weights are decoded ahead,
into FP8 images in the local workspace (csrc/gemm/decode_ahead.cuh)."""

DECODE_AHEAD_ROWS = 750
"""Rows wanted, of an expert, above which MXFP4 weights are decoded ahead. For fewer, the tiles in progress read more
decoded weights than the L2 cache holds: HBM carries them twice (benchmarks/notes/0007, 0010)."""

BLOCK_TOKENS = tuple(sorted(set().union(*TILES.values())))
COMBINE_STEP = 256
"""Columns that a warp sums at once."""


class Cut(NamedTuple):
    """How a launch is cut up: KernelParams says what each number is; block_tokens is the kernel's own."""

    block_tokens: int
    order_group: int
    order_lag: int
    prefetch_stages: int
    decode_lag: int
    combine_columns: int
    combine_chunks: int


def cut_launch(config, ep_size: int, num_tokens_bound: int, num_warps: int) -> Cut:
    """All choices of this file, for a call of at most num_tokens_bound tokens on each of ep_size ranks and num_warps
    warps that combine."""
    block = choose_block_tokens(config, ep_size, num_tokens_bound)
    columns = combine_columns(config.hidden, num_tokens_bound, num_warps)
    stages = prefetch_stages(config, ep_size, num_tokens_bound, block)
    group, lag = tile_order(block)
    decode_lag = math.ceil(2 * block * group * lag / rows_an_expert(config, ep_size, num_tokens_bound))
    return Cut(block, group, lag, stages, decode_lag, columns, math.ceil(config.hidden / columns))


def rows_an_expert(config, ep_size: int, num_tokens_bound: int) -> float:
    """Rows of a routed expert on average."""
    return max(num_tokens_bound, 1) * ep_size * config.topk / config.num_experts


def rows_wanted(config, ep_size: int, num_tokens_bound: int) -> float:
    """Rows of a routed expert on average, r, and 1.5 standard deviations of a uniform routing: r + 1.5 sqrt(r).

    A shared expert may have more, and take several blocks; its weights come from the L2 cache after the first, since
    blocks of one expert run together."""
    rows = rows_an_expert(config, ep_size, num_tokens_bound)
    return rows + 1.5 * math.sqrt(rows)


def choose_block_tokens(config, ep_size: int, num_tokens_bound: int) -> int:
    """Tokens of a tile for a call of at most num_tokens_bound tokens on each of ep_size ranks.

    The smallest that holds rows_wanted: a second block of the same expert reads its weights again. Formats without a
    kernel are planned as FP8.
    """
    wanted = rows_wanted(config, ep_size, num_tokens_bound)
    tiles = TILES.get(config.weight_format, TILES["fp8"])
    if decodes_ahead(config.weight_format, TOKENS_ON_M):
        if wanted > DECODE_AHEAD_ROWS:
            return TOKENS_ON_M
        tiles = tiles[:-1]
    return next((block for block in tiles if block >= wanted), tiles[-1])


def decodes_ahead(weight_format: str, block_tokens: int) -> bool:
    """The kernel of that tile first turns the weights into FP8 images in the local workspace."""
    return weight_format == "mxfp4" and block_tokens == TOKENS_ON_M


def reachable_tiles(config, ep_size: int, capacity: int) -> tuple[int, ...]:
    """Every tile that calls of 1 to `capacity` tokens a rank can choose, for ever more rows."""
    tiles = TILES.get(config.weight_format, TILES["fp8"])
    first, last = (tiles.index(choose_block_tokens(config, ep_size, bound)) for bound in (1, capacity))
    return tiles[first : last + 1]


def in_expert_order(block_tokens: int) -> bool:
    """Pairs of CTAs work on tiles of that size, and rows are copied into expert order before."""
    return block_tokens in (TOKENS_ON_M, SPLITS_WEIGHTS)


def tile_order(block_tokens: int) -> tuple[int, int]:
    """(group, lag) of csrc/sched/order.cuh.

    Tiles of up to 64 tokens: all of linear1, then all of linear2. Above: waves of about two tiles a CTA at intermediate
    2048, linear2 two waves behind; where CTAs work in pairs, a ticket is two tiles.
    """
    if block_tokens <= 64:
        return 1, 1 << 20
    return (8 if in_expert_order(block_tokens) else 16), 2


def prefetch_stages(config, ep_size: int, num_tokens_bound: int, block_tokens: int) -> int:
    """Stages of a CTA's likely first tile to ask the L2 cache for while the plan is made; 0 where the guess is poor.

    The guess is one token block an expert: most experts have a row, and few have more than a block. 8 stages of 132
    CTAs are 35 MB, what HBM brings in 12 us, and fit the L2 cache.
    """
    rows = rows_an_expert(config, ep_size, num_tokens_bound)
    return 8 if 1.2 <= rows <= block_tokens else 0


def combine_columns(hidden: int, num_tokens_bound: int, num_warps: int) -> int:
    """Columns of one combine item, a multiple of COMBINE_STEP: one or two items for each of num_warps warps where
    there are tokens enough, more where a whole row is an item: most tokens become complete with the last experts, and
    the call ends when the slowest warp has summed its own."""
    steps = math.ceil(hidden / COMBINE_STEP)
    steps_a_warp = max(1, math.ceil(max(num_tokens_bound, 1) * hidden / COMBINE_STEP / (2 * num_warps)))
    chunks = math.ceil(steps / min(steps_a_warp, steps))
    return math.ceil(steps / chunks) * COMBINE_STEP
