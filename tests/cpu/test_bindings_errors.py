"""Failed calls become exceptions that say what to do; missing libraries name their package."""

import sys

import pytest

driver = pytest.importorskip("cuda.bindings.driver", reason="not run: cuda.bindings is not installed")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="not run: cuda.bindings is not installed")

from megamoe_cuda import device, errors  # noqa: E402
from megamoe_cuda.errors import CudaCallError, MissingLibraryError, check  # noqa: E402

OK = driver.CUresult.CUDA_SUCCESS


@pytest.fixture(autouse=True)
def _fresh_libraries():
    errors.driver.cache_clear()
    errors.nvrtc.cache_clear()
    yield
    errors.driver.cache_clear()
    errors.nvrtc.cache_clear()


def test_success_gives_the_values():
    assert check((OK,), "f") is None
    assert check((OK, 7), "f") == 7
    assert check((OK, 7, 8), "f") == (7, 8)
    assert check((nvrtc.nvrtcResult.NVRTC_SUCCESS, 13, 0), "f") == (13, 0)


@pytest.mark.parametrize(("name", "remedy"), [
    ("OUT_OF_MEMORY", "capacity"), ("NO_DEVICE", "CUDA_VISIBLE_DEVICES"), ("ILLEGAL_ADDRESS", "compute-sanitizer"),
    ("LAUNCH_TIMEOUT", "watchdog"), ("COOPERATIVE_LAUNCH_TOO_LARGE", "num_sms"), ("NO_BINARY_FOR_GPU", "sm_90a"),
    ("STREAM_CAPTURE_UNSUPPORTED", "before the capture"), ("INVALID_CONTEXT", "set_device"),
])
def test_failure_names_call_code_and_remedy(name, remedy):
    code = getattr(driver.CUresult, f"CUDA_ERROR_{name}")
    with pytest.raises(CudaCallError) as caught:
        check((code, None), "cuSomething")
    error = caught.value
    assert (error.call, error.code, error.name) == ("cuSomething", int(code), f"CUDA_ERROR_{name}")
    assert str(error).startswith(f"cuSomething failed with CUDA_ERROR_{name} ({int(code)})")
    assert remedy in error.hint and f"remedy: {error.hint}" in str(error)


def test_every_hint_belongs_to_a_code():
    codes = {code.name for code in driver.CUresult} | {code.name for code in nvrtc.nvrtcResult}
    # Renamed or gone codes would leave a hint that nobody ever reads.
    assert not errors._HINTS.keys() - codes


def test_failure_without_hint_is_still_told():
    with pytest.raises(CudaCallError, match=r"^cuX failed with CUDA_ERROR_MAP_FAILED \(205\)") as caught:
        check((driver.CUresult.CUDA_ERROR_MAP_FAILED,), "cuX")
    assert caught.value.hint == ""


def test_missing_packages_and_libraries_name_the_package(monkeypatch):
    def absent(*_):
        raise RuntimeError("no such library")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", absent)
    with pytest.raises(MissingLibraryError, match=r"pip install 'nvidia-cuda-nvrtc==13"):
        errors.nvrtc()
    monkeypatch.setattr(driver, "cuInit", absent)
    with pytest.raises(MissingLibraryError, match=r"libcuda\.so\.1 .*NVIDIA driver"):
        errors.driver()
    for name in ("cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(sys.modules, name, None)
    for get in (errors.driver, errors.nvrtc):
        with pytest.raises(MissingLibraryError, match="pip install 'cuda-bindings>=13"):
            get()


def test_no_gpu_counts_none_and_says_so(monkeypatch):
    monkeypatch.setattr(driver, "cuInit", lambda flags: (driver.CUresult.CUDA_ERROR_NO_DEVICE,))
    assert device.num_devices() == 0
    with pytest.raises(CudaCallError, match=r"cuInit failed with CUDA_ERROR_NO_DEVICE(.|\n)*CUDA_VISIBLE_DEVICES"):
        device.device_info(0)


def test_device_info_reads_what_it_names(monkeypatch):
    answers = {"COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0, "MULTIPROCESSOR_COUNT": 132,
               "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 233472,
               "L2_CACHE_SIZE": 50 << 20, "COOPERATIVE_LAUNCH": 1, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 1,
               "PCI_DOMAIN_ID": 0, "PCI_BUS_ID": 0x1B, "PCI_DEVICE_ID": 0}

    class Fake:
        CUdevice_attribute = driver.CUdevice_attribute
        cuDeviceGet = staticmethod(lambda index: (OK, index))
        cuDeviceGetName = staticmethod(lambda size, gpu: (OK, b"NVIDIA H100\0\0"))
        cuDeviceTotalMem = staticmethod(lambda gpu: (OK, 80 << 30))
        cuDriverGetVersion = staticmethod(lambda: (OK, 13010))

        @staticmethod
        def cuDeviceGetAttribute(kind, gpu):
            return OK, answers[kind.name.removeprefix("CU_DEVICE_ATTRIBUTE_")]

        cuDeviceCanAccessPeer = staticmethod(lambda i, j: (OK, int((i, j) == (0, 1))))

    monkeypatch.setattr(device, "driver", lambda: Fake)
    info = device.device_info(3)
    assert info == device.DeviceInfo(3, "NVIDIA H100", (9, 0), 132, 232448, 233472, 50 << 20, 80 << 30, True, True,
                                     "0000:1b:00", (13, 1))
    assert device.peer_access(0, 1) and device.peer_access(2, 2) and not device.peer_access(1, 0)
