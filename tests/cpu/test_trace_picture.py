"""What a CTA's time went to adds up to its time, and a traced call can be drawn."""

import pytest

from megamoe import trace, trace_picture
from megamoe.trace import Record


def lists() -> dict:
    def records(*events):
        return [Record(ns, event, tile) for ns, event, tile in events]

    math = records((1500, "tile", 0), (2000, "first_stage", 0), (5000, "k_loop", 0), (5100, "staging", 0),
                   (6000, "epilogue", 0), (6500, "tile", 1), (6600, "first_stage", 1), (8000, "k_loop", 1),
                   (8100, "staging", 1), (8600, "epilogue", 1))  # fmt: skip
    one = {(0, "plan"): records((1000, "start", 0), (1400, "list", 0), (9600, "end", 0)), (0, "math0"): math,
           (0, "math1"): math, (0, "exchange"): records((1900, "pushed", 0), (9500, "combined", 0))}  # fmt: skip
    return one | {(1, "plan"): records((1000, "start", 0), (1400, "list", 0), (5000, "end", 0))}


def test_exposed_times_add_up_to_a_ctas_time():
    found = trace.exposed([lists()])
    assert found == pytest.approx({
        "dispatch": (0.5 + 2.0) / 2, "tensor": 4.4 / 2, "epilogue": 1.6 / 2, "waits": 1.1 / 2,
        "combine": (1.0 + 2.0) / 2,
    })  # fmt: skip
    assert sum(found.values()) == pytest.approx((8.6 + 4.0) / 2)
    assert "a CTA's time: dispatch 1.2, tensor 2.2" in trace.report(trace.summary([lists()]))


def test_every_kind_of_work_has_a_colour_and_waits_have_none():
    kinds = {trace_picture.kind_of(span) for span in trace.spans(0, lists())}
    assert kinds - {None} <= set(trace_picture.WORK) and {"tensor", "epilogue", "dispatch", "combine", "plan"} <= kinds


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="not run: matplotlib is not installed")
    path = tmp_path / "call.png"
    trace_picture.draw(trace.spans(0, lists()) + trace.spans(1, lists()), "two ranks " * 30, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert not list(tmp_path.glob("*.json"))
    with pytest.raises(ValueError, match="nothing was traced"):
        trace_picture.draw([], "", path)


def test_without_matplotlib_the_picture_can_be_drawn_elsewhere(tmp_path, monkeypatch):
    spans = trace.spans(0, lists()) + trace.spans(1, lists())
    monkeypatch.setattr(trace_picture.importlib.util, "find_spec", lambda name: None)
    kept = trace_picture.picture(spans, "a title", tmp_path / "call.png")
    assert kept.name == "call.picture.json" and not (tmp_path / "call.png").exists()
    drawn = []
    monkeypatch.setattr(trace_picture, "draw", lambda *given: drawn.append(given))
    trace_picture.draw_kept(kept, tmp_path / "call.png")
    found, title, _ = drawn[0]
    assert title == "a title"

    def facts(some):
        zero = min(span.begin.ns for span in some)
        return sorted((s.rank, s.cta, s.role, s.name, s.begin.ns - zero, s.end.ns - zero, s.end.tile) for s in some)

    assert facts(found) == facts(spans)


def test_a_few_ctas_of_each_rank_are_picked():
    one = trace.spans(0, lists())
    for num_ranks, each in ((2, trace_picture.CTAS), (8, 3), (32, 2)):
        many = [span._replace(cta=cta, rank=rank) for rank in range(num_ranks) for cta in range(132) for span in one]
        kept = {(span.rank, span.cta) for span in trace_picture.pick(many)}
        assert len(kept) == num_ranks * each and (1, 132 * (each - 1) // each) in kept
