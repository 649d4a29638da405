"""compute-sanitizer's tools as launch/prove.py runs them, and what their reports say.

Nothing of racecheck is switched off. It knows barriers of threads that meet at them, and no order that goes through a
flag, a third thread or the other CTA of a cluster; what it calls a race for that reason is compared, function by
function, with EXPLAINED. All else is a finding: another pair, a report without a source line (the case must run with
--lineinfo), a report or a summary that cannot be read. An explained pair would hide that its order is lost, so the
operations that make it are named too, and looked for in the sources by tests/cpu/test_sanitizers.py.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# Tool -> arguments of tests/gpu/memcheck_case.py. Races and initialisation are looked for inside one rank: across
# ranks, memory is shared by design and ordered by system-scope accesses, which racecheck does not follow.
CASE_ARGUMENTS = {"memcheck": ["--ranks", "2"], "synccheck": ["--ranks", "2"],
                  "racecheck": ["--ranks", "1", "--runs", "1", "--lineinfo"],
                  "initcheck": ["--ranks", "1"]}  # fmt: skip
# Every option that keeps a finding from being reported, and why.
SUPPRESSED = {
    "--report-api-errors no": "cuda-bindings asks the driver for the address of every function it knows; one that this "
    "driver lacks would be reported as an error of the program",
}
MOST_CHARACTERS = 20_000  # of the reports that a failed step's row keeps


class Order(NamedTuple):
    """Why each of `writers` and each of `readers`, 'file:function' under csrc, are ordered both ways. made_by: texts of
    the functions that order them. callers: of access functions, whom the reason speaks for; another caller needs a
    thought of its own."""

    reason: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    made_by: dict[str, tuple[str, ...]]
    callers: dict[str, set[str]]


EXPLAINED = {
    "plan offsets": Order(
        "Written once a launch, by a plan warp; then the plan warps' barrier, and st.release.cta of plan_done by one "
        "of their threads. The exchange warps read after their own ld.acquire.cta of it has given 1 (permute_rows). "
        "racecheck knows barriers only, and the exchange warps share none with the plan. Other callers of find_expert "
        "are plan threads, or come after the plan's barrier.",
        ("sched/table.cuh:offsets_of",),
        ("sched/order.cuh:find_expert", "pipeline/1_permute.cuh:place_in_images",
         "pipeline/1_permute.cuh:permute_rows"),
        {"sched/table.cuh:build_row_list": ("if (warp == 0) offsets_of(l, s, scratch.count, lane);\n"
                                            "    ptx::named_barrier_sync<kBarrierPlan, kPlanWarps * 32>();",),
         "mega_moe.cu:mega_moe": ("if (thread == 0) ptx::st_release_cta_shared(&s.plan_done, 1);",),
         "pipeline/1_permute.cuh:permute_rows": ("while (!ptx::ld_acquire_cta_shared(&s.plan_done))",)},
        {"find_expert": {"place_in_images", "read_entry", "read_logical", "tile_of_ticket"}}),
    "flags in shared memory": Order(
        "plan_done and watch_open themselves, written by st.release.cta and polled by ld.acquire.cta: such a word is "
        "there to be read while it is written.",
        ("ptx/ld_st.cuh:st_release_cta_shared",),
        ("ptx/ld_st.cuh:ld_acquire_cta_shared",),
        {"ptx/ld_st.cuh:st_release_cta_shared": ("st.release.cta.shared.u32",),
         "ptx/ld_st.cuh:ld_acquire_cta_shared": ("ld.acquire.cta.shared.u32",)},
        {"st_release_cta_shared": {"mega_moe", "combine"},
         "ld_acquire_cta_shared": {"permute_rows", "push_rows", "help_combine"}}),
    "names of a tile's rows": Order(
        "Before they are read: name_rows' warp barrier and its arrival on names_full, which every math warp waits for; "
        "the store warp comes behind those, by staging_full. Before the slot is written again, four tiles on: the "
        "readers' arrivals on tile_empty, the weights warp that waits for all of them, its arrival on tile_full, which "
        "name_rows waits for. racecheck does not follow an order through a third thread.",
        ("gemm/load_images.cuh:name_rows",),
        ("pipeline/3_swiglu.cuh:quantize_tokens_on_m", "pipeline/4_linear2.cuh:send_rows_tokens_on_m",
         "pipeline/store.cuh:store_rows"),
        {"gemm/load_images.cuh:name_rows": ("wait_mbarrier(&s.tile_full[slot], ",
                                            "mbarrier_arrive(&s.names_full[slot])",
                                            "mbarrier_arrive(&s.tile_empty[slot])"),
         "pipeline/2_linear1.cuh:compute_tiles": ("wait_mbarrier(&s.names_full[slot], ",
                                                  "mbarrier_arrive(&s.staging_full[group])",
                                                  "mbarrier_arrive(&s.tile_empty[slot])"),
         "pipeline/store.cuh:store_rows": ("++group) wait_mbarrier(&s.staging_full[group], parity);",),
         "pipeline/store.cuh:store_tiles": ("mbarrier_arrive(&s.tile_empty[slot.slot()])",),
         "gemm/load_weights.cuh:announce": ("wait_mbarrier(&s.tile_empty[number % kTileSlots], ",
                                            "mbarrier_arrive(&s.tile_full[number % kTileSlots])"),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.tile_empty[i], kTileReaders)",)},
        {}),
    "scale factors of a stage": Order(
        "Before they are read: the copy's bytes complete tokens_full or weights_full, which each math warp waits for. "
        "Before the next copy into the stage: the values have come, for the first half's promotion has multiplied by "
        "them; then a warp barrier and an arrival on stage_empty of both CTAs (release_stage), and a loader waits for "
        "those of all 16 math warps of the cluster. racecheck does not follow arrivals that one lane makes for its "
        "warp at an address of the cluster.",
        ("ptx/copy.cuh:bulk_load", "ptx/copy.cuh:bulk_load_hint", "ptx/copy.cuh:bulk_load_pair"),
        ("ptx/convert.cuh:ld_shared_f32",),
        {"gemm/mainloop.cuh:wait_stage": ("wait_mbarrier(&s.weights_full[slot], parity)",
                                          "wait_mbarrier(&s.tokens_full[slot], parity)"),
         "gemm/mainloop.cuh:accumulate_tokens_on_m": (
             "promote_half<kSecond, 0>(out.sum[0], acc, f);",
             "release_stage<C::kCluster>(&s.stage_empty[done], lane_id());"),
         "gemm/mainloop_sums.cuh:release_stage": (
             "__syncwarp();", "if (lane < kCluster) ptx::mbarrier_arrive_cluster(empty, lane);"),
         "gemm/load_images.cuh:load_images": ("wait_mbarrier(&s.stage_empty[stage.slot()], ",),
         "gemm/load_weights.cuh:load_weights": ("wait_mbarrier(&s.stage_empty[stage.slot()], ",),
         "mega_moe.cu:init_barriers": ("mbarrier_init(&s.stage_empty[i], kMathWarps * C::kCluster)",)},
        {"ld_shared_f32": {"read_scales"}, "bulk_load": {"load_images", "load_linear2"},
         "bulk_load_hint": {"load_image"}, "bulk_load_pair": {"load_image"}}),
}  # fmt: skip


# --- sources ----------------------------------------------------------------------------------------------------------


def functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of each device function of a source, lines from 1."""
    lines = [re.sub(r"//.*", "", line) for line in text.splitlines()]
    for first, line in enumerate(lines):
        if not re.match(r'\s*(MOE_DEVICE|MOE_HOST_DEVICE|extern "C" __global__)\b', line):
            continue
        depth, opened = 0, False
        for last in range(first, len(lines)):
            opened |= "{" in lines[last]
            depth += lines[last].count("{") - lines[last].count("}")
            if opened and depth == 0:
                name = re.search(r"\b(?!__)(\w+)\(", " ".join(lines[first : last + 1]))
                if name:
                    yield name[1], first + 1, last + 1
                break


