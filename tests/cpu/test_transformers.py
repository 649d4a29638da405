# ruff: noqa: E402  (what follows needs packages that may be missing)
"""A Hugging Face Qwen3-MoE whose experts megamoe serves: text in, logits out, against the model's own experts."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="not run: transformers is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="not run: safetensors is not installed")

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megamoe import EPConfig, MegaMoEError, steps
from megamoe.checkpoint import Checkpoint, CheckpointError
from megamoe.integrations import generate
from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.logits import eager_logits, logits_error, served_logits
from megamoe.integrations.tiny import byte_tokenizer, save_tiny_model, tiny_config
from megamoe.integrations.transformers import disable, enable
from megamoe.quant.fp8 import dequantize_blocks, dequantize_rows, quantize_blocks, quantize_rows
from megamoe.ranks import init_process_group
from megamoe.testing.spawn import spawn_ranks

PROMPTS = ["The quick brown fox jumps over the lazy dog.", "Grüße ☃", "a"]
STEPS = ("dispatch", "linear1", "swiglu", "linear2", "combine")
LOGITS_FP32 = 1e-5  # max abs, fp32 model, bf16 (unquantized) format
LOGITS_BF16 = 2e-2  # relative L2, bf16 model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def prompt_ids(path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]


@pytest.fixture
def step_calls(monkeypatch):
    """How often each step of the specification ran."""
    calls = dict.fromkeys(STEPS, 0)

    def spy(name, step):
        def counted(*args, **kwargs):
            calls[name] += 1
            return step(*args, **kwargs)

        return counted

    for name in STEPS:
        monkeypatch.setattr(steps, name, spy(name, getattr(steps, name)))
    return calls


def save_block_fp8(source, target) -> None:
    """The same model with its experts in block-FP8, as DeepSeek and Qwen publish them."""
    checkpoint, tensors = Checkpoint(source), {}
    for name, tensor in checkpoint.read(list(checkpoint.names)):
        if ".mlp.experts." in name:
            tensors[name], tensors[name + "_scale_inv"] = quantize_blocks(tensor)
        else:
            tensors[name] = tensor
    safetensors_torch.save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())


def test_byte_tokenizer_takes_any_text():
    tokenizer = byte_tokenizer()
    for text in [*PROMPTS, "  two  spaces\n\ttab", "\x00\x7f"]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("weights_from", ["parameters", "checkpoint"])
def test_fp32_logits_equal_eager_and_steps_is_the_code_that_ran(model, checkpoint, step_calls, weights_from):
    ids = prompt_ids(checkpoint)
    eager = eager_logits(model, ids)
    assert sum(step_calls.values()) == 0
    source = checkpoint if weights_from == "checkpoint" else None
    served = served_logits(model, ids, weight_format="bf16", checkpoint=source)
    num_calls = len(ids) * model.config.num_hidden_layers
    assert step_calls == dict.fromkeys(STEPS, num_calls)
    assert served.shape == (sum(len(text.encode()) for text in PROMPTS), model.config.vocab_size)
    error = logits_error(served, eager)
    print(f"fp32, experts from {weights_from}: {error}")
    assert error.max_abs <= LOGITS_FP32
    for layer in model.model.layers:  # and they are the experts': without them the logits are others
        layer.mlp.experts.down_proj.data.zero_()
    assert logits_error(eager_logits(model, ids), eager).max_abs > 1e4 * LOGITS_FP32


def test_bf16_logits_are_within_2e_2_of_eager(model, checkpoint, step_calls):
    model, ids = model.bfloat16(), prompt_ids(checkpoint)
    error = logits_error(served_logits(model, ids, weight_format="bf16"), eager_logits(model, ids))
    print(f"bf16: {error}")
    assert error.rel_l2 <= LOGITS_BF16 and min(step_calls.values()) > 0


def _same_quantization(self, hidden_states, top_k_index, top_k_weights):
    """The FP8 format in plain torch.matmul over the model's own parameters: no line of steps.py."""
    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    x = dequantize_rows(*quantize_rows(hidden_states.bfloat16()))
    for expert in range(self.num_experts):
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        linear1, linear2 = (
            dequantize_blocks(*quantize_blocks(w[expert].detach())) for w in (self.gate_up_proj, self.down_proj)
        )
        gate, up = torch.matmul(x[token], linear1.T).chunk(2, dim=-1)
        h = F.silu(gate) * up * top_k_weights[token, slot, None].float()
        y = torch.matmul(dequantize_rows(*quantize_rows(h)), linear2.T)
        out.index_add_(0, token, y.bfloat16().float())
    return out.bfloat16().to(hidden_states.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_logits_against_the_same_quantization_with_matmul(model, checkpoint, dtype):
    model, ids = model.to(dtype), prompt_ids(checkpoint)
    served = served_logits(model, ids, weight_format="fp8")
    assert torch.equal(
        served, served_logits(model, ids, weight_format="fp8", spec=True)
    )  # the kernel's yardstick on GPUs
    ALL_EXPERTS_FUNCTIONS.register("test_same_quantization", _same_quantization)
    model.set_experts_implementation("test_same_quantization")
    with torch.no_grad():
        same = torch.cat([model(input_ids=i).logits.flatten(0, 1) for i in ids])
    beyond, whole = logits_error(served, same), logits_error(served, eager_logits(model, ids))
    print(f"{dtype} fp8 beyond the same quantization: {beyond}; against eager, the format itself: {whole}")
    # The sums run in another order: a value near a rounding step of e4m3 or bf16 may fall to its other side
    assert beyond.rel_l2 < 5e-3
    assert 5e-3 < whole.rel_l2 < 1e-1, "the format's own error: neither absent nor out of proportion"


def test_fp8_experts_of_a_checkpoint_under_a_model_that_holds_none(model, checkpoint, tmp_path):
    save_block_fp8(checkpoint, tmp_path)
    ids = prompt_ids(checkpoint)
    light = load_without_experts(tmp_path, dtype=torch.float32)
    assert all(layer.mlp.experts.gate_up_proj.is_meta for layer in light.model.layers)
    with pytest.raises(ValueError, match=r"meta device; pass checkpoint"):
        enable(light)
    from_file = served_logits(light, ids, weight_format="fp8", checkpoint=tmp_path)
    for parameter in model.parameters():  # mapped from a file they are not aligned, and some CPUs then add otherwise
        parameter.data = parameter.data.clone()
    assert torch.equal(from_file, served_logits(model, ids, weight_format="fp8"))  # the same quantization either way
    dequantized = served_logits(light, ids, weight_format="bf16", checkpoint=tmp_path)
    for layer in model.model.layers:
        for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            parameter.data = dequantize_blocks(*quantize_blocks(parameter.data))
    assert logits_error(dequantized, eager_logits(model, ids)).max_abs <= LOGITS_FP32


def test_generate_gives_the_text_of_the_eager_model(model, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    model.set_experts_implementation("eager")
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    with enable(model, weight_format="bf16"):  # forwards of batch x prompt, then of batch x 1 tokens
        served = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(served, expected)


def test_more_tokens_than_capacity_is_refused_with_the_remedy_and_harms_nothing(model, checkpoint):
    short, long = torch.arange(8)[None], torch.arange(9)[None]
    with enable(model, weight_format="bf16", ep_config=EPConfig(8)), torch.no_grad():
        before = model(input_ids=short).logits
        with pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.experts: num_tokens=9 .*num_max_tokens_per_rank=8; .*EPConfig\(9\)"
        ):
            model(input_ids=long)
        assert torch.equal(model(input_ids=short).logits, before)


def test_disable_gives_back_the_model_as_it_was(model, checkpoint):
    ids, names = prompt_ids(checkpoint), list(model.state_dict())
    before = model.get_experts_implementation()
    serving = enable(model, weight_format="bf16")
    assert list(model.state_dict()) == names and list(serving.layers) == [
        f"model.layers.{i}.mlp.experts" for i in range(3)
    ]
    assert len({id(layer.workspace) for layer in serving.layers.values()}) == 1
    with pytest.raises(TypeError, match="model has type NoneType; pass a transformers model, or a directory"):
        enable(None)
    with pytest.raises(ValueError, match="already; call disable"):
        enable(model)
    with pytest.raises(ValueError, match="again, after a deepcopy"):
        copy.deepcopy(model)(input_ids=ids[0])
    disable(model)
    serving.close()  # twice is harmless
    assert model.get_experts_implementation() == before and serving.workspace.closed
    with pytest.raises(ValueError, match="nothing to disable"):
        disable(model)
    model.set_experts_implementation("megamoe")
    with pytest.raises(ValueError, match="experts were not given to megamoe"):
        model(input_ids=ids[0])
    model.set_experts_implementation(before)
    enable(model, weight_format="bf16").close()  # and again


def test_check_raises_what_any_layer_has_to_report(model, monkeypatch):
    def failed():
        raise MegaMoEError("an expert id was out of range")

    with enable(model, weight_format="bf16") as serving:
        serving.check()
        monkeypatch.setattr(serving.layers["model.layers.1.mlp.experts"], "check", failed)
        with pytest.raises(MegaMoEError, match="id was out of range"):
            serving.check()


def test_changed_parameters_are_followed(model, checkpoint):
    ids = prompt_ids(checkpoint)
    with enable(model, weight_format="bf16"), torch.no_grad():
        first = model(input_ids=ids[0]).logits
        model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()})
        second = model(input_ids=ids[0]).logits
    expected = eager_logits(model, ids[:1])
    assert logits_error(second[0], expected).max_abs <= LOGITS_FP32
    assert logits_error(first[0], expected).max_abs > 1e3 * LOGITS_FP32


