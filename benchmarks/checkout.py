"""Imported first by the scripts of this folder when they are run by path: makes this checkout's packages importable,
installed or not. The script's own folder leaves sys.path, since it would shadow packages of the same names."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [
    entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "benchmarks")
]
if importlib.util.find_spec("megamoe_cuda") is None:
    _spec = importlib.util.spec_from_file_location("link", ROOT / "launch" / "link.py")
    _link = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_link)
    sys.path.insert(0, str(_link.link_packages()))
