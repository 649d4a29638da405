"""megamoe under a Hugging Face model: the experts of every MoE layer served through transformers' experts registration.

    from megamoe.integrations.transformers import enable

    model = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16").to("cuda")
    with enable(model) as serving:                    # or enable(model) ... disable(model)
        logits = model(input_ids).logits

Under torch.distributed the experts are sharded (expert e on rank e // num_local_experts), attention is data-parallel:
every rank brings its own tokens. A forward of the model is then collective: all ranks run the same number of forwards,
with any number of tokens each; a rank without tokens calls `serving.idle()` instead.

Forward only. Served are gated experts in parameters gate_up_proj and down_proj, transposed or interleaved or neither,
with or without biases, whose gating is one that MoEConfig names: Qwen3-MoE, Mixtral, DeepSeek-V3, gpt-oss are tested.
Sizes that are no multiple of 128 are padded with zeros at load, tokens at each call, and the output is trimmed.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary, finalize, ref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError(
        "megamoe.integrations.transformers needs transformers 5.x with its experts registration (tested with 5.17): "
        "pip install 'megamoe[transformers]'"
    ) from error

from megamoe import torch_op
from megamoe.checkpoint import Checkpoint, CheckpointError, expert_bytes, find_problems, load_experts
from megamoe.config import EPConfig
from megamoe.errors import MegaMoEError
from megamoe.integrations.absent import unwatch, watch
from megamoe.integrations.alike import alike
from megamoe.integrations.chunks import Chunks
from megamoe.integrations.dense import load_without_experts
from megamoe.integrations.experts import Experts, expert_parameters, find_experts, weights_of
from megamoe.integrations.shared import IMPLEMENTATION, append_shared, find_shared, fold, unfold, unfold_id
from megamoe.integrations.spec import SpecExperts, exchange_of
from megamoe.layer import MoELayer
from megamoe.progress import Progress
from megamoe.workspace import Workspace

DEFAULT_CAPACITY = 4096


def enable(
    model: nn.Module | str | Path,
    *,
    workspace: Workspace | None = None,
    ep_config: EPConfig | None = None,
    weight_format: str = "fp8",
    checkpoint: str | Path | Checkpoint | None = None,
    group: dist.ProcessGroup | None = None,
    donate: bool = False,
    spec: bool = False,
    lockstep_chunks: bool = False,
    fold_shared_experts: bool = False,
) -> "Serving":
    """Serve the experts of every MoE layer of `model` by megamoe; collective over the ranks of `group`.

    model          a transformers model on the device it will run on, bf16 or fp32; or a directory with safetensors,
                   loaded in bf16 on the current device with this rank's experts only: `.model` of what is returned
    workspace      to share with other models; by default one is made for this model and closed by disable()
    ep_config      capacity and deadlines; default EPConfig(num_max_tokens_per_rank=4096). A forward with more tokens
                   (batch x sequence) on a rank than the capacity is refused
    weight_format  "fp8": weights by 128x128 block, activations by 128 of K, in e4m3; the layer takes and returns bf16.
                   "mxfp4": weights in e2m1 with a power of two for 32 of K, activations as for "fp8".
                   "bf16" (CPU only): unquantized, in the dtype of the model, fp32 included
    checkpoint     None: weights come from the module's parameters, and follow them when they change. A path: this
                   rank's experts are read from there, the module's parameters are left alone and may be on meta
    group          process group; default: torch.distributed's default group if initialised, else one rank
    donate         move the module's expert parameters to meta once copied: their memory is free, eager refuses to run
    spec           run megamoe/steps.py (plain torch) on whatever device the model is on: the yardstick for the kernel
    lockstep_chunks  more tokens than the capacity are sent in several calls, as many on every rank as the one with most
                   needs: agreed on by the hosts before each layer, which waits for the device. Not in a CUDA graph
    fold_shared_experts  the model's shared experts (DeepSeek-V3) become experts of the layer that every token goes to,
                   in its weight_format; from the module's parameters, also with a checkpoint, and whatever `donate`
                   says they stay. Refused where the block does something else with them, and by the workspace with
                   plans or several NVLink domains

    Returns a Serving, also usable as a context manager. Raises ValueError if the model has no MoE layer, or one that
    cannot be served (all reasons listed), or is enabled already; CheckpointError that lists all that is wrong with all
    layers' tensors. Nothing of the model is changed when it raises; where one rank refuses, all do, with its reason.
    However long a rank loads, the others wait for it: none returns before all have their weights.
    """
    if not isinstance(ep_config, EPConfig | None):
        raise TypeError(f"ep_config={ep_config!r} must be an EPConfig, such as EPConfig(num_max_tokens_per_rank=4096)")
    group = workspace.group if workspace else group
    ep_size, ep_rank = _placement(group)
    members = (group or dist.group.WORLD) if ep_size > 1 else None
    found, shared, held = {}, {}, None
    given, ep_config = ep_config, workspace.ep_config if workspace else ep_config or EPConfig(DEFAULT_CAPACITY)
    with alike(members, ep_config.arrive_deadline_s):
        if given is not None and workspace is not None:
            raise ValueError("ep_config: the workspace has one already; pass either workspace or ep_config")
        if workspace is not None:
            workspace.check_open()  # ranks that refuse make no layer, so the others must not either
        if ep_config.virtual_ranks is not None:
            raise ValueError(f"ep_config.virtual_ranks={ep_config.virtual_ranks}: a model is one rank; leave it None")
        if spec and workspace is not None:
            raise ValueError("workspace: steps.py uses none; leave it out with spec=True")
        if isinstance(model, str | Path):
            on_cuda = torch.cuda.is_available()
            checkpoint = checkpoint or Checkpoint(model)
            model = held = load_without_experts(
                model, dtype=torch.bfloat16,
                device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"),
            )  # fmt: skip
        elif not isinstance(model, nn.Module):
            raise TypeError(f"model has type {type(model).__name__}; pass a transformers model, or a directory")
        if model in _SERVINGS:
            raise ValueError("model: its experts are served by megamoe already; call disable(model) first")
        found = find_experts(model, weight_format)
        shared = find_shared(model, found) if fold_shared_experts else {}
        for name, (_, count) in shared.items():
            found[name] = replace(found[name], config=replace(found[name].config, num_shared_experts=count))
        source = Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
        _check_source(found, source, ep_size, ep_rank)
    device = next(iter(found.values())).device

    with ExitStack() as undo:
        owned = None
        if not spec and workspace is None:
            configs = list(dict.fromkeys(info.config for info in found.values()))
            workspace = owned = Workspace(configs, ep_config, group=group, device=device)
            undo.push(_closing(owned))
        slots = {}
        if spec:
            exchange_of(group)  # may make a group of its own, collective: no rank may be elsewhere meanwhile
        with alike(members, ep_config.arrive_deadline_s):
            for name, info in found.items():
                layer = SpecExperts(info.config, group) if spec else MoELayer(info.config, workspace)
                undo.callback(layer.close)
                slots[name] = _Slot(info, layer, ep_config.num_max_tokens_per_rank, ep_size, ep_rank, donate)
                slots[name].chunks = Chunks(group, ep_size) if lockstep_chunks else None
                slots[name].shared = ref(shared[name][0]) if shared else None
            size = sum(slot.bytes_in(source) for slot in slots.values())
            with Progress("experts", size, None if ep_rank == 0 else False) as bar:
                for slot in slots.values():
                    slot.load(source, bar)
        serving = Serving(model, slots, workspace, owned)
        serving._held = held
        undo.pop_all()
    return serving


def disable(model: nn.Module) -> None:
    """Give the experts back to the implementation they had before enable(); collective. ValueError if not enabled."""
    if model not in _SERVINGS:
        raise ValueError("model: its experts are not served by megamoe; nothing to disable")
    _SERVINGS[model].close()


class Serving:
    """What enable() set up.

    layers: {module name: MoELayer}; workspace: shared by them (None with spec=True).
    num_tokens_bound: None, or what the next forwards pass to the layers: an int, equal on all ranks, that no rank's
    tokens exceed. Set it to the batch size while decoding. None: the capacity; on one rank, what the call needs.
    """

    def __init__(self, model, slots: dict[str, "_Slot"], workspace, owned_workspace):
        self.workspace = workspace
        self.num_tokens_bound: int | None = None
        self.layers = {name: slot.layer for name, slot in slots.items()}
        self._slots = slots
        self._owned_workspace = owned_workspace
        self._model = ref(model)
        self._closed = False
        self._held = None  # a model that enable() loaded lives as long as it is served
        self._before = model.get_experts_implementation()
        model.set_experts_implementation(IMPLEMENTATION)
        if IMPLEMENTATION not in model.get_experts_implementation().values():
            raise ValueError(f"model={type(model).__name__} does not let its experts implementation be set; not served")
        _SERVINGS[model] = self
        for slot in slots.values():
            _SLOTS[slot.key] = slot
            unwatch(slot.module())
            finalize(slot.module(), _SLOTS.pop, slot.key, None)  # an id is used again
            slot.serving = ref(self)
            if slot.shared is not None:
                fold(slot.shared())
                finalize(slot.shared(), unfold_id, id(slot.shared()))
            if slot.donate:
                slot.drop_parameters()

    @property
    def model(self) -> nn.Module | None:
        """The served model; None once nobody else holds it."""
        return self._model()

    def idle(self) -> None:
        """Take part in one forward of the other ranks without tokens: every layer once, with none."""
        for slot in self._slots.values():
            slot.idle()

    def check(self) -> None:
        """Raise the sticky device error of any layer, if there is one."""
        for layer in self.layers.values():
            layer.check()

    def close(self) -> None:
        """As disable(model). Does nothing the second time."""
        self._close(close_workspace=True)

    def _close(self, close_workspace: bool) -> None:
        if self._closed:
            return
        self._closed = True
        model, self._held = self._model(), None
        if model is not None:
            del _SERVINGS[model]
            for slot in self._slots.values():
                _SLOTS.pop(slot.key, None)
                if slot.shared is not None:
                    unfold(slot.shared())
                if (module := slot.module()) is not None:  # it may have been replaced while it was served
                    watch(module)
            model.set_experts_implementation(self._before)
        for layer in self.layers.values():
            layer.close()
        if self._owned_workspace is not None and close_workspace:
            self._owned_workspace.close()

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        # An exception may be this rank's alone: then closing, collective on GPUs, would wait for peers and hide it
        alone = self.workspace is None or not self.workspace.is_cuda or self.workspace.ep_size == 1
        self._close(close_workspace=alone or exc_type is None)


# Kept outside the modules: state_dict, deepcopy and save_pretrained see nothing of megamoe. Slots are by id(module),
# which a compiler can trace.
_SERVINGS: WeakKeyDictionary[nn.Module, Serving] = WeakKeyDictionary()
_SLOTS: dict[int, "_Slot"] = {}


def _serve_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls for a module's experts: hidden_states [n, hidden], top_k_* [n, topk]."""
    key = id(self)
    if key not in _SLOTS:
        raise ValueError(
            f"experts_implementation={IMPLEMENTATION!r}, but this model's experts were not given to megamoe; "
            "call megamoe.integrations.transformers.enable(model) (again, after a deepcopy)"
        )
    if self.training and torch.is_grad_enabled() and hidden_states.requires_grad:
        raise ValueError("megamoe is forward only: it has no gradient. Call model.eval(), or disable(model) to train")
    if torch.compiler.is_compiling():
        return torch.ops.megamoe.experts(hidden_states.detach(), top_k_index, top_k_weights.detach(), key)
    return _SLOTS[key](hidden_states, top_k_index, top_k_weights)


