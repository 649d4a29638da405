"""launch/sanitizers.py: what compute-sanitizer's reports are read as. Their forms are those of its manual and of runs;
places are looked up in csrc, so that the examples stay true."""

import importlib.util
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megamoe import engine_fused
from megamoe_cuda.errors import MissingLibraryError, nvrtc

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NAMES, READ_NAMES = ("gemm/load_images.cuh", "s.tile_rows[slot][r] = row"), ("pipeline/4_linear2.cuh", "row = rows[r]")
OFFSETS, FIND = ("sched/table.cuh", "s.pair_offset[e] = "), ("sched/order.cuh", "if (offsets[middle] <= x)")
SCALES, COPY = ("ptx/convert.cuh", '"ld.shared.f32'), ("ptx/copy.cuh", '"cp.async.bulk.shared::cluster.global')
H = ("pipeline/3_swiglu.cuh", "ptx::st_shared_u16(staging")


# What a run on an H100 reported, each pair of functions once, without types; for a line number the text on that line.
# Of tiles of 128 tokens (those without an offset) the functions alone are known.
RECORDED = """
========= Error: Race reported between Write access at
=========     void moe::leave()+0x1d800 in exit.cuh[s.is_last_cta = ]
=========     and Read access at void moe::leave()+0x1d870 in exit.cuh[if (!s.is_last_cta)] [16 hazards]
=========
========= Error: Race reported between Write access at
=========     void moe::leave()+0x1d810 in exit.cuh[s.aborted = ]
=========     and Read access at void moe::leave()+0x1d880 in exit.cuh[if (!s.is_last_cta)] [8 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::bulk_load()+0x13a40 in copy.cuh[complete_tx::bytes [%0], [%1], %2, [%3];]
=========     and Read access at
=========     moe::promote_weights_on_m()+0x7a80 in mainloop_sums.cuh[const float2 sf = ] [320 hazards]
=========     and Read access at
=========     moe::promote_weights_on_m()+0x7b80 in mainloop_sums.cuh[const float2 sf = ] [320 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::cp_async_4(unsigned int, const void *, bool)+0x13170 in copy.cuh[cp.async.ca.shared.global]
=========     and Read access at
=========     moe::promote_weights_on_m()+0x7a80 in mainloop_sums.cuh[const float2 sf = ] [320 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::bulk_load_hint()+0x16480 in copy.cuh[complete_tx::bytes.L2::cache_hint]
=========     and Read access at
=========     void moe::accumulate_stage_weights_on_m()+0x72e0 in mainloop.cuh[const f32 low = second] [80 hazards]
=========     and Read access at
=========     void moe::accumulate_stage_weights_on_m()+0x7380 in mainloop.cuh[high = second] [80 hazards]
=========
========= Error: Race reported between Write access at
=========     mega_moe+0x6c30 in mega_moe.cu[st_release_cta_shared]
=========     and Read access at
=========     moe::ptx::ld_relaxed_cta_shared()+0x1d4d0 in ld_st.cuh[ld.relaxed.cta.shared] [24 hazards]
=========
========= Error: Race reported between Read access at
=========     moe::ptx::ld_relaxed_cta_shared()+0x132c0 in ld_st.cuh[ld.relaxed.cta.shared]
=========     and Write access at
=========     void moe::combine()+0x26a10 in 5_combine.cuh[s.watch_pending[my_window()] = pending;] [4 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::TokenGatherer::name_rows()+0x133d0 in gather_tokens.cuh[s.tile_weights[slot][r] = weight;]
=========     and Read access at
=========     moe::add_bias_weights_on_m() in bias.cuh[const f32 weight = second] [2156 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::name_rows() in load_images.cuh[s.tile_weights[slot][r] = weight;]
=========     and Read access at
=========     moe::add_bias_tokens_on_m() in bias.cuh[second ? weights[row]] [3472 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::TokenGatherer::name_rows()+0x133d0 in gather_tokens.cuh[s.tile_rows[slot][r] = row;]
=========     and Read access at
=========     void moe::store_rows()+0x14330 in store.cuh[const u32 row = rows[r];] [24 hazards]
=========
========= Error: Race reported between Read access at
=========     void moe::compute_tiles()+0x76f0 in 2_linear1.cuh[const u32 number = t.number]
=========     and Write access at
=========     void moe::announce()+0x165d0 in load_weights.cuh[t.number = number;] [8 hazards]
=========
========= Error: Race reported between Read access at
=========     void moe::compute_tiles()+0x7770 in 2_linear1.cuh[if (t.kind == kTile_linear1)]
=========     and Write access at
=========     void moe::announce()+0x17240 in load_weights.cuh[t.kind = kTile_end;] [8 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::bulk_load() in copy.cuh[complete_tx::bytes [%0], [%1], %2, [%3];]
=========     and Read access at moe::ptx::ld_shared_f32() in convert.cuh["ld.shared.f32] [14336 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::bulk_load_hint() in copy.cuh[complete_tx::bytes.L2::cache_hint]
=========     and Read access at moe::ptx::ld_shared_f32() in convert.cuh["ld.shared.f32] [448 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::name_rows() in load_images.cuh[s.tile_weights[slot][r] = weight;]
=========     and Read access at
=========     moe::quantize_tokens_on_m() in 3_swiglu.cuh[const f32 weight = weights[row];] [11904 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::name_rows() in load_images.cuh[s.tile_rows[slot][r] = row;]
=========     and Read access at moe::send_rows_tokens_on_m() in 4_linear2.cuh[row = rows[r];] [11904 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::offsets_of() in table.cuh[s.row_offset[e] = before[0]]
=========     and Read access at moe::find_expert() in order.cuh[if (offsets[middle] <= x)] [832 hazards]
=========     and Read access at
=========     moe::place_in_images() in 1_permute.cuh[return s.block_offset[expert]] [288 hazards]
=========     and Read access at
=========     moe::permute_rows() in 1_permute.cuh[copy_rows(l, s, first_item(l), s.row_offset] [64 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::bulk_load_hint()+0x16420 in copy.cuh[complete_tx::bytes.L2::cache_hint]
=========     and Read access at moe::decode_half()+0x7650 in mxfp4.cuh[const u32 word[4] = ] [7936 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::bulk_load()+0x25e30 in copy.cuh[complete_tx::bytes [%0], [%1], %2, [%3];]
=========     and Read access at moe::ptx::ld_shared_v4()+0x78d0 in convert.cuh["ld.shared.v4] [63488 hazards]
=========     and Read access at moe::ptx::ld_shared_u16()+0x78a0 in convert.cuh[ld.shared.u16] [15870 hazards]
=========     and Read access at
=========     void moe::accumulate_split()+0x158f0 in mxfp4_split.cuh[const f32 low = last.weights_sf] [128 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::bulk_load_pair()+0x231c0 in copy.cuh[multicast::cluster [%0]]
=========     and Read access at moe::ptx::ld_shared_v2_f32()+0x8380 in convert.cuh["ld.shared.v2.f32] [768 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::ptx::st_shared_cluster()+0x19ea0 in mbarrier.cuh[st.shared::cluster.u32]
=========     and Read access at
=========     moe::largest_of_pair()+0x19fb0 in 3_swiglu.cuh[s.partner_amax[buffer][token]));] [13392 hazards]
=========
========= Error: Race reported between Write access at
=========     moe::name_rows()+0x202b0 in load_images.cuh[s.tile_weights[slot][r] = weight;]
=========     and Read access at
=========     void moe::quantize_split()+0x18100 in 3_swiglu.cuh[const float2 weight = ] [736 hazards]
=========
========= Error: Race reported between Read access at
=========     void moe::store_h_half()+0x241e0 in store.cuh[r < t.row_count && publish; r += 32) {]
=========     and Write access at
=========     void moe::tile_of_ticket()+0x26e20 in tickets.cuh[t.row_count = idle] [64 hazards]
=========
"""


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "launch")
    sanitizers = load(ROOT / "launch" / "sanitizers.py")


