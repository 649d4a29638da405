"""NVRTC in a process of its own: `compile_apart` asks, and this file, run as a script, answers.

NVRTC keeps options of its back end until the process ends: what another library compiles there with options of its own
(cuDNN does, for attention) changes the code of every kernel compiled after it. Ours then spilled registers, and the
cache handed them on to processes that had done nothing. A new process costs 0.2 s a kernel, its code depends on nothing
but the sources, the options and the library; and a compiler that crashes takes nobody with it.
"""

import ctypes
import json
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import spawn
from pathlib import Path

DEADLINE_S = 600.0  # a kernel takes seconds; a machine may be busy

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

    from . import errors

    token = secrets.token_hex(16)
    library = load_nvidia_dynamic_lib("nvrtc").abs_path  # this process's, whose version the cache's key tells
    request = {"token": token, "path": [str(path) for path in sys.path], "library": library,
               "source_name": source_name, "sources": dict(sources), "flags": list(flags)}  # fmt: skip
    text = json.dumps(request).encode()
    try:
        ran = subprocess.run([spawn.get_executable(), "-P", __file__], input=text, capture_output=True,
                             timeout=DEADLINE_S)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise errors.CompileError(source_name, f"its compiler's process did not end within {DEADLINE_S:g} s") from error
    except (OSError, TypeError) as error:
        why = f"no process for its compiler: {error}\n  remedy: multiprocessing.set_executable(a Python interpreter)"
        raise errors.CompileError(source_name, why) from error
    # Others may print as well: site modules before the token, a profiler after the cubin.
    header, _, rest = ran.stdout.partition(token.encode())[2].partition(b"\n")
    if not header:
        said = ran.stderr.decode(errors="replace")[-4000:]
        raise errors.CompileError(source_name, f"its compiler's process ended with {ran.returncode}:\n{said}")
    answer = json.loads(header)
    if answer["error"] is not None:
        raise getattr(errors, answer["error"])(*answer["arguments"])
    return rest[: answer["cubin_bytes"]], answer["log"]


def _answer(request: dict) -> tuple[dict, bytes]:
    sys.path[:] = request["path"]
    if request["library"]:  # cuda.bindings takes what is loaded; the library finds its builtins only if they are
        library = Path(request["library"]).resolve()
        for path in (*library.parent.glob("libnvrtc-builtins.so*"), library):
            ctypes.CDLL(str(path))
    from megamoe_cuda import errors

    try:
        cubin, log = _compile(request["source_name"], request["sources"], request["flags"])
    except tuple(getattr(errors, name) for name in _ERRORS) as error:
        kind = type(error).__name__
        return {"error": kind, "arguments": [getattr(error, name) for name in _ERRORS[kind]]}, b""
    return {"error": None, "log": log, "cubin_bytes": len(cubin)}, cubin


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
    sys.stdout.buffer.write(asked["token"].encode() + json.dumps(header).encode() + b"\n" + cubin)