def place(path: str, line: int, root: Path = CSRC) -> str | None:
    """'file:function' of a line, the file found by its name, which is unique in csrc; None if it is not known."""
    found = list(root.rglob(Path(path).name))
    if len(found) != 1:
        return None
    names = [name for name, first, last in functions(found[0].read_text()) if first <= line <= last]
    return f"{found[0].relative_to(root).as_posix()}:{names[-1]}" if names else None


# --- reports ----------------------------------------------------------------------------------------------------------


def reports(output: str) -> list[list[str]]:
    """What the tool printed between the program's own lines, as the lines of each report without mark and heading.
    Reports are set apart by empty lines, races also by their first words."""
    found: list[list[str]] = []
    following = False
    for line in output.splitlines():
        _, mark, text = line.partition("=========")
        text = text.strip()
        if not mark or text == "COMPUTE-SANITIZER":
            continue
        if text and following and not re.search(r"Race reported between|SUMMARY:", text):
            found[-1].append(text)
        elif text:
            found.append([text])
        following = bool(text)
    return found


def distinct(output: str) -> str:
    """The reports, each kind once with how often it came: those that differ in numbers only are of one kind."""
    kinds, first = Counter(), {}
    for lines in reports(output):
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", "\n".join(lines))
        kinds[kind] += 1
        first.setdefault(kind, "\n".join(lines[:12]))
    text = "\n\n".join(f"{kinds[kind]} x {lines}" for kind, lines in first.items())
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "\n... and more"


