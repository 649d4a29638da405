"""Layer time from rows and weights, fitted to measured calls; and what that says for plans of more ranks."""

import json
import re
import statistics
from dataclasses import dataclass

import numpy as np

from .cost import CostModel

FP8_ROW_BYTES = 1 + 4 / 128
"""Of one value of a row: e4m3, and an fp32 scale factor for 128 of them."""
MIN_CALLS = 8  # twice the numbers fitted
CELL = ("case", "hidden", "intermediate", "num_experts", "topk", "tokens_per_rank", "capacity", "ep_size", "num_gpus",
        "routing", "protocol", "num_sms", "device")


@dataclass(frozen=True)
class LayerTime:
    """us = overhead_us + ((weight bytes / weight_tbs)^p + (FLOP / tflops)^p)^(1/p), of the busiest GPU.

    weight_tbs: TB/s at which activated experts' FP8 weights stream; tflops: of both GEMMs; p: sharpness of the
    crossover, between a sum (1) and the larger of the two (infinity). Knows nothing of links: what the measured calls
    spent on them is in the fit, and more ranks are taken to cost no more, as inside one NVLink domain.
    Nor of tiles: an expert with more rows than a tile has its weights read again, which is part of why skewed calls
    of middling size take longer than predicted.

    Virtual ranks share one GPU and one launch: that GPU streams the activated experts of all of them, each once, as an
    expert is on one rank; it does the FLOP of all rows, and pays overhead_us once. What the ranks send one another
    stays in its own memory and is not counted.
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
        """Least squares of log(us) over measured (weight bytes, FLOP, us), at least MIN_CALLS of them, by pattern
        search."""
        weight_bytes, flop, us = np.asarray(measured, np.float64).reshape(-1, 3).T
        if len(us) < MIN_CALLS:
            raise ValueError(f"{len(us)} measured calls: {MIN_CALLS} or more are needed to fit four numbers")

        def loss(log_values):
            return float(((np.log(cls(*np.exp(log_values)).us(weight_bytes, flop)) - np.log(us)) ** 2).mean())

        best = np.log([20.0, 2.5, 800.0, 3.0])
        lowest, step = loss(best), 0.5
        while step > 1e-6:
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


def row_bytes(hidden, intermediate):
    """Bytes that one (token, expert) row moves in HBM: its FP8 row, the requantized one and the bf16 row that returns,
    each written and read once."""
    return 2 * (hidden + intermediate) * FP8_ROW_BYTES + 2 * 2 * hidden


def token_bytes(hidden):
    """Bytes that a token moves besides: its FP8 input is read, its bf16 output written."""
    return hidden * FP8_ROW_BYTES + 2 * hidden


def read_measured(paths, gpu="H100"):
    """Rows (dicts) of bench.py's and scaling.py's files: a median call a cell, of its newest commit, as in the README.

    A cell is one size, routing, protocol, capacity, and number of ranks and GPUs; counted are correct calls of megamoe
    on GPUs with `gpu` in their name, prequantized in, FP8 experts, in one NVLink domain. ValueError for a file of other
    rows.
    """
    cells = {}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        try:
            for row in (row for row in rows if _is_counted(row) and gpu in row["device"]):
                cells.setdefault(tuple(str(row.get(name)) for name in CELL), []).append(row)
        except KeyError as error:
            raise ValueError(f"{path}: a row without {error}; needs a file of bench.py or scaling.py") from error
    return [_median_call(found) for found in cells.values()]


def _is_counted(row):
    return (row.get("impl") == "megamoe" and row["ok"] and row["us"] and row["num_gpus"] and row["bytes_weights"]
            and row["weight_format"] == "fp8" and row["input"] == "prequantized"
            and row.get("ranks_per_domain", row["ep_size"]) == row["ep_size"])


def _median_call(rows):
    newest = max(rows, key=lambda row: row["date"])
    us = [row["us"] for row in rows if (row["commit"], row["dirty"]) == (newest["commit"], newest["dirty"])]
    return newest | {"us": statistics.median(us)}


def kind_of(row):
    """"EP4": four ranks with a GPU each; "virtual 4": four ranks on one GPU. One rank is EP1, virtual or not."""
    return f"{'EP' if row['ep_size'] == row['num_gpus'] else 'virtual '}{row['ep_size']}"


def busiest_flop(row):
    """FLOP of the busiest GPU in a measured call, whose own "flops" are the mean over its GPUs.

    Its rows follow from bytes_activations, which are the busiest GPU's. Where these are 0, kept in L2 (below 25 MB,
    some 800 rows of hidden 4096), the mean stands: weights are what such a call waits for. Exact for equally many
    tokens on all ranks.
    """
    hidden, intermediate = row["hidden"], row["intermediate"]
    tokens = max(row["tokens_per_rank"]) * row["ep_size"] / row["num_gpus"]
    rows = (row["bytes_activations"] - tokens * token_bytes(hidden)) / row_bytes(hidden, intermediate)
    return max(row["flops"], rows * row_flop(hidden, intermediate))


def fit_measured(rows):
    """The LayerTime of these calls (read_measured)."""
    return LayerTime.fit([(row["bytes_weights"], busiest_flop(row), row["us"]) for row in rows])


def relative_error(model, rows):
    """predicted / measured - 1 of each call: float64 [rows]."""
    return np.array([float(model.us(row["bytes_weights"], busiest_flop(row))) / row["us"] - 1 for row in rows])


def error_by_kind(model, fitted, checked=()):
    """Rows (dicts), one a kind of call, apart by whether the fit used them: calls, rms and worst relative error, and
    which call that is. The last: the fitted calls, each case predicted by a fit to the other cases, where these have
    MIN_CALLS."""
    out = []
    for used, rows in (("yes", fitted), ("no", checked)):
        for kind in sorted({kind_of(row) for row in rows}, key=lambda kind: int(re.search(r"\d+", kind)[0])):
            of_kind = [row for row in rows if kind_of(row) == kind]
            out.append({"calls of": kind, "in the fit": used} | _stated(of_kind, relative_error(model, of_kind)))
    out.sort(key=lambda line: line["calls of"].startswith("virtual"))
    error = np.full(len(fitted), np.nan)
    for case in {row["case"] for row in fitted}:
        others, left_out = ([row for row in fitted if (row["case"] == case) == here] for here in (False, True))
        if len(others) >= MIN_CALLS:
            error[[row["case"] == case for row in fitted]] = relative_error(fit_measured(others), left_out)
    if fitted and not np.isnan(error).any():
        out.append({"calls of": "all, by case", "in the fit": "other cases"} | _stated(fitted, error))
    return out


def _stated(rows, error):
    worst = int(np.abs(error).argmax())
    row = rows[worst]
    return {"calls": len(rows), "rms": f"{np.sqrt((error**2).mean()):.1%}", "worst": f"{error[worst]:+.1%}",
            "worst call": f"{row['case']} {kind_of(row)} {row['routing']}, {row['num_tokens']} tokens a rank"}


def expected_active(rows, rows_per_step):
    """Expected activated copies of a rank a step: sum of 1 - exp(-rows), rows [..., slots] of rows_per_step in all."""
    total = rows.sum(axis=tuple(range(1, rows.ndim)), keepdims=True)
    return -np.expm1(-rows_per_step * rows / np.maximum(total, 1e-300)).sum(-1)
