"""python -m megamoe trace: where the time of one layer call goes, per CTA and role, from a kernel built with -DTRACE.

Each role leaves records (nanoseconds, event, tile) in a list of its own (csrc/debug/trace.cuh). What lies between two
consecutive records of a list is a span; spans go to a file for Perfetto (ui.perfetto.dev) or chrome://tracing, and
their mean lengths to a table. From `Record` to `report` all is plain arithmetic and needs no GPU.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from megamoe.layout import TRACE_EVENTS, TRACE_RECORDS, TRACE_ROLES

EXIT_NOT_RUN = 3
# A role's time up to its first record: exchange starts with the launch, the others when the row list is there.
FIRST_SPAN_FROM = {"plan": None, "exchange": "start"}
FIRST_SPAN_OTHERWISE = "list"
WARM_UP_CALLS, TIMED_CALLS = 3, 20


class Record(NamedTuple):
    """What a role noted: globaltimer nanoseconds, a word of TRACE_EVENTS, the number of the tile in its CTA."""

    ns: int
    event: str
    tile: int


class Span(NamedTuple):
    """The time between two records of one role in one CTA. tile: of the record that ends it."""

    rank: int
    cta: int
    role: str
    begin: Record
    end: Record

    @property
    def name(self) -> str:
        return f"{self.begin.event} > {self.end.event}"

    @property
    def us(self) -> float:
        return (self.end.ns - self.begin.ns) / 1000


def decode(words: Iterable, num_ctas: int) -> dict[tuple[int, str], list[Record]]:
    """One rank's buffer -> {(cta, role): its records}, lists without any left out.

    words: integers, two a record, [num_ctas, trace roles, TRACE_RECORDS]: nanoseconds, then event + tile * 2^32. A
    record with zero nanoseconds was not written and ends its list. ValueError for another length or an unknown event.
    """
    words = list(words)
    pitch = 2 * TRACE_RECORDS
    if len(words) != num_ctas * len(TRACE_ROLES) * pitch:
        raise ValueError(
            f"words has {len(words)} entries; {num_ctas} CTAs have {num_ctas * len(TRACE_ROLES) * pitch}"
        )
    lists = {}
    for i in range(num_ctas * len(TRACE_ROLES)):
        records = []
        for at in range(i * pitch, (i + 1) * pitch, 2):
            ns, what = words[at], words[at + 1] & 0xFFFF_FFFF_FFFF_FFFF
            if ns == 0:
                break
            if what & 0xFFFF_FFFF >= len(TRACE_EVENTS):
                raise ValueError(f"words[{at + 1}]={what:#x} names event {what & 0xFFFF_FFFF}; "
                                 f"there are {len(TRACE_EVENTS)}: was the kernel built from another layout.py?")
            records.append(Record(ns, TRACE_EVENTS[what & 0xFFFF_FFFF], what >> 32))
        if records:
            lists[i // len(TRACE_ROLES), TRACE_ROLES[i % len(TRACE_ROLES)]] = records
    return lists


def spans(rank: int, lists: dict[tuple[int, str], list[Record]]) -> list[Span]:
    """Spans between consecutive records, and one from the CTA's start or row list to each role's first record."""
    found = []
    for (cta, role), records in lists.items():
        origin_event = FIRST_SPAN_FROM.get(role, FIRST_SPAN_OTHERWISE)
        origin = [r for r in lists.get((cta, "plan"), ()) if r.event == origin_event and r.ns <= records[0].ns]
        chain = [*origin[:1], *records]
        found += [Span(rank, cta, role, *pair) for pair in pairwise(chain)]
    return found


def chrome_trace(all_spans: list[Span], title: str) -> dict:
    """The spans as a Chrome trace: a process per rank, a thread per CTA and role, microseconds from the first record.

    Load the JSON in Perfetto or chrome://tracing. title: shown as each process's label.
    """
    zero = min((span.begin.ns for span in all_spans), default=0)
    events, threads = [], set()
    for span in all_spans:
        thread = span.cta * len(TRACE_ROLES) + TRACE_ROLES.index(span.role)
        if (span.rank, None) not in threads:
            threads.add((span.rank, None))
            events.append(_meta(span.rank, 0, "process_name", name=f"rank {span.rank}"))
            events.append(_meta(span.rank, 0, "process_labels", labels=title))
        if (span.rank, thread) not in threads:
            threads.add((span.rank, thread))
            events.append(_meta(span.rank, thread, "thread_name", name=f"CTA {span.cta:03} {span.role}"))
            events.append(_meta(span.rank, thread, "thread_sort_index", sort_index=thread))
        events.append({
            "ph": "X", "pid": span.rank, "tid": thread, "name": span.name, "cat": span.role,
            "ts": (span.begin.ns - zero) / 1000, "dur": span.us, "args": {"tile": span.end.tile},
        })  # fmt: skip
    return {"displayTimeUnit": "ns", "traceEvents": events}


def _meta(process: int, thread: int, kind: str, **args) -> dict:
    return {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": args}


def summary(lists_of_ranks: list[dict[tuple[int, str], list[Record]]]) -> dict:
    """Times in microseconds, those without `mean` or `max` counted from the first record of any rank.

    Keys: total_us; clock_step_ns (smallest distance of two records: the timer's grain); row_list_us, pushed_us,
    combined_us (last CTA to have its row list, to have sent its rows, whose exchange warp has combined; math warps that
    help it are done by total_us); exposed_us: see exposed(); full_lists (lists that may
    lack their end, as TRACE_RECORDS were written); roles: {role: {first_tile_us, last_tile_end_us, spans: {name:
    {count, mean_us, max_us, us_a_cta}}}}. ValueError without a record.
    """
    records = [record for lists in lists_of_ranks for some in lists.values() for record in some]
    if not records:
        raise ValueError("lists_of_ranks has no record: was the kernel built with TRACE and given a buffer?")
    times = sorted({record.ns for record in records})
    zero = times[0]

    def since(ns: Iterable[int], pick=max) -> float | None:
        ns = list(ns)
        return (pick(ns) - zero) / 1000 if ns else None

    def last(event: str) -> float | None:
        return since(record.ns for record in records if record.event == event)

    roles = {}
    for role in TRACE_ROLES:
        mine = [some for lists in lists_of_ranks for (_, name), some in lists.items() if name == role]
        if not mine:
            continue
        lengths = defaultdict(list)
        for rank, lists in enumerate(lists_of_ranks):
            for span in spans(rank, lists):
                if span.role == role:
                    lengths[span.name].append(span.us)
        starts = [record.ns for some in mine for record in some if record.event == "tile"]
        ends = [some[-1].ns for some in mine if any(record.event == "tile" for record in some)]
        roles[role] = {
            "first_tile_us": since(starts, min),
            "last_tile_end_us": since(ends),
            "spans": {
                name: {"count": len(us), "mean_us": statistics.fmean(us), "max_us": max(us),
                       "us_a_cta": sum(us) / len(mine)}
                for name, us in lengths.items()
            },
        }  # fmt: skip
    return {
        "total_us": (times[-1] - zero) / 1000,
        "clock_step_ns": min((b - a for a, b in pairwise(times)), default=0),
        "row_list_us": last("list"),
        "pushed_us": last("pushed"),
        "combined_us": last("combined"),
        "exposed_us": exposed(lists_of_ranks),
        "full_lists": sum(len(some) >= TRACE_RECORDS for lists in lists_of_ranks for some in lists.values()),
        "roles": roles,
    }


EXPOSED = {"first_stage > k_loop": "tensor", "k_loop > staging": "epilogue", "staging > epilogue": "epilogue"}
EXPOSED_WORDS = ("dispatch", "tensor", "epilogue", "waits", "combine")


def exposed(lists_of_ranks: list[dict[tuple[int, str], list[Record]]]) -> dict[str, float]:
    """What a CTA's time went to, as its first math warpgroup saw it, microseconds, mean over the CTAs; the words add up
    to a CTA's whole time. dispatch: from the start to the first tile (plan included); tensor: k loops; epilogue; waits:
    inside and between tiles; combine: after the last tile. A CTA without tiles is left out of all but dispatch and
    combine, which share its time evenly."""
    sums, ctas = dict.fromkeys(EXPOSED_WORDS, 0.0), 0
    for lists in lists_of_ranks:
        for (cta, role), plan in lists.items():
            if role != "plan" or len(plan) < 2:
                continue
            ctas += 1
            begin, end, math = plan[0], plan[-1], lists.get((cta, "math0"), [])
            if not math:
                sums["dispatch"] += (end.ns - begin.ns) / 2000
                sums["combine"] += (end.ns - begin.ns) / 2000
                continue
            sums["dispatch"] += (math[0].ns - begin.ns) / 1000
            sums["combine"] += (end.ns - math[-1].ns) / 1000
            for a, b in pairwise(math):
                sums[EXPOSED.get(f"{a.event} > {b.event}", "waits")] += (b.ns - a.ns) / 1000
    return {word: total / max(ctas, 1) for word, total in sums.items()}


def report(found: dict) -> str:
    """summary() as text."""

    def us(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [
        f"traced call {us(found['total_us'])} us; last row list {us(found['row_list_us'])}, last rows sent "
        f"{us(found['pushed_us'])}, last combine {us(found['combined_us'])} us; timer step {found['clock_step_ns']} ns",
        "a CTA's time: " + ", ".join(f"{word} {us(value)}" for word, value in found["exposed_us"].items()) + " us",
        f"{'role':<9} {'from one record to the next':<28} {'count':>7} {'mean us':>9} {'max us':>9} {'us a CTA':>9}",
    ]
    for role, of_role in found["roles"].items():
        for name, s in sorted(of_role["spans"].items(), key=lambda item: -item[1]["us_a_cta"]):
            lines.append(f"{role:<9} {name:<28} {s['count']:>7} {s['mean_us']:>9.2f} {s['max_us']:>9.2f} "
                         f"{s['us_a_cta']:>9.1f}")
        if of_role["first_tile_us"] is not None:
            lines.append(f"{role:<9} first tile at {us(of_role['first_tile_us'])}, last tile ends at "
                         f"{us(of_role['last_tile_end_us'])} us")
    if found["full_lists"]:
        lines.append(f"{found['full_lists']} lists are full ({TRACE_RECORDS} records): their ends are missing, trace "
                     "fewer tokens")
    return "\n".join(lines)


def trace_call(config, num_tokens: int, virtual_ranks: int, prequantized: bool) -> tuple[list[dict], str]:
    """Runs one traced call on the current GPU, uniform routing. -> (decode() of each rank, what was run in words)."""
    import torch

    from megamoe import EPConfig, MoELayer, Workspace
    from megamoe.builds import kernel_key
    from megamoe.plan.tiles import choose_block_tokens
    from megamoe.testing.data import make_input, make_weights

    ep_config = EPConfig(num_tokens, virtual_ranks=virtual_ranks)
    ranks = range(virtual_ranks)
    block = choose_block_tokens(config, virtual_ranks, num_tokens)
    with Workspace(config, ep_config, device="cuda") as workspace, MoELayer(config, workspace) as layer:
        weights = [make_weights(1, config, virtual_ranks, rank, "cuda") for rank in ranks]
        layer.load_weights(*([getattr(w, name) for w in weights]
                             for name in ("linear1", "linear2", "linear1_sf", "linear2_sf")))  # fmt: skip
        del weights
        inputs = [make_input(1, config, r, num_tokens, device="cuda", prequantized=prequantized) for r in ranks]
        hidden_states = [i.x if i.x_sf is None else (i.x, i.x_sf) for i in inputs]
        outs = [torch.empty(i.x.shape, dtype=torch.bfloat16, device="cuda") for i in inputs]

        def call(times: int) -> None:
            for _ in range(times):
                layer(hidden_states, [i.topk_idx for i in inputs], [i.topk_weights for i in inputs], out=outs)

        call(WARM_UP_CALLS)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(TIMED_CALLS)
        end.record()
        torch.cuda.synchronize()
        untraced_us = begin.elapsed_time(end) * 1000 / TIMED_CALLS

        fused, num_ctas = workspace.fused, workspace.fused.ctas_per_rank
        key = kernel_key(config, block)
        shipped, traced = fused.kernels[key], fused.load_kernel(*key, TRACE=1)
        shape = num_ctas, len(TRACE_ROLES), TRACE_RECORDS, 2
        buffers = [torch.zeros(shape, dtype=torch.int64, device="cuda") for _ in ranks]
        fused.kernels[key] = traced
        try:
            call(WARM_UP_CALLS)  # without a buffer nothing is noted
            for rank, buffer in enumerate(buffers):
                layer._engine.params.ranks[rank].trace = buffer.data_ptr()
            call(1)
            torch.cuda.synchronize()
            layer.check()
        finally:
            torch.cuda.synchronize()
            fused.kernels[key] = shipped
            traced.close()
        lists = [decode(buffer.flatten().tolist(), num_ctas) for buffer in buffers]
    words = (f"{config.hidden}/{config.intermediate}, {config.num_experts} experts, topk {config.topk}, {num_tokens} "
             f"tokens a rank, {virtual_ranks} rank(s) of {num_ctas} CTAs, tiles of {block} tokens, "
             f"{'prequantized' if prequantized else 'bf16'} input, {torch.cuda.get_device_name()}; untraced call "
             f"{untraced_us:.1f} us")  # fmt: skip
    return lists, words


def main(argv: list[str] | None = None) -> int:
    """The verb. Exit status 0; 3 where there is no GPU for it; 2 for sizes that cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m megamoe trace", description="Runs one layer call with a kernel that notes times, writes a "
        "trace for ui.perfetto.dev and prints where the time went. Needs one sm_90 GPU.")  # fmt: skip
    sizes = {("--hidden",): 4096, ("--intermediate",): 2048, ("--experts", "--num-experts"): 32, ("--topk",): 6,
             ("--tokens", "--num-max-tokens-per-rank"): 256, ("--virtual-ranks",): 1}
    for names, default in sizes.items():
        parser.add_argument(*names, type=int, default=default, help=f"default {default}")
    parser.add_argument("--bf16", action="store_true", help="bf16 input; default: prequantized")
    parser.add_argument("--out", default="megamoe.trace.json", metavar="FILE", help="default %(default)s")
    parser.add_argument("--png", metavar="FILE", help="also draw it; without matplotlib, keep what a picture needs")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    given = parser.parse_args(argv)

    import torch

    from megamoe import EPConfig, MoEConfig, support

    if not torch.cuda.is_available():
        print("not run: no GPU", file=sys.stderr)
        return EXIT_NOT_RUN
    try:
        config = MoEConfig(given.hidden, given.intermediate, given.experts, given.topk)
        able = support(config, EPConfig(given.tokens, virtual_ranks=given.virtual_ranks), "cuda:0")
        if not able.ok:
            raise ValueError("; ".join(able.reasons))
    except ValueError as error:
        print(f"not run: {error}", file=sys.stderr)
        return 2
    lists_of_ranks, words = trace_call(config, given.tokens, given.virtual_ranks, not given.bf16)
    found = summary(lists_of_ranks)
    all_spans = [span for rank, lists in enumerate(lists_of_ranks) for span in spans(rank, lists)]
    with open(given.out, "w", encoding="utf-8") as file:
        json.dump(chrome_trace(all_spans, words), file)
    if given.png:
        from megamoe.trace_picture import picture

        print(f"wrote {picture(all_spans, words, given.png)}", file=sys.stderr)
    if given.json:
        print(json.dumps({"case": words, "file": given.out} | found))
    else:
        print(f"{words}\n{report(found)}\nwrote {given.out}: open it in ui.perfetto.dev")
    return 0
