"""megamoe behind SGLang's `--moe-a2a-backend megamoe`: the same two functions with megamoe's layer inside.

    import megamoe.integrations.sglang as adapter
    adapter.install()          # before the model is loaded

For SGLang's `layers/moe/mega_moe.py` of commit 04fa8c0 and `mega_moe_sm90.py` of commit 078e5e2 (2026). It has never
run under SGLang itself: only under a stub engine that replays SGLang's call sequence with real tensors, with the
signatures of those commits (tests/cpu/test_engine_sglang.py).

Experts come block-FP8 quantized (e4m3, 128 x 128). Ranks without tokens launch too: SGLang then gives topk_ids None.
topk_ids are physical ids (EPLB's, by `ExpertLocationDispatchInfo`); `get_moe_weights` gives what EPLB may permute.
"""

import inspect

import torch
from torch import Tensor

from megamoe.config import MoEConfig
from megamoe.integrations.engine_layers import block_fp8_reasons, load_block_fp8, refuse_alike, shared_workspace
from megamoe.layer import MoELayer
from megamoe.support import support

NAME = "_megamoe_layer"
RUNNER = {  # fields of moe_runner_config: what the adapter serves, and why nothing else
    "activation": ("silu", "only 'silu' has an adapter"),
    "is_gated": (True, "experts without a gate"),
    "apply_router_weight_on_input": (False, "megamoe applies router weights after the gate"),
    "no_combine": (False, "the layer combines"),
    "gemm1_alpha": (None, "gpt-oss's gating has no adapter"),
    "gemm1_clamp_limit": (None, "gpt-oss's gating has no adapter; DeepSeek's clamp is swiglu_limit"),
}


def refusals(hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, ep_size: int) -> list[str]:
    """Why megamoe cannot serve such experts; empty if it can. Allocates nothing."""
    try:
        config = MoEConfig(hidden_size, intermediate_size, num_experts, top_k)
    except (ValueError, TypeError) as error:
        return [str(error)]
    return list(support(config, ep_size=ep_size).reasons)


