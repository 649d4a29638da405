"""megamoe: an expert-parallel mixture-of-experts layer for Hopper GPUs, with the same layer on CPU ranks.

The whole public API is the names in ``__all__``. They are loaded on first use, so ``import megamoe`` needs neither
torch nor CUDA and starts nothing; ``python -m megamoe doctor`` can therefore say that torch is missing instead of
failing on it.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_HOME = {
    "MoEConfig": "megamoe.config",
    "EPConfig": "megamoe.config",
    "Workspace": "megamoe.workspace",
    "MoELayer": "megamoe.layer",
    "route": "megamoe.route.router",
    "support": "megamoe.support",
    "plan_memory": "megamoe.memory",
    "MegaMoEError": "megamoe.errors",
    "ExpertPlan": "megamoe.plan",
    "plan_experts": "megamoe.plan",
    "update_plan": "megamoe.plan",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'megamoe' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value) -> None:
        # Importing a submodule binds it here. `route` and `support` are functions that share their module's name:
        # without this, what `from megamoe import support` gives would depend on what was imported before
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
