"""python -m megamoe trace on several ranks, a GPU each: every rank's lists to rank 0, and what sets the ranks apart.

GPUs have clocks of their own (globaltimer): each rank's times count from the first record of its own kernel. A rank
that waits for a late peer shows it as waiting in plan and dispatch; how late the peer came is not to be seen.
"""

import base64
import json
import zlib
from itertools import accumulate, pairwise

from megamoe.layout import TRACE_EVENTS, TRACE_ROLES
from megamoe.trace import EXPOSED_WORDS, Record, exposed
from megamoe_cuda.gather import gather

DEADLINE_S = 120.0  # of ranks that pack their lists
PIECE_CHARS = 4 << 20  # the store of a process group takes values of up to 8 MiB
FILE_RECORDS = 2_000_000  # some 400 MB of JSON; Perfetto in a browser takes no more
Lists = dict[tuple[int, str], list[Record]]


def pack(lists: Lists) -> str:
    """A rank's lists as text, some four bytes a record; nanoseconds from here on count from its first record."""
    zero = min((some[0].ns for some in lists.values()), default=0)
    rows = [
        [cta, TRACE_ROLES.index(role), [b - a for a, b in pairwise((zero, *(record.ns for record in some)))],
         [TRACE_EVENTS.index(record.event) for record in some], [record.tile for record in some]]
        for (cta, role), some in lists.items()
    ]  # fmt: skip
    return base64.b64encode(zlib.compress(json.dumps(rows, separators=(",", ":")).encode())).decode()


def unpack(text: str) -> Lists:
    """What pack() made of lists, as such."""
    return {
        (cta, TRACE_ROLES[role]): [
            Record(ns, TRACE_EVENTS[event], tile)
            for ns, event, tile in zip(accumulate(steps), events, tiles, strict=True)
        ]
        for cta, role, steps, events, tiles in json.loads(zlib.decompress(base64.b64decode(text)))
    }


def gather_lists(group, lists: Lists, deadline_s: float = DEADLINE_S) -> list[Lists]:
    """Collective. -> on rank 0 the lists of every rank, each from its own zero; on the others nothing.

    AbsentRankError names a rank that does not come within deadline_s."""
    rest, parts = pack(lists), None
    while True:
        piece, rest = rest[:PIECE_CHARS], rest[PIECE_CHARS:]
        pieces = gather(group, "trace", piece, deadline_s, reader=0)
        parts = [before + piece for before, piece in zip(parts or [""] * len(pieces), pieces, strict=True)]
        if not any(gather(group, "trace goes on", bool(rest), deadline_s)):
            return [unpack(text) for text in parts]


def fewer_ctas(lists_of_ranks: list[Lists], limit: int = FILE_RECORDS) -> tuple[list[Lists], int]:
    """-> (the lists of every n-th CTA, n), for a file of about `limit` records at most."""
    every = -(-sum(len(some) for lists in lists_of_ranks for some in lists.values()) // limit) or 1
    if every == 1:
        return lists_of_ranks, 1
    return [{key: some for key, some in lists.items() if key[0] % every == 0} for lists in lists_of_ranks], every


def by_rank(lists_of_ranks: list[Lists]) -> dict:
    """What summary() does not tell apart. Keys: ranks: [{total_us, row_list_us, last_tile_end_us (None without), and
    the words of exposed_us}], each by the rank's own clock; slowest_rank: whose call took longest; busiest_rank: with
    most tensor and epilogue time."""
    ranks = []
    for lists in lists_of_ranks:
        zero = min(some[0].ns for some in lists.values())
        tile_ends = [record.ns for (_, role), some in lists.items() if role.startswith("math") for record in some]
        row_lists = [record.ns for some in lists.values() for record in some if record.event == "list"]
        ranks.append({
            "total_us": (max(some[-1].ns for some in lists.values()) - zero) / 1000,
            "row_list_us": (max(row_lists) - zero) / 1000 if row_lists else None,
            "last_tile_end_us": (max(tile_ends) - zero) / 1000 if tile_ends else None,
        } | exposed([lists]))  # fmt: skip
    numbers = range(len(ranks))
    return {
        "ranks": ranks,
        "slowest_rank": max(numbers, key=lambda rank: ranks[rank]["total_us"]),
        "busiest_rank": max(numbers, key=lambda rank: ranks[rank]["tensor"] + ranks[rank]["epilogue"]),
    }


def report_ranks(found: dict) -> str:
    """by_rank() as text."""
    columns = {"total_us": "call us", "row_list_us": "row list", "last_tile_end_us": "last tile",
               **dict(zip(EXPOSED_WORDS, EXPOSED_WORDS, strict=True))}  # fmt: skip
    lines = ["rank " + "".join(f"{head:>10}" for head in columns.values())]
    for rank, of_rank in enumerate(found["ranks"]):
        values = ("-" if of_rank[key] is None else f"{of_rank[key]:.1f}" for key in columns)
        lines.append(f"{rank:<5}" + "".join(f"{value:>10}" for value in values))
    slowest = found["slowest_rank"]
    lines.append(f"slowest rank: {slowest}, {found['ranks'][slowest]['total_us']:.1f} us from its first record to its "
                 f"last; most tensor and epilogue time: rank {found['busiest_rank']}")
    return "\n".join(lines)
