"""What a layer has done so far, from what the host knows at each launch: nothing is read back from a device unasked."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True)
class Counters:
    """What a layer counts."""

    calls: int = 0
    failed: int = 0
    tokens: int = 0
    input_bytes: int = 0

    def add(self, kinds, calls: int = 1) -> None:
        """Calls that were taken. kinds: layer_checks.Kind of each rank here."""
        self.calls += calls
        for kind in kinds:
            self.tokens += calls * kind.num_tokens
            self.input_bytes += calls * kind.input_bytes


def imbalance(served: list[int]) -> float:
    """served: rows of each slot. Largest over mean, 1.0 where nothing was served."""
    return max(served) * len(served) / sum(served) if any(served) else 1.0


class Stats(NamedTuple):
    """calls: of forward that were taken (replays of a captured graph are not seen). failed: ended in MegaMoEError.
    tokens: rows given, all ranks of this process; input_bytes, output_bytes: of hidden_states and of the result.
    wait_s: seconds in which a CPU rank waited for peers; None on CUDA, where `python -m megamoe trace` shows waits.
    rows: that the ranks of this process served, of whatever rank's tokens and shared experts left out: compared between
    ranks, it shows who has most work. imbalance: rows of the busiest expert slot here over the mean of all slots here,
    whatever experts were in them since the beginning; 1 without rows.
    Both None on CUDA unless asked for. error: why the workspace refuses calls, or None."""

    calls: int = 0
    failed: int = 0
    tokens: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    wait_s: float | None = None
    rows: int | None = None
    imbalance: float | None = None
    error: str | None = None

    def _samples(self) -> list[tuple[str, float | None]]:
        return [("calls_total", self.calls), ("failed_calls_total", self.failed), ("tokens_total", self.tokens),
                ("input_bytes_total", self.input_bytes), ("output_bytes_total", self.output_bytes),
                ("wait_seconds_total", self.wait_s), ("rows_total", self.rows), ("imbalance", self.imbalance),
                ("healthy", int(self.error is None))]  # fmt: skip

    def prometheus(self, **labels: str) -> str:
        """The numbers in Prometheus's text format, one sample each, with these labels. Of several layers: prometheus()
        of this module, for a page may not have a metric twice."""
        return prometheus([(self, labels)])


def prometheus(layers: Iterable[tuple[Stats, Mapping[str, object]]]) -> str:
    """One page in Prometheus's text format: each metric once, with a sample for each of `layers` under its labels, such
    as {"layer": 3, "rank": 0}. ValueError where two have the same labels, or for a name that no label can have."""
    metrics: dict[str, list[str]] = {}
    given = []
    for stats, labels in layers:
        for label in labels:
            if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", label):
                raise ValueError(f"label {label!r}: use letters, digits and underscores, no digit first")
        given.append(",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())))
        if given[-1] in given[:-1]:
            raise ValueError(f"two of the layers have the labels {{{given[-1]}}}; give each its own")
        for name, value in stats._samples():
            if value is not None:
                metrics.setdefault(name, []).append(f"megamoe_{name}{{{given[-1]}}} {value}")
    lines = []
    for name, samples in metrics.items():
        lines += [f"# TYPE megamoe_{name} {'counter' if name.endswith('_total') else 'gauge'}", *samples]
    return "".join(f"{line}\n" for line in lines)


def _escaped(value) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