def line_of(file: str, text: str) -> int:
    lines = [number for number, line in enumerate((CSRC / file).read_text().splitlines(), 1) if text in line]
    assert lines, f"{file} does not hold {text!r}"
    return lines[0]


def short(file: str, text: str) -> str:
    return f"mega_moe+0x5790 in {Path(file).name}:{line_of(file, text)}"


def long(file: str, text: str) -> str:
    return f"0x00006360 in /src/{file}:{line_of(file, text)}:mega_moe(moe::KernelParams)"


def quoted(file: str, text: str) -> str:
    return f'mega_moe+0x10 in "./{file}", line {line_of(file, text)}'


def broken(file: str, text: str) -> str:
    return f"\n=========     {short(file, text)}"


def summary(count: int, errors: int | None = None) -> str:
    errors = count if errors is None else errors
    return f"========= RACECHECK SUMMARY: {count} hazards displayed ({errors} errors, 0 warnings)"


def race(first: tuple[str, str], *others: tuple[str, str, int], word: str = "Error") -> str:
    """first, others: kind, where; of the others also how many."""
    lines = [f"========= {word}: Race reported between {first[0]} access at {first[1]}"]
    lines += [f"=========     and {kind} access at {where} [{count} hazards]" for kind, where, count in others]
    return "\n".join([*lines, "========= ", ""])


