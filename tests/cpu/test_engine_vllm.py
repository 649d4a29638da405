"""The vLLM adapter under a stub that replays vLLM's call sequence with real tensors.

The stub holds what the adapter imports, and signatures as recorded from vLLM's `modular_kernel.py` at commit 003d383.
"""

import enum
import importlib
import sys
from abc import ABC, abstractmethod
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

VLLM_SIGNATURES = {
    "MegaMoEPrepareAndFinalize.prepare": "self a1 topk_weights topk_ids num_experts expert_map "
    "apply_router_weight_on_input quant_config defer_input_quant",
    "MegaMoEPrepareAndFinalize.finalize": "self output fused_expert_output topk_weights topk_ids "
    "apply_router_weight_on_input weight_and_reduce_impl",
    "MegaMoEPrepareAndFinalize.post_init_setup": "self fused_experts",
    "MegaMoEPrepareAndFinalize.topk_indices_dtype": "self",
    "MegaMoEPrepareAndFinalize.max_num_tokens_per_rank": "self",
    "MegaMoEPrepareAndFinalize.num_dispatchers": "self",
    "MegaMoEPrepareAndFinalize.output_is_reduced": "self",
    "MegaMoEExperts.__init__": "self moe_config quant_config max_num_tokens num_dispatchers",
    "MegaMoEExperts.apply": "self output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts "
    "expert_map a1q_scale a2_scale workspace13 workspace2 expert_tokens_meta apply_router_weight_on_input",
    "MegaMoEExperts.workspace_shapes": "self M N K topk global_num_experts local_num_experts expert_tokens_meta "
    "activation",
    "MegaMoEExperts.process_weights_after_loading": "self layer",
    "MegaMoEExperts.finalize_weight_and_reduce_impl": "self",
    "MegaMoEExperts._supports_current_device": "",
    "MegaMoEExperts._supports_no_act_and_mul": "",
    "MegaMoEExperts._supports_quant_scheme": "weight_key activation_key",
    "MegaMoEExperts._supports_activation": "activation",
    "MegaMoEExperts._supports_parallel_config": "moe_parallel_config",
    "MegaMoEExperts._supports_shape": "hidden_dim",
    "MegaMoEExperts._supports_batch_invariance": "",
}


class Activation(enum.Enum):
    SILU = "silu"
    SWIGLUOAI = "swigluoai"


class StubPrepareAndFinalize(ABC):  # noqa: B024 (its abstract members are lambdas)
    """The abstract members of FusedMoEPrepareAndFinalizeModular."""

    def __init__(self, moe_config, quant_config):
        self.moe_config, self.quant_config = moe_config, quant_config

    def post_init_setup(self, fused_experts): ...  # noqa: B027

    activation_format = property(abstractmethod(lambda self: None))
    topk_indices_dtype = abstractmethod(lambda self: None)
    max_num_tokens_per_rank = abstractmethod(lambda self: None)
    num_dispatchers = abstractmethod(lambda self: None)
    output_is_reduced = abstractmethod(lambda self: None)
    prepare = abstractmethod(lambda self: None)
    finalize = abstractmethod(lambda self: None)

    def supports_async(self):
        return False


class StubExperts(ABC):  # noqa: B024
    """The abstract members of FusedMoEExpertsModular, and what the adapter uses of its base."""

    def __init__(self, moe_config, quant_config, max_num_tokens=None, num_dispatchers=None):
        self.moe_config, self.quant_config = moe_config, quant_config

    w1_scale = property(lambda self: self.quant_config.w1_scale)
    w2_scale = property(lambda self: self.quant_config.w2_scale)
    a2_scale = property(lambda self: None)
    for _name in ("activation_format", "_supports_current_device", "_supports_no_act_and_mul", "_supports_activation",
                  "_supports_quant_scheme", "_supports_parallel_config", "workspace_shapes", "apply",
                  "finalize_weight_and_reduce_impl"):  # fmt: skip
        locals()[_name] = abstractmethod(lambda self: None)


