"""The host's part of a call on a GPU: what reaches the driver, and by how many function calls.

The real layer, workspace and engine over a stand-in driver, with tensors of the CPU in the place of a GPU's.
"""

import contextlib
import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, engine_fused, layout
from megamoe.plan import tiles
from megamoe.quant.fp8 import quantize_rows
from megamoe_cuda import launch, symmetric
from tests.cpu.test_bindings_launch import FakeDriver

CONFIG = MoEConfig(256, 128, 8, 2)
NUM_SMS, CAPACITY, STREAM = 132, 64, 0x5000
MAX_FUNCTION_CALLS = 40
"""Of Python and of C, in one call of a layer that has had one like it, out= given: 35 with torch 2.13."""


class Driver(FakeDriver):
    """Keeps the parameters and the stream of each launch."""

    def __init__(self):
        super().__init__()
        self.param_bytes = ctypes.sizeof(layout.KernelParams)

    def cuMemHostAlloc(self, nbytes, flags):
        self.pinned = (ctypes.c_uint8 * nbytes)()
        return self.launch_result, ctypes.addressof(self.pinned)

    def cuMemHostGetDevicePointer(self, address, flags):
        return self.launch_result, address

    def cuMemFreeHost(self, address):
        return (self.launch_result,)

    def cuLaunchKernelEx(self, config, function, pointers, extra):
        self.launches.append((config, pointers))
        return (self.launch_result,)

    def last(self) -> tuple[int, layout.KernelParams]:
        """(stream, parameters) of the last launch, as they are now."""
        config, pointers = self.launches[-1]
        data = ctypes.string_at(ctypes.c_void_p.from_address(pointers).value, self.param_bytes)
        return int(config.hStream), layout.KernelParams.from_buffer_copy(data)


@pytest.fixture
def gpu(monkeypatch):
    """stream, device: torch's current ones; entered: devices that were made current."""
    state = SimpleNamespace(driver=Driver(), stream=STREAM, device=None, entered=[])

    @contextlib.contextmanager
    def device(wanted):
        before, state.device = state.device, wanted.index
        state.entered.append(wanted)
        yield
        state.device = before

    class Memory:
        def __init__(self, nbytes, ep_size, device):
            self.local = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(ep_size)]
            self.base_ptrs = [memory.data_ptr() for memory in self.local]

        def barrier(self):
            pass

        close = barrier

    stream = lambda *_: SimpleNamespace(cuda_stream=state.stream, synchronize=lambda: None)  # noqa: E731
    kernel = SimpleNamespace(cubin=b"cubin", entry="mega_moe")
    for where, name, value in (
        (torch._C, "_cuda_getCurrentRawStream", lambda index: state.stream),
        (torch.accelerator, "current_device_index", lambda: state.device),
        (torch.cuda, "current_stream", stream), (torch.cuda, "device", device),
        (torch.cuda, "synchronize", lambda *_: None), (torch.cuda, "is_current_stream_capturing", lambda: False),
        (engine_fused, "OneGpuMemory", Memory),
        (engine_fused, "device_info", lambda index: SimpleNamespace(num_sms=NUM_SMS)),
        (engine_fused, "_compiled", lambda *_: kernel), (engine_fused, "read_symbol_u32", lambda *_: 200_000),
        (launch, "driver", lambda: state.driver),
        (symmetric, "driver", lambda: state.driver),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, value, raising=False)
    return state


def layer_on(virtual_ranks: int | None = None) -> MoELayer:
    workspace = Workspace(CONFIG, EPConfig(CAPACITY, virtual_ranks), device="cpu")
    workspace.is_cuda, workspace.fused = True, engine_fused.FusedWorkspace(workspace)
    layer = MoELayer(CONFIG, workspace)
    weights = torch.zeros(8, 256, 256), torch.zeros(8, 256, 128)
    layer.load_weights(*([list(w.chunk(virtual_ranks)) for w in weights] if virtual_ranks else weights))
    layer._call_checks.look_at_values = False  # as on a GPU
    return layer


def arguments(n: int, idx=torch.int64, weights=torch.float32) -> tuple:
    return torch.zeros(n, 256).bfloat16(), torch.zeros(n, 2, dtype=idx), torch.zeros(n, 2, dtype=weights)