def told(*reports: str, count: int | None = None) -> dict:
    found = ["========= COMPUTE-SANITIZER", "fp8, tiles of 128: [1] ok", *reports]
    return sanitizers.race_facts("\n".join([*found, summary(len(reports) if count is None else count)]))


@pytest.mark.parametrize("form", [short, long, quoted, broken])
def test_explained_pairs_are_counted_by_their_order(form):
    found = told(
        race(("Read", form(*READ_NAMES)), ("Write", form(*NAMES), 768), ("Write", form(*NAMES), 32)),
        race(("Write", form(*OFFSETS)), ("Read", form(*FIND), 416), word="ERROR"),
        race(("Read", form(*SCALES)), ("Write", form(*COPY), 1), word="Warning"),
    )
    assert found["ok"] and found["findings"] == 0 and not found["output"], found["output"]
    pairs = {name: order["pairs"] for name, order in found["explained"].items()}
    assert pairs == {
        "names of a tile's rows": {
            "gemm/load_images.cuh:name_rows and pipeline/4_linear2.cuh:send_rows_tokens_on_m": 800},
        "plan offsets": {"sched/table.cuh:offsets_of and sched/order.cuh:find_expert": 416},
        "scale factors of a stage": {"ptx/copy.cuh:bulk_load and ptx/convert.cuh:ld_shared_f32": 1},
    }  # fmt: skip
    assert all(order["reason"] for order in found["explained"].values())


GOOD = race(("Read", short(*READ_NAMES)), ("Write", short(*NAMES), 768))


