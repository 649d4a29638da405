"""The host's part of a call on a GPU: what reaches the driver, and by how many function calls.

The real layer, workspace and engine over a stand-in driver, with tensors of the CPU in the place of a GPU's.
"""

import contextlib
import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace, engine_fused, layer_call, layout, workspace
from megamoe.plan import tiles
from megamoe.quant.fp8 import quantize_rows
from megamoe_cuda import launch, symmetric
from tests.cpu.test_bindings_launch import FakeDriver

CONFIG = MoEConfig(256, 128, 8, 2)
NUM_SMS, CAPACITY, STREAM = 132, 64, 0x5000
MAX_FUNCTION_CALLS = 24
"""Of Python and of C, in one call of a layer that has had one like it, out= given: 22 with torch 2.13."""


class Driver(FakeDriver):
    """Keeps the parameters and the stream of each launch."""

    def __init__(self):
        super().__init__()
        self.param_bytes, self.kept = ctypes.sizeof(layout.KernelParams), []

    def cuMemHostAlloc(self, nbytes, flags):
        self.pinned = (ctypes.c_uint8 * nbytes)()
        self.kept.append(self.pinned)
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
        *((module, "current_stream_handle", lambda index: state.stream)
          for module in (engine_fused, layer_call, workspace)),
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
    layer._call.checks.look_at_values = False  # as on a GPU
    return layer


@pytest.mark.parametrize("fails", ["read_symbol_u32", "HostStatus", "OneGpuMemory", "_clear"])
def test_a_workspace_that_cannot_be_made_gives_back_what_it_took(gpu, monkeypatch, fails):
    freed, left = [], [200_000] * 2  # kernels load until the third
    monkeypatch.setattr(Driver, "cuMemFreeHost", lambda self, address: freed.append(address) or (self.launch_result,))
    where = engine_fused.FusedWorkspace if fails == "_clear" else engine_fused
    monkeypatch.setattr(where, fails, lambda *args: left.pop() if fails == "read_symbol_u32" else [].pop())
    with pytest.raises(IndexError):
        layer_on()
    done = [call[0] for call in gpu.driver.calls]
    assert done.count("load") == done.count("unload") > 1
    assert len(freed) == (fails in ("OneGpuMemory", "_clear"))


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
    for n, idx, weights, is_pair, num_tokens, bound, has_out in (call for call in calls for _ in range(2)):
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
    assert len(gpu.driver.launches) == layer.stats().calls == 2 * len(calls)
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


def wrong_arguments() -> dict:
    """Arguments of a call each, after one with arguments(4), num_tokens, num_tokens_bound=8 and out."""
    x, topk_idx, topk_weights = arguments(4)
    wide, pair, out = torch.zeros(4, 512).bfloat16(), quantize_rows(x), torch.zeros(4, 256).bfloat16()
    return {
        "dtype": {"hidden_states": x.float()}, "e4m3 alone": {"hidden_states": pair[0]},
        "sf dtype": {"hidden_states": (pair[0], x)}, "pair of bf16": {"hidden_states": (x, pair[1])},
        "pair of None": {"hidden_states": (x, None)}, "list": {"hidden_states": [x]}, "None": {"hidden_states": None},
        "array": {"hidden_states": x.float().numpy()}, "sparse": {"hidden_states": x.to_sparse()},
        "shape": {"hidden_states": x[:3]}, "width": {"hidden_states": wide}, "strides": {"hidden_states": wide[:, ::2]},
        "aligned": {"hidden_states": wide.view(-1)[1:1025].view(4, 256)}, "meta": {"hidden_states": x.to("meta")},
        "idx dtype": {"topk_idx": topk_idx.short()}, "idx shape": {"topk_idx": topk_idx[:, :1]},
        "idx strides": {"topk_idx": topk_idx.mT.contiguous().mT}, "idx device": {"topk_idx": topk_idx.to("meta")},
        "idx None": {"topk_idx": None}, "weights dtype": {"topk_weights": topk_weights.double()},
        "weights are idx": {"topk_weights": topk_idx}, "weights strides": {"topk_weights": wide.float()[:, ::256]},
        "count int": {"num_tokens": 3}, "count dtype": {"num_tokens": torch.ones(1)},
        "count shape": {"num_tokens": torch.ones(2, dtype=torch.int32)},
        "count is out": {"num_tokens": out, "out": torch.ones(1, dtype=torch.int32)},
        "count for out": {"num_tokens": None, "out": torch.ones(1, dtype=torch.int32)},
        "out for count": {"num_tokens": out, "out": None},
        "out is x": {"hidden_states": out, "out": out}, "out dtype": {"out": out.float()},
        "out shape": {"out": out[:3]},
        "out has x's memory": {"hidden_states": out, "out": out.view(4, 256)}, "out strides": {"out": wide[:, :256]},
        "out aligned": {"out": wide.view(-1)[1:1025].view(4, 256)}, "out device": {"out": out.to("meta")},
        "out list": {"out": [out]}, "bound bool": {"num_tokens_bound": True}, "bound": {"num_tokens_bound": 3},
        "bound float": {"num_tokens_bound": 8.0}, "bound tensor": {"num_tokens_bound": torch.tensor([8, 8])},
    }  # fmt: skip


