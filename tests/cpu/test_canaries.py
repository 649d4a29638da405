"""Canaries lie behind every region, in all of the space up to the next, and a changed byte is told by its region."""

import itertools

import torch

from megamoe import canaries, layout
from megamoe.config import EPConfig, MoEConfig

CONFIG = MoEConfig(hidden=384, intermediate=128, num_experts=6, topk=3)
DIMS = layout.dims_of([CONFIG], EPConfig(70), 2, 8)


def test_regions_keep_their_order_and_size_and_get_a_gap_behind_each():
    plain, _, _ = layout.place(DIMS)
    spaced, *totals = layout.place(DIMS, canaries.GAP)
    assert [(r.name, r.bytes) for r in plain] == [(r.name, r.bytes) for r in spaced]
    assert all(r.offset % layout.REGION_ALIGN == 0 for r in spaced)
    for where, total in zip(("symmetric", "local"), totals):
        spans = canaries.spans(spaced, where, total)
        regions = [r for r in spaced if r.where == where]
        covered = sorted([(r.offset, r.offset + r.bytes) for r in regions] + [(begin, end) for _, begin, end in spans])
        assert covered[0][0] == 0 and covered[-1][1] == total
        assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
        assert all(end - begin >= canaries.GAP for _, begin, end in spans)


def test_the_checks_of_the_kernel_take_local_regions_for_the_last_ones():
    where = [region.where for region in layout.REGIONS]
    first = [region.name for region in layout.REGIONS].index("control")
    assert set(where[:first]) == {"symmetric"} and set(where[first:]) == {"local"}


def test_a_changed_byte_is_told_by_its_region():
    regions, total, _ = layout.place(DIMS, canaries.GAP)
    memory = torch.randint(0, 256, (total,), dtype=torch.uint8)
    canaries.fill(memory, regions, "symmetric")
    assert canaries.find(memory, regions, "symmetric") is None
    for region in [r for r in regions if r.where == "symmetric"]:
        memory[region.offset : region.offset + region.bytes] = 0  # the region itself is free to change
        assert canaries.find(memory, regions, "symmetric") is None
        for past in (0, 1, canaries.GAP - 1):
            memory[region.offset + region.bytes + past] = 7
            assert canaries.find(memory, regions, "symmetric") == (region.name, past, 7)
            memory[region.offset + region.bytes + past] = canaries.VALUE