def test_donated_parameters_leave_memory_and_logits_stay(model, checkpoint):
    ids = prompt_ids(checkpoint)
    eager = eager_logits(model, ids)
    with enable(model, weight_format="bf16", donate=True), torch.no_grad():
        assert all(layer.mlp.experts.down_proj.is_meta for layer in model.model.layers)
        served = torch.cat([model(input_ids=i).logits[0] for i in ids])
    assert logits_error(served, eager).max_abs <= LOGITS_FP32
    with pytest.raises(ValueError, match="gate_up_proj, down_proj are on the meta device.*enable"):
        eager_logits(model, ids)
    with enable(model, weight_format="bf16", checkpoint=checkpoint), torch.no_grad():
        again = torch.cat([model(input_ids=i).logits[0] for i in ids])
    assert torch.equal(again, served)


def test_training_is_refused_rather_than_cut_off_from_its_gradient(model):
    with enable(model, weight_format="bf16"):
        model(input_ids=torch.arange(4)[None])  # eval mode: runs, with or without no_grad
        model.train()
        with pytest.raises(ValueError, match="forward only"):
            model(input_ids=torch.arange(4)[None])


def test_models_that_cannot_be_served_are_refused_with_every_reason():
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32}  # fmt: skip
    gelu = AutoModelForCausalLM.from_config(tiny_config(hidden_act="gelu", num_hidden_layers=1))
    with pytest.raises(
        ValueError, match=r"mlp\.experts \(Qwen3MoeExperts\): their gating \(GELU.*none of swiglu, swiglu_oai"
    ):
        enable(gelu)
    gpt_oss = AutoModelForCausalLM.from_config(tiny_config("gpt_oss")).half()
    gpt_oss.model.layers[0].mlp.experts.alpha = 1.5  # another formula, though the class is known
    with pytest.raises(ValueError, match=r"layers\.0.*GptOssExperts\): their gating .*; weights are torch.float16"):
        enable(gpt_oss)
    with pytest.raises(ValueError, match="no MoE layer"):
        enable(Qwen3ForCausalLM(Qwen3Config(**sizes)))


