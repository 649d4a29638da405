"""A model whose experts hold, in plain numbers, what a number format keeps of their weights: eager's fair reference."""

from pathlib import Path

import torch
from torch import nn

from megamoe import layer_checks as checks
from megamoe.checkpoint import Checkpoint, load_experts
from megamoe.config import MoEConfig
from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.experts import find_experts, put_weights, weights_of
from megamoe.quant.fp8 import dequantize_blocks
from megamoe.steps import ExpertWeights


def dequantized(config: MoEConfig, weights: ExpertWeights) -> ExpertWeights:
    """fp32 weights that mean the same as the quantized ones; floating ones as they are."""
    if weights.linear1_sf is None:
        return weights
    dequantize = dequantize_blocks
    if config.weight_format == "mxfp4":
        from megamoe.quant.mxfp4 import dequantize
    linear1, linear2 = (
        torch.stack([dequantize(values[e], sf[e]) for e in range(len(values))])
        for values, sf in ((weights.linear1, weights.linear1_sf), (weights.linear2, weights.linear2_sf))
    )
    return weights._replace(linear1=linear1, linear1_sf=None, linear2=linear2, linear2_sf=None)


@torch.no_grad()
def round_experts(model: nn.Module, weight_format: str) -> None:
    """Quantize and dequantize the experts' parameters in place, layer by layer."""
    for info in find_experts(model, weight_format).values():
        config, plain = info.config, weights_of(info, range(info.config.num_experts))
        biases = {"linear1_bias": plain.linear1_bias, "linear2_bias": plain.linear2_bias}
        quantized = checks.expert_weights(
            config, config.num_experts, plain.linear1.device, "", plain.linear1, None, plain.linear2, None, **biases
        )
        put_weights(info, dequantized(config, quantized))


def load_dequantized(
    path: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> nn.Module:
    """A causal language model in eval mode with all its weights, block-FP8 ones dequantized; errors as in dense.py.

    For models that fit on one device whole: what serves only this rank's experts is load_without_experts and enable.
    """
    model, checkpoint = load_without_experts(path, dtype=dtype, device=device), Checkpoint(path)
    for name, info in find_experts(model, "bf16").items():
        weights = load_experts(
            checkpoint, -1, range(info.config.num_experts), config=info.config, sizes=info.sizes, dtype=dtype,
            device=device, prefix=name,
        )  # fmt: skip
        put_weights(info, weights)
    return model
