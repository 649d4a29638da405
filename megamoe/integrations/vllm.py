"""megamoe as experts of vLLM's modular MoE kernel: pass-through prepare and finalize, the whole layer in apply().

    from megamoe.integrations.vllm import MegaMoEExperts, MegaMoEPrepareAndFinalize, refusals

For vLLM's `modular_kernel.py` of commit 003d383 (2026). It has never run under vLLM itself: only under a stub engine
that replays vLLM's call sequence with real tensors, with the signatures of that commit
(tests/cpu/test_engine_vllm.py). Experts come block-FP8 quantized (e4m3, 128 x 128, activations quantized by the layer).

Two things that differ from other experts. The layer sends tokens itself, so topk_ids stay global and the output comes
back reduced. And every rank must call it even without tokens: vLLM's kernel leaves apply() out at M = 0 but still calls
finalize(), which then takes part with none.
EPLB: `get_expert_weights()` gives rows that vLLM may permute in place; topk_ids are physical ids, as its router maps
them while it adds to `expert_load_view`, which needs nothing of the experts.
"""

import torch
from torch import Tensor

try:
    from vllm.distributed import get_ep_group
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym
except ImportError as error:
    raise ImportError(f"megamoe.integrations.vllm needs vLLM with its modular MoE kernel ({error})") from error

from megamoe.config import MoEConfig
from megamoe.integrations.engine_layers import (
    block_fp8_reasons,
    check_linear_map,
    load_block_fp8,
    refuse_alike,
    shared_workspace,
)
from megamoe.layer import MoELayer
from megamoe.support import support


def refusals(moe_config) -> list[str]:
    """Why megamoe cannot serve this FusedMoEConfig, in vLLM's terms; empty if it can. Allocates nothing."""
    parallel = moe_config.moe_parallel_config
    activation = str(getattr(moe_config.activation, "value", moe_config.activation))
    reasons = []
    if activation != "silu":
        reasons.append(f"activation={activation!r}: only 'silu' (gate rows, then up rows) has an adapter")
    if getattr(moe_config, "has_bias", False):
        reasons.append("has_bias=True: the adapter hands no expert biases on")
    if not getattr(moe_config, "is_act_and_mul", True):
        reasons.append("is_act_and_mul=False: experts without a gate")
    if getattr(moe_config, "is_lora_enabled", False):
        reasons.append("is_lora_enabled=True: LoRA on experts")
    if moe_config.in_dtype != torch.bfloat16:
        reasons.append(f"in_dtype={moe_config.in_dtype}: the layer takes and returns bfloat16")
    if parallel.tp_size > 1:
        reasons.append(f"tp_size={parallel.tp_size}: experts are whole on a rank; use --enable-expert-parallel")
    try:
        config = _config(moe_config)
    except (ValueError, TypeError) as error:
        return [*reasons, str(error)]
    return [*reasons, *support(config, ep_size=parallel.ep_size).reasons]


def _config(moe_config) -> MoEConfig:
    return MoEConfig(
        moe_config.hidden_dim, moe_config.intermediate_size_per_partition, moe_config.num_experts,
        moe_config.experts_per_token, swiglu_limit=getattr(moe_config, "swiglu_limit", None),
    )  # fmt: skip


class MegaMoEPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):
    """Nothing to prepare: quantization, dispatch and combine are the layer's. moe_config, quant_config: vLLM's."""

    def post_init_setup(self, fused_experts) -> None:
        self._experts = fused_experts

    @property
    def activation_format(self):
        return mk.FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None  # int32 or int64

    def max_num_tokens_per_rank(self) -> int | None:
        return None  # of a batched format, which this is not; the capacity is moe_config.max_num_tokens

    def num_dispatchers(self) -> int:
        return self.moe_config.moe_parallel_config.ep_size

    def output_is_reduced(self) -> bool:
        return True

    def prepare(
        self, a1: Tensor, topk_weights: Tensor, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None,
        apply_router_weight_on_input: bool, quant_config, defer_input_quant: bool,
    ):  # fmt: skip
        if apply_router_weight_on_input:
            raise ValueError("apply_router_weight_on_input=True: megamoe applies router weights after the gate")
        return a1, None, None, None, None

    def finalize(
        self, output: Tensor, fused_expert_output: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        apply_router_weight_on_input: bool, weight_and_reduce_impl,
    ) -> None:  # fmt: skip
        if output.shape[0] == 0:
            self._experts.idle()
        elif output.data_ptr() != fused_expert_output.data_ptr():
            output.copy_(fused_expert_output)


