"""Memory order across ranks, read off the sources and the compiled kernels: peers' memory is reached only through the
accessors of sync/launch.cuh; every flag of it only by accesses with system scope; every weak or bulk store to it stands
before a fence with system scope and the flag behind that."""

import re
import shutil
from functools import cache

import pytest

from megamoe import layout
from megamoe.builds import kernel_build
from megamoe_cuda.__main__ import disassemble
from megamoe_cuda.compile import compile_kernel, read_sources
from megamoe_cuda.errors import MissingLibraryError, check, nvrtc

SYMMETRIC = [region.name for region in layout.REGIONS if region.where == "symmetric"]
FLAGS = {"abort": "abort_word", "head_ready": "head_ready", "x_ready": "x_ready", "combine_ready": "combine_ready"}
DATA = {name for name in SYMMETRIC if name not in FLAGS}
# What may take a flag's address. wait_acquire_sys holds the deadline around ld_acquire_sys.
FLAG_WRAPPERS = {"ptx::ld_relaxed_sys", "ptx::ld_acquire_sys", "ptx::st_relaxed_sys", "ptx::atom_cas_relaxed_sys",
                 "wait_acquire_sys"}  # fmt: skip
# Functions that store to a peer's data regions -> in order, what must follow the last of those stores there, or in the
# function that calls it.
WRITERS = {
    "push_head": ["__syncwarp", "ptx::fence_acq_rel_sys", "l.head_ready"],
    "push_row": [],  # called by push_rows
    "push_rows": ["__syncwarp", "ptx::fence_acq_rel_sys", "l.x_ready"],
    "send_rows_tokens_on_m": [],  # math warps; staging_full, then store_rows
    "store_rows": ["ptx::bulk_wait_all", "ptx::fence_proxy_async_global", "ptx::fence_acq_rel_sys",
                   "ptx::atom_add_acq_rel_gpu", "ptx::fence_acq_rel_sys", "l.combine_ready"],
}  # fmt: skip


