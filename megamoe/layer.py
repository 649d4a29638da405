"""MoELayer: what a model imports. All input is validated here; engines and steps trust it."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from megamoe import layer_checks as checks
from megamoe import torch_op
from megamoe.config import MoEConfig
from megamoe.engine import make_engine
from megamoe.errors import MegaMoEError
from megamoe.layer_call import LayerCall
from megamoe.rebalance import Rebalance, experts_a_step
from megamoe.stats import Stats, imbalance
from megamoe.workspace import Workspace


class Load(NamedTuple):
    """Rows that this rank has served: logical int64 [num_experts] by expert (sum over ranks for the whole load),
    physical int64 [slots] by slot of the rank."""

    logical: Tensor
    physical: Tensor


class MoELayer(nn.Module):
    """One expert-parallel MoE layer, inference only: forward runs without autograd and its result has no gradient.

    config: must be one of workspace.moe_configs. workspace: shared with other layers.
    weights_of: a layer of the same config in another workspace of the same ranks, whose weights this one uses too, also
        those that it loads later. Not while either is running.
    On a CUDA workspace forward is one fused kernel on the current stream; on CPU it is megamoe/steps.py. Where the
    ranks are several NVLink domains, an exchange between domains goes before and after it (megamoe/domains/engine.py).
    With EPConfig(virtual_ranks=R) every tensor argument below is a list of R tensors, one per rank, and so is the
    result.
    """

    def __init__(self, config: MoEConfig, workspace: Workspace, *, weights_of: "MoELayer | None" = None):
        super().__init__()
        if not isinstance(config, MoEConfig) or not isinstance(workspace, Workspace):
            raise TypeError(
                f"config has type {type(config).__name__} and workspace has type {type(workspace).__name__}; pass a "
                "MoEConfig, then a Workspace"
            )
        if config not in workspace.moe_configs:
            raise ValueError(
                f"config={config} is not among workspace.moe_configs={workspace.moe_configs}; add it there"
            )
        workspace.check_open()
        self.config = config
        self.workspace = workspace
        self.rerounded_groups: list[dict[str, int]] | None = None  # mxfp4 format: of the last load, one a rank
        self._weights_of = weights_of
        if weights_of is not None and weights_of.config != config:
            raise ValueError(f"weights_of has config={weights_of.config}, this layer {config}; use equal ones")
        if weights_of is not None:
            checks.equal_places(workspace, weights_of.workspace)
        self.handle = torch_op.register(self)
        self._engine = make_engine(config, workspace)
        self.index = len(workspace.layers)
        self._call = LayerCall(config, workspace, self._engine, self.index, weights_of and weights_of._call)
        workspace.layers.append(ref(self))

    @torch.no_grad()
    def load_weights(
        self,
        linear1: Tensor | Sequence[Tensor],
        linear2: Tensor | Sequence[Tensor],
        linear1_sf: Tensor | Sequence[Tensor] | None = None,
        linear2_sf: Tensor | Sequence[Tensor] | None = None,
        *,
        linear1_bias: Tensor | Sequence[Tensor] | None = None,
        linear2_bias: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """Copy in the local experts, on the current stream; again later, in place (also under captured graphs).
        MoEConfig.num_shared_experts more follow them in each tensor, equal on all ranks, and count as local experts in
        the shapes below.

        linear1: [num_local_experts, 2 * intermediate, hidden], first the gate rows, then the up rows.
        linear2: [num_local_experts, hidden, intermediate].
        weight_format="fp8": either e4m3 with linear1_sf fp32 [num_local_experts, 2 * intermediate / 128, hidden / 128]
            and linear2_sf fp32 [num_local_experts, hidden / 128, intermediate / 128], or bf16, fp16 or fp32 without
            sf, which are quantized here by 128x128 block.
        weight_format="mxfp4": either uint8 [num_local_experts, 2 * intermediate, hidden / 2] and [num_local_experts,
            hidden, intermediate / 2], two codes a byte, low nibble first, with linear1_sf uint8 [num_local_experts,
            2 * intermediate, hidden / 32] and linear2_sf uint8 [num_local_experts, hidden, intermediate / 32] (UE8M0),
            or bf16, fp16 or fp32 without sf, which are quantized here. Groups that e4m3 cannot hold under one power of
            two with the largest of their 128 rows are re-rounded (quant/mxfp4.py): counted in `rerounded_groups`, a
            dict by tensor for each rank, with a UserWarning if there are any.
        weight_format="bf16": both bf16 or both fp32, no sf.
        linear1_bias [num_local_experts, 2 * intermediate], linear2_bias [num_local_experts, hidden]: bf16, fp16 or
            fp32, kept in fp32; with MoEConfig(bias=True) and only then.
        ValueError or TypeError names the argument, its value and the remedy.
        """
        self.workspace.check_open()
        if self._weights_of is not None:
            raise RuntimeError("the layer uses the weights of another (weights_of); load them there")
        virtual_ranks = self.workspace.ep_config.virtual_ranks
        columns = [
            checks.per_rank(virtual_ranks, name, value)
            for name, value in (
                ("linear1", linear1), ("linear1_sf", linear1_sf), ("linear2", linear2), ("linear2_sf", linear2_sf),
                ("linear1_bias", linear1_bias), ("linear2_bias", linear2_bias),
            )
        ]  # fmt: skip
        num_experts = self.config.num_local_experts(self.workspace.ep_size) + self.config.num_shared_experts
        weights = [
            checks.expert_weights(self.config, num_experts, self.workspace.device, rank, *row)
            for rank, row in zip(checks.suffixes(virtual_ranks), zip(*columns, strict=True), strict=True)
        ]
        dtypes = {rank_weights.linear1.dtype for rank_weights in weights}
        if self.config.weight_format == "bf16":
            if len(dtypes | {self._call.dtype} - {None}) > 1:
                raise TypeError(
                    f"linear1 has dtypes {dtypes}, earlier {self._call.dtype}; use one dtype on all ranks and loads"
                )
            self._call.dtype = weights[0].linear1.dtype
        if self.config.weight_format == "mxfp4":
            weights, self.rerounded_groups = map(list, zip(*map(checks.fit_mxfp4, weights), strict=True))
            if any(count for rank_counts in self.rerounded_groups for count in rank_counts.values()):
                warnings.warn(f"MXFP4 groups re-rounded on loading: {self.rerounded_groups}", stacklevel=2)
        self._engine.load_weights(weights)
        self._call.loaded = True

    def load_plan(self, plan, *, plan_layer: int = 0, choice: str = "balanced") -> None:
        """Collective: move weights to where ``plan`` wants them, at once, and choose among copies by ``choice``.

        For arguments and errors see rebalance. load_weights afterwards brings back the placement without a plan.
        """
        self.rebalance(plan, plan_layer=plan_layer, choice=choice).finish()

    def rebalance(
        self, plan, *, plan_layer: int = 0, choice: str = "balanced", max_bytes: int | None = None
    ) -> Rebalance:
        """Collective: move weights to where ``plan`` wants them, step by step between calls. -> Rebalance, which does
        nothing until its step() is called.

        plan: ExpertPlan of this layer's experts and ranks (plan_experts, update_plan); plan_layer: its layer to use.
        choice: which copy serves a row: "static" (by source rank), "balanced" (by the batch's counts), "min_active"
            (one copy an expert, for small batches). The output has the same bits under any of them and any plan.
        max_bytes: weights that a rank may receive a step; None = as much as fits (EPConfig.num_staged_experts).
        All arguments are equal on all ranks: plan from the sum of their load_counts(). Ranks meet on the host, once.
        ValueError names what does not fit: another topology, too few slots or staging memory, several NVLink domains;
        on every rank, if one cannot or has other arguments. MegaMoEError names a rank that does not come.
        """
        made, facts, error = None, {}, None
        try:
            self.workspace.check_open()
            if self._weights_of is not None:
                raise RuntimeError("the layer uses the weights of another (weights_of); move them there")
            made = self._rebalance(plan, plan_layer, choice, max_bytes)
            names = "the placement of the last plan, or of load_weights", "plan", "plan.load"
            facts = {"layer": self.index, **dict(zip(names, made.digests, strict=True)), "choice": choice,
                     "max_bytes": max_bytes, "steps so far, odd or even": self.workspace.staging.bank}  # fmt: skip
        except Exception as own:
            error = own
        remedy = (
            "plan from the sum of all ranks' load_counts(); where placements differ, load_weights on all of them, and "
            "where steps do, workspace.reset()"
        )
        self.workspace.compare("plan", facts, error, remedy)
        return made

    def _rebalance(self, plan, plan_layer, choice, max_bytes) -> Rebalance:
        checks.one_domain(self.workspace)
        if not self._call.loaded:
            raise RuntimeError("the layer has no weights; call load_weights first")
        ep_config, ep_size = self.workspace.ep_config, self.workspace.ep_size
        row = checks.plan_placement(self.config, ep_config, ep_size, plan, plan_layer)
        most = ep_config.num_staged_experts if self.workspace.is_cuda else self._engine.slots
        per_step = experts_a_step(most, max_bytes, self._engine.expert_bytes)
        return Rebalance(self._engine, row, choice, per_step, plan.load[plan_layer], plan.num_nodes)

    def forward(
        self,
        hidden_states,
        topk_idx: Tensor | Sequence[Tensor],
        topk_weights: Tensor | Sequence[Tensor],
        *,
        num_tokens: Tensor | Sequence[Tensor] | None = None,
        num_tokens_bound: int | None = None,
        out: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor | list[Tensor]:
        """Collective: every rank of the workspace calls it, with any number of tokens from 0 to the capacity.

        hidden_states: bf16 [n, hidden], or a tuple (e4m3 [n, hidden], sf fp32 [n, hidden / 128]) quantized per token
            and 128.
            weight_format="bf16": the dtype of the weights.
        topk_idx: int32 or int64 [n, topk], ids over all ranks' experts; -1 = unused slot; a repeated id counts twice.
        topk_weights: fp32 or bf16 [n, topk].
        num_tokens: None, or int32 with one element on the layer's device: rows from it on are ignored, their output is
            zero.
        num_tokens_bound: int equal on all ranks, n <= num_tokens_bound <= capacity; None = capacity.
        out: None, or bf16 [n, hidden] to write to (weight_format="bf16": the dtype of the weights).
        -> out, or a new tensor like it. A token without a used slot gives exact zeros, or what the shared experts make
            of it.

        ValueError, TypeError: what the host can check, raised before anything is sent; ids are checked on CPU only.
        MegaMoEError: an id out of range on CUDA, a peer that did not come, an earlier failure (until
            workspace.reset()).
        """
        if torch.compiler.is_compiling() and self.workspace.ep_config.virtual_ranks is None:
            return torch_op.call(self, hidden_states, topk_idx, topk_weights, num_tokens, num_tokens_bound, out)
        return self._call(hidden_states, topk_idx, topk_weights, num_tokens, num_tokens_bound, out)

    def __call__(
        self, hidden_states, topk_idx, topk_weights, *, num_tokens=None, num_tokens_bound=None, out=None
    ) -> Tensor | list[Tensor]:  # fmt: skip
        """forward, and what nn.Module does around it: looked for in 0.4 us instead of the 1.4 us that it takes."""
        own = self.__dict__
        if (
            torch.compiler.is_compiling() or "_compiled_call_impl" in own or "forward" in own
            or type(self).forward is not _FORWARD or nn.Module.__call__ is not _MODULE_CALL
            or own["_forward_hooks"] or own["_forward_pre_hooks"]
            or own["_backward_hooks"] or own["_backward_pre_hooks"]
            or nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks
        ):  # fmt: skip
            return super().__call__(
                hidden_states, topk_idx, topk_weights, num_tokens=num_tokens, num_tokens_bound=num_tokens_bound, out=out
            )
        return own["_call"](hidden_states, topk_idx, topk_weights, num_tokens, num_tokens_bound, out)

    def expert_rows(self) -> list[Tensor] | list[list[Tensor]]:
        """The loaded weights as contiguous uint8 tensors [slots, bytes], for whoever moves experts without a plan.

        The same permutation of rows in each of them, in place and between calls, permutes the rank's experts; a row may
        also be copied to a layer of the same config. With virtual ranks a list for each rank.
        """
        if not self._call.loaded:
            self._call.take_weights()
        rows = [[t.flatten(1).view(torch.uint8) for t in tensors] for tensors in self._engine.expert_tensors()]
        return rows if self.workspace.ep_config.virtual_ranks is not None else rows[0]

    def warmup(self) -> None:
        """One call without tokens, if the layer has weights. Collective."""
        if not self._call.loaded:
            return
        device, topk = self.workspace.device, self.config.topk
        dtype = self._call.dtype if self.config.weight_format == "bf16" else torch.bfloat16
        x = torch.zeros(0, self.config.hidden, dtype=dtype, device=device)
        topk_idx = torch.zeros(0, topk, dtype=torch.int64, device=device)
        topk_weights = torch.zeros(0, topk, dtype=torch.float32, device=device)
        ranks = self.workspace.ep_config.virtual_ranks
        arguments = x, topk_idx, topk_weights
        self(*(arguments if ranks is None else ([t] * ranks for t in arguments)))

    def check(self) -> None:
        """Raise MegaMoEError if a call has failed on the device, or left the workspace refusing calls. Never waits."""
        try:
            self._engine.check()
        except MegaMoEError as error:
            self.workspace.poison(error)
            raise
        self.workspace.check_open()

    def stats(self, *, load: bool = False) -> Stats:
        """Live counters of this layer; `stats().prometheus()` is their text. Never waits, unless asked for the load.

        load: also on CUDA `rows` and `imbalance`, read back from the device's counters (load_counts), whose calls so
        far are waited for. ValueError where the workspace has no room for plans: the kernel then counts nothing."""
        error, counters = self.workspace.poisoned, self._call.counted()
        itemsize = self._call.dtype.itemsize if self._call.dtype is not None else torch.bfloat16.itemsize
        served = None
        if load or not self.workspace.is_cuda:
            served = torch.cat([physical for _, physical in self._engine.load_count]).tolist()
        return Stats(counters.calls, counters.failed, counters.tokens, counters.input_bytes,
                     counters.tokens * self.config.hidden * itemsize, self._engine.wait_s,
                     None if served is None else sum(served), None if served is None else imbalance(served),
                     None if error is None else str(error))  # fmt: skip

    def load_counts(self) -> Load | list[Load]:
        """Rows served so far, counted on the device; a copy, made on the current stream without waiting for it.

        ValueError on CUDA where the workspace has no room for plans: the kernel then counts nothing."""
        loads = [Load(logical.clone(), physical.clone()) for logical, physical in self._engine.load_count]
        return loads if self.workspace.ep_config.virtual_ranks is not None else loads[0]

    def close(self) -> None:
        """Drop the weights and what the engine holds. The workspace stays open. Twice is harmless."""
        self._engine.close()
        self._call.loaded = False
        self._call.forget()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a MoELayer cannot be copied or pickled: its workspace and its peers know it by a number; make another on "
            "the workspace, or with weights_of on another one"
        )

    def extra_repr(self) -> str:
        return f"{self.config}, ep_size={self.workspace.ep_size}, device={self.workspace.device}"


_FORWARD, _MODULE_CALL = MoELayer.forward, nn.Module.__call__
"""Subclasses, tests and tracers (torch.fx) put their own in the place of either."""
