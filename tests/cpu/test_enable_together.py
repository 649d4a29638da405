"""enable() on two ranks that are not alike: what one refuses or fails at both say, and they wait for one that loads."""

import sys
import time

import pytest
import torch

pytest.importorskip("transformers", reason="not run: transformers is not installed")

from megamoe import EPConfig
from megamoe.integrations import transformers as serve
from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.engine_layers import refuse_alike
from megamoe.integrations.tiny import save_tiny_model
from megamoe.integrations.transformers import enable
from megamoe.ranks import init_process_group
from megamoe.testing.spawn import spawn_ranks


def test_two_ranks_refuse_fail_and_load_together(tmp_path):
    (tmp_path / "empty").mkdir()
    results = spawn_ranks([__file__, save_tiny_model(tmp_path / "tiny"), tmp_path / "empty"], 2)
    assert [r.returncode for r in results] == [0, 0], "\n".join(r.output for r in results)


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    own_rank = init_process_group().ep_rank
    plain = load_without_experts(sys.argv[1], dtype=torch.float32)
    refused_together(plain, *sys.argv[1:], own_rank)
    loaded_together(plain, sys.argv[1], own_rank)
    torch.distributed.destroy_process_group()
