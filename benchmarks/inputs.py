"""Seeded weights and tokens, reproducible piece by piece: any rank can regenerate any expert and any rank's tokens.

The distributions are those under which the bar in cases.toml was timed: weights normal x 50, clamped to e4m3, with
positive random scale factors; hidden states normal; scores normal, top-k of them, softmax over the chosen ones. Scale
factors are sized so that outputs are of order 0.1 to 1: large enough to compare, small enough for every format.
Values differ between device types (each has its own generator), never between ranks or runs on one type.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.quant.fp8 import BLOCK, E4M3, E4M3_MAX, dequantize_blocks, quantize_rows
from megamoe.route.groups import kept_experts, members_of_groups
from megamoe.steps import ExpertWeights, RankInput

ROUTINGS = ("uniform", "zipf", "hot")
LIMITED = re.compile(r"([1-9]\d*)of([1-9]\d*)")
ZIPF_EXPONENT = 1.2
WEIGHT_SPREAD = 50.0
_EXPERT, _HIDDEN, _SCORES, _POPULARITY, _SUBSET = range(5)


@dataclass(frozen=True)
class RankTokens:
    """One rank's tokens of one routing.

    hidden_states: bf16 [num_tokens, hidden]; x, x_sf: the same quantized, e4m3 and fp32 [num_tokens, hidden / 128];
    topk_idx: int32 [num_tokens, topk], distinct experts; topk_weights: fp32 [num_tokens, topk].
    """

    hidden_states: Tensor
    x: Tensor
    x_sf: Tensor
    topk_idx: Tensor
    topk_weights: Tensor

    def for_layer(self, input_kind: str) -> tuple:
        """Positional arguments of MoELayer.forward. input_kind: 'prequantized' or 'bf16'."""
        x = (self.x, self.x_sf) if input_kind == "prequantized" else self.hidden_states
        return x, self.topk_idx, self.topk_weights


def generator(device, seed: int, kind: int, *indices: int) -> torch.Generator:
    """A generator for one piece of data, independent of what else was drawn."""
    key = seed
    for index in (kind, *indices):
        key = (key * 1_000_003 + index + 1) % (1 << 62)
    return torch.Generator(device=device).manual_seed(key)


def fill_expert(
    case, expert: int, seed: int, linear1: Tensor, linear1_sf: Tensor, linear2: Tensor, linear2_sf: Tensor
) -> None:
    """Write one expert's weights into preallocated e4m3 [N, K] and fp32 [N / 128, K / 128] tensors: one fp32 copy of a
    matrix is the peak."""
    gen = generator(linear1.device, seed, _EXPERT, expert)
    for values, sf in ((linear1, linear1_sf), (linear2, linear2_sf)):
        drawn = torch.randn(values.shape, generator=gen, device=values.device).mul_(WEIGHT_SPREAD)
        values.copy_(drawn.clamp_(-E4M3_MAX, E4M3_MAX))
        # rows of unit variance give outputs of about unit variance: 1 / (spread * sqrt(K)), times 0.5 to 1.5
        sf.copy_(
            (torch.rand(sf.shape, generator=gen, device=sf.device) + 0.5) / (WEIGHT_SPREAD * values.shape[1] ** 0.5)
        )


def make_weights(case, experts, seed: int, device) -> ExpertWeights:
    """The given experts (an iterable of ids over all ranks) as one fp8 ExpertWeights in that order, streamed expert by
    expert."""
    experts = list(experts)
    num, inter, hidden = len(experts), case.intermediate, case.hidden
    weights = ExpertWeights(
        torch.empty(num, 2 * inter, hidden, dtype=E4M3, device=device),
        torch.empty(num, 2 * inter // BLOCK, hidden // BLOCK, device=device),
        torch.empty(num, hidden, inter, dtype=E4M3, device=device),
        torch.empty(num, hidden // BLOCK, inter // BLOCK, device=device),
    )
    for slot, expert in enumerate(experts):
        fill_expert(case, expert, seed, *(tensor[slot] for tensor in weights[:4]))
    return weights


def to_bf16(weights: ExpertWeights) -> ExpertWeights:
    """The same values without quantization: dequantized to bf16, expert by expert."""

    def convert(values, sf):
        out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
        for slot in range(values.shape[0]):
            out[slot] = dequantize_blocks(values[slot], sf[slot])
        return out

    return ExpertWeights(
        convert(weights.linear1, weights.linear1_sf), None, convert(weights.linear2, weights.linear2_sf), None
    )


def make_tokens(case, ep_rank: int, num_tokens: int, routing: str, routing_idx: int, seed: int, device) -> RankTokens:
    """One rank's tokens.

    routing: 'uniform'; 'zipf' (expert popularity 1 / place ** 1.2, places shuffled once for all ranks, top-k without
    replacement); 'hot' (every token chooses expert 0, the rest uniform); 'MofD' (uniform within the token's M best of D
    equal runs of experts, as node-limited routing chooses). routing_idx: which of the routings a measurement cycles
    through."""
    limited = LIMITED.fullmatch(routing)
    if routing not in ROUTINGS and not limited:
        raise ValueError(f"routing={routing!r} must be one of {', '.join(ROUTINGS)}, or such as 2of4")
    gen = generator(device, seed, _HIDDEN, ep_rank, routing_idx)
    hidden_states = torch.randn(num_tokens, case.hidden, generator=gen, device=device).to(torch.bfloat16)
    gen = generator(device, seed, _SCORES, ep_rank, routing_idx)
    scores = torch.randn(num_tokens, case.num_experts, generator=gen, device=device)
    if routing == "zipf":
        places = torch.randperm(case.num_experts, generator=generator("cpu", seed, _POPULARITY)).to(device)
        # the k largest of log p + Gumbel noise are k draws without replacement with probabilities p
        noise = torch.rand(scores.shape, generator=gen, device=device).clamp_(1e-12, 1 - 1e-7)
        choice = -ZIPF_EXPONENT * torch.log(places + 1.0) - torch.log(-torch.log(noise))
    elif limited:
        kept, runs = map(int, limited.groups())
        members = members_of_groups(case.num_experts, runs, scores.device)
        choice = scores.masked_fill(~kept_experts(scores, members, kept, -(-case.topk // kept)), float("-inf"))
    elif routing == "hot":
        choice = scores.clone()
        choice[:, 0] = float("inf")
    else:
        choice = scores
    topk_idx = choice.topk(case.topk, dim=-1).indices
    topk_weights = scores.gather(1, topk_idx).softmax(dim=-1)
    x, x_sf = quantize_rows(hidden_states)
    return RankTokens(hidden_states, x, x_sf, topk_idx.to(torch.int32).contiguous(), topk_weights.contiguous())


def pick_rows(num_tokens: int, count: int, seed: int, device) -> Tensor:
    """Row numbers to check, sorted: all of them, or `count` drawn without replacement."""
    if count >= num_tokens:
        return torch.arange(num_tokens, device=device)
    drawn = torch.randperm(num_tokens, generator=generator("cpu", seed, _SUBSET, num_tokens))[:count]
    return drawn.sort().values.to(device)


def rows_of(tokens: RankTokens, rows: Tensor, remap: Tensor, input_kind: str) -> RankInput:
    """The chosen rows as the spec takes them, expert ids renumbered by remap[id] (-1 stays)."""
    idx = tokens.topk_idx[rows].long()
    idx = torch.where(idx >= 0, remap[idx.clamp(min=0)], idx)
    if input_kind == "prequantized":
        return RankInput(tokens.x.view(torch.uint8)[rows].view(E4M3), tokens.x_sf[rows], idx, tokens.topk_weights[rows])
    return RankInput(tokens.hidden_states[rows], None, idx, tokens.topk_weights[rows])
