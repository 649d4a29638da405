"""Micro-batches side by side: a workspace and a stream each, with SM budgets that fit on the device together.

While one micro-batch waits for rows of other ranks, another computes. Both kernels are cooperative, so they run at the
same time only if their CTAs are resident together: the budgets share the SMs out. Calls are issued in the same order on
every rank, micro-batch 0 first; otherwise two ranks could each wait for what the other has queued behind.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist

from megamoe.config import EPConfig, MoEConfig
from megamoe.layer import MoELayer
from megamoe.support import parse_device
from megamoe.workspace import Workspace


def sm_budgets(num_sms: int, count: int) -> list[int]:
    """`count` even numbers of SMs, at least 2 each, that add up to at most num_sms: pairs of CTAs share weights."""
    each = num_sms // count // 2 * 2
    if each < 2:
        raise ValueError(f"count={count} micro-batches do not fit on {num_sms} SMs; use at most {num_sms // 2}")
    return [each] * count


class MicroBatches:
    """count workspaces (attribute `workspaces`), each for one micro-batch. A context manager; collective like they are.

    moe_configs, group, device: as for Workspace. ep_config: of each micro-batch; its num_sms, None = all SMs of the
    device, is what they share. On a CPU num_sms has no meaning and micro-batches run one after the other.
    """

    def __init__(
        self, moe_configs: MoEConfig | Sequence[MoEConfig], ep_config: EPConfig, *, count: int = 2,
        group: dist.ProcessGroup | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = parse_device(device)
        if count < 1:
            raise ValueError(f"count={count} must be at least 1; 2 let one micro-batch's waits hide the other's work")
        on_cuda = self.device.type == "cuda"
        num_sms = ep_config.num_sms
        if num_sms is None and on_cuda:
            num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        budgets = [None] * count if num_sms is None else sm_budgets(num_sms, count)
        with ExitStack() as undo:
            self.workspaces = [
                undo.enter_context(
                    Workspace(moe_configs, replace(ep_config, num_sms=budget), group=group, device=self.device)
                )
                for budget in budgets
            ]
            self._close = undo.pop_all()
        self.streams = [torch.cuda.Stream(self.device) if on_cuda else None for _ in budgets]

    def layers(self, config: MoEConfig) -> list[MoELayer]:
        """A layer for each micro-batch; all use the weights that the first one is given."""
        first = MoELayer(config, self.workspaces[0])
        return [first, *(MoELayer(config, workspace, weights_of=first) for workspace in self.workspaces[1:])]

    def run(self, steps: Sequence[Callable[[], object]]) -> list:
        """Issue steps[i], micro-batch i's forward, on stream i, in order; the current stream waits for all of them."""
        if len(steps) > len(self.workspaces):
            raise ValueError(f"steps has {len(steps)} entries; there are {len(self.workspaces)} micro-batches")
        if self.device.type == "cpu":
            return [step() for step in steps]
        current, results = torch.cuda.current_stream(self.device), []
        for step, stream in zip(steps, self.streams, strict=False):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results.append(step())
        for stream in self.streams[: len(steps)]:
            current.wait_stream(stream)
        return results

    def close(self) -> None:
        """Collective, as Workspace.close."""
        self._close.close()

    def __enter__(self) -> "MicroBatches":
        return self

    def __exit__(self, *exception) -> None:
        self._close.__exit__(*exception)
