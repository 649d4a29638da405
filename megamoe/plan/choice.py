"""Which copy of an expert serves which of its rows: the arithmetic of the dispatch, in whole rows.

The rows of an expert in the order (source rank, token, slot) are cut into one interval a copy, copies in ascending
order of slot. `csrc/sched/replica.cuh` is the same arithmetic for the kernel, bit for bit.
"""

from dataclasses import dataclass

import numpy as np

from megamoe.layout import CHOICE_PASSES, CHOICES


@dataclass(frozen=True, eq=False)
class ReplicaMap:
    """Where the copies of one layer's experts are.

    first: int64 [num_logical_experts + 1], copies of expert e are first[e] to first[e + 1] - 1.
    copy:  int64 [copies], their slots over all ranks, ascending within an expert; slot p is on rank p // slots_per_rank
    flows: int64 [flows], experts with more than one copy, in the order in which they are poured
    by_source: int64 [num_ranks, num_logical_experts], slot for rows of a source rank under the choice "static"
    choice: one of CHOICES.
    """

    first: np.ndarray
    copy: np.ndarray
    flows: np.ndarray
    by_source: np.ndarray
    num_ranks: int
    slots_per_rank: int
    choice: str

    @property
    def num_logical_experts(self):
        return len(self.first) - 1


