"""python -m megamoe trace: where the time of one layer call goes, per CTA and role, from a kernel built with -DTRACE.

Each role leaves records (nanoseconds, event, tile) in a list of its own (csrc/debug/trace.cuh). What lies between two
consecutive records of a list is a span; spans go to a file for Perfetto (ui.perfetto.dev) or chrome://tracing, and
their mean lengths to a table. From `Record` to `report` all is plain arithmetic and needs no GPU. Started on several
ranks, rank 0 gathers the lists of all (megamoe/trace_ranks.py), on one clock (trace_clock.py), prints and writes.
"""

import argparse
import contextlib
import gc
import gzip
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamoe.layout import TRACE_EVENTS, TRACE_RECORDS, TRACE_ROLES

EXIT_NOT_RUN = 3
MEETING_S, PHASE_S = 90.0, 120.0  # until all ranks have started; for any phase
# A role's time up to its first record: exchange starts with the launch, the others when the row list is there.
FIRST_SPAN_FROM = {"plan": None, "exchange": "start"}
FIRST_SPAN_OTHERWISE = "list"


class Record(NamedTuple):
    """What a role noted: globaltimer nanoseconds, a word of TRACE_EVENTS, the number of the tile in its CTA."""

    ns: int
    event: str
    tile: int


Lists = dict[tuple[int, str], list[Record]]
"""Of one rank: (cta, role) -> its records."""


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


def decode(words, num_ctas: int) -> Lists:
    """One rank's buffer -> {(cta, role): its records}, lists without any left out.

    words: int64 array, two a record, [num_ctas, trace roles, TRACE_RECORDS]: nanoseconds, then event + tile * 2^32. A
    record with zero nanoseconds was not written and ends its list. ValueError for another length or an unknown event.
    """
    words, num_lists = np.asarray(words, dtype=np.int64), num_ctas * len(TRACE_ROLES)
    if words.size != num_lists * 2 * TRACE_RECORDS:
        raise ValueError(f"words has {words.size} entries; {num_ctas} CTAs have {num_lists * 2 * TRACE_RECORDS}")
    table, lists = words.reshape(num_lists, TRACE_RECORDS, 2), {}
    lengths = np.logical_and.accumulate(table[..., 0] != 0, axis=1).sum(axis=1)
    for i in np.flatnonzero(lengths).tolist():
        ns, what = table[i, : lengths[i]].T
        events, tiles = (what & 0xFFFF_FFFF).tolist(), (what.view(np.uint64) >> np.uint64(32)).tolist()
        if max(events) >= len(TRACE_EVENTS):
            raise ValueError(f"words of list {i} names event {max(events)}; there are {len(TRACE_EVENTS)}: was the "
                             "kernel built from another layout.py?")
        lists[i // len(TRACE_ROLES), TRACE_ROLES[i % len(TRACE_ROLES)]] = [
            Record(at, TRACE_EVENTS[event], tile) for at, event, tile in zip(ns.tolist(), events, tiles, strict=True)
        ]
    return lists


@contextlib.contextmanager
def collector_paused():
    """For while many records are made, none of them garbage: the collector, looking through all of them again and
    again, would take half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def spans_of(lists_of_ranks: list[Lists]) -> list[Span]:
    """spans() of every rank."""
    return [span for rank, lists in enumerate(lists_of_ranks) for span in spans(rank, lists)]


def spans(rank: int, lists: Lists) -> list[Span]:
    """Spans between consecutive records, and one from the CTA's start or row list to each role's first record."""
    found = []
    for (cta, role), records in lists.items():
        origin_event = FIRST_SPAN_FROM.get(role, FIRST_SPAN_OTHERWISE)
        origin = [r for r in lists.get((cta, "plan"), ()) if r.event == origin_event and r.ns <= records[0].ns]
        chain = [*origin[:1], *records]
        found += [Span(rank, cta, role, *pair) for pair in pairwise(chain)]
    return found


def write_chrome_trace(all_spans: list[Span], title: str, path: str | Path) -> None:
    """The spans as a Chrome trace: a process per rank, a thread per CTA and role, microseconds from the first record.

    Perfetto and chrome://tracing read it, also gzipped, which a path that ends in .gz makes it: 15 times smaller.
    title: shown as each process's label. Text piece by piece: of eight ranks the objects would take gigabytes."""
    with gzip.open(path, "wt", 1) if str(path).endswith(".gz") else open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ns","traceEvents":[\n')
        before = ""
        for event in _chrome_events(all_spans, title):
            file.write(before + event)
            before = ",\n"
        file.write("]}\n")


