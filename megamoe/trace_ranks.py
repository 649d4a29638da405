"""python -m megamoe trace on several ranks, a GPU each: every rank's lists to rank 0, and what sets the ranks apart.

The lists are on one clock by then (megamoe/trace_clock.py), so that ranks' starts and ends can be compared.
"""

import base64
import json
import statistics
import zlib
from itertools import accumulate, pairwise

from megamoe.layout import TRACE_EVENTS, TRACE_ROLES
from megamoe.trace import EXPOSED_WORDS, Lists, Record, collector_paused, exposed
from megamoe_cuda.gather import gather

DEADLINE_S = 60.0  # of ranks that pack their lists
PIECE_CHARS = 4 << 20  # the store of a process group takes values of up to 8 MiB
FILE_RECORDS = 600_000  # some 70 MB of JSON, written in 2 s; Perfetto in a browser takes a few times as much


def pack(lists: Lists) -> str:
    """A rank's lists as text, some four bytes a record."""
    zero = min((some[0].ns for some in lists.values()), default=0)
    rows = [
        [cta, TRACE_ROLES.index(role), [b - a for a, b in pairwise((zero, *(record.ns for record in some)))],
         [TRACE_EVENTS.index(record.event) for record in some], [record.tile for record in some]]
        for (cta, role), some in lists.items()
    ]  # fmt: skip
    return base64.b64encode(zlib.compress(json.dumps([zero, rows], separators=(",", ":")).encode(), 1)).decode()


def unpack(text: str) -> Lists:
    """The lists that pack() made this text of."""
    zero, rows = json.loads(zlib.decompress(base64.b64decode(text)))
    return {
        (cta, TRACE_ROLES[role]): [
            Record(zero + ns, TRACE_EVENTS[event], tile)
            for ns, event, tile in zip(accumulate(steps), events, tiles, strict=True)
        ]
        for cta, role, steps, events, tiles in rows
    }


def gather_lists(group, lists: Lists, deadline_s: float = DEADLINE_S) -> list[Lists]:
    """Collective. -> on rank 0 the lists of every rank; on the others nothing.

    AbsentRankError names a rank that does not come within deadline_s."""
    rest, parts = pack(lists), None
    while True:
        piece, rest = rest[:PIECE_CHARS], rest[PIECE_CHARS:]
        pieces = gather(group, "trace", piece, deadline_s, reader=0)
        parts = [before + piece for before, piece in zip(parts or [""] * len(pieces), pieces, strict=True)]
        if not any(gather(group, "trace goes on", bool(rest), deadline_s)):
            with collector_paused():
                return [unpack(text) for text in parts]


def fewer_ctas(lists_of_ranks: list[Lists], limit: int = FILE_RECORDS) -> tuple[list[Lists], int]:
    """-> (the lists of every n-th CTA, n), for a file of about `limit` records at most."""
    every = -(-sum(len(some) for lists in lists_of_ranks for some in lists.values()) // limit) or 1
    if every == 1:
        return lists_of_ranks, 1
    return [{key: some for key, some in lists.items() if key[0] % every == 0} for lists in lists_of_ranks], every


def by_rank(lists_of_ranks: list[Lists], clock_error_us: float) -> dict:
    """What summary() does not tell apart, of ranks on one clock, right within clock_error_us between two of them.

    Keys: ranks: [{start_us, from the first rank's start; total_us, from the rank's own; row_list_us and
    last_tile_end_us likewise (None without); the words of exposed_us; work: tensor + epilogue}]; slowest_rank: whose
    call took longest; busiest_rank: with most work; imbalance: its work over the mean; starts_apart_us; clock_error_us;
    clock_check_us: from the last start of another rank to a rank's first row list, at least. That needs the routing
    of all, so it is negative by no more than the clocks' error, or they are wrong."""
    ranks, starts = [], [min(some[0].ns for some in lists.values()) for lists in lists_of_ranks]
    first_row_list = []
    for start, lists in zip(starts, lists_of_ranks, strict=True):
        tile_ends = [record.ns for (_, role), some in lists.items() if role.startswith("math") for record in some]
        row_lists = [record.ns for some in lists.values() for record in some if record.event == "list"]
        first_row_list.append(min(row_lists, default=None))
        words = exposed([lists])
        ranks.append({
            "start_us": (start - min(starts)) / 1000,
            "total_us": (max(some[-1].ns for some in lists.values()) - start) / 1000,
            "row_list_us": (max(row_lists) - start) / 1000 if row_lists else None,
            "last_tile_end_us": (max(tile_ends) - start) / 1000 if tile_ends else None,
        } | words | {"work": words["tensor"] + words["epilogue"]})  # fmt: skip
    numbers = range(len(ranks))
    work = [of_rank["work"] for of_rank in ranks]
    after_start = [(first_row_list[a] - starts[b]) / 1000 for a in numbers for b in numbers
                   if a != b and first_row_list[a] is not None]  # fmt: skip
    return {
        "ranks": ranks,
        "slowest_rank": max(numbers, key=lambda rank: ranks[rank]["total_us"]),
        "busiest_rank": max(numbers, key=work.__getitem__),
        "imbalance": max(work) / statistics.fmean(work) if max(work) else 1.0,
        "starts_apart_us": max(of_rank["start_us"] for of_rank in ranks),
        "clock_error_us": clock_error_us,
        "clock_check_us": min(after_start, default=None),
    }


def report_ranks(found: dict) -> str:
    """by_rank() as text."""
    columns = {"start_us": "start us", "total_us": "call us", "row_list_us": "row list",
               "last_tile_end_us": "last tile", **{word: word for word in EXPOSED_WORDS}, "work": "work"}  # fmt: skip
    lines = ["rank " + "".join(f"{head:>10}" for head in columns.values())]
    for rank, of_rank in enumerate(found["ranks"]):
        values = ("-" if of_rank[key] is None else f"{of_rank[key]:.1f}" for key in columns)
        lines.append(f"{rank:<5}" + "".join(f"{value:>10}" for value in values))
    slowest, busiest, check = found["slowest_rank"], found["busiest_rank"], found["clock_check_us"]
    lines.append(f"slowest rank: {slowest}, {found['ranks'][slowest]['total_us']:.1f} us from its first record to its "
                 f"last; most work, tensor and epilogue: rank {busiest}, {found['imbalance']:.2f} times the mean; "
                 f"starts within {found['starts_apart_us']:.1f} us")  # fmt: skip
    clocks = f"clocks: one within {found['clock_error_us']:.1f} us"
    if check is not None:
        clocks += f"; every row list {check:.1f} us or more after the other ranks' starts, which it needs"
        if check < -found["clock_error_us"]:
            clocks += ": the clocks contradict that, do not compare ranks' times"
    return "\n".join([*lines, clocks])