def replica_map(physical_to_logical, num_logical_experts, num_ranks, choice="balanced", *, load=None, num_nodes=1):
    """ReplicaMap of one layer. physical_to_logical: int [slots], -1 = an empty slot, no expert twice on a rank.

    load: [num_logical_experts] or None, the planned rows: experts with few copies and many rows are poured first.
    "static": a copy on the source rank itself, else one on its node, else one anywhere; several in turn by source rank.
    ValueError for an unknown choice, an expert without a slot or twice on a rank, slots that do not divide over ranks.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice={choice!r} must be one of {', '.join(map(repr, CHOICES))}")
    placed = np.asarray(physical_to_logical, np.int64)
    if placed.ndim != 1 or len(placed) % num_ranks:
        raise ValueError(f"physical_to_logical has shape {placed.shape}: slots of one layer, divisible by num_ranks="
                         f"{num_ranks}")
    if placed.min() < -1 or placed.max() >= num_logical_experts:
        raise ValueError(f"physical_to_logical holds {placed.min()}..{placed.max()}, outside -1.."
                         f"{num_logical_experts - 1}")
    slots = len(placed) // num_ranks
    copy = np.argsort(placed, kind="stable")[(placed == -1).sum():]
    count = np.bincount(placed[placed >= 0], minlength=num_logical_experts)
    if not count.all():
        raise ValueError(f"logical expert {int(np.argmin(count > 0))} has no slot")
    first = np.concatenate([[0], count.cumsum()])
    rank, expert = copy // slots, placed[copy]
    twice = np.flatnonzero((rank[1:] == rank[:-1]) & (expert[1:] == expert[:-1]))
    if len(twice):
        raise ValueError(f"expert {expert[twice[0]]} is twice on rank {rank[twice[0]]}: a second copy there takes "
                         f"nothing from the rank")
    weight = np.zeros(num_logical_experts) if load is None else np.asarray(load, np.float64)
    order = np.lexsort((-weight, count))
    flows = order[count[order] > 1]
    by_source = _by_source(first, copy, rank, num_ranks, num_nodes)
    return ReplicaMap(first, copy, flows, by_source, num_ranks, slots, choice)


def _by_source(first, copy, rank, num_ranks, num_nodes):
    per_node, source, count = num_ranks // num_nodes, np.arange(num_ranks)[:, None, None], np.diff(first)
    nth = np.arange(count.max())
    at = np.minimum(first[:-1, None] + nth, len(copy) - 1)
    exists = np.broadcast_to(nth < count[:, None], (num_ranks, *at.shape))
    candidates = exists
    for near in (rank[at] // per_node == source // per_node, rank[at] == source):
        near = near & exists
        candidates = np.where(near.any(2, keepdims=True), near, candidates)
    in_turn = source[..., 0] % candidates.sum(2)
    chosen = (candidates & (candidates.cumsum(2) == in_turn[..., None] + 1)).argmax(2)
    return copy[first[:-1] + chosen]


def copy_begins(replicas, count):
    """First row of every copy's interval, int64 [copies], for the batch's rows per expert, count int [experts].

    "balanced": water-filling of whole rows over ranks, experts in the order of flows, until nothing changes, at most
    CHOICE_PASSES times over. "min_active": all rows of an expert on one copy, on the rank with the fewest active
    experts so far (ties: lower rank), as often. Both depend on nothing but the map and the counts.
    """
    count = np.asarray(count, np.int64)
    first, rank = replicas.first, replicas.copy // replicas.slots_per_rank
    balanced = replicas.choice == "balanced"
    replicated = np.diff(first) > 1
    weight = count if balanced else np.minimum(count, 1)
    level = np.bincount(rank[first[:-1]], weights=np.where(replicated, 0, weight), minlength=replicas.num_ranks)
    level = level.astype(np.int64)
    share = np.zeros(len(replicas.copy), np.int64)
    for again in range(CHOICE_PASSES):
        old = share.copy()
        for expert in replicas.flows:
            own, rows = slice(first[expert], first[expert + 1]), count[expert]
            if rows == 0:
                continue
            ranks = rank[own]
            if again:
                level[ranks] -= share[own]
            share[own] = _pour(level[ranks], rows) if balanced else np.arange(len(ranks)) == level[ranks].argmin()
            level[ranks] += share[own]
        if (share == old).all():
            break
    if not balanced:
        share *= np.repeat(count, np.diff(first))
    share[first[:-1][~replicated]] = count[~replicated]
    begin = share.cumsum() - share
    return begin - np.repeat(begin[first[:-1]], np.diff(first))


def _pour(level, rows):
    """What each of a few ranks receives, int64, so that the lowest rise first; the remainder goes to the first ones."""
    wet = np.ones(len(level), bool)
    while True:
        total = level[wet].sum() + rows
        height = total // wet.sum()
        dry = wet & (level > height)
        if not dry.any():
            break
        wet &= ~dry
    share = np.where(wet, height - level, 0)
    share[np.flatnonzero(wet)[:total - height * wet.sum()]] += 1
    return share


def rank_rows(replicas, count):
    """Rows of each rank under the choice for these counts, int64 [num_ranks]; not for "static"."""
    begin, count = copy_begins(replicas, count), np.asarray(count, np.int64)
    end = np.append(begin[1:], 0)
    end[replicas.first[1:] - 1] = count
    rows = np.bincount(replicas.copy // replicas.slots_per_rank, weights=end - begin, minlength=replicas.num_ranks)
    return rows.astype(np.int64)


def choose_rows(replicas, topk_idx):
    """Slot of every row: a list of int64 arrays like topk_idx, -1 where it is -1.

    topk_idx: one int [num_tokens, topk] array of logical ids a source rank, -1 = unused.
    """
    experts = replicas.num_logical_experts
    if replicas.choice == "static":
        return [np.where(one >= 0, replicas.by_source[source][np.maximum(one, 0)], -1)
                for source, one in enumerate(topk_idx)]
    counts = [np.bincount(one[one >= 0], minlength=experts) for one in topk_idx]
    begin, before = copy_begins(replicas, sum(counts)), np.zeros(experts, np.int64)
    chosen = []
    for one, count in zip(topk_idx, counts, strict=True):
        chosen.append(assign_rows(replicas, begin, one, before))
        before = before + count
    return chosen


def assign_rows(replicas, begin, topk_idx, before):
    """Slots of one source's rows, int64 like topk_idx, given copy_begins and each expert's rows of earlier sources."""
    flat = np.asarray(topk_idx, np.int64).reshape(-1)
    used = np.flatnonzero(flat >= 0)
    expert = flat[used]
    order = np.argsort(expert, kind="stable")
    count = np.bincount(expert, minlength=replicas.num_logical_experts)
    nth = np.empty(len(expert), np.int64)
    nth[order] = np.arange(len(expert)) - np.repeat(count.cumsum() - count, count)
    nth += np.asarray(before)[expert]
    # The last copy that begins at or before the row: intervals may be empty.
    copies = np.arange(len(replicas.copy))
    owner = np.repeat(np.arange(replicas.num_logical_experts), np.diff(replicas.first))
    stride = int(max(begin.max(initial=0), nth.max(initial=0))) + 1
    which = np.searchsorted(owner * stride + begin, expert * stride + nth, side="right") - 1
    slots = np.full(len(flat), -1, np.int64)
    slots[used] = replicas.copy[copies[which]]
    return slots.reshape(np.shape(topk_idx))


def words(replicas):
    """The map as the kernel reads it, uint32 (csrc/sched/replica.cuh, ReplicaMap)."""
    rank = replicas.copy // replicas.slots_per_rank
    masks = [sum(1 << int(r) for r in rank[replicas.first[e]:replicas.first[e + 1]]) for e in replicas.flows]
    header = [CHOICES.index(replicas.choice), replicas.num_logical_experts, len(replicas.flows), len(replicas.copy)]
    flows = np.stack([replicas.flows, np.array(masks, np.int64)], 1).ravel() if masks else []
    held = np.full(replicas.num_ranks * replicas.slots_per_rank, -1)
    held[replicas.copy] = np.repeat(np.arange(replicas.num_logical_experts), np.diff(replicas.first))
    parts = [header, replicas.first, replicas.copy, flows, replicas.by_source.ravel(), held]
    return np.concatenate(parts).astype(np.int64).astype(np.uint32)
