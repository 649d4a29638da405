"""python -m megamoe convert: whole checkpoints to another number format, interrupted and gone on with."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megamoe import convert as module
from megamoe.__main__ import main
from megamoe.checkpoint import Checkpoint, CheckpointError
from megamoe.convert import convert
from megamoe.progress import Progress
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks

safetensors_torch = pytest.importorskip("safetensors.torch", reason="not run: safetensors is not installed")

HIDDEN, INTERMEDIATE = 256, 160  # 160: the last block of 128 is cut


def make_source(path, num_experts: int = 3) -> dict[str, torch.Tensor]:
    """Two shards and their index, one expert in each, a dense part, and files beside them."""
    path.mkdir()
    tensors = {"model.embed_tokens.weight": torch.randn(10, HIDDEN).bfloat16(), "model.norm.weight": torch.ones(HIDDEN)}
    for expert in range(num_experts):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            shape = (HIDDEN, INTERMEDIATE) if projection == "down_proj" else (INTERMEDIATE, HIDDEN)
            tensors[f"model.layers.0.mlp.experts.{expert}.{projection}.weight"] = torch.randn(shape).bfloat16()
    shard_of = {name: f"model-0000{1 + ('experts.1' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(shard_of.values()):
        safetensors_torch.save_file({n: t for n, t in tensors.items() if shard_of[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (path / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": 256}')
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"left alone")
    return tensors


def read(path) -> dict[str, torch.Tensor]:
    """By the library that users have, not by our reader."""
    return {
        n: t.clone()
        for file in sorted(path.glob("*.safetensors"))
        for n, t in safetensors_torch.load_file(file).items()
    }


def cut(values, sf, shape) -> torch.Tensor:
    return dequantize_blocks(values, sf)[: shape[0], : shape[1]]


def quantized(tensor: torch.Tensor):
    padding = (0, -tensor.shape[1] % 128, 0, -tensor.shape[0] % 128)
    return quantize_blocks(torch.nn.functional.pad(tensor, padding))


def test_to_fp8_and_back(tmp_path, capsys):
    tensors = make_source(tmp_path / "bf16")
    assert main(["convert", str(tmp_path / "bf16"), str(tmp_path / "fp8"), "--format", "fp8"]) == 0
    assert "2 shard(s) in fp8, 2 written now" in capsys.readouterr().out
    fp8 = read(tmp_path / "fp8")
    for name, tensor in tensors.items():
        if ".experts." not in name:
            assert torch.equal(fp8[name], tensor) and name + "_scale_inv" not in fp8
            continue
        values, sf = quantized(tensor)
        assert fp8[name].dtype == torch.float8_e4m3fn and fp8[name].shape == tensor.shape
        assert torch.equal(fp8[name + "_scale_inv"], sf)
        assert torch.equal(fp8[name].float(), values.float()[: tensor.shape[0], : tensor.shape[1]])
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.embed_tokens", "model.norm"]
    assert (tmp_path / "fp8" / "tokenizer.json").exists() and not (tmp_path / "fp8" / "pytorch_model.bin").exists()
    assert set(Checkpoint(tmp_path / "fp8").names) == set(fp8)  # the index names what is there

    convert(tmp_path / "fp8", tmp_path / "back", "bf16")
    back = read(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = cut(*quantized(tensor), tensor.shape).bfloat16() if ".experts." in name else tensor
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], expected)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert convert(tmp_path / "fp8", tmp_path / "again", "fp8")  # fp8 to fp8 copies
    again = read(tmp_path / "again")
    assert all(torch.equal(again[n].view(torch.uint8), t.view(torch.uint8)) for n, t in fp8.items())


def test_a_run_that_was_cut_short_goes_on_and_digests_are_believed_only_if_right(tmp_path, monkeypatch):
    make_source(tmp_path / "src")
    real, calls = module.write_file, []

    def second_fails(path, described, tensors):
        calls.append(path.name)
        if len(calls) == 2:
            next(iter(tensors))
            path.with_name(path.name + ".partial").write_bytes(b"half of it")
            raise KeyboardInterrupt
        return real(path, described, tensors)

    monkeypatch.setattr(module, "write_file", second_fails)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "src", tmp_path / "dst", "fp8")
    first, second = calls
    assert (tmp_path / "dst" / first).exists() and not (tmp_path / "dst" / second).exists()
    monkeypatch.setattr(module, "write_file", real)
    assert convert(tmp_path / "src", tmp_path / "dst", "fp8") == [second]
    whole = read(tmp_path / "dst")
    assert convert(tmp_path / "src", tmp_path / "dst", "fp8") == []  # all there: nothing to do
    damaged = bytearray((tmp_path / "dst" / first).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "dst" / first).write_bytes(damaged)
    assert convert(tmp_path / "src", tmp_path / "dst", "fp8") == [first]
    assert all(torch.equal(a.view(torch.uint8), whole[n].view(torch.uint8)) for n, a in read(tmp_path / "dst").items())
    changed = bytearray((tmp_path / "src" / second).read_bytes())
    changed[-2] ^= 1
    (tmp_path / "src" / second).write_bytes(changed)
    assert convert(tmp_path / "src", tmp_path / "dst", "fp8") == [second]
    with pytest.raises(ValueError, match="holds another checkpoint; give an empty directory"):
        convert(tmp_path / "src", tmp_path / "dst", "bf16")
    with pytest.raises(ValueError, match="weight_format='int4' must be one of 'bf16', 'fp8', 'mxfp4'"):
        convert(tmp_path / "src", tmp_path / "dst", "int4")


def test_one_error_lists_all_that_is_wrong_and_nothing_is_written(tmp_path, capsys):
    make_source(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "fp8", "fp8")
    tensors, prefix = read(tmp_path / "fp8"), "model.layers.0.mlp.experts"
    del tensors[f"{prefix}.0.up_proj.weight_scale_inv"], tensors[f"{prefix}.1.up_proj.weight"]
    tensors[f"{prefix}.2.down_proj.weight_scale_inv"] = torch.ones(1, 1)
    tensors |= {"head.weight": torch.ones(128, 128, dtype=torch.int8), "head.weight_scale_inv": torch.ones(1, 1)}
    (tmp_path / "bad").mkdir()
    safetensors_torch.save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "bad", tmp_path / "dst", "bf16")
    assert caught.value.problems == (
        f"extra: {prefix}.1.up_proj.weight_scale_inv belongs to no tensor",
        "layout: head.weight is I8 [128, 128]; scale factors such as head.weight_scale_inv are read of F8_E4M3 "
        "matrices only",
        f"misshapen: {prefix}.2.down_proj.weight_scale_inv is [1, 1], blocks of 128 give [2, 2]",
        f"missing: {prefix}.0.up_proj.weight_scale_inv, the scale factors of an e4m3 tensor",
    )
    assert not (tmp_path / "dst").exists()
    assert main(["convert", str(tmp_path / "bad"), str(tmp_path / "dst"), "--format", "bf16"]) == 1
    assert "4 problems" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "fp8"), str(tmp_path / "fp8"), "--format", "bf16"]) == 1


def save_one(path, tensors) -> None:
    path.mkdir()
    safetensors_torch.save_file(tensors, path / "model.safetensors")


def test_to_bf16_casts_plain_experts_and_leaves_all_else(tmp_path):
    prefix = "model.layers.0.mlp.experts"
    plain = {f"{prefix}.0.up_proj.weight": torch.randn(4, 8), f"{prefix}.down_proj": torch.randn(2, 8, 4)}
    kept = {"model.norm.weight": torch.randn(8), f"{prefix}.1.up_proj.weight": torch.tensor([[300, -1]]),
            f"{prefix}.gate_up_proj": torch.tensor([[[70_000]]])}  # fmt: skip
    save_one(tmp_path / "src", plain | kept)
    convert(tmp_path / "src", tmp_path / "dst", "bf16")
    found = read(tmp_path / "dst")
    assert found.keys() == plain.keys() | kept.keys()
    assert all(found[n].dtype == torch.bfloat16 and torch.equal(found[n], t.bfloat16()) for n, t in plain.items())
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in kept.items())


def test_tensors_that_cannot_be_read_are_listed_before_anything_is_written(tmp_path, monkeypatch):
    prefix = "model.layers.0.mlp.experts"
    tensors = {f"{prefix}.down_proj_blocks": torch.zeros(2, 32, 1, 8, dtype=torch.uint8),
               f"{prefix}.gate_up_proj_blocks": torch.zeros(2, 32, 1, 16, dtype=torch.uint8),
               f"{prefix}.gate_up_proj_scales": torch.zeros(2, 32, 2, dtype=torch.uint8),
               "model.lost": torch.zeros(1), "model.odd": torch.zeros(1, dtype=torch.int16)}  # fmt: skip
    (tmp_path / "src").mkdir()
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    del tensors["model.lost"]
    safetensors_torch.save_file(tensors, tmp_path / "src" / "a.safetensors")
    (tmp_path / "src" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "src", tmp_path / "dst", "bf16")
    assert [problem.partition(", which is not read")[0] for problem in caught.value.problems] == [
        "dtype: model.odd is I16",
        f"misshapen: {prefix}.down_proj_blocks is U8 [2, 32, 1, 8], MXFP4 blocks are U8 [experts, rows, groups, 16]",
        f"misshapen: {prefix}.gate_up_proj_scales is U8 [2, 32, 2], its blocks need U8 [2, 32, 1]",
        "missing: model.lost (the index says a.safetensors, which lacks it)",
    ]
    make_source(tmp_path / "good")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"DST .*: \d+ bytes are needed, 1000 are free; make room"):
        convert(tmp_path / "good", tmp_path / "dst", "fp8")
    assert not list((tmp_path / "dst").glob("*.safetensors"))


def test_a_layout_without_a_place_in_the_format_is_one_line_and_directories_are_looked_at(tmp_path, capsys):
    make_source(tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj\.weight and 8 more: one expert, and MXFP4") as e:
        convert(tmp_path / "src", tmp_path / "dst", "mxfp4")
    assert len(e.value.problems) == 1
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "convert.json").write_text("[]")
    shard = next((tmp_path / "src").glob("*-00001-*"))
    for source, target, said in (
        ("src", "file", "DST .*: source and destination must be two directories"),
        ("src", "damaged", r"convert\.json is damaged \(.*; remove it"), (shard.name, "dst", "SRC .* is a file"),
    ):  # fmt: skip
        source = tmp_path / "src" / source if source != "src" else tmp_path / "src"
        with pytest.raises(ValueError, match=said):
            convert(source, tmp_path / target, "fp8")
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "damaged"), "--format", "fp8"]) == 1
    assert "damaged" in capsys.readouterr().err


def test_progress_ends_at_the_whole_and_is_silent_where_nobody_looks(capsys):
    for shown in (True, False, None):
        with Progress("experts", 10_000_000, shown) as progress:
            for _ in range(4):
                progress(2_500_000)
        said = capsys.readouterr().err
        assert ("100% of 0.01 GB" in said) == (shown is True)
    assert said == ""


PEAK_PROGRAM = """
import sys, torch
from megamoe.convert import convert
def status_bytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
torch.set_num_threads(1)
torch.zeros(1024, 1024).to(torch.float8_e4m3fn)
before = status_bytes("VmRSS")
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")
convert(sys.argv[1], sys.argv[2], "fp8")
print(status_bytes("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="not run: no /proc to read memory from")
def test_peak_memory_is_a_few_times_one_tensor_not_a_shard(tmp_path):
    (tmp_path / "src").mkdir()
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(12) for p in ("gate", "up", "down")]
    tensors = {name: torch.zeros(1024, 1024, dtype=torch.bfloat16) for name in names}
    safetensors_torch.save_file(tensors, tmp_path / "src" / "model.safetensors")
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK_PROGRAM, str(tmp_path / "src"), str(tmp_path / "dst")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"peak {peak / 2**20:.1f} MiB over a shard of 72 MiB, tensors of 2 MiB")
    assert peak < 24 * 2**20  # a tensor in bf16, and its quantizer's fp32 copies
