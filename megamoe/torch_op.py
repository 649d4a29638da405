"""The layer as torch operators, for torch.compile: opaque to it, with the shapes it needs while tracing.

`MoELayer.forward` takes this way by itself while a compiler traces it; eager calls do not. A layer stands in the graph
as its `handle`, an int, since an operator is given tensors and numbers only; it is good while the layer lives.

The handle is a constant of the graph. A model compiled as a whole has one graph for all layers; a block that is
compiled once and called for many layers is traced again for each, up to torch._dynamo.config.recompile_limit (8).
"""

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_handles = itertools.count(1)
_layers: WeakValueDictionary = WeakValueDictionary()


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


@torch.library.custom_op("megamoe::moe_layer", mutates_args=())
def moe_layer(
    x: Tensor, x_sf: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, num_tokens: Tensor | None, handle: int,
    num_tokens_bound: int,
) -> Tensor:  # fmt: skip
    """MoELayer.forward with its arguments; handle: of the layer, num_tokens_bound: -1 stands for None."""
    hidden_states, bound = _arguments(x, x_sf, num_tokens_bound)
    return _layer(handle)(hidden_states, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=bound)


@moe_layer.register_fake
def _(x, x_sf, topk_idx, topk_weights, num_tokens, handle, num_tokens_bound):
    return torch.empty_like(x, dtype=torch.bfloat16 if x_sf is not None else x.dtype)


@torch.library.custom_op("megamoe::moe_layer_out", mutates_args=("out",))
def moe_layer_out(
    x: Tensor, x_sf: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, num_tokens: Tensor | None, handle: int,
    num_tokens_bound: int, out: Tensor,
) -> None:  # fmt: skip
    """The same with out=."""
    hidden_states, bound = _arguments(x, x_sf, num_tokens_bound)
    _layer(handle)(hidden_states, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=bound, out=out)


@moe_layer_out.register_fake
def _(x, x_sf, topk_idx, topk_weights, num_tokens, handle, num_tokens_bound, out):
    return None


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
