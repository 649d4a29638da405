"""What a layer has done so far, from what the host knows at each launch: nothing is read back from a device unasked."""

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
    rows: that the ranks of this process served, of whatever rank's tokens: compared between ranks, it shows who has
    most work. imbalance: rows of the busiest expert slot here over the mean of all slots here; 1 without rows.
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

    def prometheus(self, **labels: str) -> str:
        """The numbers in Prometheus's text format, one sample each, with these labels."""
        given = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
        rows = [("calls_total", self.calls), ("failed_calls_total", self.failed), ("tokens_total", self.tokens),
                ("input_bytes_total", self.input_bytes), ("output_bytes_total", self.output_bytes),
                ("wait_seconds_total", self.wait_s), ("rows_total", self.rows), ("imbalance", self.imbalance),
                ("healthy", int(self.error is None))]  # fmt: skip
        lines = []
        for name, value in rows:
            if value is not None:
                kind = "counter" if name.endswith("_total") else "gauge"
                lines += [f"# TYPE megamoe_{name} {kind}", f"megamoe_{name}{{{given}}} {value}"]
        return "\n".join(lines) + "\n"


def _escaped(value) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
