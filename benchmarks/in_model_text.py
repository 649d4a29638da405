"""in_model.py --parts text: a trained model writes the same text, whoever computes its experts?

A Qwen3-MoE of bytes is trained on the standard library (as trace_model.py's model is), saved as a checkpoint, loaded in
fp32 and rounded to what the number format keeps of its experts. It then continues PROMPTS greedily: with the model's
own eager experts on these exact weights; with steps.py, the same quantization in plain torch; served by megamoe on one
rank; and, under a launcher, on all ranks. Every rank brings its share of the prompts, in one batch, each time.

Two texts are the same until a *fork*, the first byte that differs; there the reference's logits still preferred its own
byte, by the *gap*. Quantized activations move logits, so a text may fork from eager's at a near tie. How far they move
them is measured apart from what is judged: by steps.py against eager, teacher-forced on eager's texts (*floor*). The
row is ok when no gap is above twice, two logits being moved, the floor's largest change of a logit at 99 of 100
positions (the rest is where another expert was chosen), and when served logits, up to the fork, are on average at most
MAX_OVER_FLOOR times as far from eager's as the floor's. A gap cannot exceed twice the change at its own position, so
that one would be no limit.
"""

import math
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.trace_model import padded_experts, read_texts, train
from megamoe import EPConfig
from megamoe.integrations.dequantized import round_experts
from megamoe.integrations.tiny import byte_tokenizer, tiny_model
from megamoe.integrations.transformers import ALL_EXPERTS_FUNCTIONS, Serving, enable
from megamoe.ranks import rank_from_env
from megamoe_cuda.gather import busy, gather

COMMON = {"moe_intermediate_size": 128, "initializer_range": 0.02}


class Scale(NamedTuple):
    """What the model has besides tiny.COMMON; bytes of a sequence, sequences a step; bytes of each kind of text, and of
    these how many at the end are held out of the training."""

    sizes: dict
    context: int
    batch: int
    text_bytes: int
    held_out: int


SCALES = {
    "cuda": Scale(
        COMMON | {"num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 4}, 256, 64, 2**20, 2**15
    ),
    "cpu": Scale(COMMON | {"num_hidden_layers": 2, "hidden_size": 128}, 64, 8, 2**16, 2**12),
}
PROMPTS = (
    'class Error(Exception):\n    """A',
    "def main(argv=None):\n    parser ",
    "    for name, value in sorted(se",
    "        if not isinstance(other,",
    "    def __init__(self, stream, n",
    "Return the number of items in a ",
    "The following methods are also d",
    "import os\nimport sys\n\n__all__ = ",
)
"""Of equal length: one batch, without padding."""
MAX_OVER_FLOOR = 2.0
_TRAINED_BY = "padded"


def text_rows(formats: list[str], device: torch.device, seconds: float, new_bytes: int, path: Path | None):
    """Two rows a format, for one rank and for all of them; or one. Collective.

    seconds: of training. path: folder of the checkpoint, trained into if it has none; None: a temporary one. On several
    hosts it must be one that all see.
    """
    rank = rank_from_env()
    if len(PROMPTS) % rank.ep_size:
        yield {"part": "text", "ranks": rank.ep_size, "not_run": f"{rank.ep_size} ranks do not share {len(PROMPTS)} "
               "prompts evenly"}  # fmt: skip
        return
    groups = [dist.new_group([peer]) for peer in range(rank.ep_size)] if rank.ep_size > 1 else [None]
    disable_progress_bar()
    with ExitStack() as stack:
        if rank.ep_rank == 0:
            path = path or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with busy(dist.group.WORLD if rank.ep_size > 1 else None):
                train_model(path, device, seconds)
        path = Path(_gathered(str(path))[0])
        held_out = texts_as_tokens(SCALES[device.type], held_out=True)
        for weight_format in formats:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
            round_experts(model, weight_format)
            same = {"part": "text", "weight_format": weight_format, "bits_per_byte": bits_per_byte(model, held_out)}
            yield from (same | row for row in _format_rows(model, weight_format, new_bytes, groups[rank.ep_rank]))


def train_model(path: Path, device: torch.device, seconds: float) -> None:
    """A checkpoint and its tokenizer in `path`, unless it has a config.json."""
    if (path / "config.json").exists():
        return
    scale = SCALES[device.type]
    model = tiny_model(**scale.sizes).to(device).train()
    model.set_experts_implementation(_TRAINED_BY)

    def loss_of(x: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=x[:, :-1], output_router_logits=True, use_cache=False)
        return F.cross_entropy(out.logits.flatten(0, 1), x[:, 1:].flatten()), 0.002 * out.aux_loss

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    train(loss_of, list(model.parameters()), texts_as_tokens(scale), seconds, scale.batch, scale.context, device)
    torch.set_float32_matmul_precision(precision)
    model.set_experts_implementation("eager")
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def texts_as_tokens(scale: Scale, held_out: bool = False) -> dict[str, bytes]:
    """Ids of byte_tokenizer, which are below 256, by kind of text."""
    tokenizer, part = byte_tokenizer(), slice(-scale.held_out, None) if held_out else slice(-scale.held_out)
    texts = {kind: text[part].decode(errors="replace") for kind, text in read_texts(scale.text_bytes).items()}
    return {kind: bytes(tokenizer(text)["input_ids"]) for kind, text in texts.items()}


def _padded(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return padded_experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj.mT, self.down_proj.mT)


ALL_EXPERTS_FUNCTIONS.register(_TRAINED_BY, _padded)


@torch.no_grad()
def bits_per_byte(model: nn.Module, texts: dict[str, bytes], length: int = 256) -> float:
    """Of the first 4096 tokens of each text, `length` at a time."""
    rows = [torch.frombuffer(bytearray(text[:4096]), dtype=torch.uint8).view(-1, length) for text in texts.values()]
    x = torch.cat(rows).long().to(model.device)
    logits = model(input_ids=x).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())) / math.log(2)


