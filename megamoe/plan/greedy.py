"""The published greedy of DeepSeek's EPLB, written from its description: the baseline of this package's figures.

Source: README of github.com/deepseek-ai/EPLB ("hierarchical" and "global" load balancing). Its three parts are
replication (one more copy to the expert with the largest load per copy), packing (heaviest first into the lightest pack
that still has room) and, when expert groups divide evenly over nodes, doing both node by node.
"""

import numpy as np


def pack_heaviest_first(weight, num_packs):
    """Pack n items into num_packs packs of n / num_packs items each, heaviest item first, lightest open pack first.

    weight: float [layers, n], n a multiple of num_packs.
    Returns (pack, position): int64 [layers, n] each; ties go to the lower item and the lower pack.
    """
    num_layers, n = weight.shape
    per_pack = n // num_packs
    pack = np.empty((num_layers, n), np.int64)
    position = np.empty((num_layers, n), np.int64)
    if per_pack == 1:
        # One item a pack leaves nothing to decide; the published code keeps the order, and moves depend on it.
        pack[:] = np.arange(n)
        position[:] = 0
        return pack, position
    layer = np.arange(num_layers)
    filled = np.zeros((num_layers, num_packs))
    count = np.zeros((num_layers, num_packs), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        target = np.where(count < per_pack, filled, np.inf).argmin(1)
        pack[layer, item] = target
        position[layer, item] = count[layer, target]
        filled[layer, target] += weight[layer, item]
        count[layer, target] += 1
    return pack, position


def replicate_hottest(weight, num_physical):
    """Give num_physical - n extra copies, each to the expert with the largest weight per copy.

    weight: float [layers, n]. Returns (physical_to_logical int64 [layers, num_physical], count int64 [layers, n]).
    """
    num_layers, n = weight.shape
    layer = np.arange(num_layers)
    count = np.ones((num_layers, n), np.int64)
    owner = np.empty((num_layers, num_physical), np.int64)
    owner[:, :n] = np.arange(n)
    for slot in range(n, num_physical):
        hottest = (weight / count).argmax(1)
        owner[:, slot] = hottest
        count[layer, hottest] += 1
    return owner, count


def greedy_physical_to_logical(load, *, num_ranks, num_nodes=1, num_redundant_experts=0, num_groups=1):
    """physical_to_logical int64 [layers, num_physical_experts] of the published greedy.

    load: float [layers, num_logical_experts]. Hierarchical when num_groups is a multiple of num_nodes, else global.
    Two copies of one expert may land on one rank; that is the published behaviour and is kept.
    """
    load = np.asarray(load, np.float64)
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    num_layers, num_logical = load.shape
    num_physical = num_logical + num_redundant_experts
    group_size = num_logical // num_groups
    groups_per_node = num_groups // num_nodes
    logical_per_node = num_logical // num_nodes
    physical_per_node = num_physical // num_nodes

    group_load = load.reshape(num_layers, num_groups, group_size).sum(-1)
    node, position = pack_heaviest_first(group_load, num_nodes)
    # node-major numbering of the logical experts: whole groups, in the order in which they were packed
    first = (node * groups_per_node + position) * group_size
    by_node = (first[..., None] + np.arange(group_size)).reshape(num_layers, num_logical)
    logical_of = np.argsort(by_node, axis=1)
    node_load = np.take_along_axis(load, logical_of, 1).reshape(-1, logical_per_node)

    owner, count = replicate_hottest(node_load, physical_per_node)
    copy_load = np.take_along_axis(node_load / count, owner, 1)
    rank, position = pack_heaviest_first(copy_load, num_ranks // num_nodes)
    slot = rank * (num_physical // num_ranks) + position
    placed = np.take_along_axis(owner, np.argsort(slot, axis=1), 1).reshape(num_layers, num_nodes, physical_per_node)
    placed = placed + (np.arange(num_nodes) * logical_per_node)[None, :, None]
    return np.take_along_axis(logical_of, placed.reshape(num_layers, num_physical), 1)
