"""Shared experts of a transformers model as further experts of the layer: enable(fold_shared_experts=True).

The block that holds a module `experts` must hold one `shared_experts` beside it, a gated MLP whose output it adds with
weight 1 (DeepSeek-V3's form). Its intermediate size is k times that of a routed expert: it is the sum of k of these.
While folded, the module gives zero where the model's experts implementation is megamoe's, and its own output elsewhere.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe import layer_checks as checks
from megamoe.config import MoEConfig
from megamoe.integrations.experts import Experts
from megamoe.steps import ExpertWeights

IMPLEMENTATION = "megamoe"
_FOLDED: set[int] = set()  # id of each: an attribute would be copied with the module


def find_shared(model: nn.Module, found: dict[str, Experts]) -> dict[str, tuple[nn.Module, int]]:
    """The shared module of each experts module, and of how many routed experts' size it is. ValueError with all
    reasons if one is missing or computes something else."""
    shared, lines = {}, []
    for name, info in found.items():
        block = model.get_submodule(name.rpartition(".")[0])
        module = getattr(block, "shared_experts", None)
        reason = _refusal(block, module, info)
        if reason:
            lines.append(f"  - {name}: {reason}")
        else:
            shared[name] = module, module.gate_proj.weight.shape[0] // info.sizes[1]
    if lines:
        raise ValueError("fold_shared_experts=True, but these cannot be folded; leave it False:\n" + "\n".join(lines))
    return shared


@torch.no_grad()
def _refusal(block: nn.Module, module: nn.Module | None, info: Experts) -> str | None:
    projections = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(one, nn.Linear) and one.bias is None for one in projections):
        return "no module shared_experts with gate_proj, up_proj and down_proj without biases beside it"
    gate, up, down = (one.weight for one in projections)
    if gate.shape != up.shape or gate.shape[1] != info.sizes[0] or gate.shape[0] % info.sizes[1]:
        routed = [info.sizes[1], info.sizes[0]]
        return f"its shared_experts have gate_proj {list(gate.shape)}, no multiple of a routed expert's {routed}"
    if (info.config.activation, info.config.swiglu_limit, info.config.bias) != ("swiglu", None, False):
        return "its routed experts have another gating than plain SwiGLU, or biases"
    own = [vars(one).get("forward") for one in (module, info.module)]
    if any(forward is not None and getattr(forward, "__func__", None) is not _folded for forward in own):
        return "its modules have a forward of their own, apart from their class"
    if getattr(module, "config", None) is not info.module.config:
        return "its shared_experts do not know the configuration that names the experts implementation"
    # Found by trying, not by the names of classes: the MLP's formula, and that the block adds it as it is
    x = torch.randn(1, 4, info.sizes[0], generator=torch.Generator().manual_seed(0)).to(gate.device, gate.dtype)
    y = module(x)
    if not torch.allclose(y, F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), rtol=1e-2, atol=1e-5):
        return "its shared_experts are no SwiGLU of their weights"
    info.module.forward = lambda hidden_states, *_: torch.zeros_like(hidden_states)
    try:
        total = block(x)
    finally:
        del info.module.forward
    total = total[0] if isinstance(total, tuple) else total
    if not torch.allclose(total.view_as(y), y, rtol=1e-2, atol=1e-5):
        return "its block does not add the shared experts' output as it is"
    return None


def append_shared(
    config: MoEConfig, weights: ExpertWeights, module: nn.Module, sizes: tuple[int, int]
) -> ExpertWeights:
    """Weights with the module's behind them, as MoELayer.load_weights takes them: padded, in the format of the others.

    sizes: hidden and intermediate of a routed expert."""
    hidden, inter = sizes
    gate, up, down = (one.weight.detach() for one in (module.gate_proj, module.up_proj, module.down_proj))
    count = gate.shape[0] // inter
    missing = config.hidden - hidden, config.intermediate - inter
    gate_up = torch.stack([gate.view(count, inter, hidden), up.view(count, inter, hidden)], 1)
    linear1 = F.pad(gate_up, (0, missing[0], 0, missing[1])).flatten(1, 2)
    linear2 = F.pad(down.view(hidden, count, inter).transpose(0, 1), (0, missing[1], 0, missing[0])).contiguous()
    if weights.linear1_sf is not None:
        further = checks.expert_weights(config, count, linear1.device, "", linear1, None, linear2, None)
    else:
        further = ExpertWeights(linear1.to(weights.linear1.dtype), None, linear2.to(weights.linear2.dtype), None)
    return ExpertWeights(*(_cat(a, b) for a, b in zip(weights, further, strict=True)))


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return None
    as_bytes = [t.view(torch.uint8) if t.element_size() == 1 else t for t in (a, b)]
    return torch.cat(as_bytes).view(a.dtype)


def fold(module: nn.Module) -> None:
    _FOLDED.add(id(module))
    module.forward = MethodType(_folded, module)  # of the instance: its state_dict and class stay as they are


def unfold(module: nn.Module) -> None:
    _FOLDED.discard(id(module))
    module.__dict__.pop("forward", None)


def unfold_id(key: int) -> None:
    """Of a module that is gone: an id is used again."""
    _FOLDED.discard(key)


def _folded(self: nn.Module, x: Tensor) -> Tensor:
    if id(self) in _FOLDED and self.config._experts_implementation == IMPLEMENTATION:
        return x.new_zeros(())
    return type(self).forward(self, x)
