"""The CUDA engine's side of a launch, without one: what its parameters point at. The launch itself: tests/gpu."""

import ctypes
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megamoe import EPConfig, MoEConfig, layout, replicas
from megamoe.engine_fused import FusedEngine
from megamoe.quant import mxfp4_images
from megamoe.quant import weights as fp8_images
from megamoe.rebalance import Rebalance, Staging
from megamoe.steps import OAI_ALPHA
from megamoe.testing.data import make_case
from megamoe_cuda.symmetric import HostMemory

RANKS = 2


def make_engine(config: MoEConfig, layers_before: int = 0) -> FusedEngine:
    shared = SimpleNamespace(ep_size=RANKS, ep_config=EPConfig(8, RANKS), device=torch.device("cpu"), num_ranks=RANKS,
                             base_params=layout.KernelParams, cuts={})  # fmt: skip
    return FusedEngine(config, SimpleNamespace(fused=shared, num_layers=layers_before))


def make_planned_engines(config: MoEConfig, monkeypatch, layers: int = 1) -> list[FusedEngine]:
    """Layers of one workspace, with room for plans; copies are the host's, at once."""
    ep_config = EPConfig(8, RANKS, num_redundant_slots_per_rank=1, num_staged_experts=1)
    dims = layout.dims_of([config], ep_config, RANKS)
    regions, nbytes, _ = layout.place(dims)
    memory = HostMemory(nbytes, RANKS)
    shared = SimpleNamespace(ep_size=RANKS, ep_config=ep_config, device=torch.device("cpu"), num_ranks=RANKS, cuts={},
                             base_params=layout.KernelParams, first_rank=0, regions=regions, dims=dims, memory=memory,
                             check=lambda: None)  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(replicas, "copy_async", lambda dst, src, nbytes, stream: ctypes.memmove(dst, src, nbytes))
    workspace = SimpleNamespace(fused=shared, num_layers=0, staging=Staging())
    return [FusedEngine(config, workspace) for _ in range(layers)]


def floats(pointer: int, *shape: int) -> torch.Tensor:
    values = (ctypes.c_float * math.prod(shape)).from_address(pointer)
    return torch.tensor(list(values)).view(shape)


@pytest.mark.parametrize("weight_format, packing", [("fp8", fp8_images), ("mxfp4", mxfp4_images)])
def test_biases_lie_where_the_parameters_say(weight_format, packing):
    config = MoEConfig(256, 128, 6, 2, weight_format=weight_format, activation="swiglu_oai", bias=True)
    engine, other = make_engine(config), make_engine(config)
    first, second = (make_case(seed, config, RANKS, 3).weights for seed in (1, 2))
    engine.load_weights(first)
    other.share_weights(engine)
    where = [(b.linear1, b.linear2) for b in engine.params.biases[:RANKS]]
    assert len({pointer for pair in where for pointer in pair}) == 2 * RANKS
    for weights in (first, second):  # in place the second time
        engine.load_weights(weights)
        for one in (engine, other):
            assert [(b.linear1, b.linear2) for b in one.params.biases[:RANKS]] == where
        for (bias1, bias2), rank, images, w in zip(where, engine.params.ranks, engine.images, weights, strict=False):
            assert torch.equal(floats(bias1, 3, 256), w.linear1_bias) and bias1 % 16 == 0
            assert torch.equal(floats(bias2, 3, 256), w.linear2_bias) and bias2 % 16 == 0
            assert (rank.linear1, rank.linear2) == (images[0].data_ptr(), images[1].data_ptr())
    assert sum(t[0].nbytes for t in engine.images[0]) == engine.expert_bytes
    values, _ = packing.unpack_expert(2, engine.images[1][1][2], 256)
    assert torch.equal(values.view(torch.uint8), second[1].linear2[2].view(torch.uint8))


def test_the_gating_is_two_numbers():
    """h = gate / (1 + 2^(gate_exponent * gate)) * (up + up_shift), csrc/pipeline/3_swiglu.cuh."""
    for activation, slope, shift in (("swiglu", 1.0, 0.0), ("swiglu_oai", OAI_ALPHA, 1.0)):
        params = make_engine(MoEConfig(256, 128, 6, 2, activation=activation)).params
        assert params.up_shift == shift
        assert math.isclose(2 ** (params.gate_exponent * -3.0), math.exp(3.0 * slope), rel_tol=1e-6)
        assert params.biases[0].linear1 == params.biases[0].linear2 == 0


def test_ranks_that_call_different_layers_can_tell():
    """By KernelParams.layer, which goes beside the number of tokens."""
    most = 1 << layout.HEAD_LAYER_BITS
    numbers = [make_engine(MoEConfig(256, 128, 8, 2), before).params.layer for before in (0, 1, most - 1, most)]
    assert numbers == [0, 1, most - 1, 0]


def rebalance_of(engine: FusedEngine, per_step: int = 1) -> Rebalance:
    """Of experts 0 to 3 on two ranks: each receives the other's first."""
    return Rebalance(engine, np.array([[0, 1, 2], [2, 3, 0]]), "static", per_step, np.ones(4), 1)


def test_weights_on_the_move_are_not_applied_behind_newer_ones(monkeypatch):
    """load_weights between a rebalance's first stage, before anything is in force, and its next step."""
    config = MoEConfig(256, 128, 4, 2)
    first, second = (make_case(seed, config, RANKS, 3).weights for seed in (1, 2))
    for reload in (False, True):
        (engine,) = make_planned_engines(config, monkeypatch)
        engine.load_weights(first)
        rebalance = rebalance_of(engine)
        assert not rebalance.step()
        if reload:
            engine.load_weights(second)
            with pytest.raises(RuntimeError, match="start a new one"):
                rebalance.step()
            assert engine.placement.tolist() == [0, 1, -1, 2, 3, -1]
        else:
            assert rebalance.step() and engine.placement.tolist() == [0, 1, 2, 2, 3, 0]
            for ours, theirs in zip(*engine.images, strict=True):
                assert torch.equal(ours[2], theirs[0]) and torch.equal(theirs[2], ours[0])


def test_layers_share_the_room_for_weights_on_the_move(monkeypatch):
    """One layer at a time, and the bank of the step before, which a peer may not have emptied, is never the next."""
    config = MoEConfig(256, 128, 4, 2)
    engines = make_planned_engines(config, monkeypatch, 3)
    for seed, engine in enumerate(engines):
        engine.load_weights(make_case(seed, config, RANKS, 3).weights)
    rebalances = [rebalance_of(engine) for engine in engines]
    banks = []
    for rebalance, behind in zip(rebalances, (*rebalances[1:], None), strict=True):
        assert not rebalance.step()
        banks.append(engines[0].replicas.room.bank)
        if behind is not None:
            with pytest.raises(RuntimeError, match="of another layer of the workspace are on the move; finish"):
                behind.step()
        assert rebalance.step()
    assert banks == [1, 0, 1]
    for engine in engines:
        for ours, theirs in zip(*engine.images, strict=True):
            assert torch.equal(ours[2], theirs[0]) and torch.equal(theirs[2], ours[0])
    for let_go in (lambda e: e.load_weights(make_case(9, config, RANKS, 3).weights), FusedEngine.close):
        engines = make_planned_engines(config, monkeypatch, 2)
        for engine in engines:
            engine.load_weights(make_case(0, config, RANKS, 3).weights)
        assert not rebalance_of(engines[0]).step()
        let_go(engines[0])
        assert not rebalance_of(engines[1]).step()
