"""The layer as torch operators, for torch.compile: opaque to it, with the shapes it needs while tracing.

`MoELayer.forward` takes this way by itself while a compiler traces it; eager calls do not. A layer stands in the graph
as its `handle`, an int, since an operator is given tensors and numbers only; it is good while the layer lives.

The handle is a constant of the graph. A model compiled as a whole has one graph for all layers; a block that is
compiled once and called for many layers is traced again for each, up to torch._dynamo.config.recompile_limit (8), or
twice in all where torch._dynamo.config.allow_unspec_int_on_nn_module makes it an argument.
"""

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_library = torch.library.Library("megamoe", "FRAGMENT")
_handles = itertools.count(1)
_layers: WeakValueDictionary = WeakValueDictionary()


def operator(fake: Callable, mutates_args: Sequence[str] = ()) -> Callable:
    """Decorator: a function as torch.ops.megamoe's operator of its name, `fake` with the same arguments its shapes.

    As torch.library.custom_op, without its wrappers around each call, which take 7 us, and more inside a compiled
    graph. They would look after gradients, which these operators have none of, and results that alias arguments.
    """

    def define(function: Callable) -> Callable:
        name = function.__name__
        schema = name + torch.library.infer_schema(function, mutates_args=mutates_args)
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"megamoe::{name}", fake, lib=_library)
        return function

    return define


def register(layer) -> int:
    """A handle for `layer`, a MoELayer; it keeps nothing alive."""
    handle = next(_handles)
    _layers[handle] = layer
    return handle


def _layer(handle: int):
    layer = _layers.get(handle)
    if layer is None:
        raise RuntimeError(f"layer handle {handle} names no living MoELayer; compile the model that is called, again")
    return layer


def _arguments(x: Tensor, x_sf: Tensor | None, num_tokens_bound: int) -> tuple:
    return (x if x_sf is None else (x, x_sf)), (None if num_tokens_bound < 0 else num_tokens_bound)


def _fake_moe_layer(x, x_sf, topk_idx, topk_weights, num_tokens, handle, num_tokens_bound):
    return torch.empty_like(x, dtype=torch.bfloat16 if x_sf is not None else x.dtype)


@operator(fake=_fake_moe_layer)
def moe_layer(
    x: Tensor, x_sf: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, num_tokens: Tensor | None, handle: int,
    num_tokens_bound: int,
) -> Tensor:  # fmt: skip
    """MoELayer.forward with its arguments; handle: of the layer, num_tokens_bound: -1 stands for None."""
    hidden_states, bound = _arguments(x, x_sf, num_tokens_bound)
    # forward: hooks are traced around the operator, and looking for them takes a microsecond
    return _layer(handle).forward(hidden_states, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=bound)


@operator(fake=lambda *arguments: None, mutates_args=("out",))
def moe_layer_out(
    x: Tensor, x_sf: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, num_tokens: Tensor | None, handle: int,
    num_tokens_bound: int, out: Tensor,
) -> None:  # fmt: skip
    """The same with out=."""
    hidden_states, bound = _arguments(x, x_sf, num_tokens_bound)
    _layer(handle).forward(
        hidden_states, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=bound, out=out
    )


def call(layer, hidden_states, topk_idx, topk_weights, num_tokens, num_tokens_bound, out) -> Tensor:
    """What MoELayer.forward is while it is being traced."""
    x, x_sf = hidden_states if isinstance(hidden_states, tuple | list) else (hidden_states, None)
    # Not no_grad: an error raised inside a traced one would leave autograd switched off
    x, topk_weights = x.detach(), topk_weights.detach()
    bound = -1 if num_tokens_bound is None else num_tokens_bound
    if out is None:
        return torch.ops.megamoe.moe_layer(x, x_sf, topk_idx, topk_weights, num_tokens, layer.handle, bound)
    torch.ops.megamoe.moe_layer_out(x, x_sf, topk_idx, topk_weights, num_tokens, layer.handle, bound, out)
    return out
