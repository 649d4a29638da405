"""Every kernel configuration compiles for sm_90a with no spill, no serialised wgmma and no ignored setmaxnreg."""

import pytest

from megamoe.builds import kernel_builds
from megamoe.verbs import build_report
from megamoe_cuda.errors import MissingLibraryError, nvrtc


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        nvrtc()
    except MissingLibraryError as error:
        pytest.skip(f"not run: {error}")


@pytest.mark.parametrize("build", kernel_builds(), ids=lambda build: build.name)
def test_configuration_compiles_without_loss(build, monkeypatch, tmp_path):
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path))  # compiled here and now
    report = build_report(build)
    assert not report.problem, report.problem
    assert report.spilled_bytes == 0 and not {"C7508", "C7510", "C7514"}.intersection(report.codes)
    assert report.cubin_bytes > 0 and not report.from_cache