def _chrome_events(all_spans: list[Span], title: str) -> Iterator[str]:
    zero = min((span.begin.ns for span in all_spans), default=0)
    threads: dict[tuple[int, int, str], str] = {}  # -> "pid" and "tid"
    ranks = set()
    for rank, cta, role, begin, end in all_spans:
        where = threads.get((rank, cta, role))
        if where is None:
            thread = cta * len(TRACE_ROLES) + TRACE_ROLES.index(role)
            where = threads[rank, cta, role] = f'"pid":{rank},"tid":{thread}'
            if rank not in ranks:
                ranks.add(rank)
                yield _meta(where, "process_name", name=f"rank {rank}")
                yield _meta(where, "process_labels", labels=title)
                yield _meta(where, "process_sort_index", sort_index=rank)
            yield _meta(where, "thread_name", name=f"CTA {cta:03} {role}")
            yield _meta(where, "thread_sort_index", sort_index=thread)
        # json.dumps of half a million events takes three times as long
        yield (f'{{"ph":"X",{where},"name":"{begin.event} > {end.event}","ts":{(begin.ns - zero) / 1000:.3f},'
               f'"dur":{(end.ns - begin.ns) / 1000:.3f},"args":{{"tile":{end.tile}}}}}')  # fmt: skip


def _meta(where: str, kind: str, **args) -> str:
    return f'{{"ph":"M",{where},"name":"{kind}","args":{json.dumps(args)}}}'


def summary(lists_of_ranks: list[Lists], all_spans: list[Span] | None = None) -> dict:
    """Times in microseconds; moments are counted from the first record of any rank. all_spans:
    spans_of(lists_of_ranks), where it is made already.

    Keys: total_us; clock_step_ns (smallest distance of two records of a rank: the timer's grain); row_list_us,
    pushed_us, combined_us (moments when the last CTA has its row list, has sent its rows and, for pairs of CTAs, sorted
    those it got, has combined with its exchange warps; math warps that help are done by total_us); exposed_us: see
    exposed(); full_lists (lists that may lack their end, as TRACE_RECORDS were written); roles: {role: {first_tile_us,
    last_tile_end_us, spans: {name: {count, mean_us, max_us, us_a_cta}}}}. ValueError without a record.
    """
    records = [record for lists in lists_of_ranks for some in lists.values() for record in some]
    if not records:
        raise ValueError("lists_of_ranks has no record: was the kernel built with TRACE and given a buffer?")
    zero, last_ns = min(record.ns for record in records), max(record.ns for record in records)

    def since(ns: Iterable[int], pick=max) -> float | None:
        ns = list(ns)
        return (pick(ns) - zero) / 1000 if ns else None

    def last(event: str) -> float | None:
        return since(record.ns for record in records if record.event == event)

    roles, lengths_of = {}, defaultdict(lambda: defaultdict(list))
    for _, _, role, begin, end in all_spans or spans_of(lists_of_ranks):
        lengths_of[role][begin.event, end.event].append((end.ns - begin.ns) / 1000)
    for role in TRACE_ROLES:
        mine = [some for lists in lists_of_ranks for (_, name), some in lists.items() if name == role]
        if not mine:
            continue
        starts = [record.ns for some in mine for record in some if record.event == "tile"]
        ends = [some[-1].ns for some in mine if any(record.event == "tile" for record in some)]
        roles[role] = {
            "first_tile_us": since(starts, min),
            "last_tile_end_us": since(ends),
            "spans": {
                f"{begin} > {end}": {"count": len(us), "mean_us": statistics.fmean(us), "max_us": max(us),
                                     "us_a_cta": sum(us) / len(mine)}
                for (begin, end), us in lengths_of[role].items()
            },
        }  # fmt: skip
    return {
        "total_us": (last_ns - zero) / 1000,
        "clock_step_ns": min(map(_clock_step_ns, lists_of_ranks)),
        "row_list_us": last("list"),
        "pushed_us": last("pushed"),
        "combined_us": last("combined"),
        "exposed_us": exposed(lists_of_ranks),
        "full_lists": sum(len(some) >= TRACE_RECORDS for lists in lists_of_ranks for some in lists.values()),
        "roles": roles,
    }