class Written(NamedTuple):
    """ids [prompts, new bytes], and the logits [prompts, new bytes, vocabulary] that they are the most likely of."""

    ids: Tensor
    logits: Tensor


@torch.no_grad()
def write(model: nn.Module, prompts: Tensor, new_bytes: int, serving: Serving | None = None) -> Written:
    """Continue int64 [prompts, length] greedily. Collective where the model is served; as many prompts on all ranks."""
    ids, cache, steps = prompts, None, []
    for _ in range(new_bytes):
        if serving is not None:
            serving.num_tokens_bound = ids.numel()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        steps.append((ids, out.logits[:, -1:]))
    if serving is not None:
        if prompts.is_cuda:
            torch.cuda.synchronize(prompts.device)
        serving.check()
    return Written(*(torch.cat(parts, 1) for parts in zip(*steps, strict=True)))


class Comparison(NamedTuple):
    """forks: (prompt, position, gap) of each text that is not the reference's. error: the largest change of a logit at
    a position, its mean over those whose texts before are the same."""

    forks: list[tuple[int, int, float]]
    error: float


def compare(ours: Written, reference: Written) -> Comparison:
    forks, errors = [], []
    for prompt, differs in enumerate((ours.ids != reference.ids).tolist()):
        end = differs.index(True) if True in differs else len(differs) - 1
        errors.append((ours.logits[prompt, : end + 1] - reference.logits[prompt, : end + 1]).abs().amax(-1))
        if True in differs:
            logits = reference.logits[prompt, end]
            gap = logits[reference.ids[prompt, end]] - logits[ours.ids[prompt, end]]
            forks.append((prompt, end, float(gap)))
    return Comparison(forks, float(torch.cat(errors).mean()))


def _format_rows(model: nn.Module, weight_format: str, new_bytes: int, own_group):
    rank, tokenizer = rank_from_env(), byte_tokenizer()
    length = len(PROMPTS[0])
    mine = range(rank.ep_rank, len(PROMPTS), rank.ep_size)
    prompts = torch.tensor([tokenizer(PROMPTS[i])["input_ids"] for i in mine]).to(model.device)
    how = {"ep_config": EPConfig(len(mine) * (length + new_bytes)), "weight_format": weight_format}

    eager = write(model, prompts, new_bytes)
    context = torch.cat([prompts, eager.ids], 1)[:, :-1]
    with torch.no_grad():
        plain = model(input_ids=context).logits[:, length - 1 :]
        with enable(model, spec=True, **how) as serving:
            spec = write(model, prompts, new_bytes, serving)
            serving.num_tokens_bound = None
            floor = (model(input_ids=context).logits[:, length - 1 :] - plain).abs().amax(-1)
    written = {}
    for ranks in sorted({1, rank.ep_size}):
        with enable(model, group=own_group if ranks == 1 else None, **how) as serving:
            written[ranks] = write(model, prompts, new_bytes, serving)
        references = {"eager": eager, "steps.py": spec} | ({"one rank": written[1]} if ranks > 1 else {})
        found = {name: compare(written[ranks], reference) for name, reference in references.items()}
        everyone = _gathered({
            "forks": [(name, mine[i], *where) for name, it in found.items() for i, *where in it.forks],
            "errors": {name: it.error for name, it in found.items()},
            "floor": (float(floor.mean()), float(floor.flatten().quantile(0.99))),
        })  # fmt: skip
        errors = {name: statistics.mean(theirs["errors"][name] for theirs in everyone) for name in found}
        floor_error = statistics.mean(theirs["floor"][0] for theirs in everyone)
        max_gap = 2 * max(theirs["floor"][1] for theirs in everyone)
        forks = [fork for theirs in everyone for fork in theirs["forks"]]
        yield {
            "ranks": ranks,
            "prompts": len(PROMPTS),
            "bytes": new_bytes,
            "same": {name: len(PROMPTS) - sum(fork[0] == name for fork in forks) for name in found},
            "forks": [dict(zip(("from", "prompt", "position", "gap"), fork, strict=True)) for fork in sorted(forks)],
            "errors": errors,
            "floor_error": floor_error,
            "max_gap": max_gap,
            "example": tokenizer.decode(torch.cat([prompts, written[ranks].ids], 1)[0].tolist()),
            "ok": all(fork[3] <= max_gap for fork in forks) and errors["eager"] <= MAX_OVER_FLOOR * floor_error + 1e-4,
        }


def _gathered(value) -> list:
    """`value` of every rank."""
    return gather(dist.group.WORLD, "text", value) if dist.is_initialized() else [value]
