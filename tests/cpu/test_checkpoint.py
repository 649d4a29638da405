"""The loader of expert weights: what it reads, what it refuses, and what it leaves unread."""

import json
import os
import pickle

import pytest
import torch

from megamoe.checkpoint import Checkpoint, CheckpointError, load_experts
from megamoe.config import MoEConfig
from megamoe.quant import mxfp4
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks
from tests.cpu.peak_memory import needs_proc, peaks

safetensors_torch = pytest.importorskip("safetensors.torch", reason="not run: safetensors is not installed")

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 256, 128, 4
PREFIX = "model.layers.0.mlp.experts"


def config(weight_format: str) -> MoEConfig:
    return MoEConfig(HIDDEN, INTERMEDIATE, NUM_EXPERTS, 2, weight_format=weight_format)


def make_tensors(fp8: bool, sf_dtype=torch.float32) -> dict[str, torch.Tensor]:
    """One layer's experts under their checkpoint names, and a neighbour that is no expert."""
    tensors = {"model.layers.0.mlp.gate.weight": torch.randn(NUM_EXPERTS, HIDDEN)}
    for expert in range(NUM_EXPERTS):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            shape = (HIDDEN, INTERMEDIATE) if projection == "down_proj" else (INTERMEDIATE, HIDDEN)
            weight, name = torch.randn(shape) / 16, f"{PREFIX}.{expert}.{projection}.weight"
            if fp8:
                tensors[name], sf = quantize_blocks(weight)
                tensors[name + "_scale_inv"] = sf.to(sf_dtype)
            else:
                tensors[name] = weight.bfloat16()
    return tensors