@pytest.mark.parametrize("report, said", [
    (race(("Read", short(*READ_NAMES)), ("Write", short(*OFFSETS), 3)), "table.cuh:offsets_of and pipeline/4_linear2"),
    (race(("Read", short(*READ_NAMES)), ("Write", short(*NAMES), 3), ("Write", short(*H), 5)), "quantize_tokens_on_m"),
    (race(("Write", short(*NAMES)), ("Write", short(*NAMES), 3)), "Write access at mega_moe"),  # no reader
    (race(("Write", short(*READ_NAMES)), ("Read", short(*NAMES), 3)), "4_linear2.cuh:send_rows_tokens_on_m and gemm"),
    (race(("Read", "mega_moe+0xe7a0"), ("Write", "mega_moe+0x16370", 768)), "? and ?"),  # without line information
    (race(("Read", short(*READ_NAMES)), ("Write", "mega_moe+0x16370", 768)), "? and pipeline/4_linear2.cuh"),
    (race(("Read", short(*READ_NAMES)), ("Write", "f+0x1 in elsewhere.cu:12", 7)), "? and pipeline/4_linear2.cuh"),
    (race(("Read", short(*READ_NAMES)), ("Write", "mega_moe+0x1 in load_images.cuh:1", 7)), "? and pipeline/4_linear2"),
    (race(("Read", short(*READ_NAMES))), "not read: Error: Race reported"),
    (GOOD.replace(" [768 hazards]", ""), "not read: Error: Race reported"),
    ("========= Error: Potential WAR hazard detected at __shared__ 0x2c in block (0,0,0) :\n", "not read: Error: Pot"),
    ("========= Error: process didn't terminate successfully\n", "not read: Error: process"),
])  # fmt: skip
def test_everything_else_is_a_finding(report, said):
    found = told(GOOD, report)
    assert not found["ok"] and found["findings"] == 1 and said in found["output"], found
    assert found["explained"]["names of a tile's rows"]["pairs"]


def test_a_summary_must_be_there_and_agree():
    assert told(count=0)["ok"] and told(count=0)["findings"] == 0
    for output in ("", GOOD, "ended before any kernel ran\n"):
        found = sanitizers.race_facts(output)
        assert not found["ok"] and found["findings"] is None
    assert "2 hazards displayed, 1 reports read" in told(GOOD, count=2)["output"]
    found = sanitizers.race_facts(f"{GOOD}{summary(1, 256)}")  # past the tool's limit of what it prints
    assert not found["ok"] and "not all were displayed" in found["output"]


def test_a_failed_steps_row_keeps_every_kind_of_report():
    bad = "========= Invalid __global__ read of size 4 bytes\n=========     at mega_moe+0x{:x}\n=========\n"
    other = "========= Barrier error detected.\n=========\n"
    output = "".join(map(bad.format, range(4000))) + other + "a line of the program\n" * 1000
    found = sanitizers.facts(f"{output}========= ERROR SUMMARY: 4001 errors\n")
    assert not found["ok"] and found["findings"] == 4001 and found["suppressed"]
    assert found["output"].startswith("4000 x Invalid __global__ read of size 4 bytes\nat mega_moe+0x0")
    assert "1 x Barrier error detected." in found["output"] and len(found["output"]) < 300
    assert sanitizers.facts("========= ERROR SUMMARY: 0 errors\n")["ok"] and not sanitizers.facts("")["ok"]


def recorded() -> str:
    def with_line(found: re.Match) -> str:
        (path,) = CSRC.rglob(found[1])
        return f"{found[1]}:{line_of(path.relative_to(CSRC).as_posix(), found[2])}{found[3]}"

    text = re.sub(r"(\w+\.cuh?)\[(.*?)\]( \[\d+ hazards\])?$", with_line, RECORDED, flags=re.MULTILINE)
    return text.replace(":None", "") + summary(text.count("Race reported"))


def test_what_a_run_reported_is_explained():
    found = sanitizers.race_facts(recorded())
    assert found["ok"] and found["findings"] == 0 and not found["output"], found["output"]
    assert found["explained"].keys() == sanitizers.EXPLAINED.keys()
    hazards = [count for order in found["explained"].values() for count in order["pairs"].values()]
    assert sum(hazards) == sum(map(int, re.findall(r"\[(\d+) hazards\]", RECORDED)))


@pytest.mark.parametrize("name", sanitizers.EXPLAINED)
def test_without_one_explanation_its_pairs_are_findings(name, monkeypatch):
    pairs = sanitizers.race_facts(recorded())["explained"][name]["pairs"]
    monkeypatch.delitem(sanitizers.EXPLAINED, name)
    found = sanitizers.race_facts(recorded())
    assert not found["ok"] and found["findings"] >= len(pairs) and name not in found["explained"]
    assert all(f" x {pair}: " in found["output"] for pair in pairs)


