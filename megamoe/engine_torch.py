"""The CPU engine: steps.py on the ranks held here."""

from torch import Tensor

from megamoe.config import MoEConfig
from megamoe.errors import MegaMoEError
from megamoe.steps import ExpertWeights, RankInput, moe_layer


class TorchEngine:
    """Holds the weights and runs the specification. The layer has validated everything; nothing is checked again."""

    def __init__(self, config: MoEConfig, workspace):
        self.config = config
        self.exchange = workspace.exchange
        self.number, workspace.num_layers = workspace.num_layers, workspace.num_layers + 1
        self.wait_s = 0.0
        self.weights: list[ExpertWeights] | None = None

    def load_weights(self, weights: list[ExpertWeights]) -> None:
        """weights: one per rank held here. Copied: in place from the second time on, so that addresses stay."""
        if self.weights is None:
            self.weights = [ExpertWeights(*(None if t is None else t.clone() for t in rank)) for rank in weights]
            return
        for mine, theirs in zip(self.weights, weights, strict=True):
            for target, source in zip(mine, theirs, strict=True):
                if target is not None:
                    target.copy_(source)

    def forward(self, inputs: list[RankInput], num_tokens_bound: int, outs: list[Tensor | None]) -> list[Tensor]:
        """num_tokens_bound chooses nothing here: the torch exchange sends exact counts. A failed call fills outs with
        NaN."""
        waited = self.exchange.wait_s
        self.exchange.start_call(self.number)
        try:
            results = moe_layer(self.config, self.exchange, self.weights, inputs)
        except MegaMoEError:
            for out in outs:
                if out is not None:
                    out.fill_(float("nan"))
            raise
        finally:
            self.wait_s += self.exchange.wait_s - waited
        return [y if out is None else out.copy_(y) for y, out in zip(results, outs, strict=True)]

    def share_weights(self, other: "TorchEngine") -> None:
        """Use what `other` has loaded, now and later."""
        self.weights = other.weights

    def expert_tensors(self) -> list[list[Tensor]]:
        """Per rank what it was loaded with, tensors with experts along the first dimension."""
        return [[t for t in rank if t is not None] for rank in self.weights]

    def check(self) -> None:
        """Nothing is pending: every error of the torch path is raised by forward itself."""

    def close(self) -> None:
        self.weights = None
