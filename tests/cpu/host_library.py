"""Parts of csrc built by the host's compiler, for the tests of their arithmetic."""

import ctypes
import shutil
import subprocess
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def build_library(folder: Path, source: str, std: str = "c++20", include: tuple[Path, ...] = ()) -> ctypes.CDLL | None:
    """The C++ text `source` as a library in `folder`, or None where there is no g++. Warnings are errors. include:
    folders to look in before csrc."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    text, library = folder / "library.cpp", folder / "library.so"
    text.write_text(source)
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    folders = [f"-I{path}" for path in (*include, CSRC)]
    subprocess.run([compiler, f"-std={std}", *flags, *folders, str(text), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