def test_each_launch_takes_the_arguments_of_its_own_call(gpu):
    layer = layer_on()
    count = torch.ones(1, dtype=torch.int32)
    calls = [
        (1, torch.int64, torch.float32, False, None, 1, True),
        (1, torch.int64, torch.float32, False, None, 1, True),
        (5, torch.int32, torch.float32, False, count, None, False),
        (5, torch.int64, torch.bfloat16, True, None, 8, True),
        (64, torch.int32, torch.bfloat16, True, count, 64, False),
        (1, torch.int64, torch.float32, False, None, 1, True),
    ]
    kept = []
    for n, idx, weights, is_pair, num_tokens, bound, has_out in calls:
        x, topk_idx, topk_weights = arguments(n, idx, weights)
        x, x_sf = quantize_rows(x) if is_pair else (x, None)
        out = torch.empty(n, 256).bfloat16() if has_out else None
        y = layer((x, x_sf) if is_pair else x, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=bound,
                  out=out)  # fmt: skip
        assert y.shape == (n, 256) and y.dtype == torch.bfloat16 and (y is out or not has_out)
        kept.append((x, topk_idx, topk_weights, y))  # so that no address comes again
        stream, p = gpu.driver.last()
        given = {name: getattr(p.ranks[0], name) for name, _ in layout.RankParams._fields_[:6]}
        assert list(given.values()) == [
            0 if t is None else t.data_ptr() for t in (x, x_sf, topk_idx, topk_weights, num_tokens, y)
        ]
        assert (p.ranks[0].num_tokens, p.x_is_fp8, stream) == (n, is_pair, STREAM)
        assert (p.idx_is_int64, p.weights_are_bf16) == (idx == torch.int64, weights == torch.bfloat16)
        cut = tiles.cut_launch(CONFIG, 1, bound or CAPACITY, NUM_SMS * (layout.EXCHANGE_WARPS + layout.MATH_WARPS))
        assert all(getattr(p, name) == value for name, value in cut._asdict().items() if name != "block_tokens")
    assert len(gpu.driver.launches) == len(calls) and layer.stats().calls == len(calls)
    assert layer.stats().output_bytes == sum(y.nbytes for *_, y in kept)


def test_a_kernel_or_a_cut_that_takes_anothers_place_serves_the_next_call(gpu):
    layer, call = layer_on(), arguments(2)
    layer(*call)
    fused = layer.workspace.fused
    key = layer._engine.key
    fused.kernels[key] = fused.load_kernel(*key)
    layer(*call)
    assert list(layer._engine.launches)[1:] == [fused.kernels[key]]
    fused.cuts[CONFIG][CAPACITY] = fused.cuts[CONFIG][CAPACITY]._replace(prefetch_stages=77)
    layer(*call)
    assert gpu.driver.last()[1].prefetch_stages == 77


def test_arguments_like_earlier_ones_are_still_checked(gpu):
    layer, (x, topk_idx, topk_weights) = layer_on(), arguments(1)
    out = torch.empty(1, 256).bfloat16()
    for _ in range(2):
        layer(x, topk_idx, topk_weights, num_tokens_bound=1, out=out)
    wide = torch.zeros(1, 512).bfloat16()
    for wrong, message in (
        ({"num_tokens_bound": True}, "num_tokens_bound=True has type bool"),
        ({"num_tokens_bound": [1]}, "num_tokens_bound=.1. has type list"),
        ({"num_tokens_bound": CAPACITY + 1}, "must be between 0 and the capacity"),
        ({"num_tokens_bound": 0}, "has 1 tokens, above num_tokens_bound=0"),
        ({"hidden_states": x.numpy}, "hidden_states has type"), ({"hidden_states": x.float()}, "dtype torch.float32"),
        ({"hidden_states": wide[:, ::2]}, "hidden_states has strides"), ({"topk_idx": topk_idx.mT}, "topk_idx has sha"),
        ({"topk_weights": topk_weights.double()}, "topk_weights has dtype"), ({"out": x}, "out"),
        ({"hidden_states": wide[:, 1:257]}, "hidden_states starts at an address"), ({"out": wide[:, 1:257]}, "out"),
    ):  # fmt: skip
        given = {"hidden_states": x, "topk_idx": topk_idx, "topk_weights": topk_weights, "out": out}
        with pytest.raises((TypeError, ValueError), match=message):
            layer(**(given | {"num_tokens_bound": 1} | wrong))
    assert len(gpu.driver.launches) == 2


