"""Which modules of a transformers model are experts that megamoe can serve, and why not, for the others."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megamoe.config import MoEConfig

TOPK_FIELDS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Experts:
    """One experts module: qualified name, device its tokens are on, dtype of its weights."""

    name: str
    module: nn.Module
    config: MoEConfig
    device: torch.device
    dtype: torch.dtype


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of those whose forward transformers dispatches: its decorator leaves these flags on them."""
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "is_transposed"):
            yield name, module


def find_experts(model: nn.Module, weight_format: str) -> dict[str, Experts]:
    """Every MoE layer's experts by name, in the model's order. ValueError with all reasons if one cannot be served."""
    modules = dict(experts_modules(model))
    if not modules or not hasattr(model, "set_experts_implementation"):
        raise ValueError(f"model={type(model).__name__} has no MoE layer that transformers dispatches")
    refused = {name: reasons for name, module in modules.items() if (reasons := refusals(module))}
    if refused:
        lines = "\n".join(f"  - {name} ({type(modules[name]).__name__}): {'; '.join(r)}" for name, r in refused.items())
        raise ValueError(f"model={type(model).__name__} has experts that megamoe cannot serve:\n{lines}")
    # Parameters on meta are experts still to come from a checkpoint; the tokens are where the rest of the model is
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "meta alone"
        raise ValueError(f"model={type(model).__name__} is on {names}; put all of it on the one device of this rank")
    return {name: _describe(name, module, weight_format, *devices) for name, module in modules.items()}


def refusals(module: nn.Module) -> list[str]:
    """Why a module computes something else than SiLU-GLU on rows [gate; up]; empty if it does not."""
    reasons = []
    if module.is_transposed:
        reasons.append("weights are transposed ([num_experts, in, out])")
    if not module.is_concatenated:
        reasons.append("gate and up are interleaved")
    if module.has_bias:
        reasons.append("experts have biases")
    if not module.has_gate:
        reasons.append("experts have no gate")
    activation = type(getattr(module, "act_fn", None)).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        reasons.append(f"activation {activation} is not SiLU")
    if getattr(getattr(type(module), "_apply_gate", None), "__name__", None) != "_default_apply_gate":
        reasons.append("the model brings its own gating")
    if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in ("gate_up_proj", "down_proj")):
        reasons.append("no parameters gate_up_proj and down_proj")
    elif module.gate_up_proj.dtype not in (torch.bfloat16, torch.float32):
        reasons.append(f"weights are {module.gate_up_proj.dtype}; convert the model to bfloat16 or float32")
    if _topk(module) is None:
        reasons.append(f"config has none of {', '.join(TOPK_FIELDS)}")
    return reasons


def _topk(module: nn.Module) -> int | None:
    values = (getattr(module.config, field, None) for field in TOPK_FIELDS)
    return next((value for value in values if isinstance(value, int)), None)


def _describe(name: str, module: nn.Module, weight_format: str, device: torch.device) -> Experts:
    num_experts, double_intermediate, hidden = module.gate_up_proj.shape
    config = MoEConfig(hidden, double_intermediate // 2, num_experts, _topk(module), weight_format=weight_format)
    return Experts(name, module, config, device, module.gate_up_proj.dtype)
