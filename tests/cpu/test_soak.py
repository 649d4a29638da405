"""A short soak on virtual ranks of the CPU: it adds up, and a bit that differs ends it."""

import json

import pytest
import torch

from megamoe import MoELayer
from megamoe.testing import soak


def test_runs_add_up_against_one_digest(tmp_path):
    state = tmp_path / "state.json"
    first = soak.soak("cpu", 0.0, state, 4, 10)
    second = soak.soak("cpu", 0.0, state, 4, 10)
    assert (first["runs"], second["runs"]) == (1, 2) and second["calls"] == 20 and second["rounds"] == 2
    assert first["digest"] == second["digest"] and json.loads(state.read_text()) == second
    state.write_text(json.dumps(second | {"digest": "0" * 64}))
    with pytest.raises(AssertionError, match="digest"):
        soak.soak("cpu", 0.0, state, 4, 10)
    state.write_text(json.dumps(second | {"cases": 5}))
    with pytest.raises(ValueError, match="cases=5 there, 4 here"):
        soak.soak("cpu", 0.0, state, 4, 10)


def test_one_bit_is_found(tmp_path, monkeypatch):
    real, calls = MoELayer.forward, []

    def forward(self, *args, out, **kwargs):
        outs = real(self, *args, out=out, **kwargs)
        calls.append(None)
        if len(calls) > 20 and out[0].numel():
            out[0].view(torch.int16)[0, 0] ^= 1
        return outs

    monkeypatch.setattr(MoELayer, "forward", forward)
    with pytest.raises(AssertionError, match="values differ from the first call's"):
        soak.soak("cpu", 0.0, tmp_path / "state.json", 4, 60)
    assert not (tmp_path / "state.json").exists()
