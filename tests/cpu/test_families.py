# ruff: noqa: E402  (what follows needs packages that may be missing)
"""Model families through the experts registration: saved under their usual names, loaded, served, compared."""

import re
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="not run: transformers is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="not run: safetensors is not installed")

from transformers import AutoModelForCausalLM

from megamoe import EPConfig, route
from megamoe.__main__ import main as cli
from megamoe.checkpoint import Checkpoint, CheckpointError, load_experts
from megamoe.integrations import generate
from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.experts import find_experts, weights_of
from megamoe.integrations.logits import eager_logits, logits_error, served_logits
from megamoe.integrations.tiny import FAMILIES, save_tiny_model, tiny_model
from megamoe.integrations.transformers import enable
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks
from megamoe.ranks import init_process_group, rank_from_env
from megamoe.testing.spawn import spawn_ranks

LOGITS_FP32 = 1e-5  # max abs, fp32 model, bf16 (unquantized) format
LOGITS_BF16 = 2e-2  # relative L2, bf16 model
NAMES = {
    "qwen3_moe": r"model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight",
    "mixtral": r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w1\.weight",
    "deepseek_v3": r"model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight",
    "gpt_oss": r"model\.layers\.1\.mlp\.experts\.gate_up_proj_bias",
}
IDS = [torch.arange(3, 40)[None], torch.arange(60, 67)[None]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return {family: save_tiny_model(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_equal_eager_from_parameters_and_from_files(saved, family):
    path = saved[family]
    assert any(re.fullmatch(NAMES[family], name) for name in Checkpoint(path).names)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    eager = eager_logits(model, IDS)
    light = load_without_experts(path, dtype=torch.float32)
    assert logits_error(eager, eager_logits(tiny_model(family), IDS)).max_abs == 0  # nothing was lost in the files
    for name, how in (("parameters", {"model": model}), ("files", {"model": light, "checkpoint": path})):
        error = logits_error(served_logits(prompts=IDS, weight_format="bf16", **how), eager)
        print(f"{family}, experts from {name}: {error}")
        assert error.max_abs <= LOGITS_FP32
    for name, parameter in model.named_parameters():  # the experts, each tensor of theirs, matter to the logits
        if re.search(r"\.1\.mlp\.experts\.\w+$", name):
            before = parameter.data.clone()
            parameter.data.zero_()
            assert logits_error(eager_logits(model, IDS), eager).max_abs > 100 * LOGITS_FP32, name
            parameter.data.copy_(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_and_fp8_logits_are_within_the_formats_error(saved, family):
    model = AutoModelForCausalLM.from_pretrained(saved[family], dtype=torch.bfloat16).eval()
    eager = eager_logits(model, IDS)
    plain = logits_error(served_logits(model, IDS, weight_format="bf16"), eager)
    quantized = logits_error(served_logits(model, IDS, weight_format="fp8"), eager)
    print(f"{family}: bf16 {plain}; fp8 {quantized}")
    assert plain.rel_l2 <= LOGITS_BF16
    assert 2e-3 < quantized.rel_l2 < 1.5e-1, "the format's own error: neither absent nor out of proportion"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_the_same_local_experts_from_files_as_from_parameters(saved, family):
    model = AutoModelForCausalLM.from_pretrained(saved[family], dtype=torch.float32).eval()
    name, info = list(find_experts(model, "bf16").items())[-1]
    local = range(info.config.num_experts // 2, info.config.num_experts)
    read, seen = [], []
    for weight_format in ("bf16", "fp8"):
        found = find_experts(model, weight_format)[name]
        weights = load_experts(saved[family], -1, local, config=found.config, sizes=found.sizes, dtype=torch.float32,
                               prefix=name, progress=read.append)  # fmt: skip
        expected = weights_of(found, local)
        values = (weights.linear1, weights.linear2)
        if weight_format == "fp8":
            sf = weights.linear1_sf, weights.linear2_sf
            quantized = [quantize_blocks(w) for w in (expected.linear1, expected.linear2)]
            assert all(torch.equal(a, b.sf) for a, b in zip(sf, quantized, strict=True))
            assert all(torch.equal(a.float(), b.values.float()) for a, b in zip(values, quantized, strict=True))
        else:
            assert all(torch.equal(a, b) for a, b in zip(values, (expected.linear1, expected.linear2), strict=True))
        if info.config.bias:
            assert torch.equal(weights.linear1_bias, expected.linear1_bias)
            assert torch.equal(weights.linear2_bias, expected.linear2_bias)
        seen.append(sum(read))
    hidden, inter = info.sizes
    one_expert = 3 * hidden * inter + (2 * inter + hidden if info.config.bias else 0)
    assert seen == [4 * one_expert * len(local), 8 * one_expert * len(local)]  # bytes of local experts, no more


def test_sizes_that_are_no_multiple_of_128_are_padded_with_zeros_and_trimmed(saved):
    model = tiny_model("gpt_oss")
    with enable(model, weight_format="bf16") as serving:
        (layer, *_) = serving.layers.values()
        assert (layer.config.hidden, layer.config.intermediate) == (256, 256)
        info = find_experts(model, "bf16")["model.layers.0.mlp.experts"]
    weights = weights_of(info, range(8))
    gate, up = weights.linear1.chunk(2, dim=1)
    assert not gate[:, 160:].any() and not up[:, :, 192:].any() and up[:, :160, :192].all()
    assert not weights.linear2[:, 192:].any() and not weights.linear2[:, :, 160:].any()
    assert not weights.linear1_bias[:, 160:256].any() and weights.linear1_bias[:, 256:416].all()
    experts = info.module
    assert torch.equal(gate[2, 5, :192], experts.gate_up_proj[2, :, 10])  # interleaved: gate 5 is column 10
    narrow = tiny_model("qwen3_moe", moe_intermediate_size=96, hidden_size=160)
    error = logits_error(served_logits(narrow, IDS, weight_format="bf16"), eager_logits(narrow, IDS))
    assert error.max_abs <= LOGITS_FP32


def test_deepseek_block_fp8_files_are_served_as_they_are(saved, tmp_path):
    """Block-FP8 as published: experts and dense layers, one of them not in whole blocks; and a layer to be left out."""
    tensors = {}
    for name, tensor in Checkpoint(saved["deepseek_v3"]).read(Checkpoint(saved["deepseek_v3"]).names):
        tensors[name] = tensor
        if "experts" in name or "o_proj" in name or "q_a_proj" in name:
            padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 128, 0, -tensor.shape[0] % 128))
            values, sf = quantize_blocks(padded)
            tensors[name] = values.view(torch.uint8)[: len(tensor), : tensor.shape[1]].contiguous().view(values.dtype)
            tensors[name + "_scale_inv"] = sf
    tensors["model.layers.61.mlp.experts.0.gate_proj.weight"] = torch.zeros(1)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((saved["deepseek_v3"] / "config.json").read_text())
    light = load_without_experts(tmp_path, dtype=torch.float32)
    served = served_logits(light, IDS, weight_format="bf16", checkpoint=tmp_path)
    model = tiny_model("deepseek_v3")
    for name, parameter in model.named_parameters():
        if "experts" in name or "o_proj" in name or "q_a_proj" in name:
            padded = torch.nn.functional.pad(
                parameter.data, (0, -parameter.shape[-1] % 128, 0, -parameter.shape[-2] % 128)
            )
            parameter.data = dequantize_blocks(*quantize_blocks(padded))[
                ..., : parameter.shape[-2], : parameter.shape[-1]
            ]
    assert logits_error(served, eager_logits(model, IDS)).max_abs <= LOGITS_FP32
    fp8 = served_logits(light, IDS, weight_format="fp8", checkpoint=tmp_path)
    assert 2e-3 < logits_error(fp8, served).rel_l2 < 1.5e-1  # activations are quantized then


def test_deepseek_router_is_route():
    gate = tiny_model("deepseek_v3").model.layers[1].mlp.gate
    hidden_states = torch.randn(64, 256)
    logits, weights, idx = gate(hidden_states)
    routed = route(
        logits, 4, score="sigmoid", bias=gate.e_score_correction_bias, scale=2.5, num_groups=4, topk_groups=2
    )
    order = idx.argsort(1)
    ours = routed.topk_idx.argsort(1)
    assert torch.equal(idx.gather(1, order), routed.topk_idx.gather(1, ours).long())
    assert torch.allclose(weights.gather(1, order), routed.topk_weights.gather(1, ours), rtol=1e-5)


def test_gpt_oss_problems_are_listed_together_and_mxfp4_blocks_are_named(saved, tmp_path):
    tensors = safetensors_torch.load_file(saved["gpt_oss"] / "model.safetensors")
    prefix = "model.layers.0.mlp.experts."
    del tensors[prefix + "down_proj_bias"]
    tensors[prefix + "gate_up_proj"] = tensors[prefix + "gate_up_proj"].mT.contiguous()
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    info = find_experts(tiny_model("gpt_oss"), "bf16")[prefix[:-1]]
    with pytest.raises(CheckpointError) as caught:
        load_experts(tmp_path, 0, range(8), config=info.config, sizes=info.sizes)
    assert caught.value.problems == (
        f"missing: {prefix}down_proj_bias",
        f"misshapen: {prefix}gate_up_proj is [8, 320, 192], the configuration needs [8, 192, 320]",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_takes_every_family(capsys, family):
    arguments = [
        "--model",
        f"tiny-{family}",
        "--prompt",
        "hello",
        "--prompt",
        "a",
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
    ]
    assert generate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:26].strip(): line.split()[-3:] for line in lines}
    assert float(rows["megamoe against eager"][1]) <= LOGITS_FP32
    texts = [line for line in lines if "->" in line]
    assert generate.main([*arguments, "--local-experts", "--no-compare"]) == 0
    assert len(texts) == 2 and [line for line in capsys.readouterr().out.splitlines() if "->" in line] == texts


def test_two_ranks_generate_what_one_process_does_for_every_family(saved, capsys):
    """Experts halved, three prompts over two ranks: one rank has none in the last round and idles through it."""
    folders = [str(saved[family]) for family in ("mixtral", "deepseek_v3", "gpt_oss")]
    rank_main(folders)
    expected = sorted(line for line in capsys.readouterr().out.splitlines() if "->" in line)
    results = spawn_ranks([__file__, *folders], 2)
    assert [r.returncode for r in results] == [0, 0], "\n".join(r.output for r in results)
    lines = [line.partition("] ")[2] for r in results for line in r.output.splitlines() if "->" in line]
    assert len(expected) == 9 and sorted(lines) == expected


def rank_main(folders: list[str]) -> None:
    for folder in folders:
        _two_ranks_in_lockstep(folder)
        prompts = [word for text in ("hello", "Mega", "a") for word in ("--prompt", text)]
        how = ["--max-new-tokens", "3", "--device", "cpu", "--local-experts", "--no-compare"]
        assert generate.main(["--model", folder, *prompts, *how]) == 0


def test_capacity_is_that_of_tokens_not_of_padded_sizes(saved):
    model = tiny_model("gpt_oss")
    with enable(model, weight_format="bf16", ep_config=EPConfig(8)), torch.no_grad():
        model(input_ids=torch.arange(8)[None])
        with pytest.raises(ValueError, match=r"num_tokens=9 .*EPConfig\(9\)"):
            model(input_ids=torch.arange(9)[None])


def test_lockstep_chunks_send_a_long_prompt_in_several_calls(saved):
    model, long = tiny_model("gpt_oss"), torch.arange(21)[None]
    expected = eager_logits(model, [long])
    with enable(model, weight_format="bf16", ep_config=EPConfig(8), lockstep_chunks=True) as serving, torch.no_grad():
        calls = []
        for layer in serving.layers.values():
            layer.register_forward_hook(lambda layer, inputs, y: calls.append(len(y)))
        assert logits_error(model(input_ids=long).logits[0], expected).max_abs <= LOGITS_FP32
        assert calls == [8, 8, 5] * 2
        calls.clear()
        serving.idle()
        assert calls == [0, 0]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_converted_checkpoint_serves_what_quantizing_while_loading_does(saved, family, tmp_path):
    assert cli(["convert", str(saved[family]), str(tmp_path / "fp8"), "--format", "fp8"]) == 0
    model = tiny_model(family)
    expected = served_logits(model, IDS, weight_format="fp8")
    assert torch.equal(served_logits(model, IDS, weight_format="fp8", checkpoint=tmp_path / "fp8"), expected)
    assert is_fp8(tmp_path / "fp8") and not is_fp8(saved[family])
    assert cli(["convert", str(saved["gpt_oss"]), str(tmp_path / "oss"), "--format", "fp8"]) == 1


@pytest.mark.parametrize("family, weight_format", [("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")])
def test_generate_takes_a_quantized_checkpoint_and_serves_its_bytes(saved, family, weight_format, tmp_path, capsys):
    assert cli(["convert", str(saved[family]), str(tmp_path / "dst"), "--format", weight_format]) == 0
    arguments = ["--prompt", "hello", "--max-new-tokens", "2", "--device", "cpu", "--weight-format", weight_format]
    capsys.readouterr()
    assert generate.main(["--model", str(tmp_path / "dst"), *arguments]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert 0 < float(next(line for line in whole if "megamoe against eager" in line).split()[-3]) < 0.1
    assert generate.main(["--model", str(tmp_path / "dst"), *arguments, "--local-experts"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == whole[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_mxfp4_from_files_is_mxfp4_from_parameters(saved, family):
    model = tiny_model(family)  # gpt-oss's sizes are padded, its gate and up rows alternate
    expected = served_logits(model, IDS, weight_format="mxfp4")
    assert torch.equal(served_logits(model, IDS, weight_format="mxfp4", checkpoint=saved[family]), expected)


def is_fp8(path) -> bool:
    checkpoint = Checkpoint(path)
    return any(checkpoint.describe(name).dtype == "F8_E4M3" for name in checkpoint.names)


def test_a_directory_is_loaded_and_served(saved):
    with enable(saved["mixtral"], weight_format="bf16") as serving, torch.no_grad():
        served = serving.model(input_ids=IDS[0]).logits.float()
        assert serving.model.dtype == torch.bfloat16
        assert all(layer.mlp.experts.down_proj.is_meta for layer in serving.model.model.layers)
    assert serving.model is None  # nobody else held it
    expected = eager_logits(AutoModelForCausalLM.from_pretrained(saved["mixtral"], dtype=torch.bfloat16), IDS[:1])
    assert logits_error(served[0], expected).rel_l2 <= LOGITS_BF16


def _two_ranks_in_lockstep(folder: str) -> None:
    # Rank 0 needs three calls a layer, rank 1 one: both make three
    rank = rank_from_env()
    model = load_without_experts(folder, dtype=torch.float32)
    long = torch.arange(21 if rank.ep_rank == 0 else 2)[None]
    with enable(model, weight_format="bf16", ep_config=EPConfig(8), checkpoint=folder, lockstep_chunks=True) as serving:
        calls = []
        next(iter(serving.layers.values())).register_forward_hook(lambda layer, inputs, y: calls.append(len(y)))
        with torch.no_grad():
            assert model(input_ids=long).logits.isfinite().all()
    assert calls == ([8, 8, 5] if rank.ep_rank == 0 else [2, 0, 0]), calls


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_process_group()
    rank_main(sys.argv[1:])
    torch.distributed.destroy_process_group()
