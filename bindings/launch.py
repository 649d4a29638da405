"""A cubin on the GPU: loaded once, launched many times with one by-value parameter struct.

The kernel takes exactly one ``const __grid_constant__`` struct. Its bytes live at one address (a 128-byte aligned one,
what a struct with a CUtensorMap inside wants, unless the caller's own is bound) behind a one-entry pointer array, and
the driver copies them during the launch call, so the same storage serves the next call and a captured graph keeps its
own copy.

Host cost: building configuration and attributes anew costs about 17 us a launch through cuda.bindings; here they are
built once per launch shape, and a launch writes the parameter bytes, the stream when it changed, and calls the driver:
1.5 us (a stand-in driver on a server CPU), or half of it where the caller's struct is bound to the launch.
"""

import ctypes
import math
import threading

from .errors import check, driver

MAX_PARAM_BYTES = 32764  # CUDA's limit for a kernel's parameters on sm_70 and later
PARAM_ALIGN = 128
MAX_CLUSTER = 8  # the portable limit; above it a launch may fail on a GPU with disabled SMs


def copy_async(dst: int, src: int, nbytes: int, stream: int) -> None:
    """nbytes from device address src to dst, either of which may be a peer's, on the stream of this handle."""
    check(driver().cuMemcpyAsync(dst, src, nbytes, stream), "cuMemcpyAsync")


class LoadedKernel:
    """One entry of a cubin, loaded into the current context, with `smem_bytes` of dynamic shared memory a block.

    ValueError when the block cannot have that much. close() unloads: destroy graphs that hold the kernel before.
    """

    def __init__(self, cubin: bytes, entry: str, smem_bytes: int = 0):
        cuda = driver()
        device = check(cuda.cuCtxGetDevice(), "cuCtxGetDevice")
        kinds = cuda.CUdevice_attribute
        limit = check(
            cuda.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device),
            "cuDeviceGetAttribute",
        )
        self.num_sms = check(
            cuda.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device), "cuDeviceGetAttribute"
        )
        self.entry, self.smem_bytes = entry, smem_bytes
        self._cubin = cubin  # the driver may read it again when it loads lazily
        self._library = check(cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), "cuLibraryLoadData")
        try:
            kernel = check(cuda.cuLibraryGetKernel(self._library, entry.encode()), f"cuLibraryGetKernel({entry})")
            attribute = cuda.CUfunction_attribute
            self.smem_static = check(
                cuda.cuKernelGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, kernel, device),
                "cuKernelGetAttribute",
            )
            if smem_bytes + self.smem_static > limit:
                raise ValueError(
                    f"smem_bytes={smem_bytes} plus {self.smem_static} static bytes of {entry} exceed the "
                    f"{limit} bytes a block of this GPU can have: take fewer stages or a smaller tile"
                )
            check(
                cuda.cuKernelSetAttribute(
                    attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes, kernel, device
                ),
                "cuKernelSetAttribute",
            )
            self.param_bytes = check(cuda.cuKernelGetParamInfo(kernel, 0), f"cuKernelGetParamInfo({entry})")[1]
            # The context's function, not the kernel handle: it spares the driver a look-up per launch, and taking it
            # here loads the code now, so that the first launch may already be under capture.
            self._function = check(cuda.cuKernelGetFunction(kernel), "cuKernelGetFunction")
        except Exception:
            cuda.cuLibraryUnload(self._library)
            raise
        self._launches: dict[tuple, PreparedLaunch] = {}

    def launch(self, stream: int, grid, block, params, cluster: int = 1, cooperative: bool = True) -> None:
        """Launches on `stream` (e.g. torch.cuda.current_stream().cuda_stream); returns at once.

        grid: blocks in all, also with a cluster, as int or (x, y, z); block: threads, likewise; params: the struct as
        ctypes.Structure, bytes or any buffer. ValueError for a shape or a size the kernel cannot take (see prepare).
        """
        key = (grid, block, cluster, cooperative)
        prepared = self._launches.get(key)
        if prepared is None:
            prepared = self._launches[key] = self.prepare(grid, block, cluster=cluster, cooperative=cooperative)
        prepared(stream, params)

    def prepare(self, grid, block, *, cluster: int = 1, cooperative: bool = True) -> "PreparedLaunch":
        """Checks a launch shape once and builds its configuration. With `cooperative`, ValueError when the blocks
        cannot all be resident at once (the driver would refuse the launch with less to say)."""
        return PreparedLaunch(self, *self._launch_config(grid, block, cluster, cooperative))

    def bind(self, grid, block, params, *, cluster: int = 1, cooperative: bool = True) -> "BoundLaunch":
        """The same for one struct, a ctypes.Structure or another writable buffer: every launch takes it as it is by
        then."""
        return BoundLaunch(self, *self._launch_config(grid, block, cluster, cooperative), params)

    def _launch_config(self, grid, block, cluster: int, cooperative: bool) -> tuple:
        if self._library is None:
            raise RuntimeError(f"kernel {self.entry} is closed")
        grid, block = _three(grid, "grid"), _three(block, "block")
        if math.prod(block) > 1024:
            raise ValueError(f"block={block} has {math.prod(block)} threads; a block has at most 1024")
        if not 1 <= cluster <= MAX_CLUSTER or grid[0] % cluster:
            raise ValueError(f"cluster={cluster} must be 1 to {MAX_CLUSTER} and divide grid x={grid[0]}")
        if cooperative:
            blocks, resident = math.prod(grid), self.max_resident_blocks(block, cluster)
            if blocks > resident:
                raise ValueError(
                    f"grid={grid}: {blocks} blocks of {math.prod(block)} threads and {self.smem_bytes} "
                    f"bytes of shared memory cannot be resident at once; {resident} can, on {self.num_sms} SMs. "
                    "Lower num_sms, or end what holds SMs (MPS, MIG, green contexts)"
                )
        return _config(grid, block, self.smem_bytes, cluster, cooperative)

    def write_symbol(self, name: str, data: bytes) -> None:
        """Into an extern "C" __device__ variable of this cubin, before the launches that read it. ValueError for
        another length than its own."""
        cuda = driver()
        address, nbytes = check(
            cuda.cuLibraryGetGlobal(self._library, name.encode()), f"cuLibraryGetGlobal({name})"
        )
        if nbytes != len(data):
            raise ValueError(f"data has {len(data)} bytes, {name} has {nbytes}")
        check(cuda.cuMemcpyHtoD(address, data, nbytes), f"cuMemcpyHtoD({name})")

    def max_resident_blocks(self, block, cluster: int = 1) -> int:
        """Blocks of `block` threads that the whole GPU holds at once, were nothing else running."""
        cuda, block = driver(), _three(block, "block")
        if cluster == 1:
            per_sm = check(
                cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, math.prod(block), self.smem_bytes),
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            )
            return per_sm * self.num_sms
        config, _ = _config((cluster, 1, 1), block, self.smem_bytes, cluster, False)
        return cluster * check(
            cuda.cuOccupancyMaxActiveClusters(self._function, config), "cuOccupancyMaxActiveClusters"
        )

    def close(self) -> None:
        if self._library is not None:
            library, self._library, self._function = self._library, None, None
            self._launches.clear()
            check(driver().cuLibraryUnload(library), "cuLibraryUnload")


