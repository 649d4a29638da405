"""The SGLang adapter under a stub that replays SGLang's call sequence with real tensors.

Signatures as recorded from SGLang's `mega_moe.py` at commit 04fa8c0 and `mega_moe_sm90.py` at 078e5e2.
"""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from megamoe import MoEConfig
from megamoe.integrations import engine_layers
from tests.cpu.engine_stubs import (
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    TOPK,
    expected,
    experts_of,
    parameters,
    permute_experts,
    put_modules,
    tokens,
)

SGLANG_SIGNATURES = {
    "run_mega_routed_experts": "experts hidden_states topk_ids topk_weights hidden_size intermediate_size top_k "
    "num_tokens activation_clamp routed_scaling_factor num_shared_experts shared_l1_weights shared_l2_weights",
    "build_sm90_mega_moe_experts_weights": "experts",
    "is_mega_moe_experts_ready": "experts",
}


def theirs(names: str):
    """A function with these parameters, which must not run."""
    scope = {}
    exec(f"def function({', '.join(names.split())}):\n    raise AssertionError('not replaced')", scope)
    return scope["function"]


@pytest.fixture
def sglang(monkeypatch):
    capacity = SimpleNamespace(get=lambda: 64)
    parallel = SimpleNamespace(moe_ep_group=SimpleNamespace(device_group=None))
    moe = "sglang.srt.layers.moe"
    put_modules(monkeypatch, {
        "sglang.srt.environ": {
            "envs": SimpleNamespace(SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK=capacity)},
        "sglang.srt.runtime_context": {"get_parallel": lambda: parallel},
        f"{moe}.mega_moe": {n: theirs(SGLANG_SIGNATURES[n]) for n in SGLANG_SIGNATURES if "build" not in n},
        f"{moe}.mega_moe_sm90": {n: theirs(SGLANG_SIGNATURES[n]) for n in SGLANG_SIGNATURES if "build" in n},
    })  # fmt: skip
    yield importlib.import_module("megamoe.integrations.sglang")
    engine_layers.close_workspaces()


def sglang_forward(mega_moe, experts, x, topk_idx, topk_weights, scaling: float = 1.0) -> torch.Tensor:
    """The part of forward_mega_moe after the router: ids None without tokens."""
    num_tokens = x.shape[0]
    return mega_moe.run_mega_routed_experts(
        experts, x, topk_idx if num_tokens else None, topk_weights if num_tokens else None, hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE, top_k=TOPK, num_tokens=num_tokens,
        activation_clamp=experts.moe_runner_config.swiglu_limit, routed_scaling_factor=scaling, num_shared_experts=0,
        shared_l1_weights=None, shared_l2_weights=None,
    )  # fmt: skip


@pytest.mark.parametrize("limit", [None, 2.0])
def test_sglang_call_sequence_gives_the_specifications_output(sglang, limit):
    sglang.install()
    mega_moe = sys.modules["sglang.srt.layers.moe.mega_moe"]
    sm90 = sys.modules["sglang.srt.layers.moe.mega_moe_sm90"]
    config = MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOPK, swiglu_limit=limit)
    experts = experts_of(config)
    assert not mega_moe.is_mega_moe_experts_ready(experts)
    sm90.build_sm90_mega_moe_experts_weights(experts)
    sm90.build_sm90_mega_moe_experts_weights(experts)  # SGLang may ask again
    assert mega_moe.is_mega_moe_experts_ready(experts) and experts._mega_moe_weights_built
    for num_tokens in (5, 0, 33):
        x, topk_idx, topk_weights = tokens(num_tokens, num_tokens)
        y = sglang_forward(mega_moe, experts, x, topk_idx.long(), topk_weights)
        assert torch.equal(y, expected(experts.weights, x, topk_idx, topk_weights, config))
        scaled = sglang_forward(mega_moe, experts, x, topk_idx, topk_weights, scaling=2.5)
        assert torch.equal(scaled, y * 2.5)


def test_sglang_eplb_moves_expert_rows_and_physical_ids_follow(sglang):
    experts = experts_of()
    sglang.build_sm90_mega_moe_experts_weights(experts)
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    permute_experts(sglang.get_moe_weights(experts), order)
    x, logical, topk_weights = tokens(16)
    physical = torch.tensor(order).argsort()[logical.long()]
    y = sglang_forward(sglang, experts, x, physical, topk_weights)
    assert torch.equal(y, expected(experts.weights, x, logical, topk_weights))


def test_sglang_refuses_by_name_what_it_cannot_do(sglang):
    experts = experts_of()
    sglang.build_sm90_mega_moe_experts_weights(experts)
    x, topk_idx, topk_weights = tokens(3)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "top_k": TOPK, "num_tokens": 3}
    for change, reason in (
        ({"activation_clamp": 7.0}, "activation_clamp=7.0, the experts' weights were built for None"),
        ({"top_k": 3}, "top_k=3"), ({"num_shared_experts": 1}, "num_shared_experts=1: shared experts are not fused"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            sglang.run_mega_routed_experts(experts, x, topk_idx, topk_weights, **(sizes | change))
    for field, value, reason in (
        ("activation", "gelu", "'gelu': only 'silu'"), ("gemm1_alpha", 1.702, "1.702: gpt-oss"),
        ("gemm1_clamp_limit", 7.0, "7.0: gpt-oss"), ("is_gated", False, "False: experts without a gate"),
        ("apply_router_weight_on_input", True, "True: megamoe applies"), ("no_combine", True, "True: the layer"),
        ("params_dtype", torch.float16, "torch.float16: the layer takes"),
    ):  # fmt: skip
        other = experts_of()
        setattr(other.moe_runner_config, field, value)
        with pytest.raises(ValueError, match=f"moe_runner_config.{field}={reason}"):
            sglang.build_sm90_mega_moe_experts_weights(other)
    other = experts_of()
    other.w13_weight = torch.nn.Parameter(other.w13_weight.bfloat16(), requires_grad=False)
    other.w2_weight_bias, other.w13_lora_a, other.enable_lora = torch.zeros(1), torch.zeros(1), False
    with pytest.raises(ValueError, match=r"w2_weight_bias: .*biases on; w13_lora_a: LoRA.*; w13_weight is torch.bf"):
        sglang.build_sm90_mega_moe_experts_weights(other)
    assert not sglang.is_mega_moe_experts_ready(other)
    assert sglang.refusals(2880, 2880, 128, 4, 8) == ["hidden=2880 must be a multiple of 128; nearest 2816, 2944"]


def test_sglang_of_another_version_is_not_patched(sglang, monkeypatch):
    mega_moe = sys.modules["sglang.srt.layers.moe.mega_moe"]
    before = mega_moe.is_mega_moe_experts_ready
    monkeypatch.setattr(mega_moe, "run_mega_routed_experts", theirs("experts hidden_states buffer"))
    with pytest.raises(RuntimeError, match=r"run_mega_routed_experts\(experts, hidden_states, buffer\) is not the one"):
        sglang.install()
    assert mega_moe.is_mega_moe_experts_ready is before
    for name, recorded in SGLANG_SIGNATURES.items():
        assert parameters(getattr(sglang, name)) == recorded