def save(path, tensors: dict[str, torch.Tensor], shard_of=None) -> None:
    """One file, or shards by shard_of(name) with their index."""
    if shard_of is None:
        safetensors_torch.save_file(tensors, path / "model.safetensors")
        return
    shards = {}
    for name, tensor in tensors.items():
        shards.setdefault(shard_of(name), {})[name] = tensor
    for file, content in shards.items():
        safetensors_torch.save_file(content, path / file)
    index = {"metadata": {}, "weight_map": {name: shard_of(name) for name in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def stacked(tensors: dict[str, torch.Tensor], experts: range, end: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """(linear1, linear2) as the specification orders them: gate rows, then up rows."""
    get = lambda expert, projection: tensors[f"{PREFIX}.{expert}.{projection}.{end}"].float()  # noqa: E731
    linear1 = torch.stack([torch.cat([get(e, "gate_proj"), get(e, "up_proj")]) for e in experts])
    return linear1, torch.stack([get(e, "down_proj") for e in experts])


def half_shards(name: str) -> str:
    expert = name.removeprefix(PREFIX + ".").partition(".")[0]
    return f"model-0000{1 + int(expert) // 2}-of-00002.safetensors" if expert.isdigit() else "rest.safetensors"


@pytest.mark.parametrize("shard_of", [None, half_shards], ids=["one file", "shards"])
def test_plain_weights_come_back_bit_for_bit_and_only_the_local_experts(tmp_path, shard_of):
    tensors = make_tensors(fp8=False)
    save(tmp_path, tensors, shard_of)
    local = range(1, 3)
    weights = load_experts(tmp_path, 0, local, config=config("bf16"))
    linear1, linear2 = stacked(tensors, local)
    assert weights.linear1.dtype == torch.bfloat16 and weights.linear1_sf is None and weights.linear2_sf is None
    assert torch.equal(weights.linear1.float(), linear1) and torch.equal(weights.linear2.float(), linear2)
    as_fp32 = load_experts(tmp_path, 0, local, config=config("bf16"), dtype=torch.float32)
    assert as_fp32.linear1.dtype == torch.float32 and torch.equal(as_fp32.linear1, linear1)


def test_plain_weights_are_quantized_by_block_on_the_way(tmp_path):
    tensors = make_tensors(fp8=False)
    save(tmp_path, tensors)
    weights = load_experts(tmp_path, 0, range(NUM_EXPERTS), config=config("fp8"))
    for (values, sf), whole in zip(
        [(weights.linear1, weights.linear1_sf), (weights.linear2, weights.linear2_sf)],
        stacked(tensors, range(NUM_EXPERTS)),
    ):
        expected = quantize_blocks(whole)
        assert torch.equal(values.float(), expected.values.float()) and torch.equal(sf, expected.sf)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "block-FP8"])
def test_weights_are_quantized_to_mxfp4_on_the_way(tmp_path, fp8):
    tensors, local = make_tensors(fp8), range(1, 3)
    save(tmp_path, tensors)
    weights = load_experts(tmp_path, 0, local, config=config("mxfp4"))
    plain = stacked(tensors, local)
    if fp8:
        sf = stacked(tensors, local, "weight_scale_inv")
        plain = [dequantize_blocks(values.contiguous(), s.contiguous()) for values, s in zip(plain, sf, strict=True)]
    for (codes, sf), whole in zip(
        [(weights.linear1, weights.linear1_sf), (weights.linear2, weights.linear2_sf)], plain, strict=True
    ):
        expected = mxfp4.quantize(whole)
        assert torch.equal(codes, expected.codes) and torch.equal(sf, expected.sf)


@pytest.mark.parametrize("sf_dtype", [torch.float32, torch.bfloat16])
def test_block_fp8_is_copied_unchanged_and_scale_inv_multiplies(tmp_path, sf_dtype):
    tensors = make_tensors(fp8=True, sf_dtype=sf_dtype)
    save(tmp_path, tensors, half_shards)
    local = range(2, 4)
    weights = load_experts(tmp_path, 0, local, config=config("fp8"))
    values, sf = stacked(tensors, local), stacked(tensors, local, "weight_scale_inv")
    assert weights.linear1.dtype == torch.float8_e4m3fn and weights.linear1_sf.dtype == torch.float32
    assert torch.equal(weights.linear1.float(), values[0]) and torch.equal(weights.linear1_sf, sf[0])
    assert torch.equal(weights.linear2.float(), values[1]) and torch.equal(weights.linear2_sf, sf[1])
    plain = load_experts(tmp_path, 0, local, config=config("bf16"), dtype=torch.float32)
    assert torch.equal(plain.linear1, dequantize_blocks(*(t.contiguous() for t in (values[0], sf[0]))))
    assert torch.equal(plain.linear2, dequantize_blocks(values[1], sf[1]))


def test_a_rank_never_opens_the_shards_of_other_ranks(tmp_path):
    tensors = make_tensors(fp8=False)
    save(tmp_path, tensors, half_shards)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"not a checkpoint at all")
    weights = load_experts(tmp_path, 0, range(2), config=config("bf16"))
    assert torch.equal(weights.linear2.float(), stacked(tensors, range(2))[1])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is not a whole safetensors file"):
        load_experts(tmp_path, 0, range(2, 4), config=config("bf16"))


