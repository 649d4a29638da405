"""A few drawn sequences of calls against the reference; `python -m megamoe.testing.fuzz --minutes N` draws more."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="not run: hypothesis is not installed")

from megamoe import MoELayer
from megamoe.testing import fuzz


def test_drawn_sequences_meet_the_reference():
    tally = {"sequences": 0, "calls": 0}
    fuzz.batch(0, "cpu", 12, tally)
    assert tally["sequences"] >= 12 and tally["calls"] >= 24


def test_a_seed_draws_the_same_sequences_again(monkeypatch):
    drawn = []
    monkeypatch.setattr(fuzz, "run", lambda sequence, device, tally: drawn.append(sequence))
    for _ in range(2):
        fuzz.batch(7, "cpu", 10, {"sequences": 0, "calls": 0})
    assert len(drawn) == 20 and drawn[:10] == drawn[10:]


def test_what_is_wrong_is_found_and_shrunk(monkeypatch):
    """A layer that loses the last token of a rank with several, on calls after the first."""
    real = MoELayer.forward

    def forward(self, *args, **kwargs):
        outs = real(self, *args, **kwargs)
        self.count = getattr(self, "count", 0) + 1
        for out in outs:
            if out.shape[0] > 1 and self.count > 2:
                out[-1] = torch.zeros_like(out[-1])
        return outs

    monkeypatch.setattr(MoELayer, "forward", forward)
    report = fuzz.fuzz(3, 5.0, "cpu")
    failure = report["failure"]
    assert failure and failure["seed"] >= 3 and "WRONG" in failure["error"]
    text = " ".join(failure["notes"])
    assert 2 <= text.count("Call(") <= 3, text  # of up to five
