"""Expert placement in plain numpy: who gets copies, where they go, and how to change that with few moves.

Nothing here imports torch or CUDA, so plans can be made on a login node or in a router process. Modules are imported on
first use: the kernel's tile choices (tiles.py) need not even numpy.
"""

from importlib import import_module

_MODULE_OF = {
    "CostModel": "cost",
    "ExpertPlan": "plan",
    "balanced_split": "split",
    "balancedness": "load",
    "choose_replicas": "tokens",
    "count_load": "load",
    "drift": "load",
    "greedy_physical_to_logical": "greedy",
    "nodes_per_token": "tokens",
    "plan_experts": "planner",
    "popularity": "load",
    "sample_topk": "load",
    "update_plan": "planner",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