def test_one_error_lists_every_missing_extra_misshapen_and_mistyped_tensor(tmp_path):
    tensors = make_tensors(fp8=True)
    del tensors[f"{PREFIX}.1.up_proj.weight"]
    del tensors[f"{PREFIX}.3.down_proj.weight_scale_inv"]
    tensors[f"{PREFIX}.4.gate_proj.weight"] = torch.zeros(1)
    tensors[f"{PREFIX}.0.gate_proj.bias"] = torch.zeros(INTERMEDIATE)
    tensors[f"{PREFIX}.2.down_proj.weight"] = torch.zeros(HIDDEN, HIDDEN).to(torch.float8_e4m3fn)
    tensors[f"{PREFIX}.0.down_proj.weight"] = torch.zeros(HIDDEN, INTERMEDIATE)
    save(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_experts(tmp_path, 0, range(NUM_EXPERTS), config=config("fp8"))
    assert sorted(caught.value.problems) == sorted(
        [
            f"missing: {PREFIX}.1.up_proj.weight",
            f"missing: {PREFIX}.3.down_proj.weight_scale_inv",
            f"extra: {PREFIX}.4.gate_proj.weight",
            f"extra: {PREFIX}.0.gate_proj.bias",
            f"misshapen: {PREFIX}.2.down_proj.weight is [256, 256], the configuration needs [256, 128]",
            f"dtype: {PREFIX}.0.down_proj.weight is F32, the layout needs F8_E4M3",
        ]
    )
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_a_shard_that_is_not_there_is_listed_as_missing(tmp_path):
    save(tmp_path, make_tensors(fp8=False), half_shards)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*experts\.3\.up_proj.* model-00002-of-00002"):
        load_experts(tmp_path, 0, range(2, 4), config=config("bf16"))


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickle_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="never"):
            Checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_a_path_outside_the_directory_or_absent_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"outside the directory.*elsewhere"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map"')
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [4, 100, -1], ids=["in the length", "in the header", "in the data"])
def test_a_truncated_file_is_refused_by_name(tmp_path, cut):
    save(tmp_path, make_tensors(fp8=False))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors .*copy or download it again"):
        Checkpoint(tmp_path)


def test_a_file_that_shrinks_after_its_header_was_read_ends_the_reading(tmp_path):
    save(tmp_path, make_tensors(fp8=False))
    checkpoint, name = Checkpoint(tmp_path), f"{PREFIX}.3.down_proj.weight"
    os.truncate(tmp_path / "model.safetensors", checkpoint.describe(name).end - 7)
    with pytest.raises(OSError, match=f"model.safetensors ended 7 bytes before the end of {name}"):
        checkpoint.read_row(name, None)


@pytest.mark.parametrize(("entry", "message"), [
    ({"dtype": "BF16", "shape": [4]}, "damaged safetensors header"),
    ({"dtype": "BF16", "shape": [4], "data_offsets": [0, 6]}, r"does not hold a: \[4\] BF16 at bytes"),
    ({"dtype": "BF16", "shape": [4], "data_offsets": [4, 12]}, r"does not hold a: \[4\] BF16 at bytes"),
    ({"dtype": "I16", "shape": [4], "data_offsets": [0, 8]}, "a has dtype I16, which is not read here"),
])
def test_a_header_that_says_what_cannot_be_is_refused_with_the_tensor(tmp_path, entry, message):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path).read_row("a", None)


@pytest.mark.parametrize("experts", [range(0), range(3, 5), range(0, 4, 2), range(-1, 2)])
def test_an_expert_range_outside_the_layer_is_refused(tmp_path, experts):
    save(tmp_path, make_tensors(fp8=False))
    with pytest.raises(ValueError, match="expert_range"):
        load_experts(tmp_path, 0, experts, config=config("bf16"))


@needs_proc
@pytest.mark.parametrize("stacked_experts", [False, True], ids=["a tensor an expert", "all experts in one"])
def test_peak_memory_is_the_local_weights_and_one_expert(tmp_path, stacked_experts):
    names = [f"{PREFIX}.{expert}.{p}_proj.weight" for expert in range(16) for p in ("gate", "up", "down")]
    shapes = dict.fromkeys(names, (1024, 1024))
    if stacked_experts:
        shapes = {f"{PREFIX}.gate_up_proj": (16, 1024, 2048), f"{PREFIX}.down_proj": (16, 1024, 1024)}
    save(tmp_path, {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    expert_bytes = 3 * 1024 * 1024 * 2
    for peak, local_bytes in peaks(tmp_path, ("fp8", "bf16", "mxfp4")):
        # 2 MiB: code, small blocks, and Linux counts resident pages per CPU, so that sums are some hundred KiB off
        assert local_bytes <= peak <= local_bytes + expert_bytes + 2 * 2**20
