"""The checks behind MoELayer. ``rank`` is "" or, with virtual ranks, "[r]": it completes an argument's name in
messages."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from megamoe.config import BLOCK, EPConfig, MoEConfig
from megamoe.layout import MXFP4_GROUP
from megamoe.plan.plan import ExpertPlan
from megamoe.quant import mxfp4
from megamoe.quant.fp8 import E4M3, quantize_blocks
from megamoe.steps import ExpertWeights, RankInput

ALIGNMENT = 16
"""Bytes, of hidden_states and out: what one lane loads and stores."""
LOADABLE = (torch.bfloat16, torch.float16, torch.float32)


def tensor(
    name: str,
    value,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    aligned: bool = False,
) -> None:
    """Type, dtype, shape, device, stride, in the order in which a wrong one explains the next."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} has type {type(value).__name__}; pass a tensor of shape {list(shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; use {' or '.join(map(str, dtypes))}")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the workspace on {device}; move it with .to('{device}')")
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}; make it contiguous with .contiguous()")
    if aligned and value.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} starts at an address that is no multiple of {ALIGNMENT} bytes; use .clone()")


def per_rank(virtual_ranks: int | None, name: str, value) -> Sequence:
    """An argument as one entry per rank held here."""
    if virtual_ranks is None:
        return (value,)
    if value is None:
        return (None,) * virtual_ranks
    if isinstance(value, list) and len(value) == virtual_ranks:
        return value
    got = f"is a list of {len(value)}" if isinstance(value, list) else f"has type {type(value).__name__}"
    raise TypeError(f"{name} {got}; virtual_ranks={virtual_ranks} needs a list of {virtual_ranks}, one entry per rank")


def suffixes(virtual_ranks: int | None) -> Sequence[str]:
    """`rank` of each rank held here."""
    return ("",) if virtual_ranks is None else tuple(f"[{rank}]" for rank in range(virtual_ranks))


def expert_weights(
    config: MoEConfig, num_local_experts: int, device: torch.device, rank: str, linear1, linear1_sf, linear2,
    linear2_sf, linear1_bias=None, linear2_bias=None,
) -> ExpertWeights:  # fmt: skip
    """Check one rank's weights; floating ones of the fp8 format are quantized by block, biases become fp32."""
    weights = _weights(config, num_local_experts, device, rank, linear1, linear1_sf, linear2, linear2_sf)
    biases = {}
    for name, bias, columns in (
        ("linear1_bias", linear1_bias, 2 * config.intermediate), ("linear2_bias", linear2_bias, config.hidden)
    ):  # fmt: skip
        if config.bias:
            tensor(f"{name}{rank}", bias, (num_local_experts, columns), LOADABLE, device)
            biases[name] = bias.float()
        elif bias is not None:
            raise ValueError(
                f"{name}{rank} was given, but the layer's MoEConfig has bias=False; drop it or set bias=True"
            )
    return weights._replace(**biases)


def _weights(
    config: MoEConfig, num_local_experts: int, device: torch.device, rank: str, linear1, linear1_sf, linear2, linear2_sf
) -> ExpertWeights:
    """mxfp4: as loaded; groups outside the binades of their base are still to be re-rounded (fit_mxfp4)."""
    shape1 = (num_local_experts, 2 * config.intermediate, config.hidden)
    shape2 = (num_local_experts, config.hidden, config.intermediate)
    if config.weight_format == "fp8":
        first = _fp8_weight(f"linear1{rank}", linear1, linear1_sf, shape1, device)
        return ExpertWeights(*first, *_fp8_weight(f"linear2{rank}", linear2, linear2_sf, shape2, device))
    if config.weight_format == "mxfp4":
        first = _mxfp4_weight(f"linear1{rank}", linear1, linear1_sf, shape1, device)
        return ExpertWeights(*first, *_mxfp4_weight(f"linear2{rank}", linear2, linear2_sf, shape2, device))
    for name, sf in (("linear1_sf", linear1_sf), ("linear2_sf", linear2_sf)):
        if sf is not None:
            raise ValueError(
                f"{name}{rank} was given, but weight_format='bf16' has no scale factors; drop it or use 'fp8'"
            )
    tensor(f"linear1{rank}", linear1, shape1, (torch.bfloat16, torch.float32), device)
    tensor(f"linear2{rank}", linear2, shape2, (linear1.dtype,), device)
    return ExpertWeights(linear1, None, linear2, None)