def _clock_step_ns(lists: Lists) -> int:
    times = np.unique(np.array([record.ns for some in lists.values() for record in some], dtype=np.int64))
    return int(np.diff(times).min()) if len(times) > 1 else 0


EXPOSED = {"first_stage > k_loop": "tensor", "k_loop > staging": "epilogue", "staging > epilogue": "epilogue"}
EXPOSED_WORDS = ("dispatch", "tensor", "epilogue", "waits", "combine")


def exposed(lists_of_ranks: list[Lists]) -> dict[str, float]:
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


HELP = """Runs one layer call with a kernel that notes times, prints where the time went, and writes a trace.

Needs an sm_90 GPU. Started on every rank by a launcher, it traces one call of all ranks, a GPU each:

  python -m megamoe trace --tokens 512                                   one rank
  python -m megamoe trace --virtual-ranks 2 --experts 64                 two ranks that share the GPU
  launch/torchrun.sh 8 -m megamoe trace --experts 256 --tokens 2048 --out ep8.json.gz --png ep8.png"""
HOW_TO_READ = """How to read it: open the file in ui.perfetto.dev. A process is a rank; a row is a role of one CTA, and
each SM has one CTA; a bar is the time between two records of that row, named after them:

  plan      start > list (routing of all ranks has come, rows are listed) > end of the call
  weights   tile > k_loop (all is loaded)
  tokens    tile > rows_named (tiles of up to 96 tokens, whose rows are gathered) > rows_here (rows or h have come)
            > k_loop (all is loaded)
  math0, math1      tile > first_stage > k_loop (tensor cores) > staging > epilogue
  store     tile > stored          exchange   start > pushed (own rows sent; pairs of CTAs: rows sorted) > combined

The summary's words, of an average CTA by its first math warpgroup: dispatch, from the start to the first tile; tensor,
k loops; epilogue; waits, inside and between tiles, for rows, weights or h; combine, after the last tile. They add up to
the CTA's time, each is time that nothing hid. By rank, `work` is tensor + epilogue. Several GPUs are put on the host's
clock; the report says within which error. Ranks that wait for a late or busy peer show it in dispatch, waits and
combine. What the command is at goes to standard error, with seconds."""