class StubKernel:
    """vLLM's modular kernel, call by call: construction, then apply()."""

    def __init__(self, prepare_finalize, fused_experts):
        self.prepare_finalize, self.fused_experts = prepare_finalize, fused_experts
        prepare_finalize.post_init_setup(fused_experts)

    def apply(self, hidden_states, w1, w2, topk_ids, topk_weights, expert_map=None, on_input=False):
        output, experts = torch.empty_like(hidden_states), self.fused_experts
        a1, a1_scale, meta, ids, weights = self.prepare_finalize.prepare(
            hidden_states, topk_weights, topk_ids, w1.shape[0], expert_map, on_input, experts.quant_config,
            defer_input_quant=experts.expects_unquantized_inputs,
        )  # fmt: skip
        topk_ids, topk_weights = topk_ids if ids is None else ids, topk_weights if weights is None else weights
        fused_out = torch.empty_like(a1, dtype=hidden_states.dtype)
        if a1.shape[0]:  # the early return at M = 0
            *_, shape = experts.workspace_shapes(
                len(a1), w1.shape[1], a1.shape[1], TOPK, NUM_EXPERTS, len(w1), meta, None
            )
            assert shape == fused_out.shape
            experts.apply(
                output=fused_out, hidden_states=a1, w1=w1, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids,
                activation=Activation.SILU, global_num_experts=NUM_EXPERTS, expert_map=expert_map, a1q_scale=a1_scale,
                a2_scale=experts.a2_scale, workspace13=torch.empty(0), workspace2=torch.empty(0),
                expert_tokens_meta=meta, apply_router_weight_on_input=on_input,
            )  # fmt: skip
        self.prepare_finalize.finalize(
            output, fused_out, topk_weights, topk_ids, on_input, experts.finalize_weight_and_reduce_impl()
        )
        return output


@pytest.fixture
def vllm(monkeypatch):
    fused_moe = "vllm.model_executor.layers.fused_moe"
    put_modules(monkeypatch, {
        "vllm.distributed": {"get_ep_group": lambda: SimpleNamespace(device_group=None)},
        f"{fused_moe}.modular_kernel": {
            "FusedMoEPrepareAndFinalizeModular": StubPrepareAndFinalize, "FusedMoEExpertsModular": StubExperts,
            "FusedMoEActivationFormat": enum.Enum("FusedMoEActivationFormat", "Standard BatchedExperts")},
        f"{fused_moe}.topk_weight_and_reduce": {"TopKWeightAndReduceNoOP": type("TopKWeightAndReduceNoOP", (), {})},
        "vllm.model_executor.layers.quantization.utils.quant_utils": {
            "kFp8Dynamic128Sym": "dynamic 1x128", "kFp8Static128BlockSym": "static 128x128"},
    })  # fmt: skip
    monkeypatch.delitem(sys.modules, "megamoe.integrations.vllm", raising=False)
    yield importlib.import_module("megamoe.integrations.vllm")
    monkeypatch.delitem(sys.modules, "megamoe.integrations.vllm", raising=False)
    engine_layers.close_workspaces()


def vllm_config(**changes) -> SimpleNamespace:
    parallel = SimpleNamespace(ep_size=changes.pop("ep_size", 1), tp_size=changes.pop("tp_size", 1), ep_rank=0)
    fields = {"num_experts": NUM_EXPERTS, "experts_per_token": TOPK, "hidden_dim": HIDDEN, "max_num_tokens": 64,
              "intermediate_size_per_partition": INTERMEDIATE, "activation": Activation.SILU, "has_bias": False,
              "in_dtype": torch.bfloat16, "is_act_and_mul": True, "is_lora_enabled": False}  # fmt: skip
    return SimpleNamespace(**(fields | changes), moe_parallel_config=parallel)


def vllm_kernel(vllm, experts) -> StubKernel:
    quant = SimpleNamespace(w1_scale=experts.w13_weight_scale_inv.data, w2_scale=experts.w2_weight_scale_inv.data)
    fused = vllm.MegaMoEExperts(vllm_config(), quant)
    kernel = StubKernel(vllm.MegaMoEPrepareAndFinalize(vllm_config(), quant), fused)
    fused.process_weights_after_loading(experts)
    return kernel


