"""What reaches the driver, read back from the real CUlaunchConfig's memory: a driver stand-in records, nothing runs."""

import ctypes
import struct
import threading
from types import SimpleNamespace

import pytest

real = pytest.importorskip("cuda.bindings.driver", reason="not run: cuda.bindings is not installed")

from megamoe_cuda import device as device_module  # noqa: E402
from megamoe_cuda import errors, launch  # noqa: E402
from megamoe_cuda.launch import PARAM_ALIGN, LoadedKernel  # noqa: E402

OK = real.CUresult.CUDA_SUCCESS
NUM_SMS, SMEM_LIMIT = 132, 232448


class Params(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint64), ("num_tokens", ctypes.c_uint32), ("sf", ctypes.c_float),
                ("rest", ctypes.c_uint8 * 240)]


class FakeDriver:
    """One H100-like GPU and one kernel that takes Params. Everything not listed is the real module's (its types)."""

    def __init__(self):
        self.calls, self.launches = [], []
        self.param_bytes, self.blocks_per_sm, self.clusters, self.smem_static = ctypes.sizeof(Params), 1, 60, 1024
        self.launch_result = OK

    def __getattr__(self, name):
        return getattr(real, name)

    def cuCtxGetDevice(self):
        return OK, 0

    def cuDeviceGetAttribute(self, kind, device):
        return OK, {"CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": NUM_SMS,
                    "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": SMEM_LIMIT}[kind.name]

    def cuLibraryLoadData(self, cubin, *rest):
        self.calls.append(("load", cubin, rest))
        return OK, "library"

    def cuLibraryGetKernel(self, library, name):
        return OK, ("kernel", name)

    def cuKernelGetAttribute(self, attribute, kernel, device):
        assert attribute.name == "CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES"
        return OK, self.smem_static

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.calls.append((attribute.name, value, kernel))
        return (OK,)

    def cuKernelGetParamInfo(self, kernel, index):
        return OK, 0, self.param_bytes

    def cuKernelGetFunction(self, kernel):
        return OK, "function"

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, smem):
        self.calls.append(("occupancy", threads, smem))
        return OK, self.blocks_per_sm

    def cuOccupancyMaxActiveClusters(self, function, config):
        self.calls.append(("clusters", decode(config)))
        return OK, self.clusters

    def cuLibraryUnload(self, library):
        self.calls.append(("unload", library))
        return (OK,)

    def cuLaunchKernelEx(self, config, function, pointers, extra):
        address = ctypes.c_void_p.from_address(pointers).value
        self.launches.append(SimpleNamespace(config=decode(config), function=function, address=address, extra=extra,
                                             data=ctypes.string_at(address, self.param_bytes), object=id(config)))
        return (self.launch_result,)


def decode(config) -> SimpleNamespace:
    """CUlaunchConfig as the driver reads it: seven unsigned, stream, attribute array, count; 72 bytes an attribute."""
    *sizes, stream, array, count = struct.unpack("<7I4xQQI4x", ctypes.string_at(int(config.getPtr()), 56))
    attributes = {}
    for i in range(count):
        kind, *words = struct.unpack("<I4x16I", ctypes.string_at(array + 72 * i, 72))
        attributes[real.CUlaunchAttributeID(kind).name.removeprefix("CU_LAUNCH_ATTRIBUTE_")] = words[:3]
    return SimpleNamespace(grid=tuple(sizes[:3]), block=tuple(sizes[3:6]), smem=sizes[6], stream=stream,
                           attributes=attributes)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeDriver()
    monkeypatch.setattr(launch, "driver", lambda: fake)
    monkeypatch.setattr(device_module, "driver", lambda: fake)
    return fake


@pytest.fixture
def kernel(cuda):
    return LoadedKernel(b"cubin", "mega_moe", smem_bytes=200_000)


