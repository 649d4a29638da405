"""Can this configuration run here? An answer with reasons, before anything is allocated."""

from typing import NamedTuple

import torch

from megamoe.config import EPConfig, MoEConfig
from megamoe.layout import MAX_EP_SIZE, MAX_LOCAL_EXPERTS, MAX_TOKENS, MAX_VIRTUAL_RANKS


class Report(NamedTuple):
    """ok: True when ``reasons`` is empty. Each reason names the value and the remedy."""

    ok: bool
    reasons: tuple[str, ...]


def support(
    config: MoEConfig,
    ep_config: EPConfig | None = None,
    device: torch.device | str | None = None,
    *,
    ep_size: int | None = None,
) -> Report:
    """Check what only the combination of model, ranks and device decides. Allocates nothing, talks to no rank.

    device: None (sizes only), "cpu", or a CUDA device, whose kind is then looked up.
    ep_size: ranks; None = ep_config.virtual_ranks, or 1.
    """
    if ep_size is None:
        ep_size = (ep_config.virtual_ranks if ep_config is not None else None) or 1
    if ep_size < 1:
        return Report(False, (f"ep_size={ep_size} must be at least 1; nearest legal value 1",))
    reasons = []
    redundant = 0 if ep_config is None else ep_config.num_redundant_slots_per_rank
    try:
        num_local_experts = config.num_local_experts(ep_size) + config.num_shared_experts
    except ValueError as error:
        reasons.append(str(error))
    else:
        if num_local_experts <= MAX_LOCAL_EXPERTS < num_local_experts + redundant:
            reasons.append(
                f"num_redundant_slots_per_rank={redundant} beside {num_local_experts} experts a rank is above "
                f"{MAX_LOCAL_EXPERTS} slots; use at most {MAX_LOCAL_EXPERTS - num_local_experts}"
            )
        if num_local_experts > MAX_LOCAL_EXPERTS:
            reasons.append(
                f"num_experts={config.num_experts} over ep_size={ep_size} ranks is {num_local_experts} experts a "
                "rank, above "
                f"{MAX_LOCAL_EXPERTS}; use at least "
                f"{-(-config.num_experts // (MAX_LOCAL_EXPERTS - config.num_shared_experts))} ranks"
            )
    try:
        num_domains = 1 if ep_config is None else ep_config.num_domains(ep_size)
    except ValueError as error:
        reasons.append(str(error))
        num_domains = 1
    if config.num_shared_experts:
        reasons += _shared_reasons(config, ep_config, num_domains)
    if num_domains > 1:
        from megamoe.domains.workspace import domain_ep_config  # it needs Workspace's own imports

        ep_size //= num_domains
        ep_config = domain_ep_config(ep_config, num_domains, ep_size, None)
    if device is not None:
        reasons += _device_reasons(config, ep_config, ep_size, parse_device(device))
    return Report(not reasons, tuple(reasons))


def parse_device(device: torch.device | str) -> torch.device:
    """ValueError where torch knows no such device."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is no device of torch; use 'cuda' or 'cpu'") from None


def _shared_reasons(config: MoEConfig, ep_config: EPConfig | None, num_domains: int) -> list[str]:
    shared, reasons = f"num_shared_experts={config.num_shared_experts}", []
    if num_domains > 1:  # a domain serves other domains' tokens as its own, and would send them to its shared experts
        reasons.append(f"{shared} on {num_domains} NVLink domains is not supported; use 0, add their output yourself")
    if ep_config is not None and ep_config.takes_plans:
        reasons.append(
            f"{shared} with num_redundant_slots_per_rank or num_staged_experts is not supported; set both to 0, or "
            "num_shared_experts"
        )
    return reasons


def _kernel_limits(ep_config: EPConfig | None, ep_size: int) -> list[str]:
    # Bits of a row's name, of a destination mask, and the length of the parameter struct: megamoe/layout.py
    found = [("ep_size", ep_size, MAX_EP_SIZE)]
    if ep_config is not None:
        found.append(("virtual_ranks", ep_config.virtual_ranks or 1, MAX_VIRTUAL_RANKS))
        found.append(("num_max_tokens_per_rank", ep_config.num_max_tokens_per_rank, MAX_TOKENS))
    return [f"{name}={value} is above the kernel's limit; use at most {limit}" for name, value, limit in found
            if value > limit]  # fmt: skip


def _device_reasons(
    config: MoEConfig, ep_config: EPConfig | None, ep_size: int, device: torch.device
) -> list[str]:
    if device.type == "cpu":
        return []
    if device.type != "cuda":
        return [f"device={device} has no implementation; use 'cuda' (sm_90) or 'cpu'"]
    reasons = _kernel_limits(ep_config, ep_size)
    if not config.has_e4m3_activations:
        reasons.append(
            f"weight_format={config.weight_format!r} runs on CPU only; use device='cpu', weight_format='fp8' or 'mxfp4'"
        )
    if not torch.cuda.is_available():
        return [
            *reasons,
            f"device={device}: torch finds no CUDA device; use device='cpu' or install a CUDA build of torch",
        ]
    if device.index is not None and device.index >= torch.cuda.device_count():
        return [*reasons, f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices"]
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        reasons.append(
            f"device={device} ({properties.name}) is sm_{properties.major}{properties.minor}; the kernel needs sm_90 "
            "(H100, H200); "
            "use device='cpu'"
        )
    if ep_config is not None and ep_config.num_sms is not None and ep_config.num_sms > properties.multi_processor_count:
        reasons.append(f"num_sms={ep_config.num_sms} exceeds the {properties.multi_processor_count} SMs of {device}")
    return reasons
