"""MEGAMOE_DEBUG=2: before each call, ranks tell each other which layer they are about to call, and differ aloud.

Calls of different layers must come in the same order on every rank. Ranks notice by themselves that they call different
layers, in the call, but for several NVLink domains whose rows NCCL carries alone (EPConfig.domain_tokens=None); this
check costs a meeting of the hosts a call and says before it who is about to do what.
"""

import weakref

import torch.distributed as dist

from megamoe.errors import absent_ranks_named
from megamoe_cuda.compile import debug_level
from megamoe_cuda.gather import gather

_num_calls = weakref.WeakKeyDictionary()  # group -> calls compared so far, of all its workspaces
_num_workspaces = 0


def next_workspace_index() -> int:
    """A number that is equal on all ranks, since workspaces are created together."""
    global _num_workspaces
    _num_workspaces += 1
    return _num_workspaces - 1


def call_order(group) -> "CallOrder | None":
    """The check for a workspace; None below MEGAMOE_DEBUG=2, or for one rank. Workspaces of one group are compared with
    each other too."""
    if group is None or debug_level() < 2 or dist.get_world_size(group) == 1:
        return None
    return CallOrder(group)


class CallOrder:
    """compare() is collective over the group. Through its store: NCCL and gloo are not touched."""

    def __init__(self, group):
        self._group = group

    def compare(self, call: str, deadline_s: float) -> None:
        """RuntimeError on every rank if they are about to make different calls; MegaMoEError names a rank that makes
        none within the deadline."""
        with absent_ranks_named():
            everyone = gather(self._group, "call", call, deadline_s)
        number = _num_calls.get(self._group, 0)  # of this call, from 0
        _num_calls[self._group] = number + 1
        if len(set(everyone)) > 1:
            said = "; ".join(f"rank {rank} calls {theirs}" for rank, theirs in enumerate(everyone))
            raise RuntimeError(f"call {number} differs between ranks: {said}. Issue calls in the same order")