def test_vllm_call_sequence_gives_the_specifications_output(vllm):
    experts = experts_of()
    kernel = vllm_kernel(vllm, experts)
    calls = []
    kernel.fused_experts.layer.register_forward_hook(lambda layer, inputs, y: calls.append(len(inputs[0])))
    linear_map = torch.arange(NUM_EXPERTS, dtype=torch.int32)
    for num_tokens, expert_map in ((5, None), (0, None), (40, linear_map), (1, linear_map)):
        x, topk_idx, topk_weights = tokens(num_tokens, num_tokens)
        for ids in (topk_idx, topk_idx.long()):
            y = kernel.apply(x, experts.w13_weight, experts.w2_weight, ids, topk_weights, expert_map)
            assert torch.equal(y, expected(experts.weights, x, topk_idx, topk_weights))
    assert calls == [5, 5, 0, 0, 40, 40, 1, 1]  # a rank without tokens takes part
    assert kernel.prepare_finalize.output_is_reduced() and kernel.prepare_finalize.num_dispatchers() == 1


def test_vllm_clamp_is_part_of_the_layer(vllm):
    config = MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOPK, swiglu_limit=0.5)
    experts, quant = experts_of(config), SimpleNamespace()
    quant.w1_scale, quant.w2_scale = experts.w13_weight_scale_inv.data, experts.w2_weight_scale_inv.data
    fused = vllm.MegaMoEExperts(vllm_config(swiglu_limit=0.5), quant)
    kernel = StubKernel(vllm.MegaMoEPrepareAndFinalize(vllm_config(), quant), fused)
    fused.process_weights_after_loading(experts)
    x, topk_idx, topk_weights = tokens(9)
    y = kernel.apply(x, experts.w13_weight, experts.w2_weight, topk_idx, topk_weights)
    assert torch.equal(y, expected(experts.weights, x, topk_idx, topk_weights, config))
    assert not torch.equal(y, expected(experts.weights, x, topk_idx, topk_weights))


def test_vllm_layers_share_a_workspace_and_reload_in_place(vllm):
    first, second = vllm_kernel(vllm, experts_of()), vllm_kernel(vllm, experts_of(seed=1))
    assert first.fused_experts.layer.workspace is second.fused_experts.layer.workspace
    again = experts_of(seed=2)
    before = [rows.data_ptr() for rows in first.fused_experts.get_expert_weights()]
    first.fused_experts.quant_config.w1_scale = again.weights.linear1_sf
    first.fused_experts.quant_config.w2_scale = again.weights.linear2_sf
    first.fused_experts.process_weights_after_loading(again)
    assert before == [rows.data_ptr() for rows in first.fused_experts.get_expert_weights()]
    x, topk_idx, topk_weights = tokens(7)
    y = first.apply(x, again.w13_weight, again.w2_weight, topk_idx, topk_weights)
    assert torch.equal(y, expected(again.weights, x, topk_idx, topk_weights))


def test_vllm_eplb_moves_expert_rows_and_physical_ids_follow(vllm):
    experts = experts_of()
    kernel = vllm_kernel(vllm, experts)
    order = [3, 1, 0, 7, 2, 6, 5, 4]  # physical slot p now holds what slot order[p] held
    permute_experts(kernel.fused_experts.get_expert_weights(), order)
    x, logical, topk_weights = tokens(16)
    physical = torch.tensor(order).argsort()[logical.long()]
    y = kernel.apply(x, experts.w13_weight, experts.w2_weight, physical, topk_weights)
    assert torch.equal(y, expected(experts.weights, x, logical, topk_weights))


def map_to_physical_and_record(topk_ids, physical_of, num_replicas, load_view):
    """What vLLM's router does before the kernel: a replica for each id by its place, counted in the load view."""
    ids = topk_ids.long()
    replica = torch.arange(ids.numel()).view(ids.shape) % num_replicas[ids]
    physical = physical_of[ids].gather(-1, replica[..., None])[..., 0]
    load_view.index_add_(0, physical.flatten(), torch.ones(physical.numel(), dtype=load_view.dtype))
    return physical.to(topk_ids.dtype)


