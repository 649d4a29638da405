"""layer.stats(): counts of what was called, and its Prometheus text."""

import re

import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.stats import Stats, imbalance, prometheus
from megamoe.testing.data import make_case

CONFIG = MoEConfig(hidden=256, intermediate=128, num_experts=4, topk=2)


def test_counters_follow_the_calls():
    case = make_case(0, CONFIG, 2, [3, 5])
    with Workspace(CONFIG, EPConfig(8, virtual_ranks=2), device="cpu") as workspace:
        layer = MoELayer(CONFIG, workspace)
        w, i = case.weights, case.inputs
        layer.load_weights([r.linear1 for r in w], [r.linear2 for r in w], [r.linear1_sf for r in w],
                           [r.linear2_sf for r in w])  # fmt: skip
        assert layer.stats() == Stats(wait_s=0.0, rows=0, imbalance=1.0)
        for _ in range(3):
            layer([r.x for r in i], [r.topk_idx for r in i], [r.topk_weights for r in i])
        by_expert = torch.bincount(torch.cat([r.topk_idx for r in i]).flatten(), minlength=4)
        assert int(by_expert.sum()) == 16  # 5 + 3 tokens, no slot unused
        worst = int(by_expert.max()) / 4
        assert worst > 1 and layer.stats() == Stats(3, 0, 24, 24 * 512, 24 * 512, 0.0, 3 * 16, worst)
        assert layer.stats(load=True) == layer.stats()
        with pytest.raises(TypeError):
            layer([r.x.float() for r in i], [r.topk_idx for r in i], [r.topk_weights for r in i])
        assert layer.stats().calls == 3
        workspace.poison(MegaMoEError("rank 1 is gone"))
        assert layer.stats().error == "rank 1 is gone"


def test_imbalance_is_the_busiest_over_the_mean():
    assert (imbalance([6, 2, 0, 0]), imbalance([0, 0]), imbalance([5, 5])) == (3.0, 1.0, 1.0)


def test_prometheus_text():
    text = Stats(3, 1, 24, 100, 200, error="gone").prometheus(layer='mlp "7"', rank="0")
    assert 'megamoe_calls_total{layer="mlp \\"7\\"",rank="0"} 3\n' in text
    assert "wait_seconds" not in text and "megamoe_healthy" in text and text.rstrip().endswith(" 0")
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"megamoe_\w+\{[^}]*\} [\d.]+", line) for line in samples) and len(samples) == 6
    text = Stats(wait_s=1.5, rows=7, imbalance=1.25).prometheus()
    assert "wait_seconds_total{} 1.5\n" in text and "rows_total{} 7\n" in text
    assert "# TYPE megamoe_imbalance gauge\nmegamoe_imbalance{} 1.25\n" in text


def test_several_layers_are_one_page_with_each_metric_once():
    page = prometheus((Stats(layer, wait_s=0.5), {"rank": 0, "layer": layer}) for layer in range(3))
    lines = page.splitlines()
    types = [line for line in lines if line.startswith("#")]
    assert len(types) == len(set(types)) == 7
    place = lines.index("# TYPE megamoe_calls_total counter")
    assert lines[place + 1 : place + 4] == [f'megamoe_calls_total{{layer="{n}",rank="0"}} {n}' for n in range(3)]
    with pytest.raises(ValueError, match="two of the layers have the labels"):
        prometheus([(Stats(), {"rank": 0}), (Stats(), {"rank": 0})])
    with pytest.raises(ValueError, match="label 'layer-name'"):
        Stats().prometheus(**{"layer-name": 1})
