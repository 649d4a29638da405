"""Kernels are compiled before any rank waits for another on the device, by one rank a node."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from megamoe.ranks import rank_from_env


def compile_once_a_node(workspace) -> None:
    """The node's first rank compiles what the workspace's calls can choose; the others then find it in the cache.

    Collective over the workspace's group, on the host: no device deadline runs meanwhile. What fails on one rank is
    raised on all; a rank that does not come within arrive_deadline_s, compiling apart, is named. A cache that ranks do
    not share only means that each compiles for itself, as before.
    """
    group, deadline_s = workspace.group, workspace.ep_config.arrive_deadline_s
    if group is None or dist.get_world_size(group) == 1:
        return  # the engine compiles where it loads
    from megamoe_cuda.gather import busy, gather

    problem = None
    if rank_from_env().local_rank == 0:
        with busy(group, deadline_s):
            try:
                compile_for(workspace.moe_configs, workspace.ep_size, workspace.ep_config)
            except Exception as error:  # any of them would leave the peers waiting
                problem = f"{type(error).__name__}: {error}"
    for ep_rank, theirs in enumerate(gather(group, "kernels", problem, deadline_s)):
        if theirs is not None:
            raise RuntimeError(f"rank {ep_rank} could not compile the kernel: {theirs}")


def compile_for(configs, ep_size: int, ep_config) -> list:
    """Compile into the cache every kernel that calls on such a workspace can choose; needs no GPU."""
    from megamoe.builds import builds_of, kernel_build
    from megamoe_cuda.compile import compile_kernel

    wanted = builds_of(configs, ep_size, ep_config.num_max_tokens_per_rank)
    builds = [kernel_build(block, form, extras, plans=ep_config.takes_plans) for form, block, extras in wanted]
    with ThreadPoolExecutor(min(len(builds), os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda build: compile_kernel(build.source, build.entry, build.defines), builds))
