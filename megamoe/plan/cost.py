"""What a copy of an expert costs its rank in one step: rows when compute-bound, streamed weights when memory-bound."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CostModel:
    """Time of a rank's expert GEMMs as row_us * rows + expert_us * activated experts.

    row_us: time per (token, expert) row in us; expert_us: time to stream one activated expert's weights in us;
    rows_per_step: rows of one step over all ranks, tokens * topk. ValueError when a number is negative or all are 0.
    """

    row_us: float
    expert_us: float
    rows_per_step: float

    def __post_init__(self):
        for name in ("row_us", "expert_us", "rows_per_step"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: must be a finite number >= 0")
        if self.row_us == 0 and self.expert_us == 0:
            raise ValueError("row_us=0 and expert_us=0: one of them must be positive, or every plan costs the same")
        if self.rows_per_step == 0:
            raise ValueError("rows_per_step=0: pass tokens per step over all ranks times topk")

    @classmethod
    def fit(cls, rows, activated, time_us, rows_per_step):
        """Least squares of measured (rows, activated experts, time in us) of single ranks; each 1-D, same length.

        A negative coefficient is set to 0 and the other fitted alone. ValueError for fewer than two measurements.
        """
        table = np.stack([np.asarray(rows, np.float64), np.asarray(activated, np.float64)], 1)
        time_us = np.asarray(time_us, np.float64)
        if len(table) < 2:
            raise ValueError(f"{len(table)} measurements: two or more are needed to separate rows from experts")
        row_us, expert_us = np.linalg.lstsq(table, time_us, rcond=None)[0]
        if row_us < 0 or expert_us < 0:
            alone = [float(column @ time_us / max(column @ column, 1e-300)) for column in table.T]
            row_us, expert_us = (0.0, alone[1]) if row_us < 0 else (alone[0], 0.0)
        return cls(float(row_us), float(expert_us), float(rows_per_step))

    def copy_cost(self, rows, total):
        """Expected cost in us of a copy that gets `rows` of `total` recorded rows; broadcasts, float64.

        With n = rows_per_step * rows / total expected rows a step the copy is active with probability 1 - exp(-n)
        (many rare independent choices: Poisson).
        """
        expected = self.rows_per_step * np.asarray(rows) / np.maximum(total, 1e-300)
        return self.row_us * expected - self.expert_us * np.expm1(-expected)


def default_cost(phase, num_logical_experts):
    """CostModel used without one: None for "prefill" (rows count), for "decode" only activated experts count.

    The decode stand-in assumes one row per logical expert a step; it is a convention, not a measurement. Pass a model
    fitted to the machine for anything that depends on the batch size.
    """
    if phase == "prefill":
        return None
    if phase == "decode":
        return CostModel(row_us=0.0, expert_us=1.0, rows_per_step=float(num_logical_experts))
    raise ValueError(f"phase={phase!r}: choose 'prefill' (rows are what costs) or 'decode' (activated experts are)")


def slot_cost(cost, rows, total):
    """Cost of copies with these rows under cost (None: the rows themselves); rows [layers, n], total [layers]."""
    return np.asarray(rows, np.float64) if cost is None else cost.copy_cost(rows, np.asarray(total)[:, None])
