"""Every kernel configuration that exists, said once: the engine picks from it, `compile`, `doctor` and the tests build
all of it."""

from typing import NamedTuple

from megamoe.layout import BLOCK_TOKENS


class KernelBuild(NamedTuple):
    """name: for people. The rest are the arguments of megamoe_cuda.compile.compile_kernel."""

    name: str
    source: str
    entry: str
    defines: dict[str, int]


def kernel_build(block_tokens: int) -> KernelBuild:
    """The fused kernel for tiles of `block_tokens` rows, one of layout.BLOCK_TOKENS."""
    return KernelBuild(f"mega_moe, {block_tokens} tokens", "mega_moe.cu", "mega_moe", {"BLOCK_TOKENS": block_tokens})


def kernel_builds() -> tuple[KernelBuild, ...]:
    return tuple(kernel_build(block_tokens) for block_tokens in BLOCK_TOKENS)
