"""Experts whose parameters are on the meta device: given away by `enable(donate=True)`, or never loaded.

torch computes with such parameters as if nothing were missing, and adds what comes out to the tokens, or memory that
nobody wrote: the model would go on with wrong logits.
"""

from torch import nn


def watch(experts: nn.Module) -> None:
    """From now on a call of this module raises while one of its own parameters is on meta. Twice is harmless."""
    if _refuse_meta not in experts._forward_pre_hooks.values():
        experts.register_forward_pre_hook(_refuse_meta)


def unwatch(experts: nn.Module) -> None:
    """While megamoe serves it: a hook would cost each call a microsecond."""
    # Found there and not remembered here: a copy of the module has a copy of the hook
    for key in [key for key, hook in experts._forward_pre_hooks.items() if hook is _refuse_meta]:
        del experts._forward_pre_hooks[key]


def _refuse_meta(experts: nn.Module, _) -> None:
    if "forward" in experts.__dict__:  # put there by shared.py, which probes what is around the experts
        return
    if names := [name for name, parameter in experts.named_parameters(recurse=False) if parameter.is_meta]:
        raise ValueError(
            f"{type(experts).__name__}: {', '.join(names)} are on the meta device, donated to megamoe or not loaded; "
            "enable(model, checkpoint=PATH), or load them"
        )
