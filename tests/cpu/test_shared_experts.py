"""Shared experts: the specification against the float64 loop, and the kernel's slot arithmetic against both."""

import ctypes
from dataclasses import replace

import pytest
import torch

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace, plan_memory, support
from megamoe.exchange import LocalExchange
from megamoe.layout import dims_of
from megamoe.steps import moe_layer, slot_experts
from megamoe.testing.compare import verdict_ranks
from megamoe.testing.data import make_case
from megamoe.testing.reference import moe_reference
from tests.cpu.host_library import build_library

CONFIG = MoEConfig(256, 128, 8, 3, num_shared_experts=2)
SOURCE = """
#include "sched/shared.cuh"
using namespace moe;
extern "C" void slot_experts(SharedExperts e, u32 ep_size, u32 ep_rank, const i32* given, u32 slots, i32* out) {
    for (u32 i = 0; i < slots; ++i) out[i] = e.has(i) ? e.own(ep_rank, i) : e.routed(ep_size, given[e.given(i)]);
}
"""


class SharedExperts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("count", "token_slots", "expert_slots"))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    built = build_library(tmp_path_factory.mktemp("shared"), SOURCE)
    if built is None:
        pytest.skip("not run: no g++")
    return built


def kernel_slots(library, config: MoEConfig, ep_size: int, ep_rank: int, topk_idx: torch.Tensor) -> torch.Tensor:
    given = topk_idx.int().contiguous()
    out = torch.empty(len(given), config.token_slots, dtype=torch.int32)
    shared = config.num_shared_experts
    experts = SharedExperts(shared, config.token_slots, config.num_local_experts(ep_size) + shared)
    library.slot_experts(experts, ep_size, ep_rank, ctypes.c_void_p(given.data_ptr()), out.numel(),
                         ctypes.c_void_p(out.data_ptr()))  # fmt: skip
    return out


