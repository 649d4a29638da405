"""CUDA C++ text to a cubin with NVRTC, through a private disk cache.

No compiler, toolkit or CUDA header is needed at run time: the sources travel with the package and are handed to NVRTC
in memory under their names relative to ``csrc/`` (``#include "sync/wait.cuh"``), so the cubin depends on no path of the
machine. No GPU is needed either.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cache
from .compile_apart import compile_apart
from .errors import check, nvrtc

_SOURCE_SUFFIXES = (".cu", ".cuh", ".h")
_DEFINE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one thread or block of the entry needs, from ptxas -v. registers: per thread (the launch's; setmaxnreg moves
    them later); spills and stack: bytes a thread; smem_static: bytes a block, without the dynamic part; warnings: whole
    lines of the compiler's and ptxas's warnings (see `codes`)."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    smem_static: int
    warnings: tuple[str, ...]

    @property
    def codes(self) -> tuple[str, ...]:
        """Numbers of ptxas's remarks, sorted, e.g. C7508 (setmaxnreg ignored), C7510 (wgmma serialised)."""
        return tuple(sorted(set(re.findall(r"\((C\d+)\)", "\n".join(self.warnings)))))

    @property
    def losses(self) -> tuple[str, ...]:
        """The warnings in which ptxas gave up on wgmma or setmaxnreg. By its words, not by number: serialised wgmma has
        one number per cause (C7510, C7511, C7514, ...)."""
        return tuple(line for line in self.warnings if "Potential Performance Loss" in line)


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """cubin; entry: its extern "C" name; log: NVRTC's and ptxas's output; key: the cache key; path: the cache entry, or
    None where the cache could not keep it; from_cache: nothing was compiled for this call."""

    cubin: bytes
    entry: str
    log: str
    resources: Resources
    key: str
    path: Path | None
    from_cache: bool


_memory: dict[str, CompiledKernel] = {}
_memory_lock = threading.Lock()


def compile_kernel(
    source_name: str,
    entry: str,
    defines: Mapping[str, str | int] | None = None,
    *,
    arch: str = "sm_90a",
    std: str = "c++20",
    lineinfo: bool = False,
    options: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    cache_dir: str | os.PathLike | None = None,
    verbose: bool = False,
) -> CompiledKernel:
    """Compiles `source_name`, or takes the result of an earlier compilation of the same text by the same compiler.

    source_name: path relative to csrc, e.g. "mega_moe.cu". entry: the kernel's extern "C" name.
    defines: -Dname=value in the order of their names; a bool becomes 0 or 1. lineinfo: source lines for
    profilers and sanitizers, in names with the working directory before them; the instructions stay the same.
    options: further NVRTC options. sources: name -> text, instead of the shipped csrc.
    cache_dir: default $MEGAMOE_CACHE_DIR, else ~/.cache/megamoe. verbose: one line to stderr (also with MEGAMOE_DEBUG
    >= 1; the whole log from 2 on).

    ValueError for an unknown source, entry or define; CompileError with the log; MissingLibraryError without NVRTC.
    Thread-safe; NVRTC runs in a process of its own (compile_apart), so threads compile configurations in parallel.
    """
    texts = dict(sources) if sources is not None else read_sources()
    if source_name not in texts:
        known = ", ".join(sorted(name for name in texts if name.endswith(".cu"))) or "none"
        raise ValueError(f"source_name={source_name!r} is not one of the sources ({known})")
    flags = _flags(defines or {}, arch, std, lineinfo, options)
    key = cache_key(source_name, entry, flags, texts)
    where = (str(cache.directory(cache_dir)), key)
    with _memory_lock:
        earlier = _memory.get(where)
    if earlier is not None:
        return earlier

    debug = debug_level()
    start = time.perf_counter()
    store = cache.Cache(cache_dir)
    kept = store.load(key)
    if kept is not None:
        meta, cubin = kept
        resources = Resources(**{**meta["resources"], "warnings": tuple(meta["resources"]["warnings"])})
        kernel = CompiledKernel(cubin, entry, meta["log"], resources, key, store.path(key), True)
    else:
        cubin, log = compile_apart(source_name, texts, flags)
        resources = parse_log(log, entry)
        path = store.save(key, {"entry": entry, "log": log, "resources": dataclasses.asdict(resources)}, cubin)
        kernel = CompiledKernel(cubin, entry, log, resources, key, path, False)
    with _memory_lock:
        _memory[where] = dataclasses.replace(kernel, from_cache=True)
    if verbose or debug >= 1:
        print(describe(source_name, kernel, time.perf_counter() - start), file=sys.stderr)
    if debug >= 2:
        print(kernel.log, file=sys.stderr)
    return kernel