class MegaMoEExperts(mk.FusedMoEExpertsModular):
    """One layer's experts. Construction and process_weights_after_loading are collective over vLLM's EP group."""

    def __init__(self, moe_config, quant_config, max_num_tokens=None, num_dispatchers=None):
        super().__init__(moe_config, quant_config, max_num_tokens, num_dispatchers)
        if reasons := refusals(moe_config):
            raise ValueError("megamoe cannot serve this layer: " + "; ".join(reasons))
        self.layer: MoELayer | None = None
        self._checked_map: tuple | None = None

    @staticmethod
    def activation_format():
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return not torch.cuda.is_available() or torch.cuda.get_device_capability() == (9, 0)

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key, activation_key) -> bool:
        return (weight_key, activation_key) == (kFp8Static128BlockSym, kFp8Dynamic128Sym)

    @staticmethod
    def _supports_activation(activation) -> bool:
        return str(getattr(activation, "value", activation)) == "silu"

    @staticmethod
    def _supports_parallel_config(moe_parallel_config) -> bool:
        return moe_parallel_config.tp_size == 1

    @staticmethod
    def _supports_shape(hidden_dim: int) -> bool:
        return hidden_dim % 128 == 0

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True  # combine adds in slot order

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Packs w13_weight and w2_weight of vLLM's layer; they are not needed after that. ValueError on all ranks if
        one has other than block-FP8 weights, or an expert_map that is not linear."""
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        if self.layer is None:
            reasons, group = block_fp8_reasons(w13, self.w1_scale, w2, self.w2_scale), get_ep_group().device_group
            parallel = self.moe_config.moe_parallel_config
            try:
                expert_map = getattr(layer, "expert_map", None)
                check_linear_map(expert_map, self.moe_config.num_experts, parallel.ep_rank, parallel.ep_size)
            except ValueError as error:
                reasons.append(str(error))
            refuse_alike("this layer", reasons, group)
            workspace = shared_workspace(_config(self.moe_config), self.moe_config.max_num_tokens, group, w13.device)
            self.layer = MoELayer(_config(self.moe_config), workspace)
        load_block_fp8(self.layer, w13, self.w1_scale, w2, self.w2_scale)

    def get_expert_weights(self) -> list[Tensor]:
        """For EPLB: contiguous [num_local_experts, -1]; permuting rows in all of them moves experts."""
        return self.layer.expert_rows()

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, global_num_experts: int, local_num_experts: int, expert_tokens_meta,
        activation,
    ):  # fmt: skip
        return (0,), (0,), (M, K)  # the workspace is the layer's own

    def finalize_weight_and_reduce_impl(self):
        return TopKWeightAndReduceNoOP()

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        activation, global_num_experts: int, expert_map: Tensor | None, a1q_scale: Tensor | None,
        a2_scale: Tensor | None, workspace13: Tensor, workspace2: Tensor, expert_tokens_meta,
        apply_router_weight_on_input: bool,
    ) -> None:  # fmt: skip
        if global_num_experts != self.layer.config.num_experts:
            raise ValueError(f"global_num_experts={global_num_experts}, the layer has {self.layer.config.num_experts}")
        self._check_map(expert_map)
        self.layer(hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous(), out=output)

    def idle(self) -> None:
        """Take part without tokens."""
        config, device = self.layer.config, self.layer.workspace.device
        self.layer(
            torch.zeros(0, config.hidden, dtype=torch.bfloat16, device=device),
            torch.zeros(0, config.topk, dtype=torch.int64, device=device),
            torch.zeros(0, config.topk, dtype=torch.float32, device=device),
        )

    def _check_map(self, expert_map: Tensor | None) -> None:
        key = None if expert_map is None else (expert_map.data_ptr(), expert_map._version)
        if key != self._checked_map:  # once a map: reading it waits for the device
            workspace = self.layer.workspace
            check_linear_map(expert_map, self.layer.config.num_experts, workspace.ep_rank, workspace.ep_size)
            self._checked_map = key
