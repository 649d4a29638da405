"""A few drawn sequences of calls against the reference; `python -m megamoe.testing.fuzz --minutes N` draws more."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="not run: hypothesis is not installed")

from megamoe import MoELayer
from megamoe.builds import needs_extras
from megamoe.testing import fuzz


def test_drawn_sequences_meet_the_reference():
    tally = {"sequences": 0, "calls": 0}
    fuzz.batch(0, "cpu", 12, tally)
    assert tally["sequences"] >= 12 and tally["calls"] >= 24


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--json", "/nowhere/fuzz.json"]])
def test_a_run_that_could_show_nothing_is_refused(monkeypatch, capsys, arguments):
    monkeypatch.setattr(fuzz, "fuzz", None)
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(arguments)
    assert f"{arguments[0]} {arguments[1]}" in capsys.readouterr().err


def test_a_long_run_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "SAID_S", 0.0)
    monkeypatch.setattr(fuzz, "batch", lambda seed, device, count, tally: tally.update(sequences=count, calls=seed))
    report = fuzz.fuzz(5, 1e-4, "cpu")
    assert "20 sequences, 5 calls, at seed 6" in capsys.readouterr().err and report["first_seed"] == 5


def test_a_seed_draws_the_same_sequences_again(monkeypatch):
    drawn = []
    monkeypatch.setattr(fuzz, "run", lambda sequence, device, tally: drawn.append(sequence))
    for _ in range(2):
        fuzz.batch(7, "cpu", 10, {"sequences": 0, "calls": 0})
    assert len(drawn) == 20 and drawn[:10] == drawn[10:]


def test_every_kind_of_layer_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(fuzz, "run", lambda sequence, device, tally: drawn.extend(sequence.configs))
    fuzz.batch(1, "cpu", 60, {"sequences": 0, "calls": 0})
    for name, values in (("weight_format", {"fp8", "mxfp4"}), ("activation", {"swiglu", "swiglu_oai"}),
                         ("bias", {False, True}), ("num_shared_experts", {0, 1, 2})):  # fmt: skip
        assert {getattr(config, name) for config in drawn} == values
    assert any(config.weight_format == "fp8" and not needs_extras(config) for config in drawn)


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
