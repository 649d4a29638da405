"""Compile one kernel and print what it needs.

    python -m megamoe_cuda mega_moe.cu -D TILE=64 [--cubin-out f] [--sass-out f]

From a checkout without install: python -m bindings ... in the repository's root. Exit status 1 when the source does not
compile, 2 with --strict when it spills or ptxas remarks on wgmma or setmaxnreg.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .compile import compile_kernel, describe
from .errors import CompileError, MissingLibraryError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megamoe_cuda", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="name relative to csrc, e.g. mega_moe.cu")
    parser.add_argument("--entry", help='extern "C" kernel name (default: the source\'s stem)')
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--std", default="c++20")
    parser.add_argument("--lineinfo", action="store_true")
    parser.add_argument("--option", action="append", default=[], help="a further NVRTC option, e.g. --option=-G")
    parser.add_argument("--strict", action="store_true", help="fail on spills, serialised wgmma, ignored setmaxnreg")
    parser.add_argument("--no-cache", action="store_true", help="compile even if the cache has it")
    parser.add_argument("--log", action="store_true", help="print the whole compiler log")
    parser.add_argument("--cubin-out", metavar="FILE")
    parser.add_argument("--sass-out", metavar="FILE", help="needs nvdisasm or cuobjdump on PATH")
    given = parser.parse_args(arguments)

    defines = {}
    for text in given.defines:
        name, _, value = text.partition("=")
        defines[name] = value or "1"
    scratch = tempfile.TemporaryDirectory() if given.no_cache else None
    start = time.perf_counter()
    try:
        kernel = compile_kernel(
            given.source,
            given.entry or Path(given.source).stem,
            defines,
            arch=given.arch,
            std=given.std,
            lineinfo=given.lineinfo,
            options=given.option,
            cache_dir=scratch.name if scratch else None,
        )
    except (CompileError, MissingLibraryError, ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if scratch:
            scratch.cleanup()
    print(describe(given.source, kernel, time.perf_counter() - start))
    for line in kernel.resources.warnings:
        print(f"  {line}")
    if given.log:
        print(kernel.log)
    if given.cubin_out:
        Path(given.cubin_out).write_bytes(kernel.cubin)
    if given.sass_out:
        Path(given.sass_out).write_text(disassemble(kernel.cubin))
    need = kernel.resources
    return 2 if given.strict and (need.losses or need.spill_stores or need.spill_loads) else 0


def disassemble(cubin: bytes) -> str:
    """SASS text of a cubin by the toolkit's disassembler. SystemExit naming the packages when there is none."""
    for tool, flags in (("nvdisasm", ["-c"]), ("cuobjdump", ["-sass"])):
        path = shutil.which(tool)
        if path:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                return subprocess.run([path, *flags, file.name], check=True, capture_output=True, text=True).stdout
    raise SystemExit(
        "--sass-out: neither nvdisasm nor cuobjdump is on PATH (CUDA toolkit's bin, or pip install "
        "nvidia-cuda-nvdisasm); --cubin-out works without"
    )


if __name__ == "__main__":
    sys.exit(main())
