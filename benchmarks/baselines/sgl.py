"""Adapter for an optional rival, sgl-deep-gemm's fused FP8 kernel for SM90. Absent means "not run: not installed",
never a pass.

Only its public functions are called. Timed is the fused call alone: quantizing the tokens and copying them into its
symmetric buffers happens once per routing, outside; with input 'bf16' that step is inside. One symmetric buffer a
routing, so that a graph can cycle through them.
"""

import importlib.metadata
import importlib.util
from typing import ClassVar

import torch.distributed as dist

from benchmarks.inputs import RankTokens, make_weights

PACKAGE = "sgl-deep-gemm"


def version() -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def available(setup) -> str | None:
    """None where it can run, else the reason it cannot."""
    if version() is None or importlib.util.find_spec("deep_gemm") is None:
        return f"not installed ({PACKAGE} 0.1.5 with apache-tvm-ffi 0.1.11 loads beside torch 2.11)"
    if setup.device.type != "cuda":
        return "it needs a GPU"
    if setup.virtual_ranks is not None or not dist.is_initialized():
        return "it needs one process a rank: start with torchrun"
    try:
        import deep_gemm
    except Exception as error:  # a wheel for another torch fails in its own ways; the run must go on and say so
        return f"import failed: {type(error).__name__}: {error}"
    if not hasattr(deep_gemm, "get_symm_buffer_for_sm90_mega_moe"):
        return f"{PACKAGE} {version()} has no get_symm_buffer_for_sm90_mega_moe"
    return None


class SglMegaMoE:
    """See implementations.py for the interface."""

    weight_format, quantized, inputs = "fp8", True, ("prequantized", "bf16")
    # It quantizes tokens and h by rules of its own: 2.3e-2 to 2.4e-2 from the specification (8, 512 and 2048 tokens)
    limits: ClassVar = {"max_rel_l2": 5e-2, "max_row_rel_l2": 8e-2}

    def __init__(self, setup, case):
        import deep_gemm

        self._lib, self._setup, self._case = deep_gemm, setup, case
        self.name = f"{PACKAGE} {version()}"
        weights = make_weights(case, setup.experts_of(case, setup.ranks_here[0]), setup.seed, setup.device)
        self._linear1, self._linear2 = deep_gemm.transform_weights_for_mega_moe_sm90(
            (weights.linear1, weights.linear1_sf), (weights.linear2, weights.linear2_sf)
        )
        self._buffers: tuple[int, list] = (-1, [])

    def _buffers_for(self, num_tokens: int, count: int) -> list:
        capacity, buffers = self._buffers
        if capacity != num_tokens or len(buffers) < count:
            self._free()
            case = self._case
            buffers = [
                self._lib.get_symm_buffer_for_sm90_mega_moe(
                    dist.group.WORLD, case.num_experts, max(num_tokens, 1), case.topk, case.hidden, case.intermediate
                )
                for _ in range(count)
            ]
            self._buffers = num_tokens, buffers
        return buffers

    def calls(self, routings: list[list[RankTokens]], num_tokens: int, input_kind: str, outs) -> list:
        buffers = self._buffers_for(num_tokens, len(routings))

        def call_of(tokens: RankTokens, buffer, out):
            topk_idx = tokens.topk_idx.int().contiguous()

            def fill():
                self._lib.mega_moe_pre_dispatch_sm90(
                    tokens.hidden_states,
                    topk_idx,
                    tokens.topk_weights,
                    buffer.x,
                    buffer.x_sf,
                    buffer.topk_idx,
                    buffer.topk_weights,
                    tokens.hidden_states.shape[0],
                )

            def fused():
                self._lib.fp8_mega_moe(
                    out, self._linear1, self._linear2, buffer, activation_clamp=self._case.swiglu_limit
                )

            def both():
                fill()
                fused()

            fill()
            return both if input_kind == "bf16" else fused

        return [call_of(tokens[0], buffer, out[0]) for tokens, buffer, out in zip(routings, buffers, outs)]

    def check(self) -> None:
        pass

    def note(self, num_tokens: int) -> str | None:
        return None

    def _free(self) -> None:
        for buffer in self._buffers[1]:
            buffer.destroy()
        self._buffers = (-1, [])

    def close(self) -> None:
        self._free()
        self._linear1 = self._linear2 = None
