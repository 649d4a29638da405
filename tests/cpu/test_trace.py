"""python -m megamoe trace: records to spans, file and table, from records written here as csrc/debug/trace.cuh does."""

import gzip
import json
import re
from itertools import pairwise

import pytest
import torch

import megamoe
import megamoe.__main__ as cli
from megamoe import layout, trace, traced_call
from megamoe.testing.spawn import launcher_variables
from megamoe.trace import Record

T0 = 1_800_000_000_000_000_000  # globaltimer counts from 1970

# Two CTAs: when each role noted what, in nanoseconds after T0.
PLAN = [(0, "start", 0), (2000, "list", 0), (30_000, "end", 0)]
MATH = [(4000, "tile", 0), (5000, "first_stage", 0), (15_000, "k_loop", 0), (15_500, "staging", 0),
        (17_500, "epilogue", 0), (18_000, "tile", 1), (18_100, "first_stage", 1), (24_100, "k_loop", 1),
        (24_200, "staging", 1), (26_200, "epilogue", 1)]  # fmt: skip
EXCHANGE = [(6000, "pushed", 0), (29_000, "combined", 0)]
WRITTEN = {
    (0, "plan"): PLAN, (0, "math0"): MATH, (0, "exchange"): EXCHANGE,
    (1, "plan"): [(ns + 64, event, tile) for ns, event, tile in PLAN],
}  # fmt: skip


def buffer(written: dict, num_ctas: int = 2) -> torch.Tensor:
    """As the kernel leaves it: struct {u64 ns; u32 event, tile;} [CTA][role][TRACE_RECORDS]."""
    records = torch.zeros(num_ctas, len(layout.TRACE_ROLES), layout.TRACE_RECORDS, 16, dtype=torch.uint8)
    for (cta, role), some in written.items():
        for i, (ns, event, tile) in enumerate(some):
            raw = (T0 + ns).to_bytes(8, "little") + layout.TRACE_EVENTS.index(event).to_bytes(4, "little")
            raw += tile.to_bytes(4, "little")
            records[cta, layout.TRACE_ROLES.index(role), i] = torch.tensor(list(raw), dtype=torch.uint8)
    return records.view(torch.int64)


@pytest.fixture(scope="module")
def lists() -> dict:
    return trace.decode(buffer(WRITTEN).numpy(), 2)


def test_decode_reads_what_the_kernel_writes(lists):
    assert lists == {key: [Record(T0 + ns, *rest) for ns, *rest in some] for key, some in WRITTEN.items()}


def test_a_record_behind_one_that_was_not_written_is_none():
    words = buffer({(0, "store"): [(1, "tile", 0), (2, "stored", 0), (3, "tile", 1)]}, 1)
    words[0, layout.TRACE_ROLES.index("store"), 1] = 0
    assert trace.decode(words.numpy(), 1) == {(0, "store"): [Record(T0 + 1, "tile", 0)]}


def test_decode_of_large_tile_numbers():
    some = {(0, "store"): [(1, "tile", 0xFFFF_FFFF)]}  # the sign bit of the word
    assert trace.decode(buffer(some, 1).numpy(), 1)[0, "store"] == [Record(T0 + 1, "tile", 0xFFFF_FFFF)]


def test_decode_refuses_a_buffer_of_another_shape_or_layout():
    words = buffer({}, 1).flatten().tolist()
    with pytest.raises(ValueError, match="words has .* entries; 2 CTAs have"):
        trace.decode(words, 2)
    words[:2] = T0, len(layout.TRACE_EVENTS)
    with pytest.raises(ValueError, match="names event"):
        trace.decode(words, 1)


def test_spans_lie_between_consecutive_records(lists):
    math = [span for span in trace.spans(3, lists) if span.role == "math0"]
    assert {(span.rank, span.cta) for span in math} == {(3, 0)}
    assert [(span.name, span.end.tile, span.us) for span in math[:4]] == [
        ("list > tile", 0, 2.0), ("tile > first_stage", 0, 1.0), ("first_stage > k_loop", 0, 10.0),
        ("k_loop > staging", 0, 0.5),
    ]  # fmt: skip
    assert ("epilogue > tile", 1) in [(span.name, span.end.tile) for span in math]
    assert all(a.end == b.begin for a, b in pairwise(math))
    exchange = [span for span in trace.spans(3, lists) if span.role == "exchange"]
    assert [(span.name, span.us) for span in exchange] == [("start > pushed", 6.0), ("pushed > combined", 23.0)]


def test_first_span_needs_an_earlier_origin():
    """A role whose CTA left no row list, or that noted something before it, has no span up to its first record."""
    alone = {(0, "store"): [Record(T0, "tile", 0), Record(T0 + 500, "stored", 0)]}
    late = alone | {(0, "plan"): [Record(T0 + 1, "list", 0)]}
    for lists in (alone, late):
        assert [span.name for span in trace.spans(0, lists)] == ["tile > stored"]


