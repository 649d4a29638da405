"""Experts whose weights are elsewhere: they refuse to run eagerly, and are served, copied and closed like others."""

import copy
import gc

import pytest
import torch

pytest.importorskip("transformers", reason="not run: transformers is not installed")

from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.tiny import save_tiny_model
from megamoe.integrations.transformers import enable

IDS = torch.arange(4)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_model_loaded_without_experts_does_not_run_without_them(checkpoint):
    light = load_without_experts(checkpoint, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="on the meta device, donated to megamoe or not loaded"):
        light(input_ids=IDS)


def test_a_copy_is_served(checkpoint):
    """A hook is copied with its module; what megamoe might remember of the module is not."""
    light = load_without_experts(checkpoint, dtype=torch.float32)
    twin = copy.deepcopy(light)
    logits = []
    for model in (light, twin):
        with enable(model, weight_format="bf16", checkpoint=checkpoint), torch.no_grad():
            logits.append(model(input_ids=IDS).logits)
    assert torch.equal(*logits)


def test_closing_goes_on_without_a_module_that_was_replaced(checkpoint):
    model = load_without_experts(checkpoint, dtype=torch.float32)
    serving = enable(model, weight_format="bf16", checkpoint=checkpoint)
    model.model.layers[0].mlp.experts = torch.nn.Identity()
    gc.collect()
    serving.close()
    assert serving.workspace.closed
