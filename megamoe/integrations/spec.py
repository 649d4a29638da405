"""A layer with MoELayer's calls that runs steps.py on any device: what the kernel's logits are held against."""

import torch.distributed as dist
from torch import Tensor

from megamoe import layer_checks as checks
from megamoe import steps
from megamoe.config import MoEConfig
from megamoe.exchange import DistExchange, LocalExchange


class HostExchange:
    """DistExchange over gloo for tensors on any device: rows go by way of host memory.

    DistExchange polls point-to-point operations, which NCCL neither times out nor completes out of order. Collective to
    create, like the gloo group it makes.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._inner = DistExchange(dist.new_group(members, backend="gloo"))
        self.ep_size, self.ranks = self._inner.ep_size, self._inner.ranks

    def all_to_all(self, sends, step: str):
        device = sends[0][0][0].device
        on_host = [[tuple(t.cpu() for t in bundle) for bundle in to_ranks] for to_ranks in sends]
        received = self._inner.all_to_all(on_host, step)
        return [[tuple(t.to(device) for t in bundle) for bundle in from_ranks] for from_ranks in received]


_exchanges: dict[int, HostExchange] = {}


def exchange_of(group: dist.ProcessGroup | None):
    """One exchange a process group, shared by all layers: each makes a group of its own connections."""
    if not (dist.is_available() and dist.is_initialized()):
        return LocalExchange(1)
    group = group or dist.group.WORLD
    if dist.get_backend(group) == "gloo":
        return DistExchange(group)
    if id(group) not in _exchanges:
        _exchanges[id(group)] = HostExchange(group)
    return _exchanges[id(group)]


class SpecExperts:
    """load_weights, forward, check and close as MoELayer has them; one rank a process, no workspace, no checks."""

    def __init__(self, config: MoEConfig, group: dist.ProcessGroup | None = None):
        self.config = config
        self._exchange = exchange_of(group)
        self._weights = None

    def load_weights(self, linear1: Tensor, linear2: Tensor, linear1_sf=None, linear2_sf=None, **biases) -> None:
        """As MoELayer.load_weights, with the same checks and the same quantizers."""
        weights = checks.expert_weights(
            self.config, len(linear1), linear1.device, "", linear1, linear1_sf, linear2, linear2_sf, **biases
        )
        # A copy, as MoELayer makes: the caller may drop or change what it gave
        self._weights = steps.ExpertWeights(*(None if t is None else t.clone() for t in weights))

    @property
    def weights(self) -> steps.ExpertWeights:
        """As steps.py takes them."""
        return self._weights

    def __call__(self, hidden_states: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, num_tokens_bound=None):
        rank_input = steps.RankInput(hidden_states, None, topk_idx, topk_weights)
        return steps.moe_layer(self.config, self._exchange, [self._weights], [rank_input])[0]

    def check(self) -> None:
        """No device error can be pending: every step runs in order on the caller's stream."""

    def close(self) -> None:
        self._weights = None