class LoRAWrapper(torch.nn.Module):
    """The form of PEFT's: what it wraps in `base_layer`, its matrices beside it."""

    def __init__(self, base_layer: torch.nn.Module):
        super().__init__()
        self.base_layer, self.lora_A = base_layer, torch.nn.ModuleDict({"default": torch.nn.Linear(4, 4)})

    def forward(self, *inputs):
        return self.base_layer(*inputs)


def test_lora_on_experts_is_refused_and_on_attention_is_not(model):
    mlp, attention = model.model.layers[1].mlp, model.model.layers[0].self_attn
    attention.q_proj = LoRAWrapper(attention.q_proj)
    enable(model).close()
    mlp.experts = LoRAWrapper(LoRAWrapper(mlp.experts))  # a wrapper for each of two parameters
    with pytest.raises(ValueError, match=r"LoRA on experts \(lora_A\); merge it first") as told:
        enable(model)
    assert "layers.1" in str(told.value) and "layers.0" not in str(told.value)
    mlp.experts = mlp.experts.base_layer.base_layer
    mlp.experts.lora_B = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"LoRA on experts \(lora_B\)"):
        enable(model)


def test_sizes_and_arguments_that_do_not_fit_are_refused(checkpoint, model):
    with pytest.raises(ValueError, match="topk=17 must be between 1 and 16"):
        enable(AutoModelForCausalLM.from_config(tiny_config(num_experts=32, num_experts_per_tok=17)))
    with pytest.raises(TypeError, match=r"ep_config=64 must be an EPConfig"):
        enable(model, ep_config=64)
    with pytest.raises(ValueError, match="virtual_ranks=2"):
        enable(model, ep_config=EPConfig(8, virtual_ranks=2))
    with pytest.raises(ValueError, match="float16; convert the model"):
        enable(model.half())


