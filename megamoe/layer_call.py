"""How a layer is called: the way of every call, and the short one of a call like the layer's last."""

import torch

from megamoe import layer_checks as checks
from megamoe.config import MoEConfig
from megamoe.errors import MegaMoEError
from megamoe.stats import Counters
from megamoe.streams import current_stream_handle


class LayerCall:
    """What a call needs of its layer. Apart from it, since nn.Module takes 0.05 us for each attribute that is read, 1.5
    us for each that is set.

    source: of the layer whose weights this one uses, or None.
    dtype: bf16 format: of weights and hidden_states, known from load_weights on.
    """

    def __init__(self, config: MoEConfig, workspace, engine, index: int, source: "LayerCall | None"):
        self.workspace, self.engine, self.index, self.source = workspace, engine, index, source
        self.virtual_ranks = workspace.ep_config.virtual_ranks
        # Shared by all layers of this config in the workspace: what passed in one is not checked again in another
        self.checks = workspace.call_checks.setdefault(
            config, checks.CallChecks(config, workspace.device, workspace.ep_config.num_max_tokens_per_rank)
        )
        self.dtype: torch.dtype | None = None
        self.loaded = False
        self.counters, self.repeats = Counters(), 0  # repeats: calls like the last one that are not in counters yet
        self.forget()

    def forget(self) -> None:
        """The next call goes the long way."""
        self.counted()
        self.kind = self.bound = self.given_bound = None  # of the last call, if it can be repeated

    def counted(self) -> Counters:
        """What has been counted until now."""
        if self.repeats:
            self.counters.add((self.kind,), self.repeats)
            self.repeats = 0
        return self.counters

    def take_weights(self) -> None:
        """Those of `source`. RuntimeError if there are none."""
        if self.source is None or not self.source.loaded:
            raise RuntimeError("the layer has no weights; call load_weights first")
        self.engine.share_weights(self.source.engine)
        self.dtype, self.loaded = self.source.dtype, True

    def __call__(self, hidden_states, topk_idx, topk_weights, num_tokens, num_tokens_bound, out):
        """MoELayer.forward outside of a compiler's trace.

        Each line is host time of every call (tests/cpu/test_host_cost.py): a call like the last one only writes
        addresses and launches. Any other goes the long way, which has the checks and all errors."""
        kind, workspace = self.kind, self.workspace
        if (
            kind is not None
            and num_tokens_bound.__class__ is self.given_bound.__class__
            and num_tokens_bound == self.given_bound
            and not workspace.closed
            and workspace.poisoned is None
            and (stream := current_stream_handle(workspace.device_index)) == workspace.streams.handle
            and (addresses := kind.addresses(hidden_states, topk_idx, topk_weights, num_tokens, out)) is not None
        ):
            y = out
            if y is None:
                y = torch.empty_like(hidden_states[0] if kind.is_pair else hidden_states, dtype=torch.bfloat16)
                addresses = *addresses[:-1], y.data_ptr()
            if self.engine.repeat(kind, self.bound, addresses, stream):
                self.repeats += 1
                return y
        return self._long_way(hidden_states, topk_idx, topk_weights, num_tokens, num_tokens_bound, out)

    def _long_way(self, hidden_states, topk_idx, topk_weights, num_tokens, num_tokens_bound, out):
        workspace, check, counters = self.workspace, self.checks, self.counted()
        workspace.check_open()
        if not self.loaded:
            self.take_weights()
        bound = checks.num_tokens_bound(num_tokens_bound, check.capacity)
        kind = None
        if self.virtual_ranks is None:
            given, kind = check.take("", hidden_states, topk_idx, topk_weights, num_tokens, out, bound, self.dtype)
            inputs, kinds, outs = (given,), (kind,), (out,)
        else:
            columns = [
                checks.per_rank(self.virtual_ranks, name, value)
                for name, value in (
                    ("hidden_states", hidden_states), ("topk_idx", topk_idx), ("topk_weights", topk_weights),
                    ("num_tokens", num_tokens), ("out", out),
                )
            ]  # fmt: skip
            ranks = zip(checks.suffixes(self.virtual_ranks), *columns, strict=True)
            inputs, kinds = zip(*(check.take(*arguments, bound, self.dtype) for arguments in ranks), strict=True)
            outs = columns[-1]
        try:
            stream = workspace.before_call(self.index)
            results = self.engine.forward(inputs, bound, outs, kind, stream)
        except MegaMoEError as error:
            counters.failed += 1
            workspace.poison(error)
            for out in outs:
                if out is not None:
                    out.fill_(float("nan"))
            raise
        counters.add(kinds)
        if kind is None:
            return results
        if self.engine.repeat is not None and workspace.order is None:
            self.kind, self.bound, self.given_bound = kind, bound, num_tokens_bound
        return results[0]
