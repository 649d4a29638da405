"""layer.stats(): counts of what was called, and its Prometheus text."""

import re

import pytest

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.stats import Stats
from megamoe.testing.data import make_case

CONFIG = MoEConfig(hidden=256, intermediate=128, num_experts=4, topk=2)


def test_counters_follow_the_calls():
    case = make_case(0, CONFIG, 2, [3, 5])
    with Workspace(CONFIG, EPConfig(8, virtual_ranks=2), device="cpu") as workspace:
        layer = MoELayer(CONFIG, workspace)
        w, i = case.weights, case.inputs
        layer.load_weights([r.linear1 for r in w], [r.linear2 for r in w], [r.linear1_sf for r in w],
                           [r.linear2_sf for r in w])  # fmt: skip
        assert layer.stats() == Stats(wait_s=0.0)
        for _ in range(3):
            layer([r.x for r in i], [r.topk_idx for r in i], [r.topk_weights for r in i])
        assert layer.stats() == Stats(3, 0, 24, 24 * 512, 24 * 512, 0.0)
        with pytest.raises(TypeError):
            layer([r.x.float() for r in i], [r.topk_idx for r in i], [r.topk_weights for r in i])
        assert layer.stats().calls == 3
        workspace.poison(MegaMoEError("rank 1 is gone"))
        assert layer.stats().error == "rank 1 is gone"


def test_prometheus_text():
    text = Stats(3, 1, 24, 100, 200, None, "gone").prometheus(layer='mlp "7"', rank="0")
    assert 'megamoe_calls_total{layer="mlp \\"7\\"",rank="0"} 3\n' in text
    assert "wait_seconds" not in text and "megamoe_healthy" in text and text.rstrip().endswith(" 0")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"megamoe_\w+\{[^}]*\} [\d.]+", line) for line in samples) and len(samples) == 6
    assert "wait_seconds_total{} 1.5" in Stats(wait_s=1.5).prometheus()
