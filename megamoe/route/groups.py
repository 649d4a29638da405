"""Which sets of experts (expert groups, or the nodes that hold them) a token may choose from."""

import torch
from torch import Tensor


def members_of_groups(num_experts: int, num_groups: int, device: torch.device) -> Tensor:
    """Experts of each group, int64 [num_groups, num_experts / num_groups]: groups are runs of neighbouring experts."""
    return torch.arange(num_experts, device=device).view(num_groups, -1)


def members_of_nodes(home_node: Tensor) -> Tensor:
    """Experts of each node that has any, in ascending order of node: int64 [nodes, most experts of a node], padded
    with num_experts. home_node: int [num_experts].
    """
    _, node, count = torch.unique(home_node, return_inverse=True, return_counts=True)
    order = node.argsort(stable=True)
    nth = torch.arange(len(node), device=node.device) - (count.cumsum(0) - count)[node[order]]
    members = torch.full((len(count), int(count.max())), len(node), device=node.device)
    members[node[order], nth] = order
    return members


def kept_experts(picking: Tensor, members: Tensor, num_kept: int, num_best: int) -> Tensor:
    """Experts of each token's num_kept best sets, bool [n, num_experts]; ties go to the earlier set.

    picking: fp32 [n, num_experts]; members: int64 [num_sets, most], every expert once, padded with num_experts.
    The score of a set is the sum of its num_best highest values, of all of them if it has fewer.
    A NaN sorts before every number, in sets as in route: its set is kept and the token stays within num_kept sets.
    """
    num_tokens, num_experts = picking.shape
    num_best = min(num_best, members.shape[1])
    padded = torch.cat([picking, picking.new_full((num_tokens, 1), -torch.inf)], dim=1)
    best = padded[:, members].sort(dim=2, descending=True).values[..., :num_best]
    # A pad adds nothing, while -inf from the bias of an expert that is switched off counts
    real = torch.arange(num_best, device=picking.device) < (members < num_experts).sum(dim=1, keepdim=True)
    set_score = torch.where(real, best, 0.0).sum(dim=2)
    sets = set_score.sort(dim=1, descending=True, stable=True).indices[:, :num_kept]
    kept = torch.zeros_like(padded, dtype=torch.bool)
    return kept.scatter_(1, members[sets].flatten(1), True)[:, :num_experts]