@pytest.mark.parametrize("num_experts, topk, shared", [(8, 3, 2), (4, 1, 1), (24, 12, 4), (8, 3, 0), (4, 15, 1)])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_the_kernel_gives_each_slot_the_expert_that_the_specification_gives_it(
    library, num_experts, topk, shared, ep_size
):
    config = MoEConfig(256, 128, num_experts, topk, num_shared_experts=shared)
    for ep_rank in range(ep_size):
        topk_idx = torch.randint(-1, num_experts, (50, topk), generator=torch.Generator().manual_seed(ep_rank))
        expected = slot_experts(config, ep_size, ep_rank, topk_idx)
        assert torch.equal(kernel_slots(library, config, ep_size, ep_rank, topk_idx), expected.int())
        own = num_experts // ep_size + shared
        assert bool((expected[:, topk:] // own == ep_rank).all())
        assert bool((expected[:, topk:] % own >= own - shared).all())


def test_an_id_out_of_range_stays_out_of_range(library):
    """Also where there are more slots than experts: no caller names a shared expert."""
    wrong = torch.tensor([[8, 9, 12], [1000, 2**31 - 1, -2], [15, -7, 16]])
    slots = kernel_slots(library, CONFIG, 2, 0, wrong)[:, :3]
    assert bool(((slots < -1) | (slots >= 12)).all())
    told, named = (torch.where(ids < 0, ids, ids & ~(1 << 30)) for ids in (slots, wrong))  # as device_error says it
    assert torch.equal(told, named.int())


@pytest.mark.parametrize("weight_format", ["fp8", "mxfp4", "bf16"])
@pytest.mark.parametrize("ep_size, num_tokens", [(1, [9]), (4, [7, 0, 12, 1])])
@pytest.mark.parametrize("more", [{}, {"bias": True, "activation": "swiglu_oai", "swiglu_limit": 1.0}])
def test_equals_the_float64_loop(weight_format, ep_size, num_tokens, more):
    config = replace(CONFIG, weight_format=weight_format, **more)
    case = make_case(4, config, ep_size, num_tokens, "holes")
    expected = moe_reference(config, case.weights, case.inputs)
    got = moe_layer(config, LocalExchange(ep_size), case.weights, case.inputs)
    judged = verdict_ranks(got, expected)
    assert judged.ok, judged.text
    routed = replace(config, num_shared_experts=0)
    weights = [type(w)(*(None if t is None else t[: 8 // ep_size] for t in w)) for w in case.weights]
    assert not verdict_ranks(moe_layer(routed, LocalExchange(ep_size), weights, case.inputs), expected).ok


def test_one_large_shared_expert_is_the_sum_of_its_parts():
    """As DeepSeek-V3 has it: one of 2 * intermediate, its halves along that size as two experts."""
    config = replace(CONFIG, weight_format="bf16", num_shared_experts=2)
    case = make_case(5, config, 1, [6], "none", dtype=torch.float32)
    w, x = case.weights[0], case.inputs[0].x
    gate, up = (torch.cat([w.linear1[8 + part].chunk(2)[half] for part in range(2)]) for half in range(2))
    linear2 = torch.cat([w.linear2[8], w.linear2[9]], 1)
    whole = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ linear2.T
    torch.testing.assert_close(moe_layer(config, LocalExchange(1), [w], case.inputs)[0], whole, rtol=1e-5, atol=1e-5)


def test_the_layer_takes_them_behind_its_own_experts():
    case = make_case(6, CONFIG, 2, [5, 3], "uniform")
    expected = moe_layer(CONFIG, LocalExchange(2), case.weights, case.inputs)
    names = "linear1", "linear2", "linear1_sf", "linear2_sf"
    tensors = {name: [getattr(w, name) for w in case.weights] for name in names}
    with Workspace(CONFIG, EPConfig(5, 2), device="cpu") as workspace, MoELayer(CONFIG, workspace) as layer:
        with pytest.raises(ValueError, match=r"linear1\[0\] has shape \[4, 256, 256\]; expected \[6, 256, 256\]"):
            layer.load_weights(**{name: [t.view(torch.uint8)[:4].view(t.dtype) for t in value]
                                  for name, value in tensors.items()})  # fmt: skip
        layer.load_weights(**tensors)
        got = layer(*([getattr(i, name) for i in case.inputs] for name in ("x", "topk_idx", "topk_weights")))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert [load.physical.numel() for load in layer.load_counts()] == [4, 4]
        assert sum(int(load.logical.sum()) for load in layer.load_counts()) == 8 * CONFIG.topk


def test_the_workspace_holds_the_worst_case():
    """Each token's shared rows stay on its rank, so that they add capacity rows, not ep_size times as many."""
    plain, ep_config = replace(CONFIG, num_shared_experts=0), EPConfig(100, 4)
    before, after = (dims_of([config], ep_config, 4) for config in (plain, CONFIG))
    assert (before.rows, after.rows) == (4 * 100 * 3, 4 * 100 * 3 + 2 * 100)
    assert (before.num_local_experts, after.num_local_experts, after.token_slots) == (2, 4, 5)
    sizes = {row.name: row.shape for row in plan_memory(CONFIG, ep_config).rows}
    assert sizes["combine_y"] == (100, 5, 256) and sizes["head_idx"] == (2, 4, 100, 5)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="num_shared_experts=14 must be between 0 and 13"):
        replace(CONFIG, num_shared_experts=14)
    (reason,) = support(CONFIG, EPConfig(8, 4, ranks_per_domain=2), "cpu").reasons
    assert "num_shared_experts=2 on 2 NVLink domains" in reason
    (reason,) = support(CONFIG, EPConfig(8, 4, num_redundant_slots_per_rank=1), "cpu").reasons
    assert "num_shared_experts=2 with num_redundant_slots_per_rank" in reason
    (reason,) = support(replace(CONFIG, num_experts=256), ep_size=1).reasons
    assert "258 experts a rank" in reason and "use at least 2 ranks" in reason
