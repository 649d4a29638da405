"""MoELayer and Workspace on one process: what they accept, return and refuse."""

import pytest
import torch

from megamoe import EPConfig, MegaMoEError, MoEConfig, MoELayer, Workspace
from megamoe.exchange import LocalExchange
from megamoe.layer_checks import CallChecks, equal_dtypes
from megamoe.quant.fp8 import quantize_blocks, quantize_rows
from megamoe.steps import RankInput, moe_layer
from megamoe.testing.data import make_case

TINY = MoEConfig(hidden=256, intermediate=128, num_experts=4, topk=2)


def make_layer(config=TINY, virtual_ranks=None, capacity=16, num_tokens=5, **options):
    """-> layer with weights, its case, and what moe_layer makes of it."""
    workspace = Workspace(config, EPConfig(capacity, virtual_ranks), device="cpu")
    layer = MoELayer(config, workspace)
    case = make_case(0, config, virtual_ranks or 1, num_tokens, **options)
    columns = [list(column) if virtual_ranks else column[0] for column in zip(*case.weights, strict=True)]
    linear1, linear1_sf, linear2, linear2_sf, *biases = columns
    if config.bias:
        layer.load_weights(linear1, linear2, linear1_sf, linear2_sf, linear1_bias=biases[0], linear2_bias=biases[1])
    elif config.weight_format == "fp8":
        layer.load_weights(linear1, linear2, linear1_sf, linear2_sf)
    else:
        layer.load_weights(linear1, linear2)
    return layer, case, moe_layer(config, LocalExchange(case.ep_size), case.weights, case.inputs)


def test_one_rank_takes_and_returns_tensors():
    layer, case, (expected,) = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    y = layer(x, topk_idx, topk_weights)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert torch.equal(layer(x, topk_idx.long(), topk_weights), expected)
    assert torch.equal(layer(quantize_rows(x), topk_idx, topk_weights), expected)
    assert layer(x, topk_idx, topk_weights.bfloat16()).shape == expected.shape


def test_biases_are_taken_in_any_floating_dtype_and_only_where_the_config_has_them():
    config = MoEConfig(256, 128, 4, 2, activation="swiglu_oai", swiglu_limit=7.0, bias=True)
    layer, case, expected = make_layer(config, virtual_ranks=2, num_tokens=[5, 3])
    x, _, topk_idx, topk_weights, _ = map(list, zip(*case.inputs, strict=True))
    assert all(map(torch.equal, layer(x, topk_idx, topk_weights), expected))
    (one,) = make_case(0, config, 1, 5).weights
    with Workspace([config, TINY], EPConfig(8), device="cpu") as workspace:
        layer = MoELayer(config, workspace)
        layer.load_weights(*one[:1], one.linear2, *one[1:4:2], linear1_bias=one.linear1_bias.bfloat16(),
                           linear2_bias=one.linear2_bias)  # fmt: skip
        with pytest.raises(TypeError, match="linear2_bias has type NoneType; pass a tensor of shape"):
            layer.load_weights(one.linear1, one.linear2, one.linear1_sf, one.linear2_sf, linear1_bias=one.linear1_bias)
        with pytest.raises(ValueError, match=r"linear1_bias was given, but .*bias=False"):
            MoELayer(TINY, workspace).load_weights(
                one.linear1, one.linear2, one.linear1_sf, one.linear2_sf, linear1_bias=one.linear1_bias
            )


def test_a_call_runs_hooks_and_what_stands_in_for_forward(monkeypatch):
    layer, case, _ = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    seen = []
    for name, register in (
        ("before", layer.register_forward_pre_hook), ("after", layer.register_forward_hook),
        ("any before", torch.nn.modules.module.register_module_forward_pre_hook),
        ("any after", torch.nn.modules.module.register_module_forward_hook),
    ):  # fmt: skip
        hook = register(lambda *_, name=name: seen.append(name))
        layer(x, topk_idx, topk_weights)
        hook.remove()
        layer(x, topk_idx, topk_weights)
    assert seen == ["before", "after", "any before", "any after"]
    for owner, name in ((layer, "forward"), (layer, "_compiled_call_impl"), (MoELayer, "forward"),
                        (torch.nn.Module, "__call__")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_, **named: "stand-in", raising=False)
            assert layer(x, topk_idx, topk_weights) == "stand-in"
        assert layer(x, topk_idx, topk_weights).shape == x.shape


