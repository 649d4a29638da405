"""What a long command says it is at, on standard error, and that a phase that never ends says where it hangs."""

import re
import subprocess
import sys

import pytest

from megamoe.progress import Phases


def test_phases_are_said_as_they_begin_and_added_up_at_the_end(capsys):
    with Phases("it") as phase:
        phase("first")
        phase("second")
    said = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+", "N", line) for line in said] == [
        "it:    N s  first", "it:    N s  second", "it:    N s  done; seconds: start N, first N, second N",
    ]  # fmt: skip


def test_an_error_is_said_with_its_phase_and_other_ranks_say_nothing(capsys):
    for said in (True, False):
        with pytest.raises(OSError, match="why"), Phases("it", said) as phase:
            phase("first")
            raise OSError("why")
        assert ("ended in first; seconds" in capsys.readouterr().err) == said


def test_a_phase_past_its_deadline_ends_the_process_and_names_the_line():
    text = """
import time
from megamoe.progress import Phases
def library_that_waits():
    time.sleep(60)
with Phases("it", said=False, deadline_s=0.2) as phase:
    phase("first")
    library_that_waits()
"""
    ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1 and "Timeout" in ended.stderr and "library_that_waits" in ended.stderr
