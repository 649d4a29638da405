"""A layer with MoELayer's calls that runs steps.py on any device: what the kernel's logits are held against."""

import torch.distributed as dist
from torch import Tensor

from megamoe import steps
from megamoe.config import MoEConfig
from megamoe.exchange import DistExchange, LocalExchange
from megamoe.quant.fp8 import quantize_blocks


class SpecExperts:
    """load_weights, forward, check and close as MoELayer has them; one rank a process, no workspace, no checks."""

    def __init__(self, config: MoEConfig, group: dist.ProcessGroup | None = None):
        self.config = config
        distributed = dist.is_available() and dist.is_initialized()
        self._exchange = DistExchange(group) if distributed else LocalExchange(1)
        self._weights = None

    def load_weights(self, linear1: Tensor, linear2: Tensor, linear1_sf=None, linear2_sf=None) -> None:
        if self.config.weight_format == "fp8" and linear1_sf is None:
            (linear1, linear1_sf), (linear2, linear2_sf) = quantize_blocks(linear1), quantize_blocks(linear2)
        else:  # a copy, as MoELayer makes: the caller may drop or change what it gave
            linear1, linear2 = linear1.clone(), linear2.clone()
        self._weights = steps.ExpertWeights(linear1, linear1_sf, linear2, linear2_sf)

    def __call__(self, hidden_states: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, num_tokens_bound=None):
        rank_input = steps.RankInput(hidden_states, None, topk_idx, topk_weights)
        return steps.moe_layer(self.config, self._exchange, [self._weights], [rank_input])[0]

    def check(self) -> None:
        """No device error can be pending: every step runs in order on the caller's stream."""

    def close(self) -> None:
        self._weights = None
