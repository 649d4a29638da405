# ruff: noqa: E402  (what follows needs packages that may be missing)
"""MXFP4 experts under gpt-oss's names: read bit for bit, padded, refused by name, served; and written back."""

import json
from dataclasses import replace

import pytest
import torch

safetensors_torch = pytest.importorskip("safetensors.torch", reason="not run: safetensors is not installed")

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
from megamoe.__main__ import main as cli
from megamoe.checkpoint import Checkpoint, CheckpointError, expert_bytes, load_experts
from megamoe.checkpoint_mxfp4 import checkpoint_tensors
from megamoe.integrations.spec import SpecExperts
from megamoe.quant import mxfp4
from megamoe.testing.compare import rel_l2
from tests.cpu.peak_memory import needs_proc, peaks

PREFIX = "model.layers.0.mlp.experts"
NUM_EXPERTS = 4
NARROW, WHOLE, PUBLISHED = (192, 160), (256, 128), (2880, 2880)


def config_of(sizes, weight_format="mxfp4", num_experts=NUM_EXPERTS, bias=True) -> MoEConfig:
    hidden, inter = (-(-size // 128) * 128 for size in sizes)
    return MoEConfig(hidden, inter, num_experts, 2, weight_format, 7.0, "swiglu_oai", bias)


def make_tensors(sizes, num_experts=NUM_EXPERTS) -> dict[str, torch.Tensor]:
    """Any codes under any scale factor that a layer loads without rounding, biases, and a neighbour."""
    (hidden, inter), found = sizes, {"model.layers.0.mlp.router.weight": torch.randn(num_experts, sizes[0])}
    for name, rows, groups in (("gate_up_proj", 2 * inter, hidden // 32), ("down_proj", hidden, inter // 32)):
        found[f"{PREFIX}.{name}_blocks"] = torch.randint(256, (num_experts, rows, groups, 16), dtype=torch.uint8)
        found[f"{PREFIX}.{name}_scales"] = torch.randint(112, 124, (num_experts, rows, groups), dtype=torch.uint8)
        found[f"{PREFIX}.{name}_bias"] = torch.randn(num_experts, rows).bfloat16()
    return found


def save(path, tensors, in_shards=False):
    if not in_shards:
        safetensors_torch.save_file(tensors, path / "model.safetensors")
        return
    weight_map = {name: f"model-0000{1 + ('_blocks' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        safetensors_torch.save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("sizes", [NARROW, WHOLE])
def test_local_experts_come_back_bit_for_bit_gate_rows_then_up_rows(tmp_path, sizes, in_shards):
    (hidden, inter), tensors = sizes, make_tensors(sizes)
    save(tmp_path, tensors, in_shards)
    config, local, read = config_of(sizes), range(1, 3), []
    weights = load_experts(tmp_path, 0, local, config=config, sizes=sizes, progress=read.append)
    assert weights.linear1.shape == (2, 2 * config.intermediate, config.hidden // 2)
    assert weights.linear2_sf.shape == (2, config.hidden, config.intermediate // 32)
    for slot, expert in enumerate(local):
        blocks, scales = (tensors[f"{PREFIX}.gate_up_proj_{part}"][expert] for part in ("blocks", "scales"))
        for row in (0, 1, inter - 1):
            for half in (0, 1):
                at = half * config.intermediate + row
                assert torch.equal(weights.linear1[slot, at, : hidden // 2], blocks[2 * row + half].flatten())
                assert torch.equal(weights.linear1_sf[slot, at, : hidden // 32], scales[2 * row + half])
                bias = tensors[f"{PREFIX}.gate_up_proj_bias"][expert, 2 * row + half]
                assert weights.linear1_bias[slot, at] == bias.float()
        down, bias = tensors[f"{PREFIX}.down_proj_blocks"][expert], tensors[f"{PREFIX}.down_proj_bias"][expert]
        assert torch.equal(weights.linear2[slot, :hidden, : inter // 2], down.flatten(1))
        assert torch.equal(weights.linear2_bias[slot, :hidden], bias.float())
    whole = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    assert sum(read) == sum(t.nbytes for t in whole.values()) * len(local) // NUM_EXPERTS  # of local experts, no more
    assert sum(read) == expert_bytes(Checkpoint(tmp_path), PREFIX, local, config, sizes)


@pytest.mark.parametrize("sizes, num_experts", [(NARROW, 4), (WHOLE, 4), (PUBLISHED, 1)])
def test_what_is_loaded_is_written_back_bit_for_bit(tmp_path, sizes, num_experts):
    tensors = make_tensors(sizes, num_experts)
    save(tmp_path, tensors)
    config = config_of(sizes, num_experts=num_experts, bias=True) if num_experts > 1 else MoEConfig(
        2944, 2944, 1, 1, "mxfp4", 7.0, "swiglu_oai", True)  # fmt: skip
    weights = load_experts(tmp_path, 0, range(num_experts), config=config, sizes=sizes)
    back = checkpoint_tensors(weights, PREFIX, sizes)
    assert back.keys() == {name for name in tensors if name.startswith(PREFIX)}
    for name, tensor in back.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
    (tmp_path / "again").mkdir()
    save(tmp_path / "again", back)
    again = load_experts(tmp_path / "again", 0, range(num_experts), config=config, sizes=sizes)
    assert all(torch.equal(a, b) for a, b in zip(again, weights, strict=True))
    with pytest.raises(TypeError, match="weights are torch.float32 and torch.float32; pass MXFP4 codes"):
        checkpoint_tensors(weights._replace(linear1=torch.zeros(1), linear2=torch.zeros(1)), PREFIX, sizes)


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
def test_convert_gives_bf16_of_published_blocks_and_takes_them_back(tmp_path, in_shards):
    tensors = make_tensors(NARROW)
    for name in ("src", "bf16", "again", "copied", "bad"):
        (tmp_path / name).mkdir()
    save(tmp_path / "src", tensors, in_shards)
    (tmp_path / "src" / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    assert cli(["convert", str(tmp_path / "src"), str(tmp_path / "bf16"), "--format", "bf16"]) == 0
    assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == {}
    config, local = config_of(NARROW, "bf16"), range(NUM_EXPERTS)
    plain, read = (load_experts(tmp_path / d, 0, local, config=config, sizes=NARROW) for d in ("bf16", "src"))
    assert all(a is b or torch.equal(a, b) for a, b in zip(plain, read, strict=True))
    found = Checkpoint(tmp_path / "bf16")
    assert found.describe(f"{PREFIX}.gate_up_proj").shape == (NUM_EXPERTS, NARROW[0], 2 * NARROW[1])
    assert not any(name.endswith(("_blocks", "_scales")) for name in found.names)
    assert cli(["convert", str(tmp_path / "src"), str(tmp_path / "copied"), "--format", "mxfp4"]) == 0
    copied = Checkpoint(tmp_path / "copied")
    assert {name: t.tolist() for name, t in copied.read(copied.names)} == {n: t.tolist() for n, t in tensors.items()}
    assert cli(["convert", str(tmp_path / "bf16"), str(tmp_path / "again"), "--format", "bf16"]) == 0  # cast: no change


def test_convert_lists_what_is_wrong_with_blocks(tmp_path, capsys):
    tensors = make_tensors(NARROW)
    del tensors[f"{PREFIX}.down_proj_scales"]
    tensors[f"{PREFIX}.gate_up_proj_scales"] = torch.zeros(1, dtype=torch.uint8)
    save(tmp_path, tensors)
    assert cli(["convert", str(tmp_path), str(tmp_path / "dst"), "--format", "bf16"]) == 1
    said = capsys.readouterr().err
    assert "2 problems" in said and f"missing: {PREFIX}.down_proj_scales" in said
    assert f"misshapen: {PREFIX}.gate_up_proj_scales is U8 [1], its blocks need U8 [4, 320, 6]" in said
    tensors = make_tensors(NARROW)
    tensors[f"{PREFIX}.down_proj_scales"][1, 2, 3] = 255
    save(tmp_path, tensors)
    assert cli(["convert", str(tmp_path), str(tmp_path / "dst"), "--format", "bf16"]) == 1
    assert f"{PREFIX}.down_proj_scales has a scale factor of 255, which is NaN" in capsys.readouterr().err
    assert cli(["convert", str(tmp_path), str(tmp_path / "fp8"), "--format", "fp8"]) == 1
    assert "no published FP8 layout has" in capsys.readouterr().err


def test_padding_is_zero_and_the_layer_takes_it(tmp_path):
    pytest.importorskip("transformers", reason="not run: transformers is not installed")
    from megamoe.integrations.dequantized import dequantized

    (hidden, inter), tensors = NARROW, make_tensors(NARROW)
    save(tmp_path, tensors)
    config = config_of(NARROW)
    weights = load_experts(tmp_path, 0, range(NUM_EXPERTS), config=config, sizes=NARROW)
    gate_up = mxfp4.dequantize(weights.linear1, weights.linear1_sf).unflatten(1, (2, -1))
    down = mxfp4.dequantize(weights.linear2, weights.linear2_sf)
    for padding in (gate_up[:, :, inter:], gate_up[..., hidden:], down[:, hidden:], down[..., inter:]):
        assert padding.numel() and not padding.any()
    for padding in (weights.linear1_bias.unflatten(1, (2, -1))[..., inter:], weights.linear2_bias[:, hidden:]):
        assert padding.numel() and not padding.any()
    for codes, sf in ((weights.linear1, weights.linear1_sf), (weights.linear2, weights.linear2_sf)):
        assert all(mxfp4.refusal(*pair) is None for pair in zip(codes, sf, strict=True))
    x = torch.zeros(6, config.hidden)
    x[:, :hidden] = torch.randn(6, hidden)
    idx, topk_weights = torch.randint(NUM_EXPERTS, (6, 2)), torch.rand(6, 2)
    with Workspace(config, EPConfig(6), device="cpu") as workspace:
        layer = MoELayer(config, workspace)
        layer.load_weights(weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf,
                           linear1_bias=weights.linear1_bias, linear2_bias=weights.linear2_bias)  # fmt: skip
        assert layer.rerounded_groups == [{"linear1": 0, "linear2": 0}]
        y = layer(x.bfloat16(), idx, topk_weights)
    plain = dequantized(config, weights)
    exact = SpecExperts(replace(config, weight_format="bf16"))
    exact.load_weights(plain.linear1, plain.linear2, linear1_bias=plain.linear1_bias, linear2_bias=plain.linear2_bias)
    expected = exact(x.bfloat16().float(), idx, topk_weights)
    assert not y[:, hidden:].any() and not expected[:, hidden:].any()
    assert rel_l2(y[:, :hidden], expected[:, :hidden]) < 6e-2  # e4m3 activations


@pytest.mark.parametrize("weight_format", ["bf16", "fp8"])
def test_other_formats_hold_what_transformers_decodes(tmp_path, weight_format):
    """Against transformers' own decoder, by way of a stacked bf16 checkpoint."""
    oracle = pytest.importorskip("transformers.integrations.mxfp4", reason="not run: transformers is not installed")
    tensors = make_tensors(NARROW)
    stacked = dict(tensors)
    for name in (f"{PREFIX}.gate_up_proj", f"{PREFIX}.down_proj"):
        blocks, scales = stacked.pop(f"{name}_blocks"), stacked.pop(f"{name}_scales")
        stacked[name] = oracle.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    for folder, content in (("blocks", tensors), ("stacked", stacked)):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder, content)
    config, local = config_of(NARROW, weight_format), range(1, NUM_EXPERTS)
    ours, theirs = (
        load_experts(tmp_path / folder, 0, local, config=config, sizes=NARROW) for folder in ("blocks", "stacked")
    )
    for name, mine, other in zip(ours._fields, ours, theirs, strict=True):
        if weight_format == "fp8" and name in ("linear1", "linear2"):
            mine, other = mine.view(torch.uint8), other.view(torch.uint8)
        assert mine is other is None or (mine.dtype == other.dtype and torch.equal(mine, other)), name


def test_one_error_lists_every_missing_extra_misshapen_and_mistyped_tensor(tmp_path):
    tensors = make_tensors(NARROW)
    del tensors[f"{PREFIX}.gate_up_proj_blocks"]
    del tensors[f"{PREFIX}.down_proj_bias"]
    tensors[f"{PREFIX}.down_proj_scales"] = torch.zeros(NUM_EXPERTS, 192, 6, dtype=torch.uint8)
    tensors[f"{PREFIX}.gate_up_proj_scales"] = tensors[f"{PREFIX}.gate_up_proj_scales"].bfloat16()
    tensors[f"{PREFIX}.0.gate_proj.weight"] = torch.zeros(1)
    save(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_experts(tmp_path, 0, range(1), config=config_of(NARROW), sizes=NARROW)
    assert sorted(caught.value.problems) == sorted(
        [
            f"missing: {PREFIX}.gate_up_proj_blocks",
            f"missing: {PREFIX}.down_proj_bias",
            f"extra: {PREFIX}.0.gate_proj.weight",
            f"misshapen: {PREFIX}.down_proj_scales is [4, 192, 6], the configuration needs [4, 192, 5]",
            f"dtype: {PREFIX}.gate_up_proj_scales is BF16, the layout needs U8",
        ]
    )
    with pytest.raises(CheckpointError, match="intermediate=80 is no multiple of 32"):
        load_experts(tmp_path, 0, range(1), config=config_of(NARROW), sizes=(192, 80))


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_scale_factor_that_is_nan_is_named(tmp_path, weight_format):
    tensors = make_tensors(WHOLE)
    tensors[f"{PREFIX}.down_proj_scales"][2, 7, 3] = 255
    save(tmp_path, tensors)
    config = config_of(WHOLE, weight_format)
    load_experts(tmp_path, 0, range(2), config=config)  # it is another rank's
    with pytest.raises(CheckpointError, match=r"down_proj_scales is 255 at expert 2, row 7, group 3"):
        load_experts(tmp_path, 0, range(2, 4), config=config)


@needs_proc
def test_peak_memory_is_the_local_weights_and_less_than_one_plain_expert(tmp_path):
    save(tmp_path, {n: t for n, t in make_tensors((960, 992), 16).items() if not n.endswith("_bias")})
    for peak, local_bytes in peaks(tmp_path, ("mxfp4", "fp8", "bf16"), (960, 992)):
        assert 0.99 * local_bytes <= peak <= local_bytes + 6 * 2**20


def test_a_small_gpt_oss_is_served_from_its_blocks(tmp_path):
    pytest.importorskip("transformers", reason="not run: transformers is not installed")
    from transformers import AutoModelForCausalLM

    from megamoe.integrations.dense import load_without_experts
    from megamoe.integrations.dequantized import load_dequantized
    from megamoe.integrations.logits import eager_logits, logits_error, served_logits
    from megamoe.integrations.tiny import save_tiny_model
    from megamoe.integrations.verify_model import verify_model

    ids = [torch.arange(3, 40)[None], torch.arange(60, 67)[None]]
    folder = save_tiny_model(tmp_path / "bf16", family="gpt_oss")
    assert cli(["convert", str(folder), str(tmp_path / "mxfp4"), "--format", "mxfp4"]) == 0
    plain = safetensors_torch.load_file(folder / "model.safetensors")
    folder = tmp_path / "mxfp4"
    made = safetensors_torch.load_file(folder / "model.safetensors")
    for part in ("gate_up_proj", "down_proj"):
        codes, sf = mxfp4.quantize(plain[f"{PREFIX}.{part}"].mT)
        assert f"{PREFIX}.{part}" not in made and torch.equal(made[f"{PREFIX}.{part}_scales"], sf)
        assert torch.equal(made[f"{PREFIX}.{part}_blocks"].flatten(2), codes)
    assert all(torch.equal(made[n], t) for n, t in plain.items() if not n.endswith(("gate_up_proj", "down_proj")))
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    assert cli(["convert", str(folder), str(tmp_path / "back"), "--format", "bf16"]) == 0
    qwen = save_tiny_model(tmp_path / "qwen", family="qwen3_moe")
    assert cli(["convert", str(qwen), str(tmp_path / "none"), "--format", "mxfp4"]) == 1
    model = load_dequantized(folder, dtype=torch.float32)
    eager = eager_logits(model, ids)
    # Values of MXFP4 are exact in bf16: transformers' own loader reads the same model from the converted files
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert torch.equal(eager_logits(back, ids), eager)
    light = load_without_experts(folder, dtype=torch.float32)
    exact = logits_error(served_logits(light, ids, weight_format="bf16", checkpoint=folder), eager)
    served = logits_error(served_logits(light, ids, weight_format="mxfp4", checkpoint=folder), eager)
    print(f"bf16 {exact}; mxfp4 {served}")
    assert exact.max_abs <= 1e-5
    assert 2e-3 < served.rel_l2 < 1.5e-1  # e4m3 activations, and what they change of the routing
    for row in verify_model(model, ids, ["mxfp4"], capacity=64):
        assert row["floor_kl"] < 1e-2 and (row["layer"] == "all" or row["kernel_rel_l2"] < 1e-3)
