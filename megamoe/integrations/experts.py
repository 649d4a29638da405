"""Which modules of a transformers model are experts that megamoe can serve, and why not, for the others."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config import ACTIVATIONS, BLOCK, MoEConfig
from megamoe.steps import ExpertWeights, swiglu

TOPK_FIELDS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Experts:
    """One experts module: qualified name, device its tokens are on, dtype of its weights.

    config: hidden and intermediate rounded up to 128; sizes: as the model has them.
    """

    name: str
    module: nn.Module
    config: MoEConfig
    sizes: tuple[int, int]
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
    refused = {
        name: reasons for name, module in modules.items() if (reasons := refusals(module) + _adapters(model, name))
    }
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
    """Why a module computes something that MoEConfig cannot say; empty if it does not."""
    reasons = []
    if not module.has_gate:
        reasons.append("experts have no gate")
    elif _activation(module) is None:
        text = f"{type(getattr(module, 'act_fn', None)).__name__}, {type(module).__name__}._apply_gate"
        reasons.append(f"their gating ({text}) is none of {', '.join(ACTIVATIONS)}")
    wanted = ("gate_up_proj", "down_proj", *(("gate_up_proj_bias", "down_proj_bias") if module.has_bias else ()))
    if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in wanted):
        reasons.append(f"no parameters {', '.join(wanted)}")
    elif module.gate_up_proj.dtype not in (torch.bfloat16, torch.float32):
        reasons.append(f"weights are {module.gate_up_proj.dtype}; convert the model to bfloat16 or float32")
    if _topk(module) is None:
        reasons.append(f"config has none of {', '.join(TOPK_FIELDS)}")
    return reasons


def _adapters(model: nn.Module, name: str) -> list[str]:
    """LoRA on an experts module: PEFT wraps it, once or more often, and adds to its weights in the wrapper's forward,
    where a served model would leave it out without a word."""
    holders = [module := model.get_submodule(name)]
    while getattr(module := model.get_submodule(name := name.rpartition(".")[0]), "base_layer", None) is holders[-1]:
        holders.append(module)
    own = {name for holder in holders for name in (*holder._modules, *holder._parameters) if "lora" in name.lower()}
    return [f"LoRA on experts ({', '.join(sorted(own))}); merge it first (PEFT: merge_and_unload)"] if own else []


@torch.no_grad()
def _activation(module: nn.Module) -> tuple[str, float | None] | None:
    """(activation, swiglu_limit) of MoEConfig that give what the module's own gating gives, or None.

    Found by trying, not by the names of classes: about 50 architectures bring their own. Values reach both clamps.
    """
    acc = 8 * torch.randn(16, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    own = acc if module.is_concatenated else acc.unflatten(1, (2, BLOCK)).mT.flatten(1)
    try:
        expected = module._apply_gate(own.contiguous())
    except (AttributeError, RuntimeError, TypeError):  # it wants other inputs: another formula
        return None
    named = [getattr(part, name, None) for part in (module, module.config) for name in ("limit", "swiglu_limit")]
    limits = {None, *(limit for limit in named if isinstance(limit, int | float))}
    for activation in ACTIVATIONS:
        for limit in limits:
            config = MoEConfig(BLOCK, BLOCK, 1, 1, "bf16", swiglu_limit=limit, activation=activation)
            h = swiglu(config, acc, torch.ones(len(acc))).values
            if h.shape == expected.shape and torch.allclose(h, expected, rtol=1e-5, atol=1e-5):
                return activation, limit
    return None


def _topk(module: nn.Module) -> int | None:
    values = (getattr(module.config, field, None) for field in TOPK_FIELDS)
    return next((value for value in values if isinstance(value, int)), None)


def _describe(name: str, module: nn.Module, weight_format: str, device: torch.device) -> Experts:
    num_experts, *matrix = module.gate_up_proj.shape
    hidden, double_intermediate = matrix if module.is_transposed else matrix[::-1]
    sizes = hidden, double_intermediate // 2
    activation, limit = _activation(module)
    config = MoEConfig(
        *(-(-size // BLOCK) * BLOCK for size in sizes), num_experts, _topk(module), weight_format, limit, activation,
        module.has_bias,
    )  # fmt: skip
    return Experts(name, module, config, sizes, device, module.gate_up_proj.dtype)


def expert_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What an experts module keeps its weights in."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def weights_of(info: Experts, local: range) -> ExpertWeights:
    """Some experts of a module as MoELayer.load_weights takes them: gate rows, then up rows; padded with zeros.

    Views of the parameters where they have that form already, else a copy.
    """
    module, (hidden, inter) = info.module, info.sizes
    shard = slice(local.start, local.stop)
    linear1, linear2 = (w.detach()[shard] for w in (module.gate_up_proj, module.down_proj))
    if module.is_transposed:
        linear1, linear2 = linear1.mT, linear2.mT
    biases = [None, None]
    if module.has_bias:
        biases = [b.detach()[shard].float() for b in (module.gate_up_proj_bias, module.down_proj_bias)]
        biases[0] = _pad(_gate_then_up(module, biases[0]), info.config.intermediate - inter).flatten(1)
        biases[1] = _pad(biases[1], info.config.hidden - hidden)
    gate_up = _gate_then_up(module, linear1)
    missing = info.config.hidden - hidden, info.config.intermediate - inter
    linear1 = F.pad(gate_up, (0, missing[0], 0, missing[1])).flatten(1, 2) if any(missing) else gate_up.flatten(1, 2)
    linear2 = F.pad(linear2, (0, missing[1], 0, missing[0])) if any(missing) else linear2
    return ExpertWeights(linear1.contiguous(), None, linear2.contiguous(), None, *biases)


@torch.no_grad()
def put_weights(info: Experts, weights: ExpertWeights) -> None:
    """The inverse of weights_of for all experts of a module: floating weights into its parameters, padding left out."""
    module, (hidden, inter) = info.module, info.sizes
    gate_up = weights.linear1.unflatten(1, (2, -1))[:, :, :inter, :hidden]
    linear1 = gate_up.flatten(1, 2) if module.is_concatenated else gate_up.transpose(1, 2).flatten(1, 2)
    for name, value in (("gate_up_proj", linear1), ("down_proj", weights.linear2[:, :hidden, :inter])):
        value = value.mT if module.is_transposed else value
        parameter = nn.Parameter(value.to(info.dtype).contiguous(), requires_grad=False)
        module.register_parameter(name, parameter)
    if weights.linear1_bias is not None:
        bias = weights.linear1_bias.unflatten(1, (2, -1))[:, :, :inter]
        bias = bias.flatten(1) if module.is_concatenated else bias.transpose(1, 2).flatten(1)
        for name, value in (("gate_up_proj_bias", bias), ("down_proj_bias", weights.linear2_bias[:, :hidden])):
            module.register_parameter(name, nn.Parameter(value.to(info.dtype).contiguous(), requires_grad=False))


def _gate_then_up(module: nn.Module, rows: Tensor) -> Tensor:
    """[n, 2 * intermediate, ...] -> [n, 2, intermediate, ...]"""
    return rows.unflatten(1, (2, -1)) if module.is_concatenated else rows.unflatten(1, (-1, 2)).transpose(1, 2)


def _pad(columns: Tensor, missing: int) -> Tensor:
    return F.pad(columns, (0, missing)).contiguous()