def _mxfp4_weight(name: str, weight, sf, shape: tuple[int, int, int], device: torch.device) -> mxfp4.Mxfp4:
    base, bracket, rank = name.partition("[")
    sf_name = f"{base}_sf{bracket}{rank}"
    experts, rows, columns = shape
    if isinstance(weight, Tensor) and weight.dtype in LOADABLE:
        tensor(name, weight, shape, LOADABLE, device)
        if sf is not None:
            raise ValueError(
                f"{sf_name} was given with {name} in {weight.dtype}; scale factors belong to uint8 codes, drop it"
            )
        found = mxfp4.quantize(weight)
    else:
        tensor(name, weight, (experts, rows, columns // 2), (torch.uint8, *LOADABLE), device)
        if sf is None:
            raise ValueError(f"{sf_name} is missing; mxfp4 codes need uint8 {[experts, rows, columns // MXFP4_GROUP]}")
        tensor(sf_name, sf, (experts, rows, columns // MXFP4_GROUP), (torch.uint8,), device)
        found = mxfp4.Mxfp4(weight, sf)
    for expert in range(experts):
        problem = mxfp4.refusal(found.codes[expert], found.sf[expert])
        if problem:
            raise ValueError(f"{name} of local expert {expert}: {problem}; repair the checkpoint")
    return found


def fit_mxfp4(weights: ExpertWeights) -> tuple[ExpertWeights, dict[str, int]]:
    """The weights that the kernel multiplies, and how many groups of each tensor had to be re-rounded for it.

    Tensors without such groups are handed through; of others a copy is made."""
    tensors, counts = {}, {}
    for name, codes, sf in (
        ("linear1", weights.linear1, weights.linear1_sf),
        ("linear2", weights.linear2, weights.linear2_sf),
    ):
        counts[name] = 0
        for expert in range(len(codes)):
            fitted = mxfp4.fit(codes[expert], sf[expert])
            if fitted.rerounded and not counts[name]:
                codes, sf = codes.clone(), sf.clone()
            if fitted.rerounded:
                codes[expert], sf[expert] = fitted.codes, fitted.sf
            counts[name] += fitted.rerounded
        tensors |= {name: codes, f"{name}_sf": sf}
    return weights._replace(**tensors), counts


def _fp8_weight(name: str, weight, sf, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    base, bracket, rank = name.partition("[")
    sf_name = f"{base}_sf{bracket}{rank}"
    tensor(name, weight, shape, (E4M3, *LOADABLE), device)
    if weight.dtype == E4M3:
        if sf is None:
            raise ValueError(
                f"{sf_name} is missing; e4m3 weights need fp32 [{shape[0]}, {shape[1] // BLOCK}, {shape[2] // BLOCK}]"
            )
        tensor(sf_name, sf, (shape[0], shape[1] // BLOCK, shape[2] // BLOCK), (torch.float32,), device)
        return weight, sf
    if sf is not None:
        raise ValueError(
            f"{sf_name} was given with {name} in {weight.dtype}; scale factors belong to e4m3 weights, drop it"
        )
    return quantize_blocks(weight)


def num_tokens_bound(bound: int | None, capacity: int) -> int:
    """The bound that holds for this call."""
    if bound is None:
        return capacity
    if isinstance(bound, bool) or not isinstance(bound, int):
        raise TypeError(
            f"num_tokens_bound={bound!r} has type {type(bound).__name__}; pass a host int, equal on all ranks"
        )
    if not 0 <= bound <= capacity:
        raise ValueError(
            f"num_tokens_bound={bound} must be between 0 and the capacity num_max_tokens_per_rank={capacity}"
        )
    return bound


class Kind:
    """What calls share whose arguments differ in values and addresses alone, on one workspace: the object itself. An
    engine that has served one has only addresses to write for the next.

    num_tokens: rows given; input_bytes: of hidden_states without scale factors; is_pair: whether those came along."""

    __slots__ = ("_are_alike", "_has_num_tokens", "_has_out", "input_bytes", "is_pair", "num_tokens")

    def __init__(self, x: Tensor, x_sf: Tensor | None, topk_idx, topk_weights, num_tokens, out):
        """Arguments that have passed the checks."""
        self.num_tokens, self.input_bytes, self.is_pair = x.shape[0], x.nbytes, x_sf is not None
        self._has_num_tokens, self._has_out = num_tokens is not None, out is not None
        tensors = [t for t in (x, topk_idx, topk_weights, x_sf, num_tokens, out) if t is not None]
        # One call of 0.3 us for classes, dtypes, devices, shapes, strides and what else tells tensors apart. It is
        # torch.compile's own, and torch has no public name for it; as many attributes read in Python take 2 us
        self._are_alike = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def addresses(self, value, topk_idx, topk_weights, num_tokens, out) -> tuple[int, int, int, int, int, int] | None:
        """Of x, x_sf, topk_idx, topk_weights, num_tokens and out, 0 for what is not given. None: these arguments, which
        may be anything, are not of this kind, and the checks have to look at them."""
        if self.is_pair:
            if value.__class__ is not tuple or len(value) != 2:
                return None
            x, x_sf = value
            tensors = x, topk_idx, topk_weights, x_sf
        else:
            x, x_sf, tensors = value, None, (value, topk_idx, topk_weights)
        if num_tokens is not None:
            tensors += (num_tokens,)
        if out is not None:
            tensors += (out,)
        if (
            (num_tokens is not None) is not self._has_num_tokens
            or (out is not None) is not self._has_out
            or not self._are_alike(*tensors)
        ):
            return None
        address, out_address = x.data_ptr(), 0 if out is None else out.data_ptr()
        if (address | out_address) % ALIGNMENT or (address == out_address and self.num_tokens):
            return None
        return (
            address, 0 if x_sf is None else x_sf.data_ptr(), topk_idx.data_ptr(), topk_weights.data_ptr(),
            0 if num_tokens is None else num_tokens.data_ptr(), out_address,
        )  # fmt: skip


class CallChecks:
    """The checks of a call's arguments, for layers of one config on one workspace.

    Arguments of a Kind that has passed are not looked at again: it spares the calls of a model about 7 us each, all but
    the first with its number of tokens.
    """

    MAX_KINDS = 4096

    def __init__(self, config: MoEConfig, device: torch.device, capacity: int):
        self.config, self.device, self.capacity = config, device, capacity
        self.look_at_values = device.type == "cpu"  # elsewhere that stops the stream: the kernel finds these itself
        self._kinds: dict[tuple, Kind] = {}  # the last one of each key

    def take(
        self, rank: str, value, topk_idx, topk_weights, num_tokens, output, bound: int, weight_dtype: torch.dtype | None
    ) -> tuple[RankInput, Kind]:
        """value: hidden_states; output: out. Errors as MoELayer.forward has them."""
        x = value[0] if value.__class__ is tuple and value else value
        shape = x.shape if isinstance(x, Tensor) else None
        key = shape, value is x, num_tokens is None, output is None, bound, weight_dtype
        kind = self._kinds.get(key)
        if kind is None or kind.addresses(value, topk_idx, topk_weights, num_tokens, output) is None:
            x, x_sf = hidden_states(self.config, self.device, rank, value, weight_dtype)
            routing(self.config, self.device, rank, x, topk_idx, topk_weights, num_tokens, bound, self.capacity)
            out(self.config, self.device, rank, output, x, weight_dtype)
            if len(self._kinds) == self.MAX_KINDS:
                self._kinds.clear()
            kind = self._kinds[key] = Kind(x, x_sf, topk_idx, topk_weights, num_tokens, output)
        else:
            x, x_sf = value if kind.is_pair else (value, None)
        # Its own constructor, a function of Python, takes twice as long
        rank_input = tuple.__new__(RankInput, (x, x_sf, topk_idx, topk_weights, num_tokens))
        if self.look_at_values:
            _values(self.config, rank, rank_input)
        return rank_input, kind


def hidden_states(
    config: MoEConfig, device: torch.device, rank: str, value, weight_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """-> (x, x_sf or None)."""
    name = f"hidden_states{rank}"
    is_pair = isinstance(value, tuple | list)
    if is_pair and (len(value) != 2 or not config.has_e4m3_activations):
        raise TypeError(
            f"{name} has type {type(value).__name__} and length {len(value)}; pass a tensor, or with 'fp8' a pair "
            "(e4m3, sf)"
        )
    x, x_sf = value if is_pair else (value, None)
    if is_pair:
        dtypes = (E4M3,)
    else:
        dtypes = (torch.bfloat16,) if config.has_e4m3_activations else (weight_dtype,)
    if not isinstance(x, Tensor) or x.dim() != 2:
        got = f"has shape {list(x.shape)}" if isinstance(x, Tensor) else f"has type {type(x).__name__}"
        raise (ValueError if isinstance(x, Tensor) else TypeError)(
            f"{name} {got}; expected [num_tokens, hidden] = [n, {config.hidden}]"
        )
    if x.dtype == E4M3 and not is_pair:
        raise TypeError(f"{name} has dtype {x.dtype} without scale factors; pass the pair (e4m3, sf)")
    if config.has_e4m3_activations and not is_pair and x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; use torch.bfloat16 or a pair (e4m3, sf)")
    tensor(name, x, (x.shape[0], config.hidden), dtypes, device, aligned=True)
    if is_pair:
        tensor(f"{name} sf", x_sf, (x.shape[0], config.hidden // BLOCK), (torch.float32,), device)
    return x, x_sf


def routing(
    config: MoEConfig, device: torch.device, rank: str, x: Tensor, topk_idx, topk_weights, num_tokens, bound: int,
    capacity: int,
) -> None:  # fmt: skip
    """Token count, ids and weights of one rank, values aside."""
    n = x.shape[0]
    if n > bound:
        limit = "num_max_tokens_per_rank" if bound == capacity else "num_tokens_bound"
        raise ValueError(
            f"hidden_states{rank} has {n} tokens, above {limit}={bound}; send fewer, or raise it on all ranks"
        )
    shape = (n, config.topk)
    tensor(f"topk_idx{rank}", topk_idx, shape, (torch.int32, torch.int64), device)
    tensor(f"topk_weights{rank}", topk_weights, shape, (torch.float32, torch.bfloat16), device)
    if num_tokens is not None:
        if not isinstance(num_tokens, Tensor):
            got = type(num_tokens).__name__
            raise TypeError(f"num_tokens{rank} has type {got}; pass an int32 tensor with one element on {device}")
        tensor(f"num_tokens{rank}", num_tokens.reshape(-1), (1,), (torch.int32,), device)


def _values(config: MoEConfig, rank: str, rank_input: RankInput) -> None:
    n = rank_input.x.shape[0]
    if rank_input.num_tokens is not None:
        count = int(rank_input.num_tokens)
        if not 0 <= count <= n:
            raise ValueError(f"num_tokens{rank}={count} must be between 0 and the {n} rows of hidden_states{rank}")
        n = count
    topk_idx = rank_input.topk_idx[:n]
    bad = ((topk_idx < -1) | (topk_idx >= config.num_experts)).nonzero()
    if len(bad):
        token, slot = bad[0].tolist()
        raise ValueError(
            f"topk_idx{rank}[{token}, {slot}]={int(topk_idx[token, slot])} must be an expert id from 0 to "
            f"{config.num_experts - 1}, or -1 for an unused slot"
        )


def out(config: MoEConfig, device: torch.device, rank: str, value, x: Tensor, weight_dtype: torch.dtype | None) -> None:
    """The caller's output tensor, if any."""
    if value is None:
        return
    dtype = torch.bfloat16 if config.has_e4m3_activations else weight_dtype
    tensor(f"out{rank}", value, (x.shape[0], config.hidden), (dtype,), device, aligned=True)
    if value.numel() and value.data_ptr() == x.data_ptr():
        raise ValueError(
            f"out{rank} is the memory of hidden_states{rank}; pass another tensor, peers may still read it"
        )


def one_domain(workspace) -> None:
    """ValueError where a plan would have to move weights between NVLink domains."""
    if workspace.domains is not None:
        raise ValueError(
            f"{workspace.ep_size} ranks are {workspace.domains.num_domains} NVLink domains, and no plan moves weights "
            "between them; use ranks of one domain (EPConfig.ranks_per_domain), or give the layer the plan's physical "
            "experts and choose copies before each call (megamoe.plan.choose_replicas)"
        )


def equal_places(mine, theirs) -> None:
    """ValueError where a layer on the workspace `mine` cannot use the weights, in their slots, of one on `theirs`."""
    facts = [
        (("ep_size", w.ep_size), ("ep_rank", w.ep_rank), ("ranks a process", w.num_ranks_here), ("device", w.device),
         ("domains", w.ep_config.num_domains(w.ep_size)), ("num_staged_experts", w.ep_config.num_staged_experts),
         ("num_redundant_slots_per_rank", w.ep_config.num_redundant_slots_per_rank))
        for w in (mine, theirs)
    ]  # fmt: skip
    for (name, here), (_, there) in zip(*facts, strict=True):
        if here != there:
            raise ValueError(
                f"weights_of is on a workspace with {name}={there}, this layer on one with {here}; use equal ones"
            )


def equal_dtypes(inputs: Sequence[RankInput]) -> None:
    """TypeError where virtual ranks differ: one launch serves all of them with one set of dtypes."""
    kinds = {(i.x.dtype, i.topk_idx.dtype, i.topk_weights.dtype) for i in inputs}
    if len(kinds) > 1:
        raise TypeError(
            f"hidden_states, topk_idx and topk_weights have dtypes {kinds}; use the same on all virtual ranks"
        )


def plan_placement(config: MoEConfig, ep_config: EPConfig, ep_size: int, plan, plan_layer: int):
    """The plan's experts by rank, int [ep_size, slots of the plan]. ValueError when it is not for this layer."""
    if not isinstance(plan, ExpertPlan):
        raise TypeError(f"plan has type {type(plan).__name__}; pass an ExpertPlan, such as plan_experts() makes")
    if not 0 <= plan_layer < plan.num_layers:
        raise ValueError(f"plan_layer={plan_layer}: the plan has {plan.num_layers} layers")
    if (plan.num_logical_experts, plan.num_ranks) != (config.num_experts, ep_size):
        raise ValueError(
            f"the plan is for {plan.num_logical_experts} experts on {plan.num_ranks} ranks, the layer has "
            f"{config.num_experts} on {ep_size}; plan again for this topology"
        )
    slots, needed = ep_config.num_slots(config, ep_size), plan.num_local_experts
    if needed > slots:
        raise ValueError(
            f"the plan needs {needed} slots on each rank, the layer has {slots}; set "
            f"EPConfig.num_redundant_slots_per_rank={needed - config.num_local_experts(ep_size)} or more"
        )
    return plan.placed[plan_layer]
