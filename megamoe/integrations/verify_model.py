"""python -m megamoe verify --model DIR: a model's layers, with the tokens that reach them, against two references.

For each MoE layer and number format three results stand beside each other:

    original   the model's own weights and tokens, in float64
    exact      the same format (weights, tokens, SwiGLU outputs quantized), all sums in float64
    megamoe    the layer: the kernel on a GPU, megamoe/steps.py on a CPU

floor is exact against original: what the format costs, whoever computes it. kernel is megamoe against exact: what the
implementation adds. The logits are the model's, with this layer alone served and all others eager: KL is the mean over
positions of KL(eager || served) in nats, top-1 the share of positions with the same most likely token; again for exact
(floor) and megamoe (served). The last rows serve all layers together.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config import WEIGHT_FORMATS, EPConfig
from megamoe.exchange import LocalExchange
from megamoe.integrations.dequantized import load_dequantized
from megamoe.integrations.experts import Experts, find_experts, weights_of
from megamoe.integrations.logits import logits_error
from megamoe.integrations.spec import SpecExperts
from megamoe.integrations.transformers import ALL_EXPERTS_FUNCTIONS
from megamoe.layer import MoELayer
from megamoe.ranks import rank_from_env
from megamoe.steps import RankInput, moe_layer
from megamoe.support import support
from megamoe.testing.compare import rel_l2
from megamoe.workspace import Workspace

IMPLEMENTATION = "megamoe_verify"
MAX_KERNEL_ERROR = 1e-2
"""Relative L2 of megamoe against exact above which a layer has failed: the limit of the layer's own tests."""

_standing_in: dict[int, Callable] = {}


