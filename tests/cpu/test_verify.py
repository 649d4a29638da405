"""verify on random weights: every format against bf16, dequantized and exact references."""

import json

import pytest
import torch

from megamoe.__main__ import main
from megamoe.config import MoEConfig
from megamoe.layer import MoELayer
from megamoe.quant import mxfp4
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks
from megamoe.testing.data import make_input, make_weights
from megamoe.verify import REFERENCES, verify

ARGUMENTS = ["verify", "--device", "cpu", "--tokens", "64", "--hidden", "512", "--intermediate", "256"]
SMALL = MoEConfig(hidden=256, intermediate=128, num_experts=4, topk=2)


def rows_of(capsys) -> dict[tuple[str, str], dict]:
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {(row["format"], row["reference"]): row for row in rows}


def test_each_format_stands_as_far_from_its_references_as_it_rounds(capsys):
    assert main([*ARGUMENTS, "--json"]) == 0
    rows = rows_of(capsys)
    assert list(rows) == [(f, r) for f in ("bf16", "fp8", "mxfp4") for r in REFERENCES]
    error = {key: row["rel_l2"] for key, row in rows.items()}
    assert error["bf16", "bf16"] == 0 and 1e-4 < error["bf16", "weights"] < 5e-3
    assert 3e-2 < error["fp8", "bf16"] < 1e-1 and 1e-1 < error["mxfp4", "bf16"] < 3e-1
    for weight_format in ("fp8", "mxfp4"):
        assert 2e-2 < error[weight_format, "weights"] < error[weight_format, "bf16"]
    for row in rows.values():
        assert row["reference"] != "exact" or row["rel_l2"] < 5e-3
        assert row["cosine"] == pytest.approx(1 - row["rel_l2"] ** 2 / 2, abs=5e-3)
        assert row["rel_l2"] * row["rms"] <= row["max_abs"] < 20 * row["rel_l2"] * row["rms"] + 2e-2


def dense(config: MoEConfig, linear1: torch.Tensor, linear2: torch.Tensor, rank_input) -> torch.Tensor:
    """The layer's sum, token by token and slot by slot."""
    y = torch.zeros(len(rank_input.x), config.hidden, dtype=torch.float64)
    for token, x in enumerate(rank_input.x.double()):
        for expert, weight in zip(rank_input.topk_idx[token], rank_input.topk_weights[token].double(), strict=True):
            gate, up = (linear1[expert].double() @ x).chunk(2)
            y[token] += weight * (linear2[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return y


@pytest.mark.parametrize("weight_format", ["bf16", "fp8", "mxfp4"])
def test_the_weights_reference_is_a_plain_sum_over_dequantized_weights(weight_format, monkeypatch):
    """The layer is replaced by that sum: it then stands at no distance from the reference."""
    plain_config = MoEConfig(256, 128, 4, 2, "bf16")
    plain, rank_input = make_weights(5, plain_config, 1, 0), make_input(5, plain_config, 0, 9)
    kept = {
        "bf16": lambda w: w,
        "fp8": lambda w: dequantize_blocks(*quantize_blocks(w), torch.float64),
        "mxfp4": lambda w: mxfp4.dequantize(*mxfp4.quantize(w), torch.float64),
    }[weight_format]
    expected = dense(plain_config, kept(plain.linear1), kept(plain.linear2), rank_input)
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: expected)
    rows = {row["reference"]: row for row in verify(SMALL, 9, [weight_format], seed=5)}
    assert rows["weights"]["rel_l2"] < 1e-6 and rows["weights"]["cosine"] > 1 - 1e-9
    assert rows["weights"]["max_abs"] < 1e-6 and rows["exact"]["rel_l2"] > 1e-4 and rows["bf16"]["rel_l2"] > 1e-3


def test_a_wrong_implementation_is_told_from_the_format(monkeypatch, capsys):
    assert main([*ARGUMENTS, "--format", "mxfp4", "--json"]) == 0
    right = rows_of(capsys)["mxfp4", "exact"]
    real = MoELayer.forward
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: real(self, *args, **how) * 1.05)
    assert main([*ARGUMENTS, "--format", "mxfp4", "--json"]) == 1
    wrong = rows_of(capsys)["mxfp4", "exact"]
    assert right["rel_l2"] < 5e-3 and 0.045 < wrong["rel_l2"] < 0.055 and wrong["rms"] == right["rms"]
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args, **how: real(self, *args, **how) * float("nan"))
    assert main([*ARGUMENTS, "--format", "mxfp4"]) == 1


def test_biases_and_the_other_gating_are_served_too():
    config = MoEConfig(256, 128, 4, 2, swiglu_limit=7.0, activation="swiglu_oai", bias=True)
    for row in verify(config, 32, ["bf16", "fp8", "mxfp4"]):
        assert row["reference"] != "exact" or row["rel_l2"] < 5e-3, row


def test_the_table_and_its_refusals(capsys, monkeypatch):
    assert main([*ARGUMENTS, "--format", "fp8", "--format", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "64 tokens on cpu" in lines[0] and "relative L2" in lines[1] and "max error" in lines[1]
    assert [line.split()[:2] for line in lines[2:]] == [[f, r] for f in ("fp8", "bf16") for r in REFERENCES]
    assert main([*ARGUMENTS, "--experts", "0"]) == 2
    assert "num_experts=0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["verify", "--device", "cuda"]) == 2
        assert capsys.readouterr().out.count("not run: ") == 3
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(ARGUMENTS) == 2
    assert "one rank holds the whole layer" in capsys.readouterr().err
