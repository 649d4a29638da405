"""Routing of any model within few nodes, given where the experts live."""

import torch
from torch import Tensor

from .groups import kept_experts, members_of_nodes
from .router import Routed, expert_scores, pick_experts


def limit_nodes(
    logits: Tensor,
    topk: int,
    home_node: Tensor,
    max_nodes: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Routed:
    """As route, but a token's experts have at most max_nodes home nodes: its best nodes, then the experts in them.

    home_node: int32 or int64 [num_experts], tensor, array or list, node ids >= 0 (a layer of `ExpertPlan.home_node`):
        a node that surely holds the expert. `plan.choose_replicas` with the same home_node and max_nodes then keeps
        every token within max_nodes nodes whatever copies there are.
    max_nodes: >= 1; with no fewer than the nodes of home_node the result is that of route.
    The score of a node is the sum of its ceil(topk / max_nodes) best biased scores, of all of them if it has fewer
    (DeepSeek-V3 report, arXiv 2412.19437, section 2.1.2); ties go to the lower node, then to the lower expert.
    Softmax scores and their weights are those over all experts, also with normalize=False.
    home_node is read on the host, so this cannot be captured in a CUDA graph. ValueError names a wrong argument.
    """
    scores, picking = expert_scores(logits, topk, score, bias)
    num_experts = logits.shape[1]
    home_node = torch.as_tensor(home_node).cpu()
    if home_node.shape != (num_experts,) or home_node.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"home_node has shape {tuple(home_node.shape)}, dtype {home_node.dtype}; "
            f"pass int32 or int64 [num_experts] = [{num_experts}]"
        )
    if (home_node < 0).any():
        expert = int((home_node < 0).nonzero()[0])
        raise ValueError(f"home_node[{expert}]={int(home_node[expert])} must be a node id >= 0")
    if max_nodes < 1:
        raise ValueError(f"max_nodes={max_nodes} must be at least 1")
    members = members_of_nodes(home_node)
    # A token may keep the smallest nodes
    fewest = int((members < num_experts).sum(dim=1).sort().values[:max_nodes].sum())
    if topk > fewest:
        raise ValueError(
            f"max_nodes={max_nodes}: the {max_nodes} smallest nodes hold {fewest} experts, fewer than topk={topk}; "
            f"allow more nodes"
        )
    kept = None
    if max_nodes < len(members):
        kept = kept_experts(picking, members.to(logits.device), max_nodes, num_best=-(-topk // max_nodes))
    return pick_experts(scores, picking, kept, topk, normalize, scale)
