"""The kernel opened between its stages: linear1's sums from a test build, h from the local workspace."""

import contextlib
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from megamoe import EPConfig, MoEConfig, MoELayer, Workspace
from megamoe.builds import kernel_key
from megamoe.plan import tiles
from megamoe.quant.fp8 import Quantized
from megamoe.testing.data import Case
from tests.gpu import oracle


class Stages(NamedTuple):
    """Per rank: linear1 fp32 [rows, 2 * intermediate]; h (e4m3, sf) [rows, intermediate]; y bf16 [num_tokens, hidden].
    Rows are those of steps.Dispatched, in its order."""

    linear1: list[Tensor]
    h: list[Quantized]
    y: list[Tensor]


@contextlib.contextmanager
def _only_kernel(workspace: Workspace, config: MoEConfig, block_tokens: int):
    """A build that writes linear1's sums takes the place of every kernel."""
    fused = workspace.fused
    key = kernel_key(config, block_tokens)
    kernel = fused.load_kernel(*key, DUMP_LINEAR1=1)
    before, fused.kernels = fused.kernels, {key: kernel}
    try:
        yield
        torch.cuda.synchronize()
    finally:
        fused.kernels = before
        kernel.close()


def block_rows(num_rows: list[int], block_tokens: int, device) -> tuple[Tensor, int]:
    """Where the rows lie once every expert's are rounded up to whole blocks, and how many blocks there are."""
    places, block = [torch.empty(0, dtype=torch.int64)], 0
    for count in num_rows:
        places.append(block * block_tokens + torch.arange(count))
        block += -(-count // block_tokens)
    return torch.cat(places).to(device), block


def read_h(workspace: Workspace, rank: int, config: MoEConfig, block_tokens: int, places: Tensor, blocks: int):
    """The rows' h: images [block][k block], each block_tokens swizzled rows of 128 e4m3, then their scale factors.

    Where codes are decoded in the K loop, each 128 of a row is in permute_k's order (csrc/gemm/mxfp4_decode.cuh)."""
    intermediate = config.intermediate
    region = next(r for r in workspace.fused.regions if r.name == "h")
    k_blocks, image_bytes = intermediate // 128, block_tokens * (128 + 4)
    local = workspace.fused.local[rank]
    images = local[region.offset : region.offset + blocks * k_blocks * image_bytes].view(blocks, k_blocks, image_bytes)
    chunks = images[..., : block_tokens * 128].reshape(blocks, k_blocks, block_tokens, 8, 16)
    row = torch.arange(block_tokens, device=local.device)[:, None]
    chunk = torch.arange(8, device=local.device)[None, :] ^ (row % 8)
    values = chunks[:, :, row, chunk].permute(0, 2, 1, 3, 4).reshape(blocks * block_tokens, intermediate)
    if config.weight_format == "mxfp4" and not tiles.decodes_ahead("mxfp4", block_tokens):
        column = torch.arange(intermediate, device=local.device)
        values = values[:, column // 128 * 128 + column // 4 % 8 * 16 + column % 128 // 32 * 4 + column % 4]
    sf = images[..., block_tokens * 128 :].contiguous().view(torch.float32)
    sf = sf.permute(0, 2, 1).reshape(blocks * block_tokens, k_blocks)
    return Quantized(values[places].view(torch.float8_e4m3fn), sf[places])


def run(case: Case, num_rows: list[list[int]], block_tokens: int) -> Stages:
    """One call with tiles of `block_tokens`. num_rows: of every rank's experts, as steps.dispatch has them."""
    config, capacity = case.config, max(1, *(i.x.shape[0] for i in case.inputs))
    ep_config = EPConfig(capacity, case.ep_size, arrive_deadline_s=5.0, step_deadline_s=5.0)
    # Before the workspace is made: what it holds depends on its largest tile.
    with (
        mock.patch.object(tiles, "choose_block_tokens", lambda *_: block_tokens),
        Workspace(config, ep_config, device="cuda") as workspace,
        MoELayer(config, workspace) as layer,
    ):
        oracle.load(layer, case)
        places, dumps = [], []
        for rank, counts in enumerate(num_rows):
            where, blocks = block_rows(counts, block_tokens, workspace.device)
            dump = torch.full((max(blocks, 1) * block_tokens, 2 * config.intermediate), float("nan"), device="cuda")
            layer._engine.params.ranks[rank].linear1_dump = dump.data_ptr()
            places.append((where, blocks))
            dumps.append(dump)
        with _only_kernel(workspace, config, block_tokens):
            y = oracle.run_layer(layer, case)
        layer.check()
        linear1 = [dump[where] for dump, (where, _) in zip(dumps, places)]
        h = [read_h(workspace, rank, config, block_tokens, where, blocks)
             for rank, (where, blocks) in enumerate(places)]  # fmt: skip
        return Stages(linear1, h, y)