def test_vllm_replicas_serve_physical_ids_and_the_load_view_is_what_they_served(vllm):
    # Six logical experts in eight slots: 0 and 3 have a replica each
    held = torch.tensor([0, 1, 2, 3, 4, 5, 3, 0])
    physical_of, num_replicas = torch.full((6, 2), -1), torch.bincount(held)
    for logical in range(6):
        slots = (held == logical).nonzero()[:, 0]
        physical_of[logical, : len(slots)] = slots
    experts = experts_of()
    kernel, load_view = vllm_kernel(vllm, experts), torch.zeros(NUM_EXPERTS, dtype=torch.int32)
    permute_experts(kernel.fused_experts.get_expert_weights(), held.tolist())
    for num_tokens in (16, 0, 31):
        x, logical, topk_weights = tokens(num_tokens, num_tokens)
        logical = logical % 6
        physical = map_to_physical_and_record(logical, physical_of, num_replicas, load_view)
        y = kernel.apply(x, experts.w13_weight, experts.w2_weight, physical, topk_weights)
        assert torch.equal(y, expected(experts.weights, x, logical, topk_weights))
    assert load_view.all() and torch.equal(kernel.fused_experts.layer.load_counts().physical, load_view.long())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": Activation.SWIGLUOAI}, "activation='swigluoai'"),
        ({"has_bias": True}, "has_bias=True"),
        ({"is_lora_enabled": True}, "is_lora_enabled=True: LoRA"),
        ({"is_act_and_mul": False}, "is_act_and_mul=False"),
        ({"in_dtype": torch.float16}, r"in_dtype=torch\.float16"),
        ({"tp_size": 2}, "tp_size=2: .*--enable-expert-parallel"),
        ({"hidden_dim": 2880}, "hidden=2880 must be a multiple of 128"),
        ({"ep_size": 3}, "num_experts=8 cannot be spread evenly"),
    ],
)
def test_vllm_refusals_name_vllms_own_field(vllm, changes, reason):
    with pytest.raises(ValueError, match=reason):
        vllm.MegaMoEExperts(vllm_config(**changes), None)
    assert vllm.refusals(vllm_config()) == []


def test_vllm_wrong_maps_weights_and_calls_are_refused_by_name(vllm):
    experts = experts_of()
    kernel = vllm_kernel(vllm, experts)
    x, topk_idx, topk_weights = tokens(3)
    arguments = x, experts.w13_weight, experts.w2_weight, topk_idx, topk_weights
    round_robin = torch.arange(NUM_EXPERTS).flip(0)
    with pytest.raises(
        ValueError, match="expert_map is not linear: expert 0 is local 7 on rank 0 of 1, megamoe wants 0"
    ):
        kernel.apply(*arguments, round_robin)
    with pytest.raises(ValueError, match="apply_router_weight_on_input=True"):
        kernel.apply(*arguments, on_input=True)
    with pytest.raises(ValueError, match="65 tokens, above num_max_tokens_per_rank=64"):
        kernel.apply(*tokens(65)[:1], *arguments[1:3], *tokens(65)[1:])
    plain = experts_of()
    plain.w13_weight = torch.nn.Parameter(torch.zeros(8, 256, 256, dtype=torch.bfloat16), requires_grad=False)
    plain.expert_map = round_robin
    with pytest.raises(ValueError, match=r"w13_weight is torch\.bfloat16.*load a block-FP8 checkpoint; expert_map is"):
        vllm_kernel(vllm, plain)
    plain = experts_of()
    plain.expert_map = torch.arange(NUM_EXPERTS, dtype=torch.int32)
    vllm_kernel(vllm, plain)
    supports = vllm.MegaMoEExperts._supports_quant_scheme
    assert supports("static 128x128", "dynamic 1x128") and not supports(None, None)


def test_vllm_signatures_are_the_recorded_ones(vllm):
    for name, recorded in VLLM_SIGNATURES.items():
        owner, _, method = name.partition(".")
        assert parameters(getattr(getattr(vllm, owner), method)) == recorded, name
    for owner in (vllm.MegaMoEExperts, vllm.MegaMoEPrepareAndFinalize):
        assert not owner.__abstractmethods__, "an abstract member of vLLM's base is left out"


def test_without_the_engine_the_import_says_so():
    sys.modules.pop("megamoe.integrations.vllm", None)
    with pytest.raises(ImportError, match="megamoe.integrations.vllm needs vLLM"):
        importlib.import_module("megamoe.integrations.vllm")