def test_gradients_are_off_in_a_call_and_as_before_after_it():
    layer, case, (expected,) = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    with torch.enable_grad():
        y = layer(x.clone().requires_grad_(), topk_idx, topk_weights.float().requires_grad_())
        assert torch.is_grad_enabled() and not y.requires_grad and torch.equal(y, expected)


def test_virtual_ranks_take_and_return_lists():
    layer, case, expected = make_layer(virtual_ranks=2, num_tokens=[5, 0])
    x, _, topk_idx, topk_weights, _ = map(list, zip(*case.inputs, strict=True))
    y = layer(x, topk_idx, topk_weights)
    assert isinstance(y, list) and all(map(torch.equal, y, expected))
    num_tokens = [torch.tensor(2, dtype=torch.int32), torch.tensor([0], dtype=torch.int32)]
    y = layer(x, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=5)
    assert torch.equal(y[0][:2], expected[0][:2]) and not y[0][2:].any()
    out = [torch.full_like(t, float("nan")) for t in expected]
    y = layer(x, topk_idx, topk_weights, out=out)
    assert all(a is b for a, b in zip(y, out, strict=True)) and all(map(torch.equal, out, expected))


def test_the_result_is_no_view_of_anything_kept():
    layer, case, (expected,) = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    first = layer(x, topk_idx, topk_weights)
    layer(x.neg(), topk_idx, topk_weights)
    assert torch.equal(first, expected)


def test_forward_has_no_gradient():
    layer, case, _ = make_layer(MoEConfig(256, 128, 4, 2, weight_format="bf16"), dtype=torch.float32)
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    assert not layer(x.requires_grad_(), topk_idx, topk_weights).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_format_computes_in_the_dtype_of_the_weights(dtype):
    layer, case, (expected,) = make_layer(MoEConfig(256, 128, 4, 2, weight_format="bf16"), dtype=dtype)
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    y = layer(x, topk_idx, topk_weights)
    assert y.dtype == dtype and torch.equal(y, expected)


def test_plain_weights_are_quantized_by_block_on_loading():
    layer, case, _ = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    linear1, linear2 = torch.randn(4, 256, 256).bfloat16() / 16, torch.randn(4, 256, 128) / 11
    layer.load_weights(linear1, linear2)
    y = layer(x, topk_idx, topk_weights)
    first, second = quantize_blocks(linear1), quantize_blocks(linear2)
    layer.load_weights(first.values, second.values, first.sf, second.sf)
    assert torch.equal(layer(x, topk_idx, topk_weights), y)


def test_loading_copies_and_loads_again_in_place():
    layer, case, (expected,) = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    address = layer._engine.weights[0].linear1.data_ptr()
    old = case.weights[0]
    layer.load_weights(torch.zeros(4, 256, 256), torch.zeros(4, 256, 128))
    assert not layer(x, topk_idx, topk_weights).any()
    assert layer._engine.weights[0].linear1.data_ptr() == address
    layer.load_weights(old.linear1, old.linear2, old.linear1_sf, old.linear2_sf)  # the caller's were not overwritten
    assert torch.equal(layer(x, topk_idx, topk_weights), expected)


def test_layers_of_two_shapes_share_a_workspace():
    other = MoEConfig(128, 256, 6, 3)
    with Workspace([TINY, other], EPConfig(16, virtual_ranks=2), device="cpu") as workspace:
        layers = {config: MoELayer(config, workspace) for config in (TINY, other)}
        cases = {config: make_case(1, config, 2, [3, 4]) for config in layers}
        for config, layer in layers.items():
            linear1, linear1_sf, linear2, linear2_sf = list(map(list, zip(*cases[config].weights, strict=True)))[:4]
            layer.load_weights(linear1, linear2, linear1_sf, linear2_sf)
        for config in (TINY, other, TINY):
            x, _, topk_idx, topk_weights, _ = map(list, zip(*cases[config].inputs, strict=True))
            expected = moe_layer(config, LocalExchange(2), cases[config].weights, cases[config].inputs)
            assert all(map(torch.equal, layers[config](x, topk_idx, topk_weights), expected))


