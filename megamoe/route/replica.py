"""Logical expert ids to physical slots, where experts have several copies: the choice made in the dispatch."""

import numpy as np
import torch
from torch import Tensor

from megamoe.plan.choice import ReplicaMap, assign_rows, copy_begins


def choose_replicas(exchange, replicas: ReplicaMap, topk_idx: list[Tensor]) -> list[Tensor]:
    """Slot over all ranks of each row: int64 [n, topk] per rank held here (exchange.ranks), -1 where topk_idx is -1.

    topk_idx: int [n, topk], logical ids, one per rank held here. With "static" a rank decides alone; otherwise ranks
    first tell each other their rows per expert, and the rows of an expert in the order (source rank, token, slot) go
    to its copies in runs (`plan/choice.py`). Which copy serves a row changes no bit of the layer's output.
    """
    if replicas.choice == "static":
        table = torch.from_numpy(replicas.by_source).to(topk_idx[0].device)
        return [torch.where(idx >= 0, table[rank][idx.long().clamp(min=0)], -1)
                for rank, idx in zip(exchange.ranks, topk_idx, strict=True)]  # fmt: skip
    experts = replicas.num_logical_experts
    own = [torch.bincount(idx[idx >= 0].long(), minlength=experts) for idx in topk_idx]
    sends = [[(count,)] * exchange.ep_size for count in own]
    chosen = []
    received = exchange.all_to_all(sends, "dispatch")
    for rank, idx, bundles in zip(exchange.ranks, topk_idx, received, strict=True):
        counts = np.stack([bundle[0].cpu().numpy() for bundle in bundles])
        begin = copy_begins(replicas, counts.sum(0))
        slots = assign_rows(replicas, begin, idx.cpu().numpy(), counts[:rank].sum(0))
        chosen.append(torch.from_numpy(slots).to(idx.device))
    return chosen