def describe(source_name: str, kernel: CompiledKernel, seconds: float) -> str:
    """One line: what was compiled, how long it took and what it needs."""
    need = kernel.resources
    how, spilled = "cached" if kernel.from_cache else "compiled", need.spill_stores + need.spill_loads
    parts = [
        f"{source_name}: {how} in {seconds:.2f} s",
        f"{need.registers} registers",
        f"{spilled} B spilled",
        f"{need.stack} B stack",
        f"{need.smem_static} B static smem",
        f"{len(kernel.cubin)} B cubin",
        f"remarks: {' '.join(need.codes) or 'none'}",
    ]
    return ", ".join(parts)


def source_root() -> Path:
    """The folder of the device sources: csrc beside this package (a checkout), else the installed megamoe_csrc."""
    beside = Path(__file__).resolve().parent.parent / "csrc"
    if beside.is_dir():
        return beside
    spec = importlib.util.find_spec("megamoe_csrc")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the device sources are missing: neither csrc/ beside bindings/ nor the package "
            "megamoe_csrc is here; reinstall the package"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def read_sources() -> dict[str, str]:
    """Every device source, name relative to csrc -> text. Read anew each time: an edited file is never missed."""
    root = source_root()
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*"))
        if path.suffix in _SOURCE_SUFFIXES and path.is_file()
    }


def cache_key(source_name: str, entry: str, flags: Sequence[str], sources: Mapping[str, str]) -> str:
    """SHA-256 (hex) over all sources, options and the compiler's identity.

    All sources, not only the included ones: finding the included ones takes a preprocessor run, and a needless
    compilation costs seconds once while a stale kernel costs days."""
    parts = [cache.FORMAT, nvrtc_identity(), source_name, entry, *flags]
    for name in sorted(sources):
        parts += [name, sources[name]]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # lengths: ("ab", "c") and ("a", "bc") must differ
    return digest.hexdigest()


@functools.cache
def nvrtc_identity() -> str:
    """Version of the loaded NVRTC with its patch level where the wheel tells it, e.g. "13.0 (13.0.88)": two patch
    levels of one release may generate different code, and the library itself reports only the release."""
    major, minor = check(nvrtc().nvrtcVersion(), "nvrtcVersion")
    from importlib.metadata import PackageNotFoundError, version

    for package in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{major}"):
        try:
            return f"{major}.{minor} ({version(package)})"
        except PackageNotFoundError:
            continue
    return f"{major}.{minor}"


def debug_level() -> int:
    """MEGAMOE_DEBUG, 0 (default) to 3."""
    text = os.environ.get("MEGAMOE_DEBUG", "0")
    if text not in ("", "0", "1", "2", "3"):
        raise ValueError(f"MEGAMOE_DEBUG={text!r} must be 0, 1, 2 or 3; unset it for 0")
    return int(text or 0)


def parse_log(log: str, entry: str) -> Resources:
    """Reads ptxas -v's report on `entry`. ValueError when the log has none (the entry is not in the cubin)."""
    at = re.search(rf"Compiling entry function '{re.escape(entry)}'", log)
    if at is None:
        have = ", ".join(re.findall(r"Compiling entry function '([^']+)'", log)) or "none"
        raise ValueError(
            f"entry={entry!r} is not a kernel of this source (it has: {have}); declare it "
            'extern "C" __global__ with this name'
        )
    rest = log[at.end() :]
    following = rest.find("Compiling entry function")
    rest = rest if following < 0 else rest[:following]

    def number(pattern: str) -> int | None:
        found = re.search(pattern, rest)
        return int(found.group(1)) if found else None

    values = {
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
    }
    unread = [name for name, value in values.items() if value is None]
    if unread:
        raise ValueError(f"cannot read {', '.join(unread)} from ptxas's report; its wording changed:\n{rest.strip()}")
    warnings = tuple(
        line.strip() for line in log.splitlines() if re.search(r"\(C7\d\d\d\)|\bwarning\b", line, re.IGNORECASE)
    )
    return Resources(**values, smem_static=number(r"(\d+) bytes smem") or 0, warnings=warnings)


def _flags(defines: Mapping[str, str | int], arch: str, std: str, lineinfo: bool, options: Sequence[str]) -> list[str]:
    flags = [
        f"--gpu-architecture={arch}",
        f"--std={std}",
        "--ptxas-options=-v",
        "--no-source-include",  # a file in the working directory must never stand in for a shipped header
        # NVRTC keeps cubins in the driver's compute cache as well, and says nothing of registers and spills when it
        # takes one from there: what another process has just compiled would have no report. It is also not our cache,
        # whose entries only this user can have written.
        "--no-cache",
    ]
    if lineinfo:
        flags.append("--generate-line-info")
    for name in sorted(defines):
        value = defines[name]
        if not _DEFINE.fullmatch(name):
            raise ValueError(f"define {name!r} is not a C identifier")
        if not isinstance(value, int | str):
            raise TypeError(f"define {name}={value!r} must be int, bool or str, not {type(value).__name__}")
        flags.append(f"-D{name}={int(value) if isinstance(value, bool) else value}")
    return [*flags, *options]