def test_one_error_lists_the_problems_of_all_layers_and_changes_nothing(model, checkpoint, tmp_path):
    tensors = dict(safetensors_torch.load_file(checkpoint / "model.safetensors"))
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.2.mlp.experts.7.down_proj.weight"] = torch.zeros(128, 256)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    before = model.get_experts_implementation()
    with pytest.raises(CheckpointError) as caught:
        enable(model, checkpoint=tmp_path)
    assert len(caught.value.problems) == 2 and "layers.0" in str(caught.value) and "layers.2" in str(caught.value)
    assert model.get_experts_implementation() == before
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    del tensors["model.norm.weight"]
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 problem:\n  - missing: model\.norm\.weight"):
        load_without_experts(tmp_path)


def test_megamoe_does_without_transformers_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import megamoe, megamoe.checkpoint; megamoe.MoELayer\n"
        "try:\n    import megamoe.integrations.transformers\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "pip install 'megamoe[transformers]'" in done.stdout, done.stdout + done.stderr


def test_generate_script_prints_errors_and_text(capsys):
    assert generate.main(["--model", "tiny", "--prompt", "hello", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:26].strip(): line.split()[-3:] for line in lines}
    assert float(rows["megamoe against eager"][1]) <= LOGITS_FP32 and rows["megamoe against steps.py"][0] == "0.00e+00"
    assert lines[-1].startswith("'hello' -> ")
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "torchrun" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate.main(["--capacity", "0"])
    assert "--capacity 0 must be at least 1" in capsys.readouterr().err
    assert generate.main(["--prompt", "hello", "--capacity", "3", "--device", "cpu"]) == 2
    assert "generate: model.layers.0.mlp.experts: num_tokens=5" in capsys.readouterr().err


def test_two_ranks_with_their_own_prompts_give_what_one_process_gives(model, checkpoint, tmp_path, capsys):
    results = spawn_ranks([__file__, checkpoint, tmp_path], 2)
    assert [r.returncode for r in results] == [0, 0], "\n".join(r.output for r in results)
    ids = prompt_ids(checkpoint)
    for rank in range(2):
        served = safetensors_torch.load_file(tmp_path / f"rank{rank}.safetensors")["logits"]
        error = logits_error(served, eager_logits(model, ids[rank::2]))
        print(f"rank {rank} of 2: {error}")
        assert error.max_abs <= LOGITS_FP32
    assert generate.main(generate_arguments(checkpoint)) == 0
    expected = sorted(line for line in capsys.readouterr().out.splitlines() if "->" in line)
    lines = [line.partition("] ")[2] for r in results for line in r.output.splitlines() if "->" in line]
    assert len(expected) == len(PROMPTS) and sorted(lines) == expected


def generate_arguments(checkpoint) -> list[str]:
    prompts = [word for text in PROMPTS for word in ("--prompt", text)]
    return ["--model", str(checkpoint), *prompts, "--max-new-tokens", "4", "--device", "cpu", "--local-experts"]


def rank_main(checkpoint: str, out: str) -> None:
    """One of two ranks: half of the experts read from the checkpoint, every second prompt."""
    torch.set_num_threads(1)
    rank = init_process_group()
    model = load_without_experts(checkpoint, dtype=torch.float32)
    mine = prompt_ids(checkpoint)[rank.ep_rank :: 2]
    with enable(model, weight_format="bf16", checkpoint=checkpoint) as serving:
        assert {layer.workspace.ep_size for layer in serving.layers.values()} == {2}
    logits = served_logits(
        model, mine, 2, weight_format="bf16", checkpoint=checkpoint
    )  # rank 1 has one prompt: it idles
    safetensors_torch.save_file({"logits": logits}, f"{out}/rank{rank.ep_rank}.safetensors")
    assert generate.main(generate_arguments(checkpoint)) == 0
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
