"""Weights as the kernel streams them: one image per (expert, 256 rows, 128 of K), in the order it is read.

An image is what one bulk copy brings into a stage: 256 rows of 128 e4m3 bytes, 128-byte-swizzled as wgmma reads them
(16-byte chunk c of row r lies at chunk c ^ (r % 8); PTX ISA, "Asynchronous warpgroup level matrix shared memory
layout"), then two fp32 scale factors, then padding. It serves as either wgmma operand.

linear1: an image holds 128 h columns, gate and up rows alternating by 8, so that one thread of the epilogue has both;
its scale factors are the gate's and the up's. linear2: 256 rows of hidden, zero rows where hidden is an odd multiple
of 128; its scale factors are those of the two halves.
"""

import torch
from torch import Tensor

from megamoe.layout import IMAGE_PITCH_BYTES, IMAGE_SF_OFFSET, K_BLOCK, N_BLOCK, image_blocks


def image_shape(linear: int, num_local_experts: int, hidden: int, intermediate: int) -> tuple[int, int, int, int]:
    """Shape of all images of linear1 or linear2 (`linear` = 1 or 2): uint8 [experts, n blocks, k blocks, pitch]."""
    return num_local_experts, *image_blocks(linear, hidden, intermediate), IMAGE_PITCH_BYTES


def order_rows(linear: int, rows: Tensor) -> Tensor:
    """[N, K] -> [n blocks, 256, K] in image order."""
    if linear == 1:
        gate, up = rows.view(2, -1, 16, 8, rows.shape[1])
        return torch.stack((gate, up), dim=2).reshape(-1, N_BLOCK, rows.shape[1])
    missing = -rows.shape[0] % N_BLOCK
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).view(-1, N_BLOCK, rows.shape[1])


def order_sf(linear: int, sf: Tensor) -> Tensor:
    """[N / 128, k blocks] -> [n blocks, k blocks, 2]."""
    if linear == 1:
        return torch.stack(sf.chunk(2), dim=-1)
    missing = sf.shape[0] % 2
    return torch.nn.functional.pad(sf, (0, 0, 0, missing)).view(-1, 2, sf.shape[1]).transpose(1, 2)


def _swizzle_index(device: torch.device) -> tuple[Tensor, Tensor]:
    row = torch.arange(8, device=device)[:, None]
    return row, torch.arange(8, device=device)[None, :] ^ row


def pack_expert(linear: int, values: Tensor, sf: Tensor, out: Tensor) -> None:
    """Write one expert's images.

    linear: 1 or 2. values: e4m3 [N, K], as steps.ExpertWeights. sf: fp32 [N / 128, K / 128].
    out: uint8 [n blocks, k blocks, IMAGE_PITCH_BYTES], written in place.
    """
    rows = order_rows(linear, values.view(torch.uint8))
    n_blocks, k_blocks = rows.shape[0], rows.shape[2] // K_BLOCK
    chunks = rows.view(n_blocks, N_BLOCK // 8, 8, k_blocks, 8, 16).permute(0, 3, 1, 2, 4, 5)
    row, chunk = _swizzle_index(values.device)
    out[..., :IMAGE_SF_OFFSET] = chunks[:, :, :, row, chunk].reshape(n_blocks, k_blocks, IMAGE_SF_OFFSET)
    tail = torch.zeros(n_blocks, k_blocks, (IMAGE_PITCH_BYTES - IMAGE_SF_OFFSET) // 4, device=values.device)
    tail[..., :2] = order_sf(linear, sf)
    out[..., IMAGE_SF_OFFSET:] = tail.view(torch.uint8)


def unpack_expert(linear: int, images: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The exact inverse of pack_expert: (e4m3 [num_rows, K], fp32 [num_rows / 128, K / 128])."""
    n_blocks, k_blocks = images.shape[:2]
    row, chunk = _swizzle_index(images.device)  # XOR undoes itself
    chunks = images[..., :IMAGE_SF_OFFSET].reshape(n_blocks, k_blocks, N_BLOCK // 8, 8, 8, 16)[:, :, :, row, chunk]
    rows = chunks.permute(0, 2, 3, 1, 4, 5).reshape(n_blocks, N_BLOCK, k_blocks * K_BLOCK)
    sf = images[..., IMAGE_SF_OFFSET : IMAGE_SF_OFFSET + 8].contiguous().view(torch.float32)
    if linear == 1:
        gate, up = rows.view(n_blocks * 16, 2, 8, -1).unbind(1)
        values = torch.cat((gate.reshape(-1, rows.shape[2]), up.reshape(-1, rows.shape[2])))
        return values.view(torch.float8_e4m3fn), torch.cat(sf.unbind(-1))
    values = rows.reshape(-1, rows.shape[2])[:num_rows]
    return values.contiguous().view(torch.float8_e4m3fn), sf.transpose(1, 2).reshape(-1, k_blocks)[: num_rows // 128]