def _experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    own = type(self).forward.__wrapped__  # what transformers' decorator wraps: the model's eager experts
    stand_in = _standing_in.get(id(self))
    if stand_in is None:
        return own(self, hidden_states, top_k_index, top_k_weights)
    return stand_in(
        hidden_states, top_k_index, top_k_weights, lambda: own(self, hidden_states, top_k_index, top_k_weights)
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


@contextmanager
def standing_in(model: nn.Module, functions: dict[nn.Module, Callable]):
    """Inside, an experts module of `functions` gives what its function makes of (x, topk_idx, topk_weights, own)."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    _standing_in.update({id(module): function for module, function in functions.items()})
    try:
        yield
    finally:
        for module in functions:
            _standing_in.pop(id(module), None)
        model.set_experts_implementation(before)


@torch.no_grad()
def verify_model(model: nn.Module, ids: list[Tensor], weight_formats: list[str], *, capacity: int) -> list[dict]:
    """One row a layer and format, then one a format for all layers; a format that cannot run has its reason instead.

    ids: sequences [1, n], at most `capacity` tokens each. Keys of a row: layer, format, tokens, floor_rel_l2,
    floor_cosine, kernel_rel_l2, kernel_cosine, floor_kl, floor_top1, served_kl, served_top1; or not_run.
    """
    inputs: dict[str, list[tuple]] = {}
    modules = find_experts(model, "bf16")

    def recorder(name: str) -> Callable:
        def record(x, topk_idx, topk_weights, own):
            inputs.setdefault(name, []).append((x, topk_idx, topk_weights))
            return own()

        return record

    with standing_in(model, {info.module: recorder(name) for name, info in modules.items()}):
        eager = _logits(model, ids)
    rows = []
    for weight_format in weight_formats:
        found = find_experts(model, weight_format)
        device = next(iter(found.values())).device
        report = support(next(iter(found.values())).config, EPConfig(capacity), device)
        if not report.ok:
            rows.append({"layer": "all", "format": weight_format, "not_run": "; ".join(report.reasons)})
            continue
        configs = list(dict.fromkeys(info.config for info in found.values()))
        with Workspace(configs, EPConfig(capacity), device=device) as workspace:
            layers = {name: _Layer(info, workspace) for name, info in found.items()}
            for name, layer in layers.items():
                rows.append({"layer": name, "format": weight_format} | layer.compare(inputs[name])
                            | _compare_logits(model, ids, eager, [layer]))  # fmt: skip
            rows.append({"layer": "all", "format": weight_format, "tokens": len(eager)}
                        | _compare_logits(model, ids, eager, list(layers.values())))  # fmt: skip
            for layer in layers.values():
                layer.close()
    return rows


class _Layer:
    """A module's experts as the layer and as float64."""

    def __init__(self, info: Experts, workspace: Workspace):
        self.info, self.module = info, info.module
        plain = weights_of(info, range(info.config.num_experts))
        biases = {"linear1_bias": plain.linear1_bias, "linear2_bias": plain.linear2_bias}
        self._plain, self._spec = plain, SpecExperts(info.config)
        self._spec.load_weights(plain.linear1, plain.linear2, **biases)
        self._layer = MoELayer(info.config, workspace)
        self._layer.load_weights(plain.linear1, plain.linear2, **biases)

    def compare(self, calls: list[tuple]) -> dict:
        results = {"original": [], "exact": [], "megamoe": []}
        for x, topk_idx, topk_weights in calls:
            results["original"].append(self._float64("bf16", self._plain, x, topk_idx, topk_weights))
            results["exact"].append(self.exact(x, topk_idx, topk_weights))
            results["megamoe"].append(self.served(x, topk_idx, topk_weights))
        original, exact, megamoe = (torch.cat(parts).double() for parts in results.values())
        return {
            "tokens": len(exact), "floor_rel_l2": rel_l2(exact, original), "floor_cosine": _cosine(exact, original),
            "kernel_rel_l2": rel_l2(megamoe, exact), "kernel_cosine": _cosine(megamoe, exact),
        }  # fmt: skip

    def exact(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, own=None) -> Tensor:
        return self._float64(self.info.config.weight_format, self._spec.weights, x, topk_idx, topk_weights)

    def served(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, own=None) -> Tensor:
        y = self._layer(
            self._padded(x, self.info.config.weight_format), topk_idx.contiguous(), topk_weights.contiguous()
        )
        self._layer.check()
        return y[:, : x.shape[1]].to(x.dtype)

    def _float64(self, weight_format: str, weights, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        config = self.info.config
        if weight_format == "bf16" and config.weight_format != "bf16":
            config = type(config)(**(vars(config) | {"weight_format": "bf16"}))
        rank_input = RankInput(self._padded(x, weight_format), None, topk_idx, topk_weights)
        (y,) = moe_layer(config, LocalExchange(1), [weights], [rank_input], dtype=torch.float64)
        return y[:, : x.shape[1]].to(x.dtype)

    def _padded(self, x: Tensor, weight_format: str) -> Tensor:
        x = F.pad(x, (0, self.info.config.hidden - x.shape[1]))
        return (x if weight_format == "bf16" else x.to(torch.bfloat16)).contiguous()

    def close(self) -> None:
        self._layer.close()


def _compare_logits(model: nn.Module, ids: list[Tensor], eager: Tensor, layers: list[_Layer]) -> dict:
    found = {}
    for name, function in (("floor", "exact"), ("served", "served")):
        with standing_in(model, {layer.module: getattr(layer, function) for layer in layers}):
            error = logits_error(_logits(model, ids), eager)
        found |= {f"{name}_kl": error.kl, f"{name}_top1": error.top1}
    return found


def _logits(model: nn.Module, ids: list[Tensor]) -> Tensor:
    return torch.cat([model(input_ids=sequence).logits.flatten(0, 1).float() for sequence in ids])


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megamoe verify", description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, help="directory with config.json and safetensors, or tiny, tiny-mixtral, ...")
    add("--format", action="append", choices=WEIGHT_FORMATS, help="repeat for more; default: fp8")
    add("--positions", type=int, default=256, help="tokens altogether (default 256)")
    add("--sequence", type=int, default=128, help="tokens a sequence (default 128)")
    add("--text", help="a file to take the tokens from; default: random ids, which are no language")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="default: bfloat16 on cuda, else float32",
    )
    add("--json", action="store_true", help="one JSON object a row")
    given = parser.parse_args(argv)
    for name in ("positions", "sequence"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build of torch")
    if given.dtype == "auto":
        given.dtype = "bfloat16" if given.device == "cuda" else "float32"
    return given


def load(given: argparse.Namespace) -> nn.Module:
    """The model with plain experts, whatever its files hold."""
    from megamoe.integrations.tiny import TINY_NAMES, tiny_family, tiny_model

    dtype = getattr(torch, given.dtype)
    if (family := tiny_family(given.model)) is not None:
        return tiny_model(family).to(given.device, dtype)
    if not Path(given.model).is_dir():
        raise ValueError(f"--model {given.model}: no such folder; give a model's, or {TINY_NAMES}")
    return load_dequantized(given.model, dtype=dtype, device=given.device)


def tokens(given: argparse.Namespace, model: nn.Module) -> list[Tensor]:
    """Sequences [1, n] of `--positions` ids altogether."""
    if given.text:
        from transformers import AutoTokenizer

        from megamoe.integrations.tiny import byte_tokenizer, tiny_family

        text = Path(given.text).read_text()
        tokenizer = byte_tokenizer() if tiny_family(given.model) else AutoTokenizer.from_pretrained(given.model)
        flat = tokenizer(text, return_tensors="pt")["input_ids"][0]
        if len(flat) < given.positions:
            raise ValueError(f"--text {given.text} has {len(flat)} tokens, fewer than --positions {given.positions}")
    else:
        flat = torch.randint(model.config.vocab_size, (given.positions,), generator=torch.Generator().manual_seed(0))
    return [part[None].to(given.device) for part in flat[: given.positions].split(given.sequence)]


def main(argv: list[str]) -> int:
    """Exit status 1 if a layer is further than MAX_KERNEL_ERROR from its exact result, 2 if nothing could be run."""
    given = parse(argv)
    if rank_from_env().ep_size > 1:
        print("verify: one rank holds the whole model here; start it without a launcher", file=sys.stderr)
        return 2
    try:
        model = load(given)
        rows = verify_model(model, tokens(given, model), given.format or ["fp8"], capacity=given.sequence)
    except (ValueError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    if not given.json:
        print(f"{given.model}, {given.dtype} on {given.device}, {given.positions} positions")
        print(f"{'':<34}{'format':<7}{'floor':>9}{'cosine':>9} {'kernel':>9}{'cosine':>9} {'KL floor':>10}"
              f"{'served':>10} {'top-1 floor':>12}{'served':>8}")  # fmt: skip
    for row in rows:
        print(json.dumps(row) if given.json else _line(row), flush=True)
    if all("not_run" in row for row in rows):
        return 2
    return int(any(map(_has_failed, rows)))


def _has_failed(row: dict) -> bool:
    # rel_l2 leaves rows out that are not finite; the cosine is NaN then
    return row.get("kernel_rel_l2", 0.0) > MAX_KERNEL_ERROR or not math.isfinite(row.get("kernel_cosine", 1.0))


def _line(row: dict) -> str:
    start = f"{row['layer'][-33:]:<34}{row['format']:<7}"
    if "not_run" in row:
        return f"{start}not run: {row['not_run']}"
    numbers = " " * 37
    if "floor_rel_l2" in row:
        numbers = (f"{row['floor_rel_l2']:9.2e}{row['floor_cosine']:9.5f} {row['kernel_rel_l2']:9.2e}"
                   f"{row['kernel_cosine']:9.5f}")  # fmt: skip
    return (f"{start}{numbers} {row['floor_kl']:10.2e}{row['served_kl']:10.2e} {row['floor_top1']:12.1%}"
            f"{row['served_top1']:8.1%}")  # fmt: skip
