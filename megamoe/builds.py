"""Every kernel configuration that exists, said once: the engine picks from it, `compile`, `doctor` and the tests build
all of it."""

from typing import NamedTuple

from megamoe.layout import BLOCK_TOKENS
from megamoe_cuda.compile import debug_level

DEBUG_SPILL_BYTES = 320
"""What a debug build may spill, stores and loads together; a shipped build nothing."""


class KernelBuild(NamedTuple):
    """name: for people. The rest are the arguments of megamoe_cuda.compile.compile_kernel."""

    name: str
    source: str
    entry: str
    defines: dict[str, int]


def kernel_build(block_tokens: int) -> KernelBuild:
    """The fused kernel for tiles of `block_tokens` rows, one of layout.BLOCK_TOKENS; with MEGAMOE_DEBUG set, its debug
    build."""
    name, defines = f"mega_moe, {block_tokens} tokens", {"BLOCK_TOKENS": block_tokens}
    if debug_level():
        name, defines = f"{name}, debug", defines | {"DEBUG_CHECKS": 1}
    return KernelBuild(name, "mega_moe.cu", "mega_moe", defines)


def kernel_builds() -> tuple[KernelBuild, ...]:
    return tuple(kernel_build(block_tokens) for block_tokens in BLOCK_TOKENS)