def bad_calls():
    """(what to change of a good call, error, text)."""
    n, h = 5, 256
    x, idx, w = torch.zeros(n, h).bfloat16(), torch.zeros(n, 2, dtype=torch.int32), torch.zeros(n, 2)
    e4m3, sf = quantize_rows(x)
    count = torch.tensor([5], dtype=torch.int32)
    yield {"hidden_states": x.float()}, TypeError, "has dtype torch.float32; use torch.bfloat16 or a pair (e4m3, sf)"
    yield {"hidden_states": x[:, :128]}, ValueError, "hidden_states has shape [5, 128]; expected [5, 256]"
    yield {"hidden_states": x[0]}, ValueError, "hidden_states has shape [256]; expected [num_tokens, hidden] = [n, 256]"
    yield {"hidden_states": x.t().contiguous().t()}, ValueError, "hidden_states has strides (1, 5); make it contiguous"
    yield {"hidden_states": x.to("meta")}, ValueError, "hidden_states is on meta, the workspace on cpu; move it"
    yield {"hidden_states": e4m3}, TypeError, "without scale factors; pass the pair (e4m3, sf)"
    yield {"hidden_states": (e4m3, sf[:, :1])}, ValueError, "hidden_states sf has shape [5, 1]; expected [5, 2]"
    yield {"hidden_states": (x, sf)}, TypeError, "hidden_states has dtype torch.bfloat16; use torch.float8_e4m3fn"
    yield {"hidden_states": (e4m3, sf, sf)}, TypeError, "hidden_states has type tuple and length 3"
    yield {"hidden_states": None}, TypeError, "hidden_states has type NoneType"
    yield {"hidden_states": torch.zeros(n * h + 1).bfloat16()[1:].view(n, h)}, ValueError, "no multiple of 16 bytes"
    yield {"topk_idx": idx[:4]}, ValueError, "topk_idx has shape [4, 2]; expected [5, 2]"
    yield {"topk_idx": idx.float()}, TypeError, "topk_idx has dtype torch.float32; use torch.int32 or torch.int64"
    yield {"topk_idx": idx + 4}, ValueError, "topk_idx[0, 0]=4 must be an expert id from 0 to 3, or -1"
    yield {"topk_idx": idx - 2}, ValueError, "topk_idx[0, 0]=-2 must be an expert id"
    yield (
        {"topk_weights": w.half()},
        TypeError,
        "topk_weights has dtype torch.float16; use torch.float32 or torch.bfloat16",
    )
    yield {"topk_weights": w[:, :1]}, ValueError, "topk_weights has shape [5, 1]; expected [5, 2]"
    yield {"num_tokens": 5}, TypeError, "num_tokens has type int; pass an int32 tensor with one element"
    yield {"num_tokens": count.long()}, TypeError, "num_tokens has dtype torch.int64; use torch.int32"
    yield {"num_tokens": count.repeat(2)}, ValueError, "num_tokens has shape [2]; expected [1]"
    yield {"num_tokens": count + 1}, ValueError, "num_tokens=6 must be between 0 and the 5 rows"
    yield {"num_tokens": count - 6}, ValueError, "num_tokens=-1 must be between 0 and the 5 rows"
    yield {"num_tokens_bound": 4}, ValueError, "hidden_states has 5 tokens, above num_tokens_bound=4"
    yield {"num_tokens_bound": 17}, ValueError, "num_tokens_bound=17 must be between 0 and the capacity"
    yield {"num_tokens_bound": count}, TypeError, "pass a host int, equal on all ranks"
    yield {"hidden_states": (x, None)}, TypeError, "hidden_states has dtype torch.bfloat16; use torch.float8_e4m3fn"
    yield {"hidden_states": (e4m3, None)}, TypeError, "hidden_states sf has type NoneType; pass a tensor"
    yield {"topk_idx": idx.tolist()}, TypeError, "topk_idx has type list; pass a tensor of shape [5, 2]"
    yield {"topk_idx": idx.numpy()}, TypeError, "topk_idx has type ndarray; pass a tensor of shape [5, 2]"
    yield {"num_tokens_bound": True}, TypeError, "num_tokens_bound=True has type bool; pass a host int"
    yield {"num_tokens_bound": 5.0}, TypeError, "num_tokens_bound=5.0 has type float; pass a host int"
    yield {"out": torch.zeros(n, h)}, TypeError, "out has dtype torch.float32; use torch.bfloat16"
    yield {"out": x[:4]}, ValueError, "out has shape [4, 256]; expected [5, 256]"
    yield {"hidden_states": x, "out": x}, ValueError, "out is the memory of hidden_states"


