"""More tokens than the capacity, in several calls: as many on every rank, since each call is collective."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Chunks:
    """Ranks of `group` agree on the number of calls by a maximum over what each needs."""

    def __init__(self, group: dist.ProcessGroup | None, ep_size: int):
        self._group, self._ep_size = group, ep_size

    def run(self, call: Callable, capacity: int, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """call(x, topk_idx, topk_weights) on runs of at most `capacity` rows, the last ones empty; rows in order."""
        count = max(-(-x.shape[0] // capacity), 1)
        if self._ep_size > 1:
            agreed = torch.tensor(count, device=x.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
            count = int(agreed)
        runs = [slice(i * capacity, (i + 1) * capacity) for i in range(count)]
        return torch.cat([call(x[run], topk_idx[run], topk_weights[run]) for run in runs])
