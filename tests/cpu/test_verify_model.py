"""verify --model: the floor of the format and the error of the implementation stand apart."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="not run: transformers is not installed")

from megamoe.__main__ import main
from megamoe.integrations import verify_model as module
from megamoe.integrations.dequantized import load_dequantized, round_experts
from megamoe.integrations.experts import find_experts
from megamoe.integrations.logits import eager_logits, logits_error
from megamoe.integrations.tiny import FAMILIES, save_tiny_model, tiny_model
from megamoe.layer import MoELayer
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks

IDS = [torch.arange(3, 40)[None], torch.arange(60, 67)[None]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_row_a_layer_and_format(family, capsys):
    arguments = ["verify", "--model", f"tiny-{family}", "--format", "fp8", "--format", "bf16", "--positions", "48",
                 "--sequence", "32", "--device", "cpu", "--json"]  # fmt: skip
    assert main(arguments) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = list(find_experts(tiny_model(family), "bf16"))
    assert [(r["layer"], r["format"]) for r in rows] == [(n, f) for f in ("fp8", "bf16") for n in [*names, "all"]]
    for row in rows:
        fp8, whole = row["format"] == "fp8", row["layer"] == "all"
        assert row["tokens"] == 48 and (row["floor_kl"] > 1e-6) == fp8 and row["served_kl"] < 0.5
        if not whole:
            assert (1e-2 < row["floor_rel_l2"] < 1e-1) if fp8 else row["floor_rel_l2"] == 0
            assert row["kernel_rel_l2"] < (6e-3 if fp8 else 1e-6) and row["kernel_cosine"] > 0.9999
        if not fp8:
            assert row["served_top1"] == 1 and row["served_kl"] < 1e-9


def test_a_wrong_implementation_is_told_from_the_floor(monkeypatch, capsys):
    real = MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: real(self, *args, **how) * 1.05)
    assert main(["verify", "--model", "tiny", "--positions", "16", "--device", "cpu", "--json"]) == 1
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert 0.045 < row["kernel_rel_l2"] < 0.055
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: real(self, *args, **how) * float("nan"))
    assert main(["verify", "--model", "tiny", "--positions", "16", "--device", "cpu"]) == 1
    capsys.readouterr()
    monkeypatch.setattr(MoELayer, "forward", real)
    assert main(["verify", "--model", "tiny", "--positions", "16", "--device", "cpu", "--json"]) == 0
    right = json.loads(capsys.readouterr().out.splitlines()[0])
    assert right["floor_rel_l2"] == row["floor_rel_l2"] and right["kernel_rel_l2"] < 6e-3


def test_the_table_and_its_refusals(capsys, tmp_path, monkeypatch):
    assert main(["verify", "--model", "tiny", "--positions", "8", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "KL floor" in lines[1] and lines[2].startswith("model.layers.0.mlp.experts") and lines[-1].startswith("all")
    assert main(["verify", "--model", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert module._line({"layer": "all", "format": "bf16", "not_run": "CPU only"}).endswith("not run: CPU only")
    text = tmp_path / "text"
    text.write_text("To be or not to be")
    assert main(["verify", "--model", "tiny", "--positions", "8", "--device", "cpu", "--text", str(text)]) == 0
    assert main(["verify", "--model", "tiny", "--positions", "80", "--device", "cpu", "--text", str(text)]) == 2
    assert "has 18 tokens, fewer than --positions 80" in capsys.readouterr().err
    for name in ("--positions", "--sequence"):
        with pytest.raises(SystemExit):
            main(["verify", "--model", "tiny", name, "0"])
        assert f"{name} 0 must be at least 1" in capsys.readouterr().err
    rows = [{"layer": "all", "format": "bf16", "not_run": "CPU only"}]
    monkeypatch.setattr(module, "verify_model", lambda *_, **__: rows)
    assert main(["verify", "--model", "tiny", "--device", "cpu"]) == 2  # nothing was run: no success
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["verify", "--model", "tiny", "--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["verify", "--model", "tiny"]) == 2
    assert "one rank holds the whole model" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_and_reloaded_experts_are_what_the_format_keeps(family, tmp_path):
    model = tiny_model(family)
    plain = eager_logits(model, IDS)
    same = load_dequantized(save_tiny_model(tmp_path, family=family), dtype=torch.float32)
    assert logits_error(eager_logits(same, IDS), plain).max_abs < 1e-6
    round_experts(model, "fp8")
    name, info = next(iter(find_experts(model, "bf16").items()))
    experts = info.module
    down = tiny_model(family).get_submodule(name).down_proj.data[0]
    down = down.T if experts.is_transposed else down
    padded = torch.nn.functional.pad(down, (0, -down.shape[1] % 128, 0, -down.shape[0] % 128))
    kept = dequantize_blocks(*quantize_blocks(padded))[: down.shape[0], : down.shape[1]]
    assert torch.equal(experts.down_proj.data[0], kept.T if experts.is_transposed else kept)
    once = {name: p.clone() for name, p in model.named_parameters()}
    round_experts(model, "fp8")  # what is on the grid stays there
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, once[name], rtol=1e-6), name
    assert 1e-3 < logits_error(eager_logits(model, IDS), plain).rel_l2 < 1e-1
