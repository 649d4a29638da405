"""A line on the terminal that says how far a read has come. Nothing where standard error is no terminal."""

import sys
import time


class Progress:
    """Call it with the bytes of each step; a context manager that ends the line.

    total: bytes altogether. shown: None = where standard error is a terminal.
    """

    def __init__(self, what: str, total: int, shown: bool | None = None):
        self._what, self._total, self._done = what, total, 0
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._began = self._said = time.monotonic()

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if self._shown and (now - self._said > 0.1 or self._done >= self._total):
            self._said = now
            rate = self._done / 1e9 / max(now - self._began, 1e-9)
            share = self._done / max(self._total, 1)
            print(
                f"\r{self._what}: {share:4.0%} of {self._total / 1e9:.2f} GB, {rate:.2f} GB/s", end="", file=sys.stderr
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._shown and self._done:
            print(file=sys.stderr)