@torch_op.operator(fake=lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape))
def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, key: int) -> Tensor:
    """The same in a compiled graph. key: id of the module, a constant of that graph."""
    if key not in _SLOTS:
        raise RuntimeError("the compiled model's experts are no longer served by megamoe: torch.compile it again")
    return _SLOTS[key](hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _serve_experts)


class _Slot:
    """A module's layer, and the state of the parameters that it was loaded from."""

    def __init__(self, info: Experts, layer, capacity: int, ep_size: int, ep_rank: int, donate: bool):
        self.info, self.name, self.config = replace(info, module=None), info.name, info.config
        self.layer, self.capacity, self.ep_size, self.donate = layer, capacity, ep_size, donate
        self.module, self.key = ref(info.module), id(info.module)
        num_local_experts = info.config.num_local_experts(ep_size)
        self.local = range(ep_rank * num_local_experts, (ep_rank + 1) * num_local_experts)
        self.serving, self.chunks, self.shared = None, None, None
        self._loaded = None

    def bytes_in(self, source: Checkpoint | None) -> int:
        """What load will read of the files."""
        return 0 if source is None else expert_bytes(source, self.name, self.local, self.config, self.info.sizes)

    def load(self, source: Checkpoint | None, progress: Progress | None = None) -> None:
        if source is not None:
            info = self.info
            weights = load_experts(
                source, -1, self.local, config=self.config, sizes=info.sizes, dtype=info.dtype, device=info.device,
                prefix=self.name, progress=progress,
            )  # fmt: skip
        else:
            weights = weights_of(replace(self.info, module=self.module()), self.local)
            self._loaded = self._state()
        if self.shared is not None:
            weights = append_shared(self.config, weights, self.shared(), self.info.sizes)
        self.layer.load_weights(
            weights.linear1, weights.linear2, weights.linear1_sf, weights.linear2_sf,
            linear1_bias=weights.linear1_bias, linear2_bias=weights.linear2_bias,
        )  # fmt: skip

    def drop_parameters(self) -> None:
        module = self.module()
        for name, parameter in expert_parameters(module).items():
            module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        self._loaded = None

    def _state(self) -> tuple:
        params = [*expert_parameters(self.module()).values(), *(self.shared().parameters() if self.shared else ())]
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in params]

    def __call__(self, hidden_states: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(hidden_states, topk_idx, topk_weights)
        if self._loaded is not None and self._loaded != self._state():
            self.load(None)  # a load_state_dict or an in-place edit since: eager experts would follow it too
        # What has the right form already is not touched: each torch call here would take a microsecond of every layer
        x = hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, self.info.sizes[0])
        if x.shape[0] > self.capacity and self.chunks is None:
            raise ValueError(
                f"{self.name}: num_tokens={x.shape[0]} (batch x sequence of this forward) is above the capacity "
                f"num_max_tokens_per_rank={self.capacity}; enable(model, ep_config=EPConfig({x.shape[0]})), or "
                "split the prompt or the batch into several forwards, or pass lockstep_chunks=True"
            )
        if self.chunks is None:
            y = self._forward(x, topk_idx, topk_weights)
        else:
            y = self.chunks.run(self._forward, self.capacity, x, topk_idx, topk_weights)
        if y.shape != hidden_states.shape:
            y = y[:, : x.shape[1]].reshape(hidden_states.shape)
        return y if y.dtype == hidden_states.dtype else y.to(hidden_states.dtype)

    def idle(self) -> None:
        self(
            torch.zeros(0, self.info.sizes[0], dtype=self.info.dtype, device=self.info.device),
            torch.zeros(0, self.config.topk, dtype=torch.int64, device=self.info.device),
            torch.zeros(0, self.config.topk, dtype=torch.float32, device=self.info.device),
        )

    def _forward(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        if self.config.weight_format != "bf16" and x.dtype != torch.bfloat16:
            x = x.to(torch.bfloat16)
        if x.shape[1] < self.config.hidden:
            x = F.pad(x, (0, self.config.hidden - x.shape[1]))
        bound = self.serving().num_tokens_bound
        if bound is None and self.ep_size == 1:  # no peer to agree with: the tokens there are, in powers of two
            bound = min(1 << max(x.shape[0] - 1, 0).bit_length(), self.capacity)
        return self.layer(x.contiguous(), topk_idx.contiguous(), topk_weights.contiguous(), num_tokens_bound=bound)


def _check_source(found: dict[str, Experts], source: Checkpoint | None, ep_size: int, ep_rank: int) -> None:
    """All layers' problems in one error, before a workspace exists or a byte of weights is read."""
    if source is None:
        if missing := [name for name, info in found.items() if info.module.gate_up_proj.device.type == "meta"]:
            raise ValueError(f"model: the expert parameters of {missing} are on the meta device; pass checkpoint=PATH")
        return
    problems = []
    for name, info in found.items():
        num_local_experts = info.config.num_local_experts(ep_size)
        local = range(ep_rank * num_local_experts, (ep_rank + 1) * num_local_experts)
        problems += find_problems(source, name, local, info.config, info.sizes)
    if problems:
        raise CheckpointError(source.path, problems)


def _placement(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(ep_size, ep_rank)"""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def _closing(workspace: Workspace):
    """For ExitStack.push. What all ranks fail at together ends in close(). An interrupt, or the absence of a peer, may
    be this rank's alone: close(), collective on GPUs, would wait for peers and hide it."""

    def leave(kind, error, trace) -> None:
        alone = kind is not None and (not issubclass(kind, Exception) or issubclass(kind, MegaMoEError))
        if alone and workspace.is_cuda and workspace.ep_size > 1:
            workspace.abandon()
            return
        try:
            workspace.close()
        except Exception:
            if error is None:
                raise

    return leave
