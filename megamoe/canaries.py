"""Debug builds: bytes of one value behind every region of layout.py, which nothing may change. They find what an access
runs past a region's end; that it starts inside, csrc/debug/check.cuh looks at."""

from collections.abc import Sequence

from torch import Tensor

from megamoe.layout import REGION_ALIGN, Placed

GAP = REGION_ALIGN
VALUE = 0xC5


def spans(regions: Sequence[Placed], where: str, total_bytes: int) -> list[tuple[str, int, int]]:
    """(region, begin, end) of the canaries behind each region of `where`, bytes from the start of its memory."""
    here = [region for region in regions if region.where == where]
    ends = [region.offset for region in here[1:]] + [total_bytes]
    return [(region.name, region.offset + region.bytes, end) for region, end in zip(here, ends, strict=True)]


def fill(memory: Tensor, regions: Sequence[Placed], where: str) -> None:
    """memory: uint8, one rank's arena ("symmetric") or workspace ("local")."""
    for _, begin, end in spans(regions, where, memory.numel()):
        memory[begin:end] = VALUE


def find(memory: Tensor, regions: Sequence[Placed], where: str) -> tuple[str, int, int] | None:
    """The first region with a changed canary: (its name, bytes past its end, what is there now). Waits for the
    device."""
    for name, begin, end in spans(regions, where, memory.numel()):
        changed = (memory[begin:end] != VALUE).nonzero()
        if len(changed):
            at = int(changed[0])
            return name, at, int(memory[begin + at])
    return None