def test_what_is_wrong_after_a_right_call_is_refused_as_in_a_first_one(gpu):
    x, topk_idx, topk_weights = arguments(4)
    right = {"hidden_states": x, "topk_idx": topk_idx, "topk_weights": topk_weights, "num_tokens_bound": 8,
             "num_tokens": torch.ones(1, dtype=torch.int32), "out": torch.zeros(4, 256).bfloat16()}  # fmt: skip
    layer, unused = layer_on(), layer_on()
    for name, wrong in wrong_arguments().items():
        for _ in range(2):
            layer(**right)
        count = len(gpu.driver.launches)
        with pytest.raises((TypeError, ValueError)) as first:
            unused(**(right | wrong))
        with pytest.raises(first.type) as later:
            layer(**(right | wrong))
        assert str(later.value) == str(first.value) and len(gpu.driver.launches) == count, name
    layer(**right)
    x.data = x.data.float()  # the same object, which is another tensor now
    with pytest.raises(TypeError, match="hidden_states has dtype torch.float32"):
        layer(**right)


def test_the_short_way_is_left_for_all_that_has_changed_beside_the_arguments(gpu):
    layer, call = layer_on(), arguments(2)
    went = []
    long_way = layer._call._long_way
    layer._call._long_way = lambda *arguments: went.append(1) or long_way(*arguments)

    def took_the_long_way() -> bool:
        went.clear()
        layer(*call)
        return bool(went)

    assert took_the_long_way() and not took_the_long_way()
    gpu.stream, layer.workspace.streams._owner.query = 0x7000, lambda: True
    assert took_the_long_way() and gpu.driver.last()[0] == 0x7000 and not took_the_long_way()
    gpu.device = 3
    assert took_the_long_way() and gpu.entered
    gpu.device = None
    with torch.inference_mode():  # tensors of it are another kind to torch
        call = arguments(2)
        assert took_the_long_way() and not took_the_long_way() and layer(*call).is_inference()
    layer.workspace.fused.debug = True  # canaries are looked at before each call
    layer.workspace.fused._check_canaries = lambda: None
    assert took_the_long_way() and took_the_long_way()
    layer.workspace.fused.debug = False
    assert not took_the_long_way()
    layer.workspace.poison(MegaMoEError("as if"))
    with pytest.raises(MegaMoEError, match="as if"):
        layer(*call)
    layer.workspace.poisoned = None
    layer.close()
    with pytest.raises(RuntimeError, match="call load_weights first"):
        layer(*call)


def test_capture_on_another_stream_is_no_hand_over(gpu, monkeypatch):
    layer, call = layer_on(), arguments(2)
    layer(*call)
    owner = layer.workspace.streams._owner
    owner.query = lambda: False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu.stream = 0x7000
    for _ in range(2):
        layer(*call)
        assert gpu.driver.last()[0] == 0x7000 and layer.workspace.streams._owner is owner
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="stream 0x7000 calls a layer while a call on stream 0x5000"):
        layer(*call)


def test_every_call_is_counted_once_however_it_went(gpu):
    layer = layer_on()
    for n in (1, 1, 1, 3, 3, 0, 0, 1):
        layer(*arguments(n))
    assert (layer.stats().calls, layer.stats().tokens) == (8, 10)
    layer.close()
    assert layer.stats().calls == 8 and layer.stats().input_bytes == 10 * 512


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
    assert "LayerCall._long_way" not in names and len(names) <= MAX_FUNCTION_CALLS, names


@torch.no_grad()
def test_another_number_of_tokens_goes_the_long_way_without_the_checks(gpu):
    layer, first, second = layer_on(), arguments(1), arguments(2)
    names = [name for _, name in functions_called(lambda: (layer(*first), layer(*second)))]
    assert names.count("LayerCall._long_way") == 2 and not {"hidden_states", "routing"} & set(names)


@torch.no_grad()
def test_the_operator_of_compiled_graphs_has_no_wrappers(gpu):
    layer, (x, topk_idx, topk_weights) = layer_on(), arguments(1)
    found = functions_called(
        lambda: torch.ops.megamoe.moe_layer(x, None, topk_idx, topk_weights, None, layer.handle, 1)
    )
    assert "BoundLaunch.__call__" in [name for _, name in found]
    assert not [file for file, _ in found if "/torch/_library/" in file or "/torch/_dynamo/" in file]
    assert len(found) <= MAX_FUNCTION_CALLS + 10, found
