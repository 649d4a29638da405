"""The call that `python -m megamoe trace` runs: one layer call with a kernel built with -DTRACE, of one process with
virtual ranks or of ranks with a GPU each."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed as dist

from megamoe import EPConfig, MoELayer, Workspace
from megamoe.builds import kernel_build, kernel_key, needs_extras
from megamoe.engine_fused import together
from megamoe.layout import TRACE_RECORDS, TRACE_ROLES
from megamoe.plan.tiles import choose_block_tokens
from megamoe.ranks import rank_from_env
from megamoe.testing.data import make_input, make_weights
from megamoe.trace import Lists, decode
from megamoe.trace_clock import GpuClock, compile_clock, on_host_clock
from megamoe.trace_ranks import DEADLINE_S, gather_lists
from megamoe.warmup import compile_for
from megamoe_cuda.compile import compile_kernel
from megamoe_cuda.gather import gather

WARM_UP_CALLS, TIMED_CALLS = 3, 20


class Traced(NamedTuple):
    """lists_of_ranks: decode() of each rank, of ranks with a GPU each by their host's clock, and on rank 0 only. words:
    what was run. clock_error_us: by how much at most two ranks' times are apart from being one clock's; None for ranks
    on one GPU."""

    lists_of_ranks: list[Lists]
    words: str
    clock_error_us: float | None


def trace_call(
    config, num_tokens: int, virtual_ranks: int, prequantized: bool, *, routing: str = "uniform", group=None,
    phase: Callable[[str], None] = lambda text: None,
) -> Traced:  # fmt: skip
    """Runs one traced call on the current GPU.

    group: None, or ranks of one host with a GPU each (virtual_ranks=1), on all of which this is called. phase: told
    what begins."""
    ep_config = EPConfig(num_tokens, virtual_ranks=virtual_ranks if group is None else None)
    ep_size, ranks = virtual_ranks, range(virtual_ranks)
    if group is not None:
        ep_size, ranks = dist.get_world_size(group), [dist.get_rank(group)]

    def given(column: list):
        return column if group is None else column[0]

    block, lead = choose_block_tokens(config, ep_size, num_tokens), rank_from_env().local_rank == 0
    phase("kernels, weights, inputs")
    with together(group, DEADLINE_S), ThreadPoolExecutor(1) as compiler:
        # By one rank a node and all at once, while the weights are made: the others find them in the cache
        compiled = compiler.submit(compile_all, config, ep_size, ep_config, block) if lead else None
        weights = [make_weights(1, config, ep_size, rank, "cuda") for rank in ranks]
        inputs = [make_input(1, config, r, num_tokens, routing, "cuda", prequantized) for r in ranks]
        torch.cuda.synchronize()
        if compiled is not None:
            compiled.result()
    phase("workspace")
    with Workspace(config, ep_config, group=group, device="cuda") as workspace, MoELayer(config, workspace) as layer:
        if workspace.fused is None or len({place.host for place in workspace.places}) > 1:
            raise ValueError("the ranks are of several hosts or NVLink domains, without a common clock; trace those of "
                             "one")  # fmt: skip
        fused, num_ctas, key = workspace.fused, workspace.fused.ctas_per_rank, kernel_key(config, block)
        phase("weights into images")
        with together(group, DEADLINE_S):
            names = ("linear1", "linear2", "linear1_sf", "linear2_sf")
            layer.load_weights(*(given([getattr(w, name) for w in weights]) for name in names))
            del weights
            hidden_states = given([i.x if i.x_sf is None else (i.x, i.x_sf) for i in inputs])
            routed = given([i.topk_idx for i in inputs]), given([i.topk_weights for i in inputs])
            outs = [torch.empty(i.x.shape, dtype=torch.bfloat16, device="cuda") for i in inputs]
            shape = num_ctas, len(TRACE_ROLES), TRACE_RECORDS, 2
            buffers = [torch.zeros(shape, dtype=torch.int64, device="cuda") for _ in ranks]
            traced = fused.load_kernel(*key, TRACE=1)
            torch.cuda.synchronize()

        def call(times: int) -> None:
            for _ in range(times):
                layer(hidden_states, *routed, out=given(outs))

        phase("untraced calls")
        call(WARM_UP_CALLS)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(TIMED_CALLS)
        end.record()
        torch.cuda.synchronize()
        layer.check()
        untraced_us = begin.elapsed_time(end) * 1000 / TIMED_CALLS

        phase("traced call")
        shipped = fused.kernels[key]
        with contextlib.ExitStack() as stack:
            with together(group, DEADLINE_S):
                clock = None if group is None else stack.enter_context(GpuClock())
                readings = [] if clock is None else [clock.read()]
            fused.kernels[key] = traced
            try:
                # Nothing is noted without a buffer. Ranks leave the meeting above milliseconds apart; these calls bring
                # the GPUs in step, and the traced one follows at once.
                call(WARM_UP_CALLS)
                for rank, buffer in enumerate(buffers):
                    layer._engine.params.ranks[rank].trace = buffer.data_ptr()
                call(1)
                torch.cuda.synchronize()
                layer.check()
            finally:
                torch.cuda.synchronize()
                fused.kernels[key] = shipped
                traced.close()
            with together(group, DEADLINE_S):
                readings += [] if clock is None else [clock.read()]
        lists_of_ranks = [decode(buffer.cpu().numpy(), num_ctas) for buffer in buffers]
        error_us = None
        if group is not None:
            phase("lists to rank 0")
            mine = [untraced_us, max(reading.error_ns for reading in readings) / 1000]
            columns = zip(*gather(group, "trace call", mine, DEADLINE_S), strict=True)
            untraced_us, error_us = (max(column) for column in columns)
            error_us *= 2  # of two ranks, each on its own
            lists_of_ranks = gather_lists(group, on_host_clock(lists_of_ranks[0], *readings))
        phase("workspace's end")
    of_gpus = "" if group is None else f" of {ep_size}, on their host's clock within {error_us:.1f} us"
    words = (f"{config.hidden}/{config.intermediate}, {config.num_experts} experts, topk {config.topk}, {num_tokens} "
             f"tokens a rank, {ep_size} rank(s) of {num_ctas} CTAs, tiles of {block} tokens, {config.weight_format} "
             f"weights, {'prequantized' if prequantized else 'bf16'} input, {routing} routing, "
             f"{torch.cuda.get_device_name()}{of_gpus}; untraced call {untraced_us:.1f} us")  # fmt: skip
    return Traced(lists_of_ranks, words, error_us)


def compile_all(config, ep_size: int, ep_config, block: int) -> None:
    """Into the cache: what such a workspace loads, the traced build of the tile that the call takes, the clock."""
    build = kernel_build(block, config.weight_format, needs_extras(config), plans=ep_config.takes_plans)
    with ThreadPoolExecutor(3) as pool:
        jobs = (pool.submit(compile_for, [config], ep_size, ep_config), pool.submit(compile_clock),
                pool.submit(compile_kernel, build.source, build.entry, build.defines | {"TRACE": 1}))  # fmt: skip
        for job in jobs:
            job.result()
