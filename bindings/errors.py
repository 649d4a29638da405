"""Failed CUDA driver and NVRTC calls as exceptions that name the call, the code and a remedy."""

import functools

# What to do about it, by code name. Only codes a user of a correct program can meet; the driver describes the others.
_HINTS = {
    "CUDA_ERROR_NO_DEVICE": "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_NOT_INITIALIZED": "initialise CUDA first, e.g. torch.cuda.set_device(local_rank); torch.cuda.init()",
    "CUDA_ERROR_DEINITIALIZED": "the driver is shutting down: call close() before the interpreter exits",
    "CUDA_ERROR_INVALID_CONTEXT": "this thread has no CUDA context: torch.cuda.set_device(...) and touch the device",
    "CUDA_ERROR_OUT_OF_MEMORY": "free device memory or lower the capacity; nvidia-smi shows "
    "who holds it, and torch.cuda.empty_cache() returns torch's own reserve",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the kernel module and libcuda differ: reboot or reinstall the driver",
    "CUDA_ERROR_SYSTEM_NOT_READY": "the fabric manager of an NVSwitch machine is not running",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernel is built for sm_90a: it needs an H100, H200 or GH200",
    "CUDA_ERROR_INVALID_IMAGE": "the cubin is damaged or for another architecture: delete the kernel cache",
    "CUDA_ERROR_NOT_FOUND": 'the kernel has no such entry: is it declared extern "C" __global__?',
    "CUDA_ERROR_INVALID_VALUE": "an argument is out of range: grid, block, cluster, shared memory or parameters",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "registers or shared memory of one block exceed the SM",
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": "the grid does not fit on the SMs at once: lower num_sms, or give the "
    "launch the whole GPU (MPS, green contexts and MIG take SMs away)",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel read or wrote outside its memory and the context is lost: restart the "
    "process; CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer finds the launch",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "a kernel used a misaligned address and the context is lost: restart the process",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "a kernel ran an illegal instruction, the context is lost: restart the process",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel failed and the context is lost: restart; compute-sanitizer finds it",
    "CUDA_ERROR_ASSERT": "a device-side assert failed and the context is lost: restart the process",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "a watchdog ended the kernel (a display is attached): use a GPU without a display",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "the GPU's memory failed: drain the machine and run nvidia-smi -q -d ECC",
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": "the two GPUs have no NVLink or PCIe peer path: nvidia-smi topo -p2p rw",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "not permitted while a stream captures: run one call before the capture",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "an earlier call broke this capture: run one call before the capture",
    "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT": "not permitted while a stream captures: run one call before the capture",
    "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD": "another thread captures this stream: launch from that thread",
    "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE": "NVRTC's builtins library is missing or of another version: reinstall "
    "nvidia-cuda-nvrtc",
    "NVRTC_ERROR_INVALID_OPTION": "this NVRTC does not know an option or the architecture: install "
    "nvidia-cuda-nvrtc==13.*",
}


class CudaCallError(RuntimeError):
    """A driver or NVRTC call failed.

    call: the function's name; code: the number it returned; name: the code's name; description: the library's own
    words, or ""; hint: the remedy, or "".
    """

    def __init__(self, call: str, code: int, name: str, description: str = "", hint: str = ""):
        self.call, self.code, self.name, self.description, self.hint = call, code, name, description, hint
        text = f"{call} failed with {name} ({code})"
        if description:
            text += f": {description}"
        if hint:
            text += f"\n  remedy: {hint}"
        super().__init__(text)


class MissingLibraryError(ImportError):
    """A Python package or a shared library is absent; the message names the package to install."""


class CompileError(RuntimeError):
    """NVRTC refused the source. log: its whole output."""

    def __init__(self, source_name: str, log: str):
        self.source_name, self.log = source_name, log
        lines = log.strip().splitlines()
        shown = "\n".join(lines[:60])
        if len(lines) > 60:
            shown += f"\n... {len(lines) - 60} more lines in .log"
        super().__init__(f"{source_name} does not compile:\n{shown}")


def check(result, call: str):
    """The value of a cuda.bindings result tuple ``(status, *values)``: None, the one value, or a tuple of them.

    call: the function's name for the message. CudaCallError when the status is not success.
    """
    status, *values = result if isinstance(result, tuple) else (result,)
    if int(status):
        name = getattr(status, "name", str(status))
        raise CudaCallError(call, int(status), name, _describe(status), _HINTS.get(name, ""))
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def _describe(status) -> str:
    # The library that failed may be unable to describe its failure: the code's name must still reach the user.
    try:
        if type(status).__name__.startswith("nvrtc"):
            text = nvrtc().nvrtcGetErrorString(status)[1]
            return "" if text.decode() == status.name else text.decode()
        return driver().cuGetErrorString(status)[1].decode()
    except Exception:
        return ""


@functools.cache
def driver():
    """The module cuda.bindings.driver with libcuda loaded and initialised.

    MissingLibraryError without the package or without a driver; CudaCallError when cuInit fails (no GPU).
    """
    try:
        from cuda.bindings import driver as module
    except ImportError as error:
        raise MissingLibraryError("cuda.bindings is not installed: pip install 'cuda-bindings>=13,<14'") from error
    try:
        status = module.cuInit(0)
    except Exception as error:  # cuda.bindings raises its own class here, and not the same one in every version
        raise MissingLibraryError(
            "libcuda.so.1 is not on this machine: install the NVIDIA driver (>= 580), or start "
            "the container with GPUs (--gpus all)"
        ) from error
    if int(status[0]):
        # Not check(): describing this status would call driver() again.
        name = status[0].name
        raise CudaCallError("cuInit", int(status[0]), name, "", _HINTS.get(name, ""))
    return module


@functools.cache
def nvrtc():
    """The module cuda.bindings.nvrtc with libnvrtc loaded. Needs no GPU. MissingLibraryError names what to install."""
    try:
        from cuda.bindings import nvrtc as module
    except ImportError as error:
        raise MissingLibraryError("cuda.bindings is not installed: pip install 'cuda-bindings>=13,<14'") from error
    try:
        module.nvrtcVersion()
    except Exception as error:  # as in driver()
        raise MissingLibraryError(
            "libnvrtc.so.13 was not found: pip install 'nvidia-cuda-nvrtc==13.*' (or a CUDA 13 "
            "toolkit on the loader's path)"
        ) from error
    return module
