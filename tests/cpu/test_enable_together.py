"""enable() and the engines' adapters on two ranks that are not alike: what one refuses or fails at both say, and they
wait for one that loads."""

import re
import sys
import time
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="not run: transformers is not installed")

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.integrations import engine_layers
from megamoe.integrations import transformers as serve
from megamoe.integrations.alike import alike
from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.engine_layers import load_block_fp8, refuse_alike
from megamoe.integrations.experts import find_experts
from megamoe.integrations.tiny import save_tiny_model
from megamoe.integrations.transformers import enable
from megamoe.ranks import init_process_group
from megamoe.testing.data import make_case
from megamoe.testing.spawn import spawn_ranks
from megamoe_cuda.gather import gather


def test_two_ranks_refuse_fail_and_load_together(tmp_path):
    (tmp_path / "empty").mkdir()
    results = spawn_ranks([__file__, save_tiny_model(tmp_path / "tiny"), tmp_path / "empty"], 2)
    assert [r.returncode for r in results] == [0, 0], "\n".join(r.output for r in results)


@pytest.mark.parametrize(("kind", "ended"), [(None, "close"), (ValueError, "close"), (KeyboardInterrupt, "abandon"),
                                             (MegaMoEError, "abandon")])  # fmt: skip
@pytest.mark.parametrize("closes", [True, False])
def test_what_may_be_one_ranks_alone_is_not_hidden_by_a_collective_close(kind, ended, closes):
    done = []

    def close():
        done.append("close")
        if not closes:
            raise MegaMoEError("rank 1 did not come")

    workspace = SimpleNamespace(is_cuda=True, ep_size=2, close=close, abandon=lambda: done.append("abandon"))
    expected = (() if closes else MegaMoEError) if kind is None else kind
    try:
        with ExitStack() as stack:
            stack.push(serve._closing(workspace))
            if kind is not None:
                raise kind("the first")
        assert not expected
    except BaseException as error:
        assert type(error) is expected and (kind is None or str(error) == "the first")
    assert done == [ended]


@pytest.mark.parametrize(("is_cuda", "ep_size", "kind", "closed"), [
    (True, 2, KeyError, 0), (True, 2, None, 1), (True, 1, KeyError, 1), (False, 2, KeyError, 1),
])
def test_an_exception_of_one_rank_does_not_wait_for_peers_to_close_with_it(is_cuda, ep_size, kind, closed):
    done, serving = [], object.__new__(serve.Serving)
    serving.workspace = serving._owned_workspace = SimpleNamespace(
        is_cuda=is_cuda, ep_size=ep_size, close=lambda: done.append("close")
    )
    serving._closed, serving._held, serving._model, serving.layers = False, None, lambda: None, {}
    with nullcontext() if kind is None else pytest.raises(kind), serving:
        if kind:
            raise kind
    assert len(done) == closed


@pytest.mark.parametrize(("ep_size", "num_tokens", "wanted", "bound"), [
    (1, 0, None, 1), (1, 1, None, 1), (1, 5, None, 8), (1, 8, None, 8), (1, 9, None, 12), (1, 5, 7, 7),
    (2, 5, None, None), (2, 5, 7, 7),  # ranks do not know each other's tokens
])
def test_the_bound_on_tokens_is_one_ranks_own_or_equal_on_all(ep_size, num_tokens, wanted, bound):
    slot, given = object.__new__(serve._Slot), []
    slot.config, slot.capacity, slot.ep_size = MoEConfig(256, 128, 4, 2), 12, ep_size
    slot.serving, slot.layer = lambda: SimpleNamespace(num_tokens_bound=wanted), lambda *_, **named: given.append(named)
    slot._forward(torch.zeros(num_tokens, 256).bfloat16(), torch.zeros(num_tokens, 2), torch.zeros(num_tokens, 2))
    assert given == [{"num_tokens_bound": bound}]


def test_a_closed_workspace_of_an_engine_is_made_anew():
    config = MoEConfig(256, 128, 8, 2)
    first = engine_layers.shared_workspace(config, 8, None, "cpu")
    assert engine_layers.shared_workspace(config, 8, None, torch.device("cpu")) is first
    assert engine_layers.shared_workspace(config, 16, None, "cpu") is not first
    first.close()
    assert not engine_layers.shared_workspace(config, 8, None, "cpu").closed
    engine_layers.close_workspaces()


def test_a_rank_serves_the_experts_of_its_own_index_only():
    check = engine_layers.check_linear_map
    check(None, 4, 1, 2)
    check(torch.tensor([-1, -1, 0, 1]), 4, 1, 2)
    with pytest.raises(ValueError, match="expert 0 is local 0 on rank 1 of 2, megamoe wants -1"):
        check(torch.tensor([0, 1, -1, -1]), 4, 1, 2)
    with pytest.raises(ValueError, match="expert 3 is local 0 on rank 1 of 2, megamoe wants 1"):
        check(torch.tensor([-1, -1, 0, 0]), 4, 1, 2)


def test_block_fp8_needs_e4m3_and_a_scale_for_each_matrix():
    weights = make_case(0, MoEConfig(256, 128, 8, 2), 1, 0).weights[0]
    with pytest.raises(ValueError, match=r"^w13_weight is torch.float32.*; w2_weight is torch.float8_e4m3fn, .* None"):
        layer = SimpleNamespace(workspace=SimpleNamespace(group=None), load_weights=lambda *_: None)
        load_block_fp8(layer, weights.linear1.float(), weights.linear1_sf, weights.linear2, None)