@pytest.mark.parametrize(("change", "error", "text"), list(bad_calls()), ids=lambda value: None)
def test_a_bad_call_is_refused_with_a_remedy_and_leaves_the_layer_usable(change, error, text):
    layer, case, (expected,) = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    good = {"hidden_states": x, "topk_idx": topk_idx, "topk_weights": topk_weights}
    for _ in range(2):  # also where arguments like the good ones have been checked before
        with pytest.raises(error) as raised:
            layer(**(good | change))
        assert text in str(raised.value)
        for like in ({}, {"num_tokens_bound": 5}, {"out": torch.empty_like(x)}, {"hidden_states": quantize_rows(x)}):
            layer(**(good | like))
    assert torch.equal(layer(**good), expected)


def test_kinds_of_calls_are_forgotten_when_there_are_many(monkeypatch):
    monkeypatch.setattr(CallChecks, "MAX_KINDS", 2)
    checks = CallChecks(TINY, torch.device("cpu"), 8)
    for n in range(8):
        checks.take("", torch.zeros(n, 256).bfloat16(), torch.zeros(n, 2).int(), torch.zeros(n, 2), None, None, 8, None)
        assert len(checks._kinds) <= 2


def test_virtual_ranks_of_one_launch_share_their_dtypes():
    ids, weights = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2)
    like = RankInput(torch.zeros(1, 256).bfloat16(), None, ids, weights)
    equal_dtypes([like, like])
    for other in (like._replace(topk_idx=ids.long()), like._replace(topk_weights=weights.bfloat16())):
        with pytest.raises(TypeError, match="use the same on all virtual ranks"):
            equal_dtypes([like, other])


def test_too_many_tokens_for_the_capacity():
    layer, case, _ = make_layer(capacity=4, num_tokens=5)
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    with pytest.raises(ValueError, match="hidden_states has 5 tokens, above num_max_tokens_per_rank=4; send fewer"):
        layer(x, topk_idx, topk_weights)


def test_virtual_ranks_name_the_rank_of_a_bad_argument():
    layer, case, _ = make_layer(virtual_ranks=2)
    x, _, topk_idx, topk_weights, _ = map(list, zip(*case.inputs, strict=True))
    with pytest.raises(ValueError, match=r"topk_idx\[1\] has shape \[4, 2\]"):
        layer(x, [topk_idx[0], topk_idx[1][:4]], topk_weights)
    with pytest.raises(TypeError, match=r"hidden_states has type Tensor; virtual_ranks=2 needs a list of 2"):
        layer(x[0], topk_idx, topk_weights)
    with pytest.raises(TypeError, match=r"topk_weights is a list of 1; virtual_ranks=2 needs a list of 2"):
        layer(x, topk_idx, topk_weights[:1])


def bad_weights():
    first, second = torch.zeros(4, 256, 256), torch.zeros(4, 256, 128)
    q1, q2 = quantize_blocks(first), quantize_blocks(second)
    yield (first[:2], second), {}, ValueError, "linear1 has shape [2, 256, 256]; expected [4, 256, 256]"
    yield (first, second.double()), {}, TypeError, "linear2 has dtype torch.float64"
    yield (q1.values, q2.values), {}, ValueError, "linear1_sf is missing; e4m3 weights need fp32 [4, 2, 2]"
    yield (q1.values, q2.values, q1.sf, q2.sf.double()), {}, TypeError, "linear2_sf has dtype torch.float64"
    yield (
        (q1.values, q2.values, q1.sf[:, :1], q2.sf),
        {},
        ValueError,
        "linear1_sf has shape [4, 1, 2]; expected [4, 2, 2]",
    )
    yield (first, second, q1.sf), {}, ValueError, "linear1_sf was given with linear1 in torch.float32"
    yield (first.transpose(1, 2), second), {}, ValueError, "linear1 has strides"
    bf16 = {"weight_format": "bf16"}
    yield (
        (first, second, q1.sf),
        bf16,
        ValueError,
        "linear1_sf was given, but weight_format='bf16' has no scale factors",
    )
    yield (first, second.bfloat16()), bf16, TypeError, "linear2 has dtype torch.bfloat16; use torch.float32"
    yield (
        (first.half(), second.half()),
        bf16,
        TypeError,
        "linear1 has dtype torch.float16; use torch.bfloat16 or torch.float32",
    )