def _reasons_of(experts, ep_size: int) -> list[str]:
    """As refusals, of an experts module with its weights."""
    w13, w2, runner = experts.w13_weight.data, experts.w2_weight.data, experts.moe_runner_config
    reasons = refusals(w13.shape[2], w13.shape[1] // 2, experts.num_experts, experts.top_k, ep_size)
    for name, (served, why) in RUNNER.items():
        if (given := getattr(runner, name, served)) != served:
            reasons.append(f"moe_runner_config.{name}={given!r}: {why}")
    if (dtype := getattr(runner, "params_dtype", None)) not in (None, torch.bfloat16):
        reasons.append(f"moe_runner_config.params_dtype={dtype}: the layer takes and returns bfloat16")
    for name in ("w13_weight_bias", "w2_weight_bias"):
        if getattr(experts, name, None) is not None:
            reasons.append(f"{name}: the adapter hands no expert biases on")
    held = vars(experts) | getattr(experts, "_parameters", {}) | getattr(experts, "_modules", {})
    lora = [n for n, value in held.items() if "lora" in n.lower() and isinstance(value, Tensor | torch.nn.Module)]
    if lora:
        reasons.append(f"{', '.join(lora)}: LoRA on experts")
    scales = (getattr(experts, name, None) for name in ("w13_weight_scale_inv", "w2_weight_scale_inv"))
    return reasons + block_fp8_reasons(w13, next(scales), w2, next(scales))


def build_sm90_mega_moe_experts_weights(experts) -> None:
    """Pack an experts module's w13_weight and w2_weight, once. Collective over SGLang's MoE EP group.

    experts: with top_k, num_experts (physical, all ranks), w13_weight, w2_weight and their weight_scale_inv, and
    moe_runner_config.swiglu_limit. ValueError on all ranks with all reasons if megamoe cannot serve them.
    """
    if getattr(experts, "_mega_moe_weights_built", False):
        return
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_parallel

    w13, w2 = experts.w13_weight.data, experts.w2_weight.data
    group = get_parallel().moe_ep_group.device_group
    refuse_alike("these experts", _reasons_of(experts, experts.num_experts // w13.shape[0]), group)
    config = MoEConfig(
        w13.shape[2], w13.shape[1] // 2, experts.num_experts, experts.top_k,
        swiglu_limit=experts.moe_runner_config.swiglu_limit,
    )  # fmt: skip
    capacity = envs.SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK.get()
    workspace = shared_workspace(config, capacity, group, w13.device)
    layer = MoELayer(config, workspace)
    load_block_fp8(layer, w13, experts.w13_weight_scale_inv.data, w2, experts.w2_weight_scale_inv.data)
    experts.__dict__[NAME] = layer  # not a submodule: SGLang walks an experts module's parameters
    experts._mega_moe_sm90_fp8_weights = True
    experts._mega_moe_weights_built = True


def is_mega_moe_experts_ready(experts) -> bool:
    """Whether build_sm90_mega_moe_experts_weights has run."""
    return NAME in experts.__dict__


def run_mega_routed_experts(
    experts,
    hidden_states: Tensor,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    *,
    hidden_size: int,
    intermediate_size: int,
    top_k: int,
    num_tokens: int,
    activation_clamp: float | None = None,
    routed_scaling_factor: float = 1.0,
    num_shared_experts: int = 0,
    shared_l1_weights=None,
    shared_l2_weights=None,
) -> Tensor:
    """This rank's tokens through the routed experts, combined: bf16 [num_tokens, hidden_size]. Collective.

    topk_ids, topk_weights: [num_tokens, top_k], or None without tokens. ValueError names what differs from what the
    weights were built for, and shared experts fused into the call.
    """
    layer: MoELayer = experts.__dict__[NAME]
    config = layer.config
    for name, given, built in (
        ("hidden_size", hidden_size, config.hidden), ("intermediate_size", intermediate_size, config.intermediate),
        ("top_k", top_k, config.topk), ("activation_clamp", activation_clamp, config.swiglu_limit),
    ):  # fmt: skip
        if given != built:
            raise ValueError(f"{name}={given}, the experts' weights were built for {built}")
    if num_shared_experts or shared_l1_weights is not None or shared_l2_weights is not None:
        raise ValueError(
            f"num_shared_experts={num_shared_experts}: shared experts are not fused; let SGLang run them on its stream"
        )
    if topk_ids is None:
        topk_ids = hidden_states.new_empty((0, top_k), dtype=torch.int32)
        topk_weights = hidden_states.new_empty((0, top_k), dtype=torch.float32)
    y = layer(hidden_states[:num_tokens].contiguous(), topk_ids.contiguous(), topk_weights.float().contiguous())
    return y.mul_(routed_scaling_factor) if routed_scaling_factor != 1.0 else y


def get_moe_weights(experts) -> list[Tensor]:
    """For EPLB: contiguous [num_local_experts, -1]; permuting rows in all of them moves experts."""
    return experts.__dict__[NAME].expert_rows()


def install() -> None:
    """Put these functions in the place of SGLang's. RuntimeError if SGLang's take other arguments than recorded."""
    from sglang.srt.layers.moe import mega_moe, mega_moe_sm90

    ours = {
        mega_moe: (run_mega_routed_experts, is_mega_moe_experts_ready),
        mega_moe_sm90: (build_sm90_mega_moe_experts_weights,),
    }
    for module, functions in ours.items():
        for function in functions:
            theirs = inspect.signature(getattr(module, function.__name__))
            if list(theirs.parameters) != list(inspect.signature(function).parameters):
                raise RuntimeError(
                    f"SGLang's {function.__name__}{theirs} is not the one that megamoe was written against"
                )
    for module, functions in ours.items():
        for function in functions:
            setattr(module, function.__name__, function)