def test_layers_of_a_workspace_do_not_mix_their_parameters(gpu):
    first = layer_on()
    second = MoELayer(CONFIG, first.workspace)
    second.load_weights(torch.zeros(8, 256, 256), torch.zeros(8, 256, 128))
    images = []
    for layer in (first, second, first):
        layer(*arguments(3))
        images.append(gpu.driver.last()[1].ranks[0].linear1)
    assert images[0] == images[2] != images[1]


def test_virtual_ranks_have_their_own_pointers(gpu):
    layer = layer_on(virtual_ranks=2)
    x, topk_idx, topk_weights = zip(arguments(3), arguments(5), strict=True)
    layer(list(x), list(topk_idx), list(topk_weights))
    _, p = gpu.driver.last()
    assert [(p.ranks[i].x, p.ranks[i].num_tokens) for i in range(2)] == [(t.data_ptr(), len(t)) for t in x]


def test_stream_and_device_are_those_of_the_call(gpu):
    layer, call = layer_on(), arguments(2)
    layer(*call)
    gpu.stream, layer.workspace.streams._owner.query = 0x7000, lambda: True
    layer(*call)
    assert gpu.driver.last()[0] == 0x7000
    layer.workspace.streams._owner.query = lambda: False
    gpu.stream = STREAM
    with pytest.raises(RuntimeError, match="stream 0x5000 calls a layer while a call on stream 0x7000"):
        layer(*call)
    gpu.stream, gpu.device, gpu.entered = 0x7000, 3, []
    layer(*call)
    assert gpu.entered == [layer.workspace.device] and gpu.device == 3 and len(gpu.driver.launches) == 3


def test_a_report_of_the_device_ends_the_next_call_and_every_later_one(gpu):
    layer, call = layer_on(), arguments(2)
    layer(*call)
    record = layout.KernelStatus.from_buffer(gpu.driver.pinned)
    record.code, record.role, record.step = layout.CODES.index("timeout"), 1, 1
    with pytest.raises(MegaMoEError, match="no routing table from rank 0"):
        layer(*call)
    with pytest.raises(MegaMoEError, match="an earlier call failed"):
        layer(*call)
    assert len(gpu.driver.launches) == 1 and layer.stats().failed == 1
    record = None
    layer.workspace.close()
    with pytest.raises(MegaMoEError, match="the workspace is closed"):
        layer.check()


def functions_called(call) -> list[tuple[str, str]]:
    """(file, name) of each, in order, when `call` is made for the second time."""
    found = []

    def note(frame, event, argument):
        if event in ("call", "c_call"):
            name = frame.f_code.co_qualname if event == "call" else argument.__qualname__
            found.append((frame.f_code.co_filename, name))

    for _ in range(2):
        found.clear()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
    return found


@torch.no_grad()
def test_a_repeated_call_takes_few_function_calls(gpu):
    layer, call, out = layer_on(), arguments(1), torch.empty(1, 256).bfloat16()
    found = functions_called(lambda: layer(*call, num_tokens_bound=1, out=out))
    names = [name for _, name in found]
    assert "BoundLaunch.__call__" in names and "hidden_states" not in names  # it was launched, not checked again
    assert len(names) <= MAX_FUNCTION_CALLS, names


@torch.no_grad()
def test_the_operator_of_compiled_graphs_has_no_wrappers(gpu):
    layer, (x, topk_idx, topk_weights) = layer_on(), arguments(1)
    found = functions_called(
        lambda: torch.ops.megamoe.moe_layer(x, None, topk_idx, topk_weights, None, layer.handle, 1)
    )
    assert "BoundLaunch.__call__" in [name for _, name in found]
    assert not [file for file, _ in found if "/torch/_library/" in file or "/torch/_dynamo/" in file]
    assert len(found) <= MAX_FUNCTION_CALLS + 10, found