@pytest.mark.parametrize(("arguments", "options", "error", "text"), list(bad_weights()), ids=lambda value: None)
def test_bad_weights_are_refused_with_a_remedy(arguments, options, error, text):
    config = MoEConfig(256, 128, 4, 2, **options)
    layer = MoELayer(config, Workspace(config, EPConfig(8), device="cpu"))
    with pytest.raises(error) as raised:
        layer.load_weights(*arguments)
    assert text in str(raised.value)


def test_forward_before_load_weights_and_after_close():
    layer = MoELayer(TINY, Workspace(TINY, EPConfig(8), device="cpu"))
    x, idx, weights = torch.zeros(1, 256).bfloat16(), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match="call load_weights first"):
        layer(x, idx, weights)
    layer.load_weights(torch.zeros(4, 256, 256), torch.zeros(4, 256, 128))
    layer(x, idx, weights)
    layer.close()
    layer.close()
    with pytest.raises(RuntimeError, match="call load_weights first"):
        layer(x, idx, weights)


def test_a_closed_workspace_refuses_calls():
    layer, case, _ = make_layer()
    layer.workspace.close()
    layer.workspace.close()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]
    with pytest.raises(MegaMoEError, match="the workspace is closed; create a new one"):
        layer(x, topk_idx, topk_weights)


def test_a_failed_call_poisons_the_workspace_until_reset(monkeypatch):
    layer, case, (expected,) = make_layer()
    x, _, topk_idx, topk_weights, _ = case.inputs[0]

    def fail(*_):
        raise MegaMoEError("stuck")

    with monkeypatch.context() as patch:
        patch.setattr(layer._engine, "forward", fail)
        with pytest.raises(MegaMoEError, match="stuck"):
            layer(x, topk_idx, topk_weights)
    for refused in (layer.check, lambda: layer(x, topk_idx, topk_weights)):
        with pytest.raises(MegaMoEError, match=r"an earlier call failed \(stuck\); call workspace.reset"):
            refused()
    layer.workspace.reset()
    layer.check()
    assert torch.equal(layer(x, topk_idx, topk_weights), expected)


def test_workspace_refuses_what_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="moe_configs is empty"):
        Workspace([], EPConfig(8), device="cpu")
    with pytest.raises(ValueError, match="num_experts=4 cannot be spread evenly over ep_size=3"):
        Workspace(TINY, EPConfig(8, virtual_ranks=3), device="cpu")
    with pytest.raises(ValueError, match="has no implementation"):
        Workspace(TINY, EPConfig(8), device="meta")
    bf16 = MoEConfig(256, 128, 4, 2, weight_format="bf16")
    with pytest.raises(ValueError, match="weight_format='bf16' runs on CPU only; use device='cpu'"):
        Workspace(bf16, EPConfig(8), device="cuda")
    with pytest.raises(ValueError, match="is not among workspace"):
        MoELayer(bf16, Workspace(TINY, EPConfig(8), device="cpu"))
    with pytest.raises(TypeError, match="config has type Workspace and workspace has type MoEConfig; pass a MoEC"):
        MoELayer(Workspace(TINY, EPConfig(8), device="cpu"), TINY)
    with pytest.raises(TypeError, match="moe_configs holds a value of type dict; pass a MoEConfig"):
        Workspace({}, EPConfig(8), device="cpu")
    with pytest.raises(TypeError, match="ep_config has type int; pass an EPConfig"):
        Workspace(TINY, 8, device="cpu")
    monkeypatch.setenv("MEGAMOE_DEBUG", "loud")  # misspelt, it must not pass for off
    with pytest.raises(ValueError, match="MEGAMOE_DEBUG='loud' must be 0, 1, 2 or 3"):
        Workspace(TINY, EPConfig(8), device="cpu")