class BoundLaunch:
    """One launch shape of one kernel, and the struct that it takes, which the driver copies during the call.

    For one thread at a time, the one that writes the struct. ValueError when `params` is not as long as the kernel's
    struct: the two descriptions of the struct differ.
    """

    def __init__(self, kernel: LoadedKernel, config, attributes: list, params):
        if not 0 < kernel.param_bytes <= MAX_PARAM_BYTES:
            raise ValueError(
                f"{kernel.entry} takes {kernel.param_bytes} bytes of parameters; 1 to {MAX_PARAM_BYTES} "
                "can be passed by value"
            )
        self._params = (ctypes.c_char * _length(kernel, params)).from_buffer(params)  # keeps them alive
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._params))
        self._pointers_address = ctypes.addressof(self._pointers)
        self._kernel, self._function, self._cuda = kernel, kernel._function, driver()
        self._config, self._attributes = config, attributes
        self._stream = None

    def __call__(self, stream: int) -> None:
        """Launches on `stream`; returns at once."""
        if self._kernel._library is None:
            raise RuntimeError(f"kernel {self._kernel.entry} is closed")
        if stream != self._stream:
            self._config.hStream = stream
            self._stream = stream
        result = self._cuda.cuLaunchKernelEx(self._config, self._function, self._pointers_address, 0)
        if result[0] != 0:
            check(result, f"cuLaunchKernelEx({self._kernel.entry})")


class PreparedLaunch:
    """One launch shape of one kernel, for any struct. Calls may come from several threads; they take turns."""

    def __init__(self, kernel: LoadedKernel, config, attributes: list):
        storage = ctypes.create_string_buffer(kernel.param_bytes + PARAM_ALIGN)
        begin = -ctypes.addressof(storage) % PARAM_ALIGN
        self._params = memoryview(storage).cast("B")[begin : begin + kernel.param_bytes]
        self._launch = BoundLaunch(kernel, config, attributes, self._params)
        self._kernel, self._lock = kernel, threading.Lock()

    def __call__(self, stream: int, params) -> None:
        """As LoadedKernel.launch."""
        _length(self._kernel, params)
        with self._lock:
            self._params[:] = memoryview(params).cast("B")
            self._launch(stream)


def _length(kernel: LoadedKernel, params) -> int:
    length = memoryview(params).nbytes
    if length != kernel.param_bytes:
        raise ValueError(
            f"params has {length} bytes, {kernel.entry} takes {kernel.param_bytes}: "
            "the struct's description and the compiled kernel are not of the same version"
        )
    return length


def _three(value, what: str) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    sizes += (1,) * (3 - len(sizes))
    if len(sizes) != 3 or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"{what}={value!r} must be one to three positive ints")
    return sizes


def _config(grid: tuple, block: tuple, smem_bytes: int, cluster: int, cooperative: bool):
    """The CUlaunchConfig and its attributes; the caller keeps both alive."""
    cuda = driver()
    attributes = []
    if cooperative:
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        attributes.append(attribute)
    if cluster > 1:
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = cluster, 1, 1
        attribute.value.clusterDim = size
        attributes.append(attribute)
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = smem_bytes
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config, attributes


def read_symbol_u32(cubin: bytes, name: str) -> int:
    """The value of an `extern "C" __device__ const` 32-bit word: a number that only the compiled code knows."""
    cuda = driver()
    library = check(cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), "cuLibraryLoadData")
    try:
        address, nbytes = check(cuda.cuLibraryGetGlobal(library, name.encode()), f"cuLibraryGetGlobal({name})")
        value = ctypes.c_uint32()
        if nbytes != ctypes.sizeof(value):
            raise ValueError(f"name={name!r} is {nbytes} bytes in the cubin, not a 32-bit word")
        check(cuda.cuMemcpyDtoH(ctypes.addressof(value), address, nbytes), "cuMemcpyDtoH")
        return value.value
    finally:
        check(cuda.cuLibraryUnload(library), "cuLibraryUnload")