def test_loading_sets_the_dynamic_shared_memory(cuda, kernel):
    assert cuda.calls == [("load", b"cubin", ([], [], 0, [], [], 0)),
                          ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", 200_000, ("kernel", b"mega_moe"))]
    assert (kernel.param_bytes, kernel.smem_static, kernel.num_sms) == (256, 1024, NUM_SMS)


def test_launch_passes_shape_stream_and_one_aligned_struct(cuda, kernel):
    params = Params(x=0x1122334455667788, num_tokens=7, sf=1.5)
    kernel.launch(0xABC0, NUM_SMS, 384, params)
    (sent,) = cuda.launches
    assert (sent.config.grid, sent.config.block, sent.config.smem) == ((NUM_SMS, 1, 1), (384, 1, 1), 200_000)
    assert sent.config.stream == 0xABC0 and sent.function == "function" and sent.extra == 0
    assert sent.address % PARAM_ALIGN == 0 and sent.data == bytes(params)
    assert sent.config.attributes == {"COOPERATIVE": [1, 0, 0]}


def test_cluster_and_cooperative_attributes(cuda, kernel):
    kernel.launch(0, 120, 384, Params(), cluster=2)
    kernel.launch(0, (6, 2, 3), (64, 2), Params(), cluster=1, cooperative=False)
    first, second = (sent.config for sent in cuda.launches)
    assert first.attributes == {"COOPERATIVE": [1, 0, 0], "CLUSTER_DIMENSION": [2, 1, 1]} and first.grid == (120, 1, 1)
    assert second.attributes == {} and (second.grid, second.block) == ((6, 2, 3), (64, 2, 1))


def test_configuration_is_built_once_and_only_stream_and_bytes_change(cuda, kernel, monkeypatch):
    kernel.launch(1, NUM_SMS, 384, Params(num_tokens=1))
    monkeypatch.setattr(launch, "_config", None)  # building another would fail
    for stream, num_tokens in ((1, 2), (5, 3), (0, 4)):
        kernel.launch(stream, NUM_SMS, 384, Params(num_tokens=num_tokens))
    assert [sent.config.stream for sent in cuda.launches] == [1, 1, 5, 0]
    assert [Params.from_buffer_copy(sent.data).num_tokens for sent in cuda.launches] == [1, 2, 3, 4]
    assert len({sent.object for sent in cuda.launches}) == len({sent.address for sent in cuda.launches}) == 1
    assert [call for call in cuda.calls if call[0] == "occupancy"] == [("occupancy", 384, 200_000)]


def test_a_bound_struct_is_taken_as_it_is_at_each_launch(cuda, kernel):
    params = Params(num_tokens=1)
    bound = kernel.bind(NUM_SMS, 384, params)
    for stream, num_tokens in ((7, 1), (7, 2), (9, 3)):
        params.num_tokens = num_tokens
        bound(stream)
        assert cuda.launches[-1].data == bytes(params) and cuda.launches[-1].config.stream == stream
    assert {sent.address for sent in cuda.launches} == {ctypes.addressof(params)}
    with pytest.raises(ValueError, match="params has 1008 bytes, mega_moe takes 256"):
        kernel.bind(NUM_SMS, 384, (ctypes.c_char * 1008)())
    with pytest.raises(ValueError, match="133 blocks"):
        kernel.bind(133, 384, params)
    kernel.close()
    with pytest.raises(RuntimeError, match="mega_moe is closed"):
        bound(7)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda params: params])
def test_any_buffer_is_a_struct(cuda, kernel, kind):
    params = Params(num_tokens=9)
    kernel.launch(0, 1, 32, kind(params))
    assert cuda.launches[0].data == bytes(params)


def test_a_struct_of_another_size_is_refused_before_the_driver(cuda, kernel):
    for wrong in (b"", bytes(255), bytes(257)):
        with pytest.raises(ValueError, match=rf"params has {len(wrong)} bytes, mega_moe takes 256"):
            kernel.launch(0, 1, 32, wrong)
    with pytest.raises(TypeError):
        kernel.launch(0, 1, 32, 256)
    assert not cuda.launches