class Pair(NamedTuple):
    """One line of a report of racecheck. writer, reader: 'file:function'; None where they are not known, or the pair is
    not of one writer and one reader."""

    writer: str | None
    reader: str | None
    hazards: int
    text: str


def pairs(report: list[str]) -> list[Pair]:
    """The first access of a race with each of the others. ValueError if it does not read as such."""
    text = " ".join(report)
    accesses = re.findall(r"(Read|Write) access at\s+(.*?)(?=\s+and (?:Read|Write) access at|$)", text)
    counts = [re.search(r"\[(\d+) hazards?\]", where) for _, where in accesses[1:]]
    if "Race reported between" not in text or not counts or not all(counts):
        raise ValueError(text)
    found = []
    for (kind, where), count in zip(accesses[1:], counts):
        both = [accesses[0], (kind, where)]
        at = {}
        for access, described in both:
            line = re.search(r'([^\s":]+\.cuh?)"?(?::|,? line )\s*(\d+)', described)
            at[access] = place(line[1], int(line[2])) if line else None
        said = " and ".join(f"{access} access at {described}" for access, described in both)
        found.append(Pair(at.get("Write"), at.get("Read"), int(count[1]), said))
    return found


def order_of(pair: Pair) -> str | None:
    return next((name for name, order in EXPLAINED.items()
                 if pair.writer in order.writers and pair.reader in order.readers), None)  # fmt: skip


# --- facts of a step --------------------------------------------------------------------------------------------------


def facts(output: str) -> dict:
    """Errors and warnings as the tool counts them: 0 expected. "output": what to keep if the step failed."""
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", output)]
    return {"findings": sum(errors) if errors else None, "suppressed": SUPPRESSED, "output": distinct(output),
            "ok": bool(errors) and not any(errors)}  # fmt: skip


def race_facts(output: str) -> dict:
    """findings: what EXPLAINED does not explain, `unexplained` in words. explained: of each order that was met its
    reason and the hazards of each pair."""
    unexplained, met, read, displayed = Counter(), {}, 0, None
    for report in reports(output):
        summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed(?: \((\d+) errors?, (\d+) warnings?\))?",
                            " ".join(report))  # fmt: skip
        if summary:
            displayed = (displayed or 0) + int(summary[1])
            if summary[2] and int(summary[2]) + int(summary[3]) > int(summary[1]):
                unexplained["not all were displayed: " + summary[0]] += 1
            continue
        read += 1
        try:
            found = pairs(report)
        except ValueError as error:
            unexplained[f"not read: {error}"] += 1
            continue
        for pair in found:
            name = order_of(pair)
            if name is None:
                unexplained[f"{pair.writer or '?'} and {pair.reader or '?'}: {pair.text}"] += 1
            else:
                hazards = met.setdefault(name, {"reason": EXPLAINED[name].reason, "pairs": {}})["pairs"]
                said = f"{pair.writer} and {pair.reader}"
                hazards[said] = hazards.get(said, 0) + pair.hazards
    if displayed is not None and displayed > read:
        unexplained[f"{displayed} hazards displayed, {read} reports read"] += 1
    texts = [f"{count} x {text}" for text, count in unexplained.items()]
    return {"findings": None if displayed is None else sum(unexplained.values()), "explained": met,
            "suppressed": SUPPRESSED, "output": "\n".join(texts)[:MOST_CHARACTERS],
            "ok": displayed is not None and not unexplained}  # fmt: skip
