"""The call that `python -m megamoe trace` runs: one layer call with a kernel built with -DTRACE, of one process with
virtual ranks or of ranks with a GPU each."""

import torch
import torch.distributed as dist

from megamoe import EPConfig, MoELayer, Workspace
from megamoe.builds import kernel_key
from megamoe.engine_fused import together
from megamoe.layout import TRACE_RECORDS, TRACE_ROLES
from megamoe.plan.tiles import choose_block_tokens
from megamoe.ranks import rank_from_env
from megamoe.testing.data import make_input, make_weights
from megamoe.trace import decode
from megamoe.trace_ranks import DEADLINE_S, gather_lists
from megamoe_cuda.gather import gather

WARM_UP_CALLS, TIMED_CALLS = 3, 20


def trace_call(
    config, num_tokens: int, virtual_ranks: int, prequantized: bool, *, routing: str = "uniform", group=None
) -> tuple[list[dict], str]:
    """Runs one traced call on the current GPU. -> (decode() of each rank, what was run in words).

    group: None, or ranks with a GPU each (virtual_ranks=1), on all of which this is called; only rank 0 then has lists,
    and each rank's times start at its own first record."""
    ep_config = EPConfig(num_tokens, virtual_ranks=virtual_ranks if group is None else None)
    ep_size, ranks = virtual_ranks, range(virtual_ranks)
    if group is not None:
        ep_size, ranks = dist.get_world_size(group), [dist.get_rank(group)]

    def given(column: list):
        return column if group is None else column[0]

    block = choose_block_tokens(config, ep_size, num_tokens)
    with Workspace(config, ep_config, group=group, device="cuda") as workspace, MoELayer(config, workspace) as layer:
        if workspace.fused is None:
            raise ValueError("the ranks are of several NVLink domains; trace those of one domain")
        fused, num_ctas, key = workspace.fused, workspace.fused.ctas_per_rank, kernel_key(config, block)
        with together(group, DEADLINE_S):
            weights = [make_weights(1, config, ep_size, rank, "cuda") for rank in ranks]
            names = ("linear1", "linear2", "linear1_sf", "linear2_sf")
            layer.load_weights(*(given([getattr(w, name) for w in weights]) for name in names))
            del weights
            inputs = [make_input(1, config, r, num_tokens, routing, "cuda", prequantized) for r in ranks]
            hidden_states = given([i.x if i.x_sf is None else (i.x, i.x_sf) for i in inputs])
            routed = given([i.topk_idx for i in inputs]), given([i.topk_weights for i in inputs])
            outs = [torch.empty(i.x.shape, dtype=torch.bfloat16, device="cuda") for i in inputs]
            first = rank_from_env().local_rank == 0
            traced = fused.load_kernel(*key, TRACE=1) if first or group is None else None
        with together(group, DEADLINE_S):  # the node's other ranks find it in the cache
            traced = traced or fused.load_kernel(*key, TRACE=1)

        def call(times: int) -> None:
            for _ in range(times):
                layer(hidden_states, *routed, out=given(outs))

        call(WARM_UP_CALLS)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(TIMED_CALLS)
        end.record()
        torch.cuda.synchronize()
        untraced_us = begin.elapsed_time(end) * 1000 / TIMED_CALLS

        shipped = fused.kernels[key]
        shape = num_ctas, len(TRACE_ROLES), TRACE_RECORDS, 2
        buffers = [torch.zeros(shape, dtype=torch.int64, device="cuda") for _ in ranks]
        if group is not None:
            untraced_us = max(gather(group, "trace call", untraced_us, DEADLINE_S))
        fused.kernels[key] = traced
        try:
            # Without a buffer nothing is noted. Ranks leave the meeting above milliseconds apart: the traced call
            # follows these at once, which have brought the GPUs in step.
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
        lists = [decode(buffer.flatten().tolist(), num_ctas) for buffer in buffers]
    if group is not None:
        lists = gather_lists(group, lists[0])
    clocks = "" if group is None else f" of {ep_size}; each rank's times count from its own first record"
    words = (f"{config.hidden}/{config.intermediate}, {config.num_experts} experts, topk {config.topk}, {num_tokens} "
             f"tokens a rank, {ep_size} rank(s) of {num_ctas} CTAs, tiles of {block} tokens, {config.weight_format} "
             f"weights, {'prequantized' if prequantized else 'bf16'} input, {routing} routing, "
             f"{torch.cuda.get_device_name()}{clocks}; untraced call {untraced_us:.1f} us")  # fmt: skip
    return lists, words