@pytest.mark.parametrize("name, read", [("x.json", open), ("x.json.gz", gzip.open)])
def test_chrome_trace_has_a_process_a_rank_and_a_thread_a_role(name, read, lists, tmp_path):
    trace.write_chrome_trace(trace.spans_of([lists, lists]), 'a "case"', tmp_path / name)
    with read(tmp_path / name) as file:
        events = json.load(file)["traceEvents"]
    meta = [e for e in events if e["ph"] == "M"]
    names = {(e["pid"], e["args"]["name"]) for e in meta if e["name"] == "thread_name"}
    assert names == {(r, f"CTA {c:03} {role}") for r in (0, 1) for c, role in WRITTEN}
    assert [e["args"]["name"] for e in meta if e["name"] == "process_name"] == ["rank 0", "rank 1"]
    assert [e["args"]["labels"] for e in meta if e["name"] == "process_labels"] == ['a "case"'] * 2
    assert len({(e["pid"], e["tid"]) for e in meta if e["name"] == "thread_name"}) == 2 * len(WRITTEN)
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == 2 * len(trace.spans(0, lists)) and min(e["ts"] for e in complete) == 0
    (k_loop,) = [e for e in complete if (e["pid"], e["name"], e["args"]["tile"]) == (1, "first_stage > k_loop", 1)]
    assert (k_loop["ts"], k_loop["dur"]) == (18.1, 6.0)
    assert max(e["ts"] + e["dur"] for e in complete) == pytest.approx(30.064)


def test_summary_counts_from_the_first_record_of_any_rank(lists):
    later = {key: [r._replace(ns=r.ns + 1000) for r in some] for key, some in lists.items()}
    found = trace.summary([later, lists])
    assert (found["total_us"], found["combined_us"], found["pushed_us"]) == (31.064, 30.0, 7.0)
    assert found["row_list_us"] == 3.064 and found["clock_step_ns"] == 64 and found["full_lists"] == 0
    math = found["roles"]["math0"]
    assert (math["first_tile_us"], math["last_tile_end_us"]) == (4.0, 27.2)
    assert math["spans"]["first_stage > k_loop"] == {"count": 4, "mean_us": 8.0, "max_us": 10.0, "us_a_cta": 16.0}
    assert found["roles"]["plan"]["first_tile_us"] is None and "store" not in found["roles"]
    text = trace.report(found)
    assert "last combine 30.0 us" in text and "first tile at 4.0, last tile ends at 27.2 us" in text


def test_summary_without_records_says_why():
    with pytest.raises(ValueError, match="no record"):
        trace.summary([{}])


def test_a_full_list_is_said():
    full = {(0, "store"): [(i, "tile", i) for i in range(1, layout.TRACE_RECORDS + 1)]}
    found = trace.summary([trace.decode(buffer(full, 1).numpy(), 1)])
    assert found["full_lists"] == 1 and "1 lists are full" in trace.report(found)


def test_without_a_gpu_it_is_not_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "x.trace.json"
    assert cli.main(["trace", "--out", str(out)]) != 0
    assert capsys.readouterr().err == "not run: no GPU\n" and not out.exists()


def test_a_folder_that_is_not_there_is_said_before_anything_runs(capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["trace", "--png", str(tmp_path / "none" / "x.png")])
    assert "none/x.png: its folder does not exist" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["trace", "--help"])
    said = capsys.readouterr().out
    assert "torchrun.sh 8 -m megamoe trace" in said and all(word in said for word in trace.EXPOSED_WORDS)
    roles, events = re.findall(r"[a-z]+[01]?", said), re.findall(r"[a-z_]+", said)
    assert not set(layout.TRACE_ROLES) - set(roles)
    assert not set(layout.TRACE_EVENTS) - set(events)


def test_the_verb_writes_the_file_and_the_table(monkeypatch, capsys, tmp_path, lists):
    """Everything but the call on the GPU (tests/gpu/test_trace.py)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(megamoe, "support", lambda *_, **__: type("Able", (), {"ok": True, "reasons": ()}))
    asked = {}

    def traced(config, num_tokens, virtual_ranks, prequantized, *, routing, group, phase):
        phase("the call")
        asked.update(config=config, num_tokens=num_tokens, ranks=virtual_ranks, prequantized=prequantized)
        assert group is None and routing == "uniform"
        return traced_call.Traced([lists, lists], "the case", None)

    monkeypatch.setattr(traced_call, "trace_call", traced)
    out = tmp_path / "x.trace.json"
    sizes = ["--hidden", "256", "--intermediate", "128", "--experts", "8", "--topk", "2", "--tokens", "5"]
    assert cli.main(["trace", *sizes, "--virtual-ranks", "2", "--bf16", "--out", str(out)]) == 0
    assert (asked["config"].hidden, asked["config"].topk, asked["num_tokens"], asked["ranks"]) == (256, 2, 5, 2)
    assert not asked["prequantized"]
    said, err = capsys.readouterr()
    assert "pushed > combined" in said and "slowest rank" not in said
    begun = re.findall(r"trace: +[\d.]+ s  (\S+)", err)
    assert begun == ["the", "summary", str(out), "done;"] and "the call 0.0, summary 0.0" in err
    assert len({e["pid"] for e in json.loads(out.read_text())["traceEvents"]}) == 2
    assert cli.main(["trace", *sizes, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["case"] == "the case" and printed["roles"]["math0"]["spans"] and asked["prequantized"]


def test_illegal_sizes_are_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.main(["trace", "--hidden", "100"]) == 2
    assert "hidden=100 must be a multiple of 128" in capsys.readouterr().err
    for name, value in launcher_variables(0, 8, 1).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["trace", "--virtual-ranks", "2"]) == 2
    assert "virtual_ranks=2 on 8 ranks of a launcher" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["trace", "--experts", "12"]) == 2 and not capsys.readouterr().err  # rank 0 says it
