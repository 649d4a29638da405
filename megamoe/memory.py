"""Every byte the kernel path allocates, explained before it is allocated."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from megamoe.config import EPConfig, MoEConfig

NUM_SMS = 132
"""Of an H100 SXM or H200. One table has a row per CTA, of which each SM runs one."""


class MemoryPlan(NamedTuple):
    """What each rank allocates.

    rows: one object a region, with name, bytes, shape, dtype, where ("symmetric" or "local"), writer, reader.
    symmetric_bytes, local_bytes: what is allocated: the regions and the alignment between them.
    """

    rows: tuple
    symmetric_bytes: int
    local_bytes: int
    device: str

    def explain(self) -> str:
        """A table, largest region first, and the two totals."""
        if not self.rows:
            return f"device {self.device}: the torch path keeps no workspace: 0 bytes symmetric, 0 bytes local per rank"
        lines = [f"{'region':<24} {'bytes':>14}  {'where':<9} {'dtype':<8} {'shape':<28} writer -> reader"]
        for row in sorted(self.rows, key=lambda row: -row.bytes):
            shape = " x ".join(map(str, row.shape))
            lines.append(
                f"{row.name:<24} {row.bytes:>14,}  {row.where:<9} {row.dtype!s:<8} {shape:<28} {row.writer} -> "
                f"{row.reader}"
            )
        for where, total in (("symmetric", self.symmetric_bytes), ("local", self.local_bytes)):
            padding = total - sum(row.bytes for row in self.rows if row.where == where)
            lines.append(f"{'between regions':<24} {padding:>14,}  {where:<9} alignment")
            lines.append(f"{'total':<24} {total:>14,}  {where:<9} per rank")
        return "\n".join(lines)


def plan_memory(
    configs: MoEConfig | Sequence[MoEConfig],
    ep_config: EPConfig,
    ep_size: int | None = None,
    *,
    device: torch.device | str = "cuda",
) -> MemoryPlan:
    """What a Workspace for these layers holds on each rank. Pure: needs no GPU.

    ep_size: ranks; None = ep_config.virtual_ranks, or 1. device: "cuda" (the kernel's regions) or "cpu" (none).
    With several domains (ep_config.ranks_per_domain) the kernel's regions hold what all domains can send, and the
    exchange's own buffers are rows named domain_*.
    Weights and the tensor a call returns are not part of a workspace and not counted.
    """
    configs = (configs,) if isinstance(configs, MoEConfig) else tuple(configs)
    ep_size = ep_size or ep_config.virtual_ranks or 1
    for config in configs:
        config.num_local_experts(ep_size)
    device = torch.device(device)
    if device.type == "cpu":
        return MemoryPlan((), 0, 0, str(device))
    from megamoe import layout  # the kernel's own table, so that plan and allocation cannot differ

    num_domains, buffers = ep_config.num_domains(ep_size), []
    if num_domains > 1:
        from megamoe.domains import workspace as domains

        ep_size //= num_domains
        buffers = domains.buffers_of(configs, ep_config, num_domains)
        configs = [domains.domain_config(config, num_domains) for config in configs]
        ep_config = domains.domain_ep_config(ep_config, num_domains, ep_size, NUM_SMS)
    num_sms = min(ep_config.num_sms or NUM_SMS, NUM_SMS)
    num_ctas = layout.ctas_per_rank(num_sms, ep_config.virtual_ranks or 1)
    rows, symmetric_bytes, local_bytes = layout.place(layout.dims_of(configs, ep_config, ep_size, num_ctas))
    local_bytes += sum(buffer.bytes for buffer in buffers)
    return MemoryPlan((*rows, *buffers), symmetric_bytes, local_bytes, str(device))
