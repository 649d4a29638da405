"""What the tests of both engines' adapters share: importable stub modules, experts as engines hold them, an oracle."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import torch

from megamoe import MoEConfig, route
from megamoe.exchange import LocalExchange
from megamoe.steps import RankInput, moe_layer
from megamoe.testing.data import make_weights

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOPK = 256, 128, 8, 2
CONFIG = MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOPK)


def parameters(function) -> str:
    return " ".join(inspect.signature(function).parameters)


def put_modules(monkeypatch, modules: dict[str, dict]) -> None:
    """Importable modules of these names and contents, parents included, and a fresh adapter at the end."""
    for name, content in modules.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                monkeypatch.setitem(sys.modules, path, ModuleType(path))
                if depth > 1:
                    monkeypatch.setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1],
                                        sys.modules[path], raising=False)  # fmt: skip
        for key, value in content.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def experts_of(config: MoEConfig = CONFIG, seed: int = 0) -> SimpleNamespace:
    """An experts module with its weights as both engines hold them."""
    weights = make_weights(seed, config, 1, 0)
    hold = lambda tensor: torch.nn.Parameter(tensor, requires_grad=False)  # noqa: E731
    return SimpleNamespace(
        weights=weights, num_experts=config.num_experts, top_k=config.topk, w13_weight=hold(weights.linear1),
        w2_weight=hold(weights.linear2), w13_weight_scale_inv=hold(weights.linear1_sf),
        w2_weight_scale_inv=hold(weights.linear2_sf),
        moe_runner_config=SimpleNamespace(swiglu_limit=config.swiglu_limit, activation="silu"),
    )  # fmt: skip


def tokens(num_tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    return x, *route(torch.randn(num_tokens, NUM_EXPERTS, generator=generator), topk=TOPK)


def expected(weights, x, topk_idx, topk_weights, config: MoEConfig = CONFIG) -> torch.Tensor:
    return moe_layer(config, LocalExchange(1), [weights], [RankInput(x, None, topk_idx, topk_weights)])[0]


def permute_experts(rows: list[torch.Tensor], order: list[int]) -> None:
    """What an EPLB rearrangement does within a rank."""
    for tensor in rows:
        assert tensor.is_contiguous() and tensor.shape[0] == NUM_EXPERTS
        tensor.copy_(tensor[order].clone())
