"""ExpertPlan: which expert sits in which slot, and how good that is; its constructor checks it."""

from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from .cost import CostModel, slot_cost
from .load import balancedness
from .replicate import minmax_replicas


@dataclass(frozen=True, eq=False)
class ExpertPlan:
    """Placement of all layers. Slot p of a layer lives on rank p // num_local_experts, rank r on node
    r // (num_ranks / num_nodes).

    physical_to_logical: int32 [layers, num_physical_experts]
    load:  float64 [layers, num_logical_experts], the statistics it was made for, in rows
    share: float64 [layers, num_physical_experts], part of its expert's rows each slot is planned to take
    home_node: int32 [layers, num_logical_experts], a node that holds the expert and all of its expert group, or None
        where the routing has no groups; max_nodes_per_token goes with it
    cost: CostModel of phase "decode", None for "prefill", where cost means rows
    """

    physical_to_logical: np.ndarray
    load: np.ndarray
    share: np.ndarray
    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    phase: str = "prefill"
    cost: CostModel | None = None
    home_node: np.ndarray | None = None
    max_nodes_per_token: int | None = None
    num_replicas: np.ndarray = field(init=False, repr=False)
    logical_to_physical: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        replicas, to_physical = invert(self.physical_to_logical, self.num_logical_experts)
        object.__setattr__(self, "num_replicas", replicas)
        object.__setattr__(self, "logical_to_physical", to_physical)
        self.check()

    @property
    def num_layers(self):
        return self.physical_to_logical.shape[0]

    @property
    def num_logical_experts(self):
        return self.load.shape[1]

    @property
    def num_physical_experts(self):
        return self.physical_to_logical.shape[1]

    @property
    def num_redundant_experts(self):
        return self.num_physical_experts - self.num_logical_experts

    @property
    def num_local_experts(self):
        """Slots per rank."""
        return self.num_physical_experts // self.num_ranks

    @property
    def placed(self):
        """physical_to_logical by rank: int32 [layers, num_ranks, num_local_experts]."""
        return self.physical_to_logical.reshape(self.num_layers, self.num_ranks, -1)

    @cached_property
    def slot_load(self):
        """Planned rows per slot, float64 [layers, num_physical_experts]."""
        return np.take_along_axis(self.load, self.physical_to_logical.astype(np.int64), 1) * self.share

    @cached_property
    def rank_load(self):
        """Planned rows per rank, float64 [layers, num_ranks]."""
        return self.slot_load.reshape(self.num_layers, self.num_ranks, -1).sum(2)

    @cached_property
    def node_load(self):
        """Planned rows per node, float64 [layers, num_nodes]."""
        return self.rank_load.reshape(self.num_layers, self.num_nodes, -1).sum(2)

    @cached_property
    def rank_cost(self):
        """Planned cost per rank, float64 [layers, num_ranks]: rows for "prefill", us for "decode"."""
        cost = slot_cost(self.cost, self.slot_load, self.load.sum(1))
        return cost.reshape(self.num_layers, self.num_ranks, -1).sum(2)

    @cached_property
    def bound(self):
        """No plan with these slots and an even split has a smaller largest rank_cost, float64 [layers].

        max(mean over ranks, cost of the hottest copy under the best replica counts). For "decode" the mean is that of
        this plan's replica counts, since a further copy is a further activated expert.
        """
        count = minmax_replicas(self.load, self.num_redundant_experts, self.num_ranks)
        hottest = slot_cost(self.cost, self.load / count, self.load.sum(1)).max(1)
        return np.maximum(self.rank_cost.mean(1), hottest)

    @cached_property
    def gap(self):
        """Largest rank_cost / bound - 1, float64 [layers], 0 where nothing was routed."""
        largest = self.rank_cost.max(1)
        return np.where(self.bound > 0, largest / np.where(self.bound > 0, self.bound, 1.0) - 1, 0.0)

    @cached_property
    def balancedness(self):
        """Mean / largest rank_cost, float64 [layers]; 1.0 where nothing was routed."""
        return balancedness(self.rank_cost)

    def moves_from(self, other):
        """Slots whose expert differs from the other plan's, int64 [layers]: weights that must be copied.

        ValueError when the other plan has another topology.
        """
        mine, theirs = self.physical_to_logical.shape, other.physical_to_logical.shape
        if mine != theirs or self.num_ranks != other.num_ranks:
            raise ValueError(f"plans of different topologies: {mine[0]} layers, {mine[1]} slots, {self.num_ranks} "
                             f"ranks against {theirs[0]} layers, {theirs[1]} slots, {other.num_ranks} ranks")
        return (self.physical_to_logical != other.physical_to_logical).sum(1)

    def check(self):
        """Raise ValueError, naming layer and expert, unless the plan is one: shapes that fit the topology, experts in
        range, each at least once, shares that sum to one, and with expert groups a copy of each expert on its home
        node with whole groups at home.
        """
        slots, ranks, nodes = self.num_physical_experts, self.num_ranks, self.num_nodes
        if slots % ranks or ranks % nodes:
            raise ValueError(f"{slots} slots on {ranks} ranks on {nodes} nodes: each must divide the one before")
        if self.share.shape != self.physical_to_logical.shape or len(self.load) != self.num_layers:
            raise ValueError(f"share {self.share.shape} and load {self.load.shape} do not fit physical_to_logical "
                             f"{self.physical_to_logical.shape}")
        if not self.num_replicas.all():
            layer, expert = np.argwhere(self.num_replicas == 0)[0]
            raise ValueError(f"layer {layer}: logical expert {expert} has no slot")
        total = np.zeros(self.load.shape)
        np.add.at(total, (np.arange(self.num_layers)[:, None], self.physical_to_logical), self.share)
        wrong = np.argwhere(~np.isclose(total, 1.0, atol=1e-6))
        if len(wrong):
            layer, expert = wrong[0]
            raise ValueError(f"layer {layer}: the shares of expert {expert} do not sum to 1 but to "
                             f"{total[layer, expert]:.6g}")
        if (self.share < 0).any():
            layer, slot = np.argwhere(self.share < 0)[0]
            raise ValueError(f"layer {layer}: slot {slot} has the negative share {self.share[layer, slot]:.6g}")
        if self.home_node is not None:
            self._check_homes()

    def _check_homes(self):
        by_group = self.home_node.reshape(self.num_layers, self.num_groups, -1)
        split = (by_group != by_group[..., :1]).any(2)
        if split.any():
            layer, expert_group = np.argwhere(split)[0]
            raise ValueError(f"layer {layer}: expert group {expert_group} has no single home node")
        node = np.arange(self.num_physical_experts) // (self.num_physical_experts // self.num_nodes)
        at_home = np.zeros(self.load.shape, bool)
        layer, slot = np.nonzero(np.take_along_axis(self.home_node, self.physical_to_logical, 1) == node)
        at_home[layer, self.physical_to_logical[layer, slot]] = True
        if not at_home.all():
            layer, expert = np.argwhere(~at_home)[0]
            raise ValueError(f"layer {layer}: expert {expert} has no copy on its home node "
                             f"{self.home_node[layer, expert]}")

    def as_dict(self):
        """Lists and numbers only, for JSON; from_dict reads it back."""
        names = ("num_ranks", "num_nodes", "num_groups", "phase", "max_nodes_per_token")
        arrays = ("physical_to_logical", "load", "share", "home_node")
        plain = {name: getattr(self, name) for name in names}
        plain |= {name: None if getattr(self, name) is None else getattr(self, name).tolist() for name in arrays}
        return plain | {"cost": None if self.cost is None else asdict(self.cost)}

    @classmethod
    def from_dict(cls, plain):
        """The plan of an as_dict; checked like any other."""
        plain = dict(plain)
        for name, dtype in (("physical_to_logical", np.int32), ("load", np.float64), ("share", np.float64),
                            ("home_node", np.int32)):
            plain[name] = None if plain[name] is None else np.asarray(plain[name], dtype)
        plain["cost"] = None if plain["cost"] is None else CostModel(**plain["cost"])
        return cls(**plain)


def invert(physical_to_logical, num_logical_experts):
    """(num_replicas int32 [layers, experts], logical_to_physical int32 [layers, experts, most replicas]).

    Slots of an expert in ascending order, padded with -1. ValueError for an expert index out of range.
    """
    mapping = np.asarray(physical_to_logical)
    if mapping.size and (mapping.min() < 0 or mapping.max() >= num_logical_experts):
        raise ValueError(f"physical_to_logical holds {mapping.min()}..{mapping.max()}, outside "
                         f"0..{num_logical_experts - 1}")
    num_layers, num_physical = mapping.shape
    layer = np.arange(num_layers)[:, None]
    replicas = np.zeros((num_layers, num_logical_experts), np.int32)
    np.add.at(replicas, (layer, mapping), 1)
    order = np.argsort(mapping, axis=1, kind="stable")
    expert = np.take_along_axis(mapping, order, 1)
    first = np.cumsum(replicas, axis=1) - replicas
    nth = np.arange(num_physical) - np.take_along_axis(first, expert, 1)
    to_physical = np.full((num_layers, num_logical_experts, int(replicas.max())), -1, np.int32)
    to_physical[layer, expert, nth] = order
    return replicas, to_physical