def bare(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@cache
def functions() -> dict[str, str]:
    """Every device function outside of csrc/ptx and csrc/debug by name -> its text, without comments."""
    found = {}
    for name, text in read_sources().items():
        if name.startswith(("ptx/", "debug/")) or name == "params.gen.cuh":
            continue
        text = bare(text)
        for head in re.finditer(r"MOE_DEVICE (?:static )?[\w<>:*& ]+?[ *&](\w+)\([^;{]*?\)(?: const)? \{", text):
            depth, end = 1, head.end()
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            found[head[1]] = found.get(head[1], "") + text[head.end() : end]
    return found


def calls_around(text: str, at: int) -> list[str]:
    """Names of the calls that the position `at` stands inside of, innermost first."""
    names, depth = [], 0
    for i in range(at - 1, -1, -1):
        if text[i] in ";{}" and depth == 0:
            break
        depth += {")": 1, "(": -1}.get(text[i], 0)
        if depth < 0:
            names.append(re.search(r"[\w:.]*$", text[:i])[0])
            depth = 0
    return names


def uses(accessor: str) -> list[tuple[str, str, int, str]]:
    """(function, its text, position, first argument) of every use outside of the accessors themselves."""
    found = []
    for function, text in functions().items():
        for use in re.finditer(rf"\bl\.{accessor}\(", text):
            depth, end = 1, use.end()
            while (depth and text[end] not in (",",)) or depth > 1:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                if not depth:
                    break
                end += 1
            found.append((function, text, use.start(), text[use.end() : end].strip()))
    return found


def test_only_the_accessors_know_addresses_of_arenas():
    for name, text in read_sources().items():
        if name not in ("sync/launch.cuh", "debug/check.cuh", "params.gen.cuh"):
            assert not re.search(r"\barena\b|\boff_\w+|\.at<", bare(text)), name
    text = bare(read_sources()["sync/launch.cuh"])
    assert text.count("p.arena[") == 2  # at(), and the address that a debug build checks


def test_memory_instructions_stand_in_ptx_only():
    for name, text in read_sources().items():
        if not name.startswith("ptx/"):
            for statement in re.findall(r'asm volatile\("([^"]*)"', bare(text)):
                assert not statement or statement.startswith("mov.u32"), f"{name}: {statement}"


def test_wrappers_do_what_their_names_say():
    named = 0
    for name in ("ptx/ld_st.cuh", "ptx/mbarrier.cuh"):
        text = bare(read_sources()[name])
        for function, body in re.findall(r"MOE_DEVICE \w+ (\w+)\([^)]*\) \{(.*?)\n?\}\n", text, re.DOTALL):
            order = re.search(r"(relaxed|acquire|release|acq_rel)_(sys|gpu|cta|cluster)", function)
            asm = "".join(re.findall(r'"([^"]*)"', body))
            if order:
                named += 1
                assert f".{order[1]}.{order[2]}" in asm, function
            elif re.match(r"(ld|st|atom)_", function):
                assert not re.search(r"\.(relaxed|acquire|release|acq_rel|volatile)", asm), function
    assert named >= 17


@pytest.mark.parametrize("region", FLAGS)
def test_flags_of_ranks_are_touched_with_system_scope_only(region):
    found = uses(FLAGS[region])
    assert found
    for function, text, at, _ in found:
        named = re.search(r"const u32\* (\w+) = $", text[:at])  # the address first: then each use of its name counts
        places = [use.start() for use in re.finditer(rf"\b{named[1]}\b", text[at:])] if named else [0]
        for place in places:
            around = set(calls_around(text, at + place))
            assert around & FLAG_WRAPPERS, f"{function} uses {FLAGS[region]} in {around or 'no call'}"


def test_peers_are_written_by_the_known_functions_and_read_by_none():
    writers = set()
    for region in DATA:
        for function, text, at, rank in uses(region):
            if rank == "l.me.ep_rank" or (rank == "me" and re.search(r"\bme = l\.me\.ep_rank\b", text)):
                continue
            assert function in WRITERS, f"{function} reaches {region} of rank {rank}"
            assert not {"ptx::ld_cg", "ptx::ld_cg_v4", "ptx::cp_async_16"} & set(calls_around(text, at)), function
            writers.add(function)
    assert writers == {"push_head", "push_row", "send_rows_tokens_on_m", "store_rows"}


@pytest.mark.parametrize("function", [name for name, order in WRITERS.items() if order])
def test_a_system_fence_stands_between_the_rows_and_their_flag(function):
    text = functions()[function]
    stores = [m.end() for name in (*DATA, "push_row") for m in re.finditer(rf"\b(?:l\.)?{name}(?:<\w+>)?\(", text)]
    at = max(stores)
    for word in WRITERS[function]:
        found = text.find(word, at)
        assert found > 0, f"{function}: no {word} after the last store"
        at = found + len(word)


def test_math_warps_rows_reach_the_fence_through_staging_full():
    sends = r"send_rows_tokens_on_m.*mbarrier_arrive\(&s\.staging_full"
    assert re.search(sends, functions()["compute_tiles"], re.DOTALL)
    assert re.match(r"\s*for .*wait_mbarrier\(&s\.staging_full", functions()["store_rows"])


def test_rows_are_read_after_their_flag():
    for reader, flag in (("prepare", "wait_rows"), ("wait_heads", "wait_acquire_sys"), ("combine", "drop_arrived"),
                         ("help_combine", "drop_arrived")):  # fmt: skip
        assert flag in functions()[reader]
    text = functions()["combine"]
    assert text.index("drop_arrived") < text.index("combine_ready_items")


# --- inside a CTA -----------------------------------------------------------------------------------------------------


def test_helpers_read_a_window_only_where_every_lane_has_seen_it_open():
    text = functions()["help_combine"]
    seen = re.search(r"if \(!__all_sync\(~0u, ptx::ld_acquire_cta_shared\(&s\.watch_open.*?\{[^}]*continue;", text)
    assert seen and not re.search("watch_(pending|first)", text[: seen.start()])


def test_an_open_window_is_changed_by_atomics_only():
    text = functions()["combine"]
    stores = [store.start() for store in re.finditer(r"s\.watch_pending\[my_window\(\)\] =[^=]", text)]
    assert len(stores) == 1 and stores[0] < text.index("ptx::st_release_cta_shared(&s.watch_open")
    assert re.search(r"atomicAnd\(&s\.watch_pending\[my_window\(\)\], 0u\);\s*ptx::st_release_cta_shared", text)


def test_the_store_warp_publishes_as_one():
    assert "publish = __all_sync(~0u, may_publish(" in functions()["store_rows"]


# --- the compiled kernels ---------------------------------------------------------------------------------------------


@cache
def ptx(block_tokens: int) -> str:
    lib, texts, build = nvrtc(), read_sources(), kernel_build(block_tokens)
    headers = [name for name in sorted(texts) if name != build.source]
    program = check(
        lib.nvrtcCreateProgram(texts[build.source].encode(), build.source.encode(), len(headers),
                               [texts[name].encode() for name in headers], [name.encode() for name in headers]),
        "nvrtcCreateProgram",
    )  # fmt: skip
    flags = ["--gpu-architecture=compute_90a", "--std=c++20", "--no-source-include", f"-DBLOCK_TOKENS={block_tokens}"]
    check(lib.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags]), "nvrtcCompileProgram")
    text = bytearray(check(lib.nvrtcGetPTXSize(program), "nvrtcGetPTXSize"))
    check(lib.nvrtcGetPTX(program, text), "nvrtcGetPTX")
    lib.nvrtcDestroyProgram(program)
    return bytes(text).rstrip(b"\0").decode()


