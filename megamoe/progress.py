"""What a long command is at, on standard error: how far a read has come, or which phase has begun."""

import faulthandler
import sys
import time


class Progress:
    """A line on the terminal. Call it with the bytes of each step; a context manager that ends the line.

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


class Phases:
    """Lines on standard error that say what a long command is at: one as each phase begins, with the seconds so far, so
    that a run that is cut off says where it was; and one at the end with what each took.

    said: False for ranks that need not say it too. deadline_s: a phase that takes longer ends the process, on any rank,
    with the stacks of its threads on standard error: for waits inside libraries, which have no deadline of their own.
    Context manager around all phases.
    """

    def __init__(self, what: str, said: bool = True, deadline_s: float = 300.0, began: float | None = None):
        self._what, self._said, self._deadline_s = what, said, deadline_s
        self._began = self._since = time.monotonic() if began is None else began
        self._phase, self._took = "start", []

    def __call__(self, phase: str) -> None:
        now = self._next(phase)
        self._say(f"{now - self._began:6.1f} s  {phase}")
        faulthandler.dump_traceback_later(self._deadline_s, exit=True, file=sys.__stderr__)

    def _next(self, phase: str) -> float:
        now = time.monotonic()
        self._took.append((self._phase, now - self._since))
        self._phase, self._since = phase, now
        return now

    def _say(self, text: str) -> None:
        if self._said:
            print(f"{self._what}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Phases":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        faulthandler.cancel_dump_traceback_later()
        phase, now = self._phase, self._next("")
        took = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._took)
        self._say(f"{now - self._began:6.1f} s  {'ended in ' + phase if kind else 'done'}; seconds: {took}")
