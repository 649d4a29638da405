"""The Triton router against the torch router, in Triton's interpreter. tests/gpu/test_router.py runs it compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_ids_and_weights_are_those_of_torch():
    if not find_spec("triton"):
        pytest.skip("not run: triton is missing")
    # A process of its own: Triton decides at import whether it interprets
    ran = subprocess.run([sys.executable, ROOT / "tests" / "router_cases.py", "cpu"], capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip().endswith("cases agree"), ran.stdout
