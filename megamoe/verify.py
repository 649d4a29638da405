"""python -m megamoe verify: how far one layer with random weights is from three references, a number format at a time.

    bf16        bf16 throughout: the weights and tokens before quantization, SwiGLU outputs and rows rounded to bf16
    weights     the format's weights, exactly dequantized; tokens and SwiGLU outputs not quantized, float64
    exact       all operands as the format has them (tokens and SwiGLU outputs quantized too), sums in float64

The distance from `bf16` is the price of the format, from `weights` that of its activations and of the implementation,
from `exact` what the implementation adds: the kernel on a GPU, megamoe/steps.py on a CPU. Only this last one is judged.
With --model DIR the layers of a model are run instead, on the tokens that reach them: verify --model DIR --help.
"""

import argparse
import json
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe import layer_checks as checks
from megamoe.config import WEIGHT_FORMATS, EPConfig, MoEConfig
from megamoe.exchange import LocalExchange
from megamoe.layer import MoELayer
from megamoe.ranks import rank_from_env
from megamoe.steps import ExpertWeights, RankInput, moe_layer
from megamoe.support import support
from megamoe.testing.data import make_input, make_weights
from megamoe.workspace import Workspace

REFERENCES = ("bf16", "weights", "exact")
MAX_EXACT_ERROR = 1e-2
"""Relative L2 against `exact` above which the layer has failed: the limit of the layer's own tests."""


@torch.no_grad()
def verify(
    config: MoEConfig, num_tokens: int, weight_formats: list[str], *, device: torch.device | str = "cpu", seed: int = 0
) -> list[dict]:
    """One row a format and reference; a format that cannot run on `device` has first one row with the reason.

    config: its weight_format is replaced by each of weight_formats. Weights, tokens and a uniform routing are random.
    Keys of a row: format, reference (a word of REFERENCES), rel_l2 (of the whole output), cosine, max_abs (largest
    absolute difference), rms (root mean square of the reference); or format, not_run. A NaN in the output gives NaN.
    """
    device, plain_config = torch.device(device), replace(config, weight_format="bf16")
    configs = [replace(config, weight_format=weight_format) for weight_format in weight_formats]
    reasons = [support(format_config, EPConfig(num_tokens), device).reasons for format_config in configs]
    rows = [
        {"format": weight_format, "not_run": "; ".join(why)}
        for weight_format, why in zip(weight_formats, reasons, strict=True)
        if why
    ]
    if len(rows) == len(configs):
        return rows
    plain = make_weights(seed, plain_config, 1, 0, device)
    rank_input = make_input(seed, plain_config, 0, num_tokens, device=device)
    in_bf16 = _spec(plain_config, plain, rank_input)
    for format_config, why in zip(configs, reasons, strict=True):
        if why:
            continue
        weights = _served_weights(format_config, plain)
        wide = rank_input._replace(x=rank_input.x.double())
        references = {
            "bf16": in_bf16,
            "weights": _spec(plain_config, weights, wide, torch.float64),
            "exact": _spec(format_config, weights, rank_input, torch.float64),
        }
        y = _layer(format_config, plain, rank_input, device)
        named = {"format": format_config.weight_format}
        rows += [named | {"reference": name} | _distance(y, references[name]) for name in REFERENCES]
    return rows


def _served_weights(config: MoEConfig, plain: ExpertWeights) -> ExpertWeights:
    """What the layer makes of plain weights when it loads them."""
    weights = checks.expert_weights(
        config, config.num_experts, plain.linear1.device, "", plain.linear1, None, plain.linear2, None,
        plain.linear1_bias, plain.linear2_bias,
    )  # fmt: skip
    return checks.fit_mxfp4(weights)[0] if config.weight_format == "mxfp4" else weights


def _spec(config: MoEConfig, weights: ExpertWeights, rank_input: RankInput, dtype=torch.float32) -> Tensor:
    # Quantized weights under the bf16 format are dequantized in `dtype`, and nothing else is quantized
    return moe_layer(config, LocalExchange(1), [weights], [rank_input], dtype=dtype)[0]


def _layer(config: MoEConfig, plain: ExpertWeights, rank_input: RankInput, device: torch.device) -> Tensor:
    with Workspace(config, EPConfig(len(rank_input.x)), device=device) as workspace:
        layer = MoELayer(config, workspace)
        layer.load_weights(
            plain.linear1, plain.linear2, linear1_bias=plain.linear1_bias, linear2_bias=plain.linear2_bias
        )
        y = layer(rank_input.x, rank_input.topk_idx, rank_input.topk_weights).clone()
        if workspace.is_cuda:
            torch.cuda.synchronize(device)  # check() sees what has happened, and waits for nothing
        layer.check()
    return y


def _distance(y: Tensor, reference: Tensor) -> dict[str, float]:
    a, b = y.double(), reference.double()
    return {
        "rel_l2": float((a - b).norm() / b.norm()),
        "cosine": float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)),
        "max_abs": float((a - b).abs().max()),
        "rms": float(b.square().mean().sqrt()),
    }


def main(argv: list[str]) -> int:
    """Exit status 1 if a format is further than MAX_EXACT_ERROR from its exact result, 2 if nothing could be run."""
    parser = argparse.ArgumentParser(
        prog="python -m megamoe verify", description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sizes = {"hidden": 1024, "intermediate": 512, "experts": 16, "topk": 4, "tokens": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--format", action="append", choices=WEIGHT_FORMATS, help="repeat for more; default: all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and routing (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    given = parser.parse_args(argv)
    if rank_from_env().ep_size > 1:
        print("verify: one rank holds the whole layer here; start it without a launcher", file=sys.stderr)
        return 2
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    formats = given.format or ["bf16", "fp8", "mxfp4"]
    try:
        config = MoEConfig(given.hidden, given.intermediate, given.experts, given.topk)
        rows = verify(config, given.tokens, formats, device=given.device, seed=given.seed)
    except ValueError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    if not given.json:
        print(f"hidden {given.hidden}, intermediate {given.intermediate}, {given.experts} experts, topk {given.topk}, "
              f"{given.tokens} tokens on {given.device}")  # fmt: skip
        print(f"{'format':<8}{'against':<10}{'relative L2':>12}{'cosine':>12}{'max error':>12}{'rms':>12}")
    for row in rows:
        print(json.dumps(row) if given.json else _line(row), flush=True)
    if all("not_run" in row for row in rows):
        return 2
    return int(any(row.get("reference") == "exact" and not row["rel_l2"] <= MAX_EXACT_ERROR for row in rows))


def _line(row: dict) -> str:
    if "not_run" in row:
        return f"{row['format']:<8}not run: {row['not_run']}"
    return (f"{row['format']:<8}{row['reference']:<10}{row['rel_l2']:12.2e}{row['cosine']:12.7f}{row['max_abs']:12.2e}"
            f"{row['rms']:12.2e}")  # fmt: skip
