"""MXFP4 weights as the kernel streams them: the images of quant/weights.py with codes instead of e4m3 values.

An image is what one bulk copy brings into a stage: 16 KB of codes of 256 rows x 128 of K, 1 KB of scale bytes, two
fp32 bases, padding. Rows lie as in an FP8 image (gate and up alternating by 8). Codes and scale bytes lie as the lanes
of the math warps hold them in the wgmma A operand (csrc/ptx/wgmma_register_a.cuh), each reading 4 x 16 bytes:

    row of the image   128 * warpgroup + 64 * slab + 16 * warp + 8 * upper + r      r = lane / 4
    k of the block     32 * q + 8 * slice + e                                       q = lane % 4, e = 0 to 7
    bytes of codes     [warpgroup][warp][slab][slice / 2][lane][slice % 2][upper][4 bytes: codes e = 0 to 7]
    byte of scales     [warpgroup][warp][lane][slab][upper]

A lane holds whole groups of 32: the kernel permutes K to that end (permute_k in csrc/gemm/mxfp4_decode.cuh). In a word,
the magnitude of code e is in bits 4 e to 4 e + 2; signs lie where one mask, or one shift, puts them into e4m3 bytes. A
scale byte is 8 * (sf - top + 14), an offset into the decoder's table; the bases are those of the image's two 128 rows
(linear1: gate, up), 2^(top - 133).
"""

import torch
from torch import Tensor

from megamoe.layout import (
    K_BLOCK,
    MXFP4_GROUP,
    MXFP4_IMAGE_PITCH_BYTES,
    MXFP4_IMAGE_SF_OFFSET,
    MXFP4_SCALES_OFFSET,
    N_BLOCK,
)
from megamoe.quant import weights
from megamoe.quant.mxfp4 import BASE_ROWS, BINADES, LARGEST_EXPONENT, tops

SIGN_BITS = (7, 15, 23, 31, 3, 11, 19, 27)
"""Where the sign of code e lies in its word."""
_AS_ROWS = (2, 2, 4, 2, 8)  # warpgroup, slab, warp, upper, r: the rows of an image


def image_shape(linear: int, num_local_experts: int, hidden: int, intermediate: int) -> tuple[int, int, int, int]:
    """Shape of all images of linear1 or linear2 (`linear` = 1 or 2): uint8 [experts, n blocks, k blocks, pitch]."""
    return (*weights.image_shape(linear, num_local_experts, hidden, intermediate)[:3], MXFP4_IMAGE_PITCH_BYTES)


def pack_expert(linear: int, codes: Tensor, sf: Tensor, out: Tensor) -> None:
    """Write one expert's images.

    linear: 1 or 2. codes: uint8 [N, K / 2], sf: uint8 [N, K / 32], as quant.mxfp4.fit returns them.
    out: uint8 [n blocks, k blocks, MXFP4_IMAGE_PITCH_BYTES], written in place.
    """
    top = tops(codes, sf)
    step = sf.int() - top.repeat_interleave(BASE_ROWS)[:, None] + (BINADES - 1)
    # Only all-zero groups lie outside, and their values are zero in any row of the table
    step = step.clamp(0, BINADES - 1).to(torch.uint8)
    base = torch.exp2((top - 127 - LARGEST_EXPONENT).double()).float()

    rows = weights.order_rows(linear, codes.contiguous().view(torch.int32))  # one word: 8 codes
    n_blocks, k_blocks = rows.shape[0], rows.shape[2] * 8 // K_BLOCK
    words = _place_signs(rows).view(n_blocks, *_AS_ROWS, k_blocks, 4, 2, 2)  # ..., q, slice / 2, slice % 2
    words = words.permute(0, 6, 1, 3, 2, 8, 5, 7, 9, 4)
    out[..., :MXFP4_SCALES_OFFSET] = words.reshape(n_blocks, k_blocks, -1).contiguous().view(torch.uint8)
    steps = (weights.order_rows(linear, step) * 8).view(n_blocks, *_AS_ROWS, k_blocks, 4)
    steps = steps.permute(0, 6, 1, 3, 5, 7, 2, 4)
    out[..., MXFP4_SCALES_OFFSET:MXFP4_IMAGE_SF_OFFSET] = steps.reshape(n_blocks, k_blocks, -1)
    tail = torch.zeros(n_blocks, k_blocks, (MXFP4_IMAGE_PITCH_BYTES - MXFP4_IMAGE_SF_OFFSET) // 4, device=codes.device)
    tail[..., :2] = weights.order_sf(linear, base[:, None].expand(-1, k_blocks))
    out[..., MXFP4_IMAGE_SF_OFFSET:] = tail.view(torch.uint8)


def unpack_expert(linear: int, images: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The inverse of pack_expert: (codes uint8 [num_rows, K / 2], sf uint8 [num_rows, K / 32]).

    Exact, but for the sf of all-zero groups that lay outside the binades of their rows' base: those come back clamped.
    """
    n_blocks, k_blocks = images.shape[:2]
    words = images[..., :MXFP4_SCALES_OFFSET].contiguous().view(torch.int32)
    words = words.view(n_blocks, k_blocks, 2, 4, 2, 2, 8, 4, 2, 2).permute(0, 2, 4, 3, 9, 6, 1, 7, 5, 8)
    words = _collect_signs(words.reshape(n_blocks, N_BLOCK, k_blocks * K_BLOCK // 8))
    steps = images[..., MXFP4_SCALES_OFFSET:MXFP4_IMAGE_SF_OFFSET].reshape(n_blocks, k_blocks, 2, 4, 8, 4, 2, 2)
    steps = steps.permute(0, 2, 6, 3, 7, 4, 1, 5).reshape(n_blocks, N_BLOCK, k_blocks * K_BLOCK // MXFP4_GROUP) // 8
    base = images[:, 0, MXFP4_IMAGE_SF_OFFSET : MXFP4_IMAGE_SF_OFFSET + 8].contiguous().view(torch.float32)
    top = torch.where(base > 0, torch.log2(base.double()).round() + 127 + LARGEST_EXPONENT, 0).int()
    halves = (words, steps, top[:, :, None])
    words, steps, top = (_undo_rows(linear, t, t.shape[1]) for t in halves)
    sf = steps.int() + top.repeat_interleave(BASE_ROWS, 0) - (BINADES - 1)
    return words[:num_rows].contiguous().view(torch.uint8), sf[:num_rows].clamp(0, 254).to(torch.uint8)


def _undo_rows(linear: int, blocks: Tensor, rows: int) -> Tensor:
    """[n blocks, rows, X] in image order -> [N, X]; rows: 256, or 2 for what two halves have one each of."""
    if linear == 2:
        return blocks.reshape(-1, blocks.shape[2])
    run = rows // 32 or 1  # gate and up alternate by 8 rows, or by 1
    gate, up = blocks.reshape(-1, 2, run, blocks.shape[2]).unbind(1)
    return torch.cat((gate.reshape(-1, blocks.shape[2]), up.reshape(-1, blocks.shape[2])))


def _place_signs(words: Tensor) -> Tensor:
    out = words & 0x77777777
    for code, bit in enumerate(SIGN_BITS):
        out |= (words >> (4 * code + 3) & 1) << bit
    return out


def _collect_signs(words: Tensor) -> Tensor:
    out = words & 0x77777777
    for code, bit in enumerate(SIGN_BITS):
        out |= (words >> bit & 1) << (4 * code + 3)
    return out
