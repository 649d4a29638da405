"""MEGAMOE_DEBUG=2: before each call, ranks tell each other which layer they are about to call, and differ aloud.

Calls of different layers must come in the same order on every rank; otherwise ranks wait for each other until a
deadline.
This check costs a host collective a call and says at once who does what.
"""

import os
from datetime import timedelta

import torch.distributed as dist

_orders: dict[tuple[int, ...], "CallOrder"] = {}
_num_workspaces = 0


def next_workspace_index() -> int:
    """A number that is equal on all ranks, since workspaces are created together."""
    global _num_workspaces
    _num_workspaces += 1
    return _num_workspaces - 1


def call_order(group, timeout_s: float) -> "CallOrder | None":
    """The check for a group of ranks, one for all its workspaces: calls are compared across those too.

    None below MEGAMOE_DEBUG=2, or for one rank. Collective where it is not None.
    """
    if os.environ.get("MEGAMOE_DEBUG") not in ("2", "3") or group is None or dist.get_world_size(group) == 1:
        return None
    members = tuple(dist.get_process_group_ranks(group))
    if members not in _orders:
        _orders[members] = CallOrder(members, timeout_s)
    return _orders[members]


class CallOrder:
    """compare() is collective over `members`, global ranks, on a gloo group of its own: NCCL's streams stay out."""

    def __init__(self, members: tuple[int, ...], timeout_s: float):
        self._timeout_s, self._num_calls = timeout_s, 0
        self._group = dist.new_group(
            members, timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=True
        )

    def compare(self, call: str) -> None:
        """RuntimeError on every rank if they are about to make different calls."""
        everyone = [None] * dist.get_world_size(self._group)
        try:
            dist.all_gather_object(everyone, call, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"call {self._num_calls}: this rank calls {call}; another made none within {self._timeout_s} s: {error}"
            ) from error
        if len(set(everyone)) > 1:
            said = "; ".join(f"rank {rank} calls {theirs}" for rank, theirs in enumerate(everyone))
            raise RuntimeError(f"call {self._num_calls} differs between ranks: {said}. Issue calls in the same order")
        self._num_calls += 1
