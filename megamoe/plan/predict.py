"""Layer time from rows and weights, fitted to measured calls; and what that says for plans of more ranks."""

import json
from dataclasses import dataclass

import numpy as np

from .cost import CostModel


@dataclass(frozen=True)
class LayerTime:
    """us = overhead_us + ((weight bytes / weight_tbs)^p + (FLOP / tflops)^p)^(1/p), of the busiest rank.

    weight_tbs: TB/s at which activated experts' FP8 weights stream; tflops: of both GEMMs; p: sharpness of the
    crossover, between a sum (1) and the larger of the two (infinity). Knows nothing of links: what the measured calls
    spent on them is in the fit, and more ranks are taken to cost no more, as inside one NVLink domain.
    """

    overhead_us: float
    weight_tbs: float
    tflops: float
    p: float

    def us(self, weight_bytes, flop):
        """float64, broadcast over both."""
        weights = np.asarray(weight_bytes, np.float64) / self.weight_tbs * 1e-6
        compute = np.asarray(flop, np.float64) / self.tflops * 1e-6
        return self.overhead_us + (weights**self.p + compute**self.p) ** (1 / self.p)

    def of_rank(self, rows, activated, hidden, intermediate):
        """us of a rank with these rows and activated experts."""
        return self.us(activated * expert_bytes(hidden, intermediate), rows * row_flop(hidden, intermediate))

    def cost(self, hidden, intermediate, rows_per_step):
        """The linear CostModel of phase "decode" with these rates."""
        return CostModel(row_flop(hidden, intermediate) / self.tflops * 1e-6,
                         expert_bytes(hidden, intermediate) / self.weight_tbs * 1e-6, float(rows_per_step))

    @classmethod
    def fit(cls, measured):
        """Least squares of log(us) over measured (weight bytes, FLOP, us), at least 8 of them, by pattern search."""
        weight_bytes, flop, us = np.asarray(measured, np.float64).reshape(-1, 3).T
        if len(us) < 8:
            raise ValueError(f"{len(us)} measured calls: 8 or more are needed to fit four numbers")

        def loss(log_values):
            return float(((np.log(cls(*np.exp(log_values)).us(weight_bytes, flop)) - np.log(us)) ** 2).mean())

        best = np.log([20.0, 2.5, 800.0, 3.0])
        lowest, step = loss(best), 0.5
        while step > 1e-4:
            trials = [best + step * sign * axis for axis in np.eye(4) for sign in (1, -1)]
            losses = [loss(trial) for trial in trials]
            if min(losses) < lowest:
                lowest, best = min(losses), trials[int(np.argmin(losses))]
            else:
                step /= 2
        return cls(*map(float, np.exp(best)))


def expert_bytes(hidden, intermediate):
    """FP8 weights of one expert in bytes, without scale factors."""
    return 3 * hidden * intermediate


def row_flop(hidden, intermediate):
    """FLOP of one (token, expert) row: two GEMMs of hidden x 2 intermediate and intermediate x hidden."""
    return 6 * hidden * intermediate


def read_measured(paths):
    """Rows (dicts) of benchmarks/results/*.jsonl that are correct calls of megamoe, FP8 in: the newest of each cell."""
    rows = []
    for path in paths:
        with open(path, encoding="utf-8") as file:
            rows += [json.loads(line) for line in file if line.strip()]
    rows = [row for row in rows if row.get("impl") == "megamoe" and row.get("ok") and row.get("us")
            and row.get("weight_format", "fp8") == "fp8" and row.get("input", "prequantized") == "prequantized"
            and row.get("bytes_weights")]
    cell = ("case", "num_tokens", "ep_size", "virtual_ranks", "routing", "protocol", "input", "device")
    newest = {}
    for row in sorted(rows, key=lambda row: row.get("date", "")):
        newest[tuple(str(row.get(name)) for name in cell)] = row
    return list(newest.values())


def fit_measured(rows):
    """(LayerTime, relative error of each row): float64 [rows], predicted / measured - 1."""
    table = np.array([(row["bytes_weights"], row["flops"], row["us"]) for row in rows], np.float64).reshape(-1, 3)
    model = LayerTime.fit(table)
    return model, model.us(table[:, 0], table[:, 1]) / table[:, 2] - 1


def expected_active(rows, rows_per_step):
    """Expected activated copies of a rank a step: sum of 1 - exp(-rows), rows [..., slots] of rows_per_step in all."""
    total = rows.sum(axis=tuple(range(1, rows.ndim)), keepdims=True)
    return -np.expm1(-rows_per_step * rows / np.maximum(total, 1e-300)).sum(-1)
