"""What bench.py can time, behind one small interface.

An implementation has
    name           as in results: impl
    weight_format  'fp8', 'mxfp4' or 'bf16'
    quantized      judged against the FP8 specification (True) or the one without quantizers (False)
    limits         of its distance from that specification, where they are not the layer's: keywords of gate.judge
    inputs         which of 'prequantized', 'bf16' it takes
    calls          (routings, num_tokens, input_kind, outs) -> one callable a routing; each call is collective and
                   writes outs[routing][rank held here]
    check          () raises what a call left behind on the device
    note           (num_tokens) -> a kernel configuration or mode worth a word in the results, or None
    close          ()
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist

from benchmarks.baselines.unfused import Unfused, available
from benchmarks.inputs import RankTokens, make_weights, to_bf16
from benchmarks.links import Counter
from benchmarks.timing import Call, Meet
from megamoe import MoEConfig, MoELayer, Workspace


@dataclass(frozen=True)
class Setup:
    """Where this process stands. ranks_here: the ep ranks it plays; num_units: GPUs (or, on CPU, processes) that share
    the work; group: the process group of the ep ranks, None = all; ranks_per_domain, domain_tokens: as in EPConfig."""

    device: torch.device
    ep_size: int
    ranks_here: tuple[int, ...]
    virtual_ranks: int | None
    num_gpus: int
    num_units: int
    meet: Meet
    seed: int
    group: dist.ProcessGroup | None = None
    ranks_per_domain: int | None = None
    domain_tokens: int | None = None
    counter: Counter | None = None

    @property
    def is_first(self) -> bool:
        return self.ranks_here[0] == 0

    @property
    def one_rank_a_gpu(self) -> bool:
        """The ranks are one NVLink domain of GPUs with one rank each."""
        return self.num_gpus == self.ep_size and self.ranks_per_domain in (None, self.ep_size)

    def experts_of(self, case, ep_rank: int) -> range:
        per_rank = case.num_experts // self.ep_size
        return range(ep_rank * per_rank, (ep_rank + 1) * per_rank)


class MegaMoE:
    """This project's layer: the fused kernel on a GPU, the torch steps on CPU."""

    quantized, inputs = True, ("prequantized", "bf16")
    limits: ClassVar = {}

    def __init__(self, setup: Setup, case, config: MoEConfig, workspace: Workspace):
        self.weight_format = config.weight_format
        self.name = "megamoe" if workspace.is_cuda else "megamoe-cpu"
        self._virtual = setup.virtual_ranks is not None
        self._layer = MoELayer(config, workspace)
        weights = [
            make_weights(case, setup.experts_of(case, rank), setup.seed, setup.device) for rank in setup.ranks_here
        ]
        columns = [self._per_rank(list(column)) for column in zip(*weights, strict=True)]
        linear1, linear1_sf, linear2, linear2_sf = columns[:4]
        self._layer.load_weights(linear1, linear2, linear1_sf, linear2_sf)

    def _per_rank(self, values: list):
        return values if self._virtual else values[0]

    def calls(self, routings: list[list[RankTokens]], num_tokens: int, input_kind: str, outs) -> list[Call]:
        def call_of(tokens: list[RankTokens], out: list) -> Call:
            arguments = [
                self._per_rank(list(column)) for column in zip(*(t.for_layer(input_kind) for t in tokens), strict=True)
            ]
            out = self._per_rank(out)
            return lambda: self._layer(*arguments, num_tokens_bound=num_tokens, out=out)

        return [call_of(tokens, out) for tokens, out in zip(routings, outs, strict=True)]

    def check(self) -> None:
        self._layer.check()

    def note(self, num_tokens: int) -> str | None:
        describe = getattr(self._layer, "describe", None)
        return describe(num_tokens) if describe else None

    def close(self) -> None:
        self._layer.close()


class TorchBaseline:
    """baselines/unfused.py, in FP8 or bf16. Virtual ranks: all their tokens and experts as one rank, with no
    exchange."""

    limits: ClassVar = {}  # a baseline that computes something else proves nothing: its gate must hold too

    def __init__(self, setup: Setup, case, precision: str):
        self.weight_format, self.quantized = precision, precision == "fp8"
        self.inputs = ("prequantized", "bf16") if self.quantized else ("bf16",)
        self._setup, self._case, self._merged = setup, case, setup.virtual_ranks is not None
        self._ep_rank, self._ep_size = (0, 1) if self._merged else (setup.ranks_here[0], setup.ep_size)
        experts = range(case.num_experts) if self._merged else setup.experts_of(case, self._ep_rank)
        self._weights = make_weights(case, experts, setup.seed, setup.device)
        if not self.quantized:
            self._weights = to_bf16(self._weights)
        self.name = self._layer(0).name
        self._built: tuple[int, Unfused] | None = None

    def _layer(self, num_tokens: int) -> Unfused:
        return Unfused(
            self._case,
            self._weights,
            ep_rank=self._ep_rank,
            ep_size=self._ep_size,
            num_tokens=num_tokens,
            precision=self.weight_format,
        )

    def calls(self, routings: list[list[RankTokens]], num_tokens: int, input_kind: str, outs) -> list[Call]:
        capacity = num_tokens * len(self._setup.ranks_here)
        if self._built is None or self._built[0] != capacity:
            self._built = None  # free the old buffers before the new ones are made
            self._built = capacity, self._layer(capacity)
        layer = self._built[1]

        def call_of(tokens: list[RankTokens], out: list) -> Call:
            # one rank's view of the virtual ranks' tokens, made outside the timing; each rank's out receives its part
            # of one tensor
            columns = [
                torch.cat(column)
                for column in zip(*((t.hidden_states, t.topk_idx, t.topk_weights) for t in tokens), strict=True)
            ]
            x, topk_idx, topk_weights = columns
            x_sf = None
            if self.quantized and input_kind == "prequantized":
                x = torch.cat([t.x.view(torch.uint8) for t in tokens]).view(tokens[0].x.dtype)
                x_sf = torch.cat([t.x_sf for t in tokens])
            if not self._merged:
                return lambda: layer(x, x_sf, topk_idx, topk_weights, out[0])
            whole = torch.empty_like(x, dtype=torch.bfloat16)
            parts = whole.split([len(o) for o in out])

            def call():
                layer(x, x_sf, topk_idx, topk_weights, whole)
                for part, rank_out in zip(parts, out):
                    rank_out.copy_(part)

            return call

        return [call_of(tokens, out) for tokens, out in zip(routings, outs, strict=True)]

    def check(self) -> None:
        pass

    def note(self, num_tokens: int) -> str | None:
        return "one rank with all tokens, no exchange" if self._merged else None

    def close(self) -> None:
        self._built = self._weights = None


def make_baseline(name: str, setup: Setup, case):
    """(implementation, None), or (None, why it is not run)."""
    if name == "sgl":
        from benchmarks.baselines import sgl

        reason = sgl.available(setup)
        return (None, reason) if reason else (sgl.SglMegaMoE(setup, case), None)
    reason = available(setup.device)
    return (None, reason) if reason else (TorchBaseline(setup, case, "bf16" if name == "torch-bf16" else "fp8"), None)