def main(argv: list[str] | None = None) -> int:
    """The verb. Exit status 0; 3 where there is no GPU for it; 2 for sizes that cannot run."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m megamoe trace", description=HELP, epilog=HOW_TO_READ,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    sizes = {
        ("--hidden",): (4096, "width of a token"), ("--intermediate",): (2048, "width of an expert"),
        ("--experts", "--num-experts"): (32, "of all ranks together"), ("--topk",): (6, "experts a token goes to"),
        ("--tokens", "--num-max-tokens-per-rank"): (256, "of each rank"),
        ("--virtual-ranks",): (1, "ranks on this GPU, without a launcher"),
    }  # fmt: skip
    for names, (default, text) in sizes.items():
        parser.add_argument(*names, type=int, default=default, help=f"{text}; default {default}")
    parser.add_argument("--weight-format", choices=("fp8", "mxfp4"), default="fp8", help="default %(default)s")
    parser.add_argument("--routing", choices=("uniform", "zipf"), default="uniform",
                        help="zipf: the i-th most popular expert has weight 1 / i; default %(default)s")  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="bf16 input; default: prequantized")
    parser.add_argument("--out", default="megamoe.trace.json", metavar="FILE",
                        help="for Perfetto; gzipped if it ends in .gz; default %(default)s")  # fmt: skip
    parser.add_argument("--png", metavar="FILE", help="also draw it; without matplotlib, keep what a picture needs")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    given = parser.parse_args(argv)
    for path in filter(None, (given.out, given.png)):
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: its folder does not exist; make it first")

    import torch

    from megamoe import EPConfig, MoEConfig, support
    from megamoe.progress import Phases
    from megamoe.ranks import init_process_group, rank_from_env
    from megamoe.traced_call import trace_call

    info = rank_from_env()
    several = info.ep_size > 1

    def not_run(why, status: int) -> int:
        if info.ep_rank == 0:
            print(f"not run: {why}", file=sys.stderr)
        return status

    if not torch.cuda.is_available():
        return not_run("no GPU", EXIT_NOT_RUN)
    try:
        config = MoEConfig(given.hidden, given.intermediate, given.experts, given.topk, given.weight_format)
        if several and given.virtual_ranks != 1:
            raise ValueError(f"virtual_ranks={given.virtual_ranks} on {info.ep_size} ranks of a launcher; use one")
        able = support(config, EPConfig(given.tokens, virtual_ranks=None if several else given.virtual_ranks),
                       "cuda:0", ep_size=info.ep_size if several else None)  # fmt: skip
        if not able.ok:
            raise ValueError("; ".join(able.reasons))
    except ValueError as error:
        return not_run(error, 2)
    group = None
    with Phases("trace", said=info.ep_rank == 0, deadline_s=PHASE_S, began=began) as phase:
        if several:
            phase(f"meeting of {info.ep_size} ranks")
            init_process_group(timeout_s=MEETING_S)
            group = torch.distributed.group.WORLD
        traced = trace_call(config, given.tokens, given.virtual_ranks, not given.bf16, routing=given.routing,
                            group=group, phase=phase)  # fmt: skip
        if info.ep_rank == 0:
            write_and_print(traced, given, phase)
        if several:  # last on rank 0, which may hold the store that others still ask
            phase("leaving")
            torch.distributed.destroy_process_group()
    return 0


@collector_paused()
def write_and_print(traced, given: argparse.Namespace, phase) -> None:
    """Files and report of what was traced, a traced_call.Traced; the report first, as it is there first."""
    from megamoe.trace_ranks import by_rank, fewer_ctas, report_ranks

    phase("summary")
    lists_of_ranks, words = traced.lists_of_ranks, traced.words
    all_spans = spans_of(lists_of_ranks)
    kept, every = fewer_ctas(lists_of_ranks)
    if every > 1:
        words += f"; one CTA in {every} is in the file"
    ranks = {} if traced.clock_error_us is None else by_rank(lists_of_ranks, traced.clock_error_us)
    found = summary(lists_of_ranks, all_spans) | ranks
    if given.json:
        print(json.dumps({"case": words, "file": given.out} | found), flush=True)
    else:
        print("\n".join([words, report(found), *([report_ranks(ranks)] if ranks else [])]), flush=True)
    if every > 1:
        all_spans = spans_of(kept)
    phase(f"{given.out} with {len(all_spans)} events")
    write_chrome_trace(all_spans, words, given.out)
    if not given.json:
        print(f"wrote {given.out}: open it in ui.perfetto.dev", flush=True)
    if given.png:
        from megamoe.trace_picture import picture

        phase("picture")
        print(f"wrote {picture(all_spans, words, given.png)}", file=sys.stderr)
