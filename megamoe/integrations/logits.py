"""How far one run's logits are from another's, and the runs worth comparing."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.integrations.transformers import Serving, enable


class LogitsError(NamedTuple):
    """rel_l2: ||a - b|| / ||b|| over all logits. max_abs: largest |a - b|. top1: share of equal argmax. kl: mean over
    positions of the divergence of a's distribution from the reference's, KL(reference || a), in nats."""

    rel_l2: float
    max_abs: float
    top1: float
    kl: float


def logits_error(logits: Tensor, reference: Tensor) -> LogitsError:
    """Both [..., vocabulary], compared in float64."""
    a, b = logits.double(), reference.double()
    rel_l2 = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
    top1 = (a.argmax(-1) == b.argmax(-1)).double().mean()
    kl = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    return LogitsError(float(rel_l2), float((a - b).abs().max()), float(top1), float(kl))


@torch.no_grad()
def eager_logits(model: nn.Module, prompts: list[Tensor]) -> Tensor:
    """The model's own experts, one prompt a forward -> [all positions, vocabulary]. Not collective."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        return _all_positions(model, prompts)
    finally:
        model.set_experts_implementation(before)


@torch.no_grad()
def serving_logits(
    model: nn.Module, serving: Serving, prompts: list[Tensor], num_forwards: int | None = None
) -> Tensor:
    """The same, served. Collective: num_forwards is the most prompts that any rank has."""
    logits = _all_positions(model, prompts)
    for _ in range((num_forwards or len(prompts)) - len(prompts)):
        serving.idle()
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)  # check() sees what has happened, and waits for nothing
    serving.check()
    return logits


def served_logits(model: nn.Module, prompts: list[Tensor], num_forwards: int | None = None, **how) -> Tensor:
    """serving_logits inside enable(model, **how)."""
    with enable(model, **how) as serving:
        return serving_logits(model, serving, prompts, num_forwards)


def _all_positions(model: nn.Module, prompts: list[Tensor]) -> Tensor:
    vocabulary = model.get_output_embeddings().weight
    rows = [model(input_ids=ids).logits.flatten(0, 1) for ids in prompts]
    return torch.cat(rows) if rows else vocabulary.new_zeros(0, vocabulary.shape[0])
