"""Expert placement in plain numpy: who gets copies, where they go, and how to change that with few moves.

Nothing here imports torch or CUDA, so plans can be made on a login node or in a router process.
"""

from .cost import CostModel
from .greedy import greedy_physical_to_logical
from .load import balancedness, count_load, drift, popularity, sample_topk
from .plan import ExpertPlan
from .planner import plan_experts, update_plan
from .split import balanced_split
from .tokens import choose_replicas, nodes_per_token

__all__ = [
    "CostModel",
    "ExpertPlan",
    "balanced_split",
    "balancedness",
    "choose_replicas",
    "count_load",
    "drift",
    "greedy_physical_to_logical",
    "nodes_per_token",
    "plan_experts",
    "popularity",
    "sample_topk",
    "update_plan",
]