def refused_together(model, checkpoint: str, empty: str, rank: int) -> None:
    for what, path in ((model, checkpoint if rank == 0 else empty), (checkpoint if rank else empty, None)):
        try:
            enable(what, weight_format="bf16", checkpoint=path)
            raise AssertionError("a rank without a checkpoint was not refused")
        except (ValueError, OSError) as error:
            assert "model.safetensors" in str(error), error
    try:
        refuse_alike("this layer", [], torch.distributed.group.WORLD)
        refuse_alike("this layer", ["expert_map is not linear"] * rank, torch.distributed.group.WORLD)
        raise AssertionError("what a peer cannot serve was not refused")
    except ValueError as error:
        assert str(error) == "megamoe cannot serve this layer: expert_map is not linear", error


def loaded_together(model, checkpoint: str, rank: int) -> None:
    """Rank 1 fails while it loads, which both say; then it takes longer than any deadline, and rank 0 waits."""
    shipped, calls = serve.load_experts, []

    def fails(*args, **more):
        raise RuntimeError("the disk is gone")

    def is_slow(*args, **more):
        time.sleep(0 if calls else 6.0)
        calls.append(args)
        return shipped(*args, **more)

    deadlines = EPConfig(64, arrive_deadline_s=4.0, step_deadline_s=4.0)
    arguments = {"weight_format": "bf16", "checkpoint": checkpoint, "ep_config": deadlines}
    serve.load_experts = fails if rank else shipped
    try:
        enable(model, **arguments)
        raise AssertionError("what failed on one rank was not told to the other")
    except (ValueError, RuntimeError) as error:
        assert str(error) == ("the disk is gone" if rank else "rank 1: RuntimeError: the disk is gone"), error
    serve.load_experts = is_slow if rank else shipped
    begin = time.monotonic()
    with enable(model, **arguments):
        assert time.monotonic() - begin > 5.0
    serve.load_experts = shipped


def poisoned_together(model, checkpoint: str, rank: int) -> None:
    """Of a workspace that one rank alone refuses, both make no layer: its next ones have one number on both."""
    configs = list({info.config for info in find_experts(model, "bf16").values()})
    with Workspace(configs, EPConfig(64, arrive_deadline_s=4.0), device="cpu") as workspace:
        arguments = {"weight_format": "bf16", "workspace": workspace, "checkpoint": checkpoint}
        if rank:
            workspace.poison(MegaMoEError("an id was out of range"))
        try:
            enable(model, **arguments)
            raise AssertionError("a workspace that a peer refuses was taken")
        except (ValueError, MegaMoEError) as error:
            assert "an id was out of range" in str(error) and "call workspace.reset()" in str(error), error
        workspace.reset()
        with enable(model, **arguments):
            model(torch.arange(4).view(1, 4))


def loaded_by_engines_together(rank: int) -> None:
    """One rank fails alone, where no next call of its own would have told the other."""
    config = MoEConfig(256, 128, 8, 2)
    weights, deadlines = make_case(0, config, 2, 0, ranks=[rank]).weights[0], []
    with Workspace(config, EPConfig(8, arrive_deadline_s=4.0), device="cpu") as workspace:
        layer = MoELayer(config, workspace)
        tensors = weights.linear1, weights.linear1_sf, weights.linear2, weights.linear2_sf
        load_block_fp8(layer, *tensors)
        if rank:
            layer.load_weights = lambda *_: torch.empty(1 << 60)
        try:
            load_block_fp8(layer, *tensors)
            raise AssertionError("what failed on one rank was not told to the other")
        except (ValueError, RuntimeError) as error:
            assert "memory" in str(error) and (rank or "rank 1: RuntimeError: " in str(error)), error
    shipped = engine_layers.gather
    engine_layers.gather = lambda *args: deadlines.append(args[3]) or shipped(*args)
    refuse_alike("this layer", [], torch.distributed.group.WORLD)
    engine_layers.gather = shipped
    assert deadlines == [engine_layers.LOADING_S] and deadlines[0] > 5 * EPConfig(8).arrive_deadline_s


def absent(rank: int) -> None:
    """A peer that does not come is named by who is well; who is not tells its own failure."""
    world = torch.distributed.group.WORLD
    for problem in (None, OSError("the disk is gone")):
        try:
            if rank == 0:
                with alike(world, 0.5):
                    if problem is not None:
                        raise problem
                raise AssertionError("the absence of a peer was not told")
        except (MegaMoEError, OSError) as error:
            told = r"role host step serve: rank 0 waited (0\.[5-9]|[1-5]\.\d) s at serve for rank 1"
            assert re.search(told, str(error)) if problem is None else error is problem, error
        gather(world, "absent")


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_rank = init_process_group().ep_rank
    plain = load_without_experts(sys.argv[1], dtype=torch.float32)
    refused_together(plain, *sys.argv[1:], own_rank)
    loaded_together(plain, sys.argv[1], own_rank)
    poisoned_together(plain, sys.argv[1], own_rank)
    loaded_by_engines_together(own_rank)
    absent(own_rank)
    torch.distributed.destroy_process_group()