def instructions(text: str) -> list[str]:
    return re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*(?:[.:]+\w+)*)\s", text, re.MULTILINE)


ORDERED = re.compile(r"(ld|st|atom|red)\.\w*\.?(relaxed|acquire|release|acq_rel)\.(\w+)\.global|"
                     r"(ld|st)\.(relaxed|acquire|release)\.(\w+)\.global")  # fmt: skip


@pytest.mark.parametrize("block_tokens", [32, 128])
def test_ptx_has_no_access_of_unknown_order(block_tokens):
    try:
        found = instructions(ptx(block_tokens))
    except MissingLibraryError as error:
        pytest.skip(f"not run: {error}")
    assert len(found) > 3000
    for name in found:
        assert not re.search(r"volatile|membar|\.nc\b|ld\.global\.ca|\.mmio", name), name
        assert name != "fence.proxy.async" and not re.match(r"fence\.(sc|acq_rel)\.cta", name), name
        if re.match(r"(atom|red)\.(?!shared)", name):
            assert re.search(r"\.(relaxed|acquire|release|acq_rel)\.(sys|gpu)\.global", name), name
    # One flag store a place: routing, rows, combine (and the abort words by compare-and-swap)
    text = ptx(block_tokens)
    stores = [m.start() for m in re.finditer(r"st\.relaxed\.sys\.global", text)]
    fences = [m.start() for m in re.finditer(r"fence\.acq_rel\.sys", text)]
    data = [m.start() for m in re.finditer(r"st\.global\.v4|cp\.async\.bulk\.global|st\.(?:u|b|f)32 ", text)]
    assert len(fences) >= 4 and len(stores) >= 3
    for store in stores:
        fence = max((at for at in fences if at < store), default=-1)
        assert fence >= 0 and not any(fence < at < store for at in data), "data are stored between fence and flag"