def test_findings_of_one_kind_are_told_once():
    other = race(("Read", short(*READ_NAMES)), ("Write", short(*OFFSETS), 3))
    found = told(*[other.replace("0x5790", f"0x{number:x}") for number in range(1000)])
    assert found["findings"] == 1000 and found["output"].startswith("1000 x sched/table.cuh:offsets_of and ")
    assert found["output"].count("\n") == 0


def callers(function: str) -> set[str]:
    found = set()
    for path in CSRC.rglob("*.cu*"):
        text = path.read_text()
        lines = text.splitlines()
        for name, first, last in sanitizers.functions(text):
            body = re.sub(r"//.*", "", "\n".join(lines[first - 1 : last]))
            if name != function and re.search(rf"\b{function}(<.*?>)?\(", body):
                found.add(name)
    return found


@pytest.mark.parametrize("name", sanitizers.EXPLAINED)
def test_what_is_explained_is_what_the_sources_hold(name):
    order, known = sanitizers.EXPLAINED[name], {}
    for path in CSRC.rglob("*.cu*"):
        file, text = path.relative_to(CSRC).as_posix(), path.read_text()
        for function, first, last in sanitizers.functions(text):
            body = re.sub(r" *//.*", "", "\n".join(text.splitlines()[first - 1 : last]))
            known[f"{file}:{function}"] = known.get(f"{file}:{function}", "") + body
    assert set(order.writers) <= known.keys() and set(order.readers) <= known.keys()
    lost = [(place, text) for place, texts in order.made_by.items() for text in texts if text not in known[place]]
    assert order.made_by and not lost, "is the order of these accesses still what the reason says?"
    assert {function: callers(function) for function in order.callers} == order.callers
    accesses = {place.partition(":")[2] for place in (*order.writers, *order.readers) if place.startswith("ptx/")}
    assert accesses <= order.callers.keys()  # a function that many could call says nothing by itself


def test_a_line_is_in_one_function_of_one_file():
    names = [path.name for path in CSRC.rglob("*.cu*")]
    assert len(names) == len(set(names)), "reports may name a file by its last name only"
    kernel = (CSRC / "mega_moe.cu").read_text()
    assert sanitizers.place("mega_moe.cu", line_of("mega_moe.cu", "st_release_cta_shared")) == "mega_moe.cu:mega_moe"
    assert sanitizers.place("/src/mega_moe.cu", len(kernel.splitlines()) + 1) is None
    assert sanitizers.place("mega_moe.cu", 1) is None and sanitizers.place("launch.py", 1) is None
    for path in CSRC.rglob("*.cu*"):
        text = path.read_text()
        found = list(sanitizers.functions(text))
        heads = re.findall(r'^\s*(?:MOE_DEVICE|MOE_HOST_DEVICE|extern "C" __global__)\b', text, re.MULTILINE)
        assert len(found) == len(heads), path
        for before, after in pairwise(found):
            assert before[2] < after[1], (path, before, after)


def test_the_case_compiles_with_line_information(monkeypatch, tmp_path):
    try:
        nvrtc()
    except MissingLibraryError as error:
        pytest.skip(f"not run: {error}")
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(engine_fused, "compile_kernel", engine_fused.compile_kernel)  # put back at the end
    plain = engine_fused._compiled("fp8", 8, False, False)
    load(ROOT / "tests" / "gpu" / "memcheck_case.py").use_line_info()
    lined = engine_fused._compiled("fp8", 8, False, False)
    for file in ("mega_moe.cu", "load_weights.cuh"):
        assert file.encode() in lined.cubin and file.encode() not in plain.cubin
    assert lined.resources == plain.resources and lined.key != plain.key
