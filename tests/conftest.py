"""Tiers, seeds and skip reasons. The tests are of the checkout that they lie in, installed or not.

tests/cpu needs no device, tests/ranks starts several processes, tests/gpu needs an sm_90 GPU. A test that lacks its
means is skipped with a reason that starts with "not run: "; a skip that does not say so fails the run, since it would
read as a pass in a summary.
"""

import importlib.util
import os
import random
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = "not run: "


def _use_checkout() -> None:
    spec = importlib.util.spec_from_file_location("megamoe_launch_link", ROOT / "launch" / "link.py")
    link = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(link)
    site = str(link.link_packages())
    if site not in sys.path:
        sys.path.insert(0, site)
    # For the processes that tests start.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if site not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([site, *filter(None, paths)])


_use_checkout()


@cache
def num_gpus() -> int:
    """GPUs that torch can use here and that are sm_90."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.get_device_capability(i) == (9, 0) for i in range(torch.cuda.device_count()))


@cache
def gpu_reason(count: int) -> str | None:
    """Why a test that needs `count` GPUs cannot run here, or None."""
    import torch

    if not torch.cuda.is_available():
        return NOT_RUN + "no GPU"
    if num_gpus() == 0:
        return NOT_RUN + f"no sm_90 GPU (found {torch.cuda.get_device_name(0)})"
    if num_gpus() < count:
        return NOT_RUN + f"needs {count} GPUs, found {num_gpus()}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0] if item.path.is_relative_to(ROOT / "tests") else ""
        if folder in ("cpu", "ranks", "gpu"):
            item.add_marker(folder)
        wanted = item.get_closest_marker("gpus")
        count = wanted.args[0] if wanted else int(folder == "gpu")
        reason = gpu_reason(count) if count else None
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeds_and_threads():
    """Same numbers each run; one thread, since several ranks and workers share the cores."""
    import torch

    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


def _refuse_silent_skip(report) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(NOT_RUN):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skipped without saying {NOT_RUN!r} and why: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _refuse_silent_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_silent_skip(report)
    return report