@pytest.mark.parametrize("block_tokens", [32, 128])
def test_sass_keeps_the_scopes(block_tokens):
    if not shutil.which("nvdisasm") and not shutil.which("cuobjdump"):
        pytest.skip("not run: neither nvdisasm nor cuobjdump is installed")
    build = kernel_build(block_tokens)
    try:
        sass = disassemble(compile_kernel(build.source, build.entry, build.defines).cubin)
        text = ptx(block_tokens)
    except MissingLibraryError as error:
        pytest.skip(f"not run: {error}")
    assert not re.search(r"\bLDG[.\w]*\.CONSTANT\b", sass)  # a peer's bytes must not come from the read-only cache

    def count(pattern: str, where: str) -> int:
        return len(re.findall(pattern, where))

    # ptxas may copy code, never drop an ordered access or weaken its scope
    assert count(r"\bST[.\w]*\.STRONG\.SYS\b", sass) >= count(r"st\.(?:relaxed|release)\.sys", text) > 0
    assert count(r"\bLD[.\w]*\.STRONG\.SYS\b", sass) >= count(r"ld\.(?:relaxed|acquire)\.sys", text) > 0
    assert count(r"\bATOM[.\w]*\.STRONG\.SYS\b", sass) >= count(r"atom\.cas\.relaxed\.sys", text) > 0
    assert count(r"\bMEMBAR[.\w]*\.SYS\b", sass) >= count(r"fence\.acq_rel\.sys", text) > 0


MUTATIONS = [
    ("pipeline/1_dispatch.cuh", r"ptx::st_relaxed_sys\(l\.head_ready", "ptx::st_relaxed_gpu(l.head_ready",
     lambda: test_flags_of_ranks_are_touched_with_system_scope_only("head_ready")),
    ("pipeline/5_combine.cuh", r"ptx::ld_acquire_sys\(l\.combine_ready", "ptx::ld_acquire_gpu(l.combine_ready",
     lambda: test_flags_of_ranks_are_touched_with_system_scope_only("combine_ready")),
    ("pipeline/1_dispatch.cuh", r"__syncwarp\(\);\s*ptx::fence_acq_rel_sys\(\);\s*for", "for",
     lambda: test_a_system_fence_stands_between_the_rows_and_their_flag("push_rows")),
    ("pipeline/store.cuh", r"ptx::bulk_wait_all\(\);\s*ptx::fence_proxy_async_global\(\);\s*\} else", "} else",
     lambda: test_a_system_fence_stands_between_the_rows_and_their_flag("store_rows")),
    ("pipeline/5_combine.cuh", r"l\.combine_y\(l\.me\.ep_rank", "l.combine_y(0",
     test_peers_are_written_by_the_known_functions_and_read_by_none),
    ("pipeline/5_combine.cuh", r"__all_sync\(~0u, (ptx::ld_acquire_cta_shared\(&s\.watch_open)", r"__any_sync(~0u, \1",
     test_helpers_read_a_window_only_where_every_lane_has_seen_it_open),
    ("pipeline/5_combine.cuh", r"atomicAnd\(&s\.(watch_pending\[my_window\(\)\]), 0u\)", r"s.\1 = 0",
     test_an_open_window_is_changed_by_atomics_only),
    ("pipeline/store.cuh", r"__all_sync\(~0u, may_publish\(l, s, t\)\)", "may_publish(l, s, t)",
     test_the_store_warp_publishes_as_one),
    ("pipeline/exit.cuh", r"l\.abort_word\(r\)", "l.at<u32>(r, l.p.off_abort)",
     test_only_the_accessors_know_addresses_of_arenas),
    ("ptx/ld_st.cuh", r"st\.relaxed\.sys\.global", "st.relaxed.gpu.global", test_wrappers_do_what_their_names_say),
]  # fmt: skip


@pytest.mark.parametrize("file, pattern, text, lint", MUTATIONS, ids=[f"{m[0]} {m[2]}" for m in MUTATIONS])
def test_the_lint_finds_what_is_wrong(monkeypatch, file, pattern, text, lint):
    sources = read_sources()
    sources[file], count = re.subn(pattern, text, sources[file])
    assert count
    monkeypatch.setitem(globals(), "read_sources", lambda: sources)
    functions.cache_clear()
    try:
        with pytest.raises(AssertionError):
            lint()
    finally:
        functions.cache_clear()
