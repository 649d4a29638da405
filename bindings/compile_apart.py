"""NVRTC in a process of its own: `compile_apart` asks, and this file, run as a script, answers.

NVRTC keeps options of its back end until the process ends: what another library compiles there with options of its own
(cuDNN does, for attention) changes the code of every kernel compiled after it. Ours then spilled registers, and the
cache handed them on to processes that had done nothing. A new process costs 0.2 s a kernel, its code depends on nothing
but the sources, the options and the library; and a compiler that crashes takes nobody with it.
"""

import contextlib
import ctypes
import errno
import importlib.util
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import spawn
from pathlib import Path

DEADLINE_S = 600.0  # a kernel takes seconds; a machine may be busy
INSIDE = "MEGAMOE_COMPILER"  # set in the process that compiles
REMEDY = "multiprocessing.set_executable(a Python interpreter like this one)"
NO_INTERPRETER = (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR)

# Exceptions of megamoe_cuda.errors that are raised over here, and what they are made of.
_ERRORS = {
    "CompileError": ("source_name", "log"),
    "CudaCallError": ("call", "code", "name", "description", "hint"),
    "MissingLibraryError": ("msg",),
}


def compile_apart(source_name: str, sources: Mapping[str, str], flags: Sequence[str]) -> tuple[bytes, str]:
    """(cubin, log of NVRTC and ptxas) of sources[source_name]; the other sources are its headers, by their names.

    CompileError with the log, also where the process ends without an answer; CudaCallError, MissingLibraryError as
    NVRTC's calls. The interpreter is multiprocessing's (multiprocessing.set_executable where Python is embedded).
    """
    from cuda.pathfinder import load_nvidia_dynamic_lib

    from .errors import CompileError

    interpreter = spawn.get_executable()
    if os.environ.get(INSIDE):  # each would start the next for ever
        why = f"{interpreter!r} runs this program again instead of a compiler\n  remedy: {REMEDY}"
        raise CompileError(source_name, why)
    token = secrets.token_hex(16)
    request = {
        "token": token,
        "version": sys.version_info[:2],
        "path": [os.path.abspath(path) for path in map(str, sys.path) if path],  # "" would be any folder of the moment
        "library": load_nvidia_dynamic_lib("nvrtc").abs_path,  # this process's, whose version the cache's key tells
        "source_name": source_name,
        "sources": dict(sources),
        "flags": list(flags),
    }
    text = json.dumps(request).encode()
    try:
        ran = subprocess.run([interpreter, "-P", __file__], input=text, capture_output=True, timeout=DEADLINE_S,
                             env={**os.environ, INSIDE: "1"})  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CompileError(source_name, f"its compiler's process did not end within {DEADLINE_S:g} s") from error
    except (OSError, TypeError) as error:
        wrong = isinstance(error, TypeError) or error.errno in NO_INTERPRETER
        why = f"no process for its compiler: {error}" + f"\n  remedy: {REMEDY}" * wrong
        raise CompileError(source_name, why) from error
    return _read(ran, token, source_name)


def _read(ran: subprocess.CompletedProcess, token: str, source_name: str) -> tuple[bytes, str]:
    from . import errors

    # Others may print as well: site modules before the token, a profiler after the cubin.
    header, ended, rest = ran.stdout.partition(token.encode())[2].partition(b"\n")
    answer = json.loads(header) if ended else None
    if answer is None or len(rest) < answer["cubin_bytes"]:
        said = "\n".join(ran.stderr.decode(errors="replace").strip().splitlines()[-50:])
        raise errors.CompileError(source_name, f"its compiler's process ended with {ran.returncode}:\n{said}")
    if answer["error"] is not None:
        raise getattr(errors, answer["error"])(*answer["arguments"])
    return rest[: answer["cubin_bytes"]], answer["log"]


def _answer(request: dict) -> tuple[dict, bytes]:
    """Header and cubin for a request of compile_apart."""
    sys.path[:] = request["path"]
    _import_package()
    from megamoe_cuda import errors

    try:
        if list(sys.version_info[:2]) != request["version"]:
            theirs, ours = (".".join(map(str, v)) for v in (request["version"], sys.version_info[:2]))
            why = f"{sys.executable} is Python {ours}, this process {theirs}\n  remedy: {REMEDY}"
            raise errors.CompileError(request["source_name"], why)
        _load(request["library"])
        cubin, log = _compile(request["source_name"], request["sources"], request["flags"])
    except tuple(getattr(errors, name) for name in _ERRORS) as error:
        kind = type(error).__name__
        arguments = [getattr(error, name) for name in _ERRORS[kind]]
        return {"error": kind, "arguments": arguments, "cubin_bytes": 0}, b""
    return {"error": None, "log": log, "cubin_bytes": len(cubin)}, cubin


def _import_package() -> None:
    """megamoe_cuda is the package that this file is of, whatever lies on the path."""
    folder = Path(__file__).parent
    spec = importlib.util.spec_from_file_location("megamoe_cuda", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])  # fmt: skip
    sys.modules["megamoe_cuda"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["megamoe_cuda"])


def _load(library: str | None) -> None:
    """cuda.bindings takes what is loaded; the library finds its builtins only if they are."""
    if library:
        path = Path(library).resolve()
        for builtins in path.parent.glob("libnvrtc-builtins.so*"):
            with contextlib.suppress(OSError):  # a dangling link; NVRTC says so if it was the one
                ctypes.CDLL(str(builtins))
        ctypes.CDLL(str(path))


def _compile(source_name: str, sources: Mapping[str, str], flags: Sequence[str]) -> tuple[bytes, str]:
    from megamoe_cuda.errors import CompileError, check, nvrtc

    lib = nvrtc()
    headers = [name for name in sorted(sources) if name != source_name]
    program = check(
        lib.nvrtcCreateProgram(
            sources[source_name].encode(),
            source_name.encode(),
            len(headers),
            [sources[name].encode() for name in headers],
            [name.encode() for name in headers],
        ),
        "nvrtcCreateProgram",
    )
    result = lib.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    log_size = check(lib.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
    buffer = bytearray(log_size)
    check(lib.nvrtcGetProgramLog(program, buffer), "nvrtcGetProgramLog")
    log = bytes(buffer).rstrip(b"\0").decode(errors="replace")
    if result[0] == lib.nvrtcResult.NVRTC_ERROR_COMPILATION:
        raise CompileError(source_name, log)
    check(result, "nvrtcCompileProgram")
    cubin = bytearray(check(lib.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize"))
    check(lib.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    return bytes(cubin), log


if __name__ == "__main__":
    asked = json.load(sys.stdin.buffer)
    header, cubin = _answer(asked)
    sys.stdout.flush()
    with open(1, "wb", closefd=False) as out:  # buffered, whatever PYTHONUNBUFFERED says: all of it or an error
        out.write(asked["token"].encode() + json.dumps(header).encode() + b"\n" + cubin)
