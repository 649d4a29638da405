"""launch/: the interpreter that a checkout runs with, and numbers of ranks that are none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def run(*command, **more) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **more)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_an_environment_that_is_linked_is_used_and_never_changed(tmp_path):
    """It is another checkout's: its key is of that one's path, so that it would count as not set up here."""
    shutil.copytree(LAUNCH, tmp_path / "mine/launch")
    shutil.copy(LAUNCH.parent / "pyproject.toml", tmp_path / "mine")
    executable(tmp_path / "theirs/.venv/bin/python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "theirs/.venv/ready").write_text("0123456789abcdef\n")
    executable(tmp_path / "bin/python3", "#!/bin/sh\nexit 1\n")  # the system's own: without torch
    (tmp_path / "mine/.venv").symlink_to(tmp_path / "theirs/.venv")
    before = files_below(tmp_path / "theirs")
    ran = run(tmp_path / "mine/launch/do", "setup", env=os.environ | {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"})
    assert ran.returncode == 0 and "using .venv" in ran.stdout, ran
    assert files_below(tmp_path / "theirs") == before


@pytest.mark.parametrize("number", ["two", "0", "-1", "script.py"])
@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh", "scale.sh"])
def test_a_number_of_ranks_that_is_none_is_named(script, number):
    if script == "mpirun.sh" and not shutil.which("mpirun"):
        pytest.skip("not run: no mpirun")
    ran = run(LAUNCH / script, number, "other.py")
    assert ran.returncode == 2 and f"'{number}' must be a number" in ran.stderr and "Traceback" not in ran.stderr
