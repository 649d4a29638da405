"""The correctness gate: an output against the specification (megamoe.steps) on the same operands, in the same run as
its timing.

A token's output depends on that token and its experts alone, so a subset of rows is checked with just the experts those
rows use, regenerated
from the seed on the checking rank: no rank needs another's weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs import RankTokens, make_weights, rows_of, to_bf16
from megamoe.config import MoEConfig
from megamoe.exchange import LocalExchange
from megamoe.steps import moe_layer
from megamoe.testing import compare


@dataclass(frozen=True)
class Verdict:
    """ok, and why. rel_l2: over all checked rows; row_rel_l2: the worst row; rows: how many were checked, of
    num_tokens."""

    ok: bool
    rel_l2: float
    row_rel_l2: float
    rows: int
    num_tokens: int
    reason: str = ""


def spec_rows(
    case, tokens: RankTokens, rows: Tensor, seed: int, *, quantized: bool, experts_at_once: int = 96
) -> Tensor:
    """The spec's output for the given rows of one rank, fp32 [len(rows), hidden].

    quantized: the FP8 layer; otherwise the same code without quantizers, on bf16 hidden states and the dequantized
    weights.
    experts_at_once bounds the memory: rows are taken in groups that use no more different experts than that.
    """
    out = torch.zeros(len(rows), case.hidden, device=tokens.x.device)
    for begin, end in _groups(tokens.topk_idx[rows].cpu(), experts_at_once):
        group = rows[begin:end]
        used = tokens.topk_idx[group]
        experts = used[used >= 0].unique().tolist()
        if not experts:
            continue
        remap = torch.full((case.num_experts,), -1, dtype=torch.int64, device=out.device)
        remap[experts] = torch.arange(len(experts), device=out.device)
        weights = make_weights(case, experts, seed, out.device)
        config = MoEConfig(
            case.hidden,
            case.intermediate,
            len(experts),
            case.topk,
            weight_format=case.weight_format if quantized else "bf16",
            swiglu_limit=case.swiglu_limit,
        )
        rank_input = rows_of(tokens, group, remap, "prequantized" if quantized else "bf16")
        weights = weights if quantized else to_bf16(weights)
        out[begin:end] = moe_layer(config, LocalExchange(1), [weights], [rank_input])[0].float()
    return out


def _groups(topk_idx: Tensor, experts_at_once: int) -> list[tuple[int, int]]:
    groups, begin, used = [], 0, set()
    for row, ids in enumerate(topk_idx.tolist()):
        wider = used | {expert for expert in ids if expert >= 0}
        if len(wider) > experts_at_once and row > begin:
            groups.append((begin, row))
            begin, used = row, {expert for expert in ids if expert >= 0}
        else:
            used = wider
    if len(topk_idx):
        groups.append((begin, len(topk_idx)))
    return groups


def judge(output: Tensor, rows: Tensor, expected: Tensor, **limits: float) -> Verdict:
    """Compare output[rows] with the expected rows; every other row must at least have been written, with finite values.

    output: [num_tokens, hidden], poisoned with NaN before the call. Limits as in megamoe.testing.compare.verdict,
    whose keywords change them: whole tensor rel L2 < 1e-2, every row < 3e-2, rows of zeros exactly zero.
    """
    num_tokens = output.shape[0]
    finite = torch.isfinite(output).all(dim=-1)
    if not bool(finite.all()):
        reason = f"{int((~finite).sum())} of {num_tokens} rows unwritten or not finite"
        return Verdict(False, float("nan"), float("nan"), len(rows), num_tokens, reason)
    compared = compare.verdict(output[rows], expected, **limits)
    return Verdict(
        compared.ok, compared.rel_l2, compared.worst_row, len(rows), num_tokens, "" if compared.ok else compared.text
    )


def merge(verdicts: list[Verdict]) -> Verdict:
    """One verdict over ranks or routings: the worst of each."""
    worst = max(verdicts, key=lambda v: (not v.ok, v.rel_l2))
    return Verdict(
        all(v.ok for v in verdicts),
        max((v.rel_l2 for v in verdicts), key=_nan_last),
        max((v.row_rel_l2 for v in verdicts), key=_nan_last),
        sum(v.rows for v in verdicts),
        sum(v.num_tokens for v in verdicts),
        worst.reason,
    )


def _nan_last(value: float) -> tuple[bool, float]:
    return value != value, value
