"""How far is a result from the expected one, and is that good enough."""

from typing import NamedTuple

import torch
from torch import Tensor


def rel_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64 over rows that are finite in both; 0.0 if nothing is expected."""
    a, e = actual.double().flatten(0, -2), expected.double().flatten(0, -2)
    finite = a.isfinite().all(1) & e.isfinite().all(1)
    norm = e[finite].norm()
    error = (a[finite] - e[finite]).norm()
    return float(error / norm) if norm > 0 else (0.0 if error == 0 else float("inf"))


def row_rel_l2(actual: Tensor, expected: Tensor) -> Tensor:
    """The same per row: float64 [rows]. A row expected to be zero gives 0 if it is exactly zero, else inf.

    A row expected to hold NaN or infinity gives 0 if the actual one does too, else inf; the reverse gives inf.
    """
    a, e = actual.double().flatten(0, -2), expected.double().flatten(0, -2)
    error, norm = (a - e).norm(dim=1), e.norm(dim=1)
    rel = torch.where(error == 0, torch.zeros_like(error), error / norm)  # x / 0 = inf is meant
    a_finite, e_finite = a.isfinite().all(1), e.isfinite().all(1)
    rel = torch.where(a_finite == e_finite, rel, torch.full_like(rel, float("inf")))
    return torch.where(~a_finite & ~e_finite, torch.zeros_like(rel), rel)


def row_limit(intermediate: int) -> float:
    """Most relative L2 error of one output row against the specification: 3e-2 from intermediate 512 on.

    The tensor core adds e4m3 products with about 14 bits, so that linear1 differs from the specification by some 1e-4
    and now and then an h lies on the other side of an e4m3 rounding boundary. Such a flip moves h by one e4m3 step, an
    eighth of its value at most, and linear2 hands the whole of it on: of a row of `intermediate` values of like size it
    is about 1 / (8 sqrt(intermediate)), several times that for the largest of them, and in a row that holds a few flips
    they add up in squares. The bound follows that root: 6e-2 at 128, 4.2e-2 at 256, 3.5e-2 at 384. (Random rows with
    linear1 disturbed by 2e-4 to 5e-4 of its size, 4000 at a time: worst 4.7e-2, 3.9e-2, 3.2e-2.) What no flip excuses
    is checked without them, stage by stage: tests/gpu/test_stages.py.
    """
    return min(6e-2, 3e-2 * max(1.0, 512 / intermediate) ** 0.5)


class Verdict(NamedTuple):
    """ok, and why: rel_l2 over all rows, the worst row and its index (-1 without rows), text for people."""

    ok: bool
    rel_l2: float
    worst_row: float
    worst_row_idx: int
    text: str


def verdict(actual: Tensor, expected: Tensor, *, max_rel_l2: float = 1e-2, max_row_rel_l2: float = 3e-2) -> Verdict:
    """Judge a layer's output [rows, width]: whole tensor, every row, zero rows exactly zero, NaN only where
    expected."""
    if actual.shape != expected.shape:
        text = f"shape {list(actual.shape)}, expected {list(expected.shape)}"
        return Verdict(False, float("inf"), float("inf"), -1, text)
    expected = expected.to(actual.device)
    whole, per_row = rel_l2(actual, expected), row_rel_l2(actual, expected)
    worst, worst_idx = (float(per_row.max()), int(per_row.argmax())) if len(per_row) else (0.0, -1)
    ok = whole < max_rel_l2 and worst < max_row_rel_l2
    text = (
        f"{'ok' if ok else 'WRONG'}: relative L2 {whole:.2e} (limit {max_rel_l2:.0e}), worst row {worst:.2e} at "
        f"{worst_idx} "
        f"(limit {max_row_rel_l2:.0e}), {len(per_row)} rows"
    )
    return Verdict(ok, whole, worst, worst_idx, text)


def verdict_ranks(actual: list[Tensor], expected: list[Tensor], **limits: float) -> Verdict:
    """The same over a list of ranks, rows of all ranks one after the other."""
    shapes = [list(a.shape) for a in actual], [list(e.shape) for e in expected]
    if shapes[0] != shapes[1]:
        return Verdict(False, float("inf"), float("inf"), -1, f"shapes {shapes[0]}, expected {shapes[1]}")
    return verdict(torch.cat(actual), torch.cat([e.to(actual[0].device) for e in expected]), **limits)