@pytest.mark.parametrize("size", [0, 32765])
def test_parameter_limit(cuda, kernel, size):
    kernel.param_bytes = size
    with pytest.raises(ValueError, match=f"takes {size} bytes of parameters; 1 to 32764"):
        kernel.prepare(1, 32)


def test_largest_struct_is_passed_whole(cuda):
    cuda.param_bytes = launch.MAX_PARAM_BYTES
    data = bytes(range(256)) * 128
    LoadedKernel(b"cubin", "big").launch(0, 1, 32, data[:launch.MAX_PARAM_BYTES])
    assert cuda.launches[0].data == data[:launch.MAX_PARAM_BYTES]


def test_blocks_that_cannot_be_resident_are_refused(cuda, kernel):
    with pytest.raises(ValueError, match=r"133 blocks of 384 threads and 200000 bytes .* 132 can, on 132 SMs"):
        kernel.launch(0, 133, 384, Params())
    with pytest.raises(ValueError, match=r"124 blocks .*; 120 can"):
        kernel.launch(0, 124, 384, Params(), cluster=2)
    assert cuda.calls[-1][1].attributes == {"CLUSTER_DIMENSION": [2, 1, 1]}
    cuda.blocks_per_sm = 0
    with pytest.raises(ValueError, match=r"1 blocks .*; 0 can"):
        kernel.launch(0, 1, 384, Params())
    kernel.launch(0, 1000, 384, Params(), cooperative=False)
    assert len(cuda.launches) == 1


@pytest.mark.parametrize(("shape", "said"), [
    ({"grid": 0}, "grid=0 must be one to three positive ints"),
    ({"grid": (1, 2, 3, 4)}, "grid="),
    ({"block": -1}, "block=-1"),
    ({"block": (1024, 2)}, r"block=\(1024, 2, 1\) has 2048 threads"),
    ({"grid": 3, "cluster": 2}, "cluster=2 must be 1 to 8 and divide grid x=3"),
    ({"grid": 32, "cluster": 16}, "cluster=16"),
])
def test_impossible_shapes_are_named(kernel, shape, said):
    with pytest.raises(ValueError, match=said):
        kernel.launch(0, **{"grid": 1, "block": 32, "params": Params(), **shape})


def test_too_much_shared_memory_is_refused_and_unloaded(cuda):
    LoadedKernel(b"cubin", "fits", SMEM_LIMIT - 1024)
    with pytest.raises(ValueError, match=f"={SMEM_LIMIT - 1023} plus 1024 static bytes of big exceed the {SMEM_LIMIT}"):
        LoadedKernel(b"cubin", "big", SMEM_LIMIT - 1023)
    assert cuda.calls[-1] == ("unload", "library")


def test_failed_launch_says_call_code_and_remedy(cuda, kernel):
    cuda.launch_result = real.CUresult.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
    with pytest.raises(errors.CudaCallError, match=r"\(mega_moe\) .*TOO_LARGE \(720\)(.|\n)*num_sms") as caught:
        kernel.launch(0, 1, 32, Params())
    assert caught.value.code == 720 and caught.value.call == "cuLaunchKernelEx(mega_moe)"


def test_a_closed_kernel_refuses(cuda, kernel):
    prepared = kernel.prepare(1, 32)
    kernel.close()
    kernel.close()
    assert [call for call in cuda.calls if call[0] == "unload"] == [("unload", "library")]
    for call in (lambda: kernel.launch(0, 1, 32, Params()), lambda: prepared(0, Params())):
        with pytest.raises(RuntimeError, match="mega_moe is closed"):
            call()


def test_threads_do_not_mix_their_bytes(cuda, kernel):
    threads = [threading.Thread(target=lambda i=i: [kernel.launch(i, 1, 32, Params(num_tokens=i)) for _ in range(200)])
               for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = {(sent.config.stream, Params.from_buffer_copy(sent.data).num_tokens) for sent in cuda.launches}
    assert len(cuda.launches) == 800 and pairs == {(i, i) for i in range(1, 5)}
