"""enable(fold_shared_experts=True): DeepSeek-V3's shared experts served by the layer, and given back."""

import copy
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="not run: transformers is not installed")

from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.logits import eager_logits, logits_error, served_logits, serving_logits
from megamoe.integrations.tiny import save_tiny_model, tiny_model
from megamoe.integrations.transformers import disable, enable
from megamoe.ranks import init_process_group, rank_from_env
from megamoe.testing.spawn import spawn_ranks

IDS = [torch.arange(3, 40)[None], torch.arange(60, 67)[None]]
LOGITS_FP32 = 1e-5  # max abs, fp32 model, bf16 (unquantized) format


def shared_of(model) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("shared_experts")]


@pytest.mark.parametrize("count, intermediate", [(1, 128), (2, 128), (1, 96)])
def test_the_layer_does_what_the_module_did(count, intermediate):
    """Of one and of two experts' size; padded."""
    model = tiny_model("deepseek_v3", n_shared_experts=count, moe_intermediate_size=intermediate)
    eager, calls = eager_logits(model, IDS), []
    for module in shared_of(model):
        module.down_proj.register_forward_hook(lambda *_: calls.append(None))
    with enable(model, weight_format="bf16", fold_shared_experts=True) as serving:
        assert {layer.config.num_shared_experts for layer in serving.layers.values()} == {count}
        calls.clear()
        assert logits_error(serving_logits(model, serving, IDS), eager).max_abs <= LOGITS_FP32
        assert not calls
        model.set_experts_implementation("eager")  # and its shared experts with it
        assert logits_error(eager_logits(model, IDS), eager).max_abs == 0 and calls
    assert logits_error(eager_logits(model, IDS), eager).max_abs == 0
    assert all("forward" not in vars(module) for module in shared_of(model))


@pytest.mark.parametrize("weight_format", ["fp8", "mxfp4"])
def test_quantized_as_the_other_experts(weight_format):
    model = tiny_model("deepseek_v3")
    eager, how = eager_logits(model, IDS), {"weight_format": weight_format}
    apart = logits_error(served_logits(model, IDS, **how), eager)
    folded = served_logits(model, IDS, fold_shared_experts=True, **how)
    assert 0 < logits_error(folded, eager).rel_l2 < 2 * apart.rel_l2
    spec = served_logits(model, IDS, fold_shared_experts=True, spec=True, **how)
    assert logits_error(folded, spec).max_abs < 1e-4  # a near tie of rounding aside, the same operations


def test_changes_copies_and_second_servings_are_followed():
    model = tiny_model("deepseek_v3")
    before = set(model.state_dict())
    with enable(model, weight_format="bf16", fold_shared_experts=True) as serving:
        assert set(model.state_dict()) == before
        with torch.no_grad():
            shared_of(model)[0].up_proj.weight.mul_(-2)
        shared_of(model)[1].down_proj.weight.data = shared_of(model)[1].down_proj.weight * 3
        served = serving_logits(model, serving, IDS)
        twin = copy.deepcopy(model)
        twin.set_experts_implementation("eager")
        eager = eager_logits(twin, IDS)
        assert logits_error(served, eager).max_abs <= 10 * LOGITS_FP32
        assert logits_error(served_logits(twin, IDS, weight_format="bf16"), eager).max_abs <= 10 * LOGITS_FP32
    with enable(model, weight_format="bf16") as serving:
        assert logits_error(serving_logits(model, serving, IDS), eager).max_abs <= 10 * LOGITS_FP32


def test_one_compiled_graph():
    model = tiny_model("deepseek_v3")
    block = model.model.layers[1].mlp
    x = torch.randn(1, 5, 256)
    with torch.no_grad(), enable(model, weight_format="bf16", fold_shared_experts=True):
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), block(x))


def test_what_cannot_be_folded_is_refused_and_left_alone():
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: no module shared_experts"):
        enable(tiny_model("qwen3_moe"), fold_shared_experts=True)
    model = tiny_model("deepseek_v3")
    eager = eager_logits(model, IDS)
    first, second = (model.model.layers[i].mlp for i in (1, 2))
    forward = type(first).forward
    scaled = lambda x: forward(first, x) * 0.5  # noqa: E731
    first.forward = scaled
    second.shared_experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError) as error:
        enable(model, fold_shared_experts=True)
    assert "layers.1.mlp.experts: its block does not add" in str(error.value)
    assert "layers.2.mlp.experts: its shared_experts are no SwiGLU" in str(error.value)
    del first.forward
    second.shared_experts.act_fn = torch.nn.SiLU()
    second.shared_experts.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of their own"):
        enable(model, fold_shared_experts=True)
    del second.shared_experts.forward
    enable(model, weight_format="bf16", fold_shared_experts=True)
    disable(model)
    assert logits_error(eager_logits(model, IDS), eager).max_abs == 0


def test_two_ranks_serve_their_own_tokens_shared_experts(tmp_path):
    path = save_tiny_model(tmp_path, family="deepseek_v3")
    expected = rank_main(path)
    results = spawn_ranks([__file__, path], 2)
    assert [r.returncode for r in results] == [0, 0], "\n".join(r.output for r in results)
    for result in results:
        (line,) = [line for line in result.output.splitlines() if line.startswith("sums ")]
        assert [float(word) for word in line.split()[1:]] == pytest.approx(expected[result.ep_rank], rel=1e-5)


def rank_main(path) -> list[list[float]]:
    """Each rank its own prompt of IDS, one process both. -> sums over logits"""
    rank = rank_from_env()
    model, sums = load_without_experts(path, dtype=torch.float32), []
    with enable(model, weight_format="fp8", checkpoint=path, fold_shared_experts=True) as serving:
        for ids in IDS[rank.ep_rank :: rank.ep_size]:
            logits = serving_logits(model, serving, [ids])
            sums.append([float(logits.abs().sum()), float(logits[-1].square().sum())])
    return sums


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_process_group()
    print("sums", *rank_main(sys.argv[1])[0])
    torch.distributed.destroy_process_group()
