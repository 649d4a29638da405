"""Every kernel configuration that exists, said once: the engine picks from it, `compile`, `doctor` and the tests build
all of it."""

from typing import NamedTuple

from megamoe.plan.tiles import TILES, choose_block_tokens, reachable_tiles
from megamoe_cuda.compile import debug_level

DEBUG_SPILL_BYTES = 320
"""What a debug build may spill, stores and loads together; a shipped build nothing."""


class KernelBuild(NamedTuple):
    """name: for people. The rest are the arguments of megamoe_cuda.compile.compile_kernel."""

    name: str
    source: str
    entry: str
    defines: dict[str, int | str]


def needs_extras(config) -> bool:
    """A layer of `config` asks for what only builds with -DEXTRAS do (csrc/extras.cuh)."""
    return config.activation != "swiglu" or config.bias or config.num_shared_experts > 0


def kernel_key(config, block_tokens: int) -> tuple[str, int, bool]:
    """(weight format, tokens of a tile, extras): which kernel serves a layer of `config` with such tiles."""
    return config.weight_format, block_tokens, needs_extras(config)


def kernel_build(
    block_tokens: int, weight_format: str = "fp8", extras: bool = False, *, plans: bool = False
) -> KernelBuild:
    """The fused kernel for tiles of `block_tokens` rows, one of TILES[weight_format]; with MEGAMOE_DEBUG set, its debug
    build. extras: for layers that need them; plans: for workspaces that may be given an expert plan."""
    defines, name = {"BLOCK_TOKENS": block_tokens}, f"mega_moe, {block_tokens} tokens"
    if weight_format == "mxfp4":
        defines, name = defines | {"WEIGHT_FORMAT": "kMxfp4"}, f"mega_moe mxfp4, {block_tokens} tokens"
    if extras:
        defines, name = defines | {"EXTRAS": 1}, f"{name}, extras"
    if plans:
        defines, name = defines | {"PLANS": 1}, f"{name}, with plans"
    if debug_level():
        name, defines = f"{name}, debug", defines | {"DEBUG_CHECKS": 1}
    return KernelBuild(name, "mega_moe.cu", "mega_moe", defines)


def kernel_builds(extras: bool = False, plans: bool = False) -> tuple[KernelBuild, ...]:
    return tuple(kernel_build(block, form, extras, plans=plans) for form, tiles in TILES.items() for block in tiles)


def builds_of(configs, ep_size: int, capacity: int) -> list[tuple[str, int, bool]]:
    """kernel_key of every kernel that calls of up to `capacity` tokens a rank can choose."""
    return sorted({kernel_key(c, block) for c in configs for block in reachable_tiles(c, ep_size, capacity)})


def check_blocks(configs, ep_size: int, ep_config) -> None:
    """ValueError where one rank could have more blocks of tokens than the kernel counts, in 16 bits."""
    capacity = ep_config.num_max_tokens_per_rank
    for c in configs:
        rows = capacity * (ep_size * c.topk + c.num_shared_experts)
        block = choose_block_tokens(c, ep_size, capacity)
        if rows // block + ep_config.num_slots(c, ep_size) + c.num_shared_experts > 65535:
            raise ValueError(
                f"num_max_tokens_per_rank={capacity} on {ep_size} ranks with topk={c.topk} can put {rows} rows on one "
                f"rank, more than {65535 * block}; lower num_max_tokens_per_rank"
            )
