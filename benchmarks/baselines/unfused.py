"""The unfused baseline: what torch, NCCL and two grouped matmuls give without this project. Two rows of the table:

unfused-fp8   all-to-all of FP8 tokens, sort by expert, grouped FP8 matmul with SwiGLU and requantization in its
              epilogue, grouped FP8 matmul, sum per token and rank, all-to-all of bf16 partial sums, sum over ranks.
              Same FP8 weights, same formats as megamoe.
unfused-bf16  the same path with bf16 tokens, weights dequantized to bf16 beforehand and torch's grouped matmul. Its
              correctness is judged against the specification without quantizers, on the same values.

Fixed capacity: each rank sends each rank one slot a token, so no token is ever dropped, no size depends on the routing,
and the whole call fits in a CUDA graph. A token crosses to a rank once, however many of its experts live there.
One rank, or virtual ranks: all tokens and experts in one place, and no exchange; that flatters the baseline, and its
rows say ep_size 1 of N.
"""

import importlib.util

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.quant.fp8 import BLOCK, E4M3, dequantize_blocks, dequantize_rows, quantize_rows
from megamoe.steps import ExpertWeights


def available(device: torch.device) -> str | None:
    """None where the baseline runs, else the reason it does not."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed, and the grouped FP8 matmul is a Triton kernel"
    return None


class Unfused:
    """One rank of the unfused layer; buffers are allocated here, once, so that calls can be captured.

    case: shape. weights: this rank's experts, fp8 ExpertWeights; for precision 'bf16' the bf16 ones. num_tokens:
    capacity, equal on all ranks. kernels: 'triton', or 'torch' (plain torch, for CPU).
    """

    def __init__(
        self,
        case,
        weights: ExpertWeights,
        *,
        ep_rank: int,
        ep_size: int,
        num_tokens: int,
        precision: str = "fp8",
        group=None,
        kernels: str | None = None,
    ):
        self.case, self.weights, self.precision, self.group = case, weights, precision, group
        self.ep_rank, self.ep_size, self.capacity = ep_rank, ep_size, num_tokens
        self.num_local_experts = case.num_experts // ep_size
        self.first_expert = ep_rank * self.num_local_experts
        device = self.device = weights.linear1.device
        self.kernels = kernels or ("triton" if device.type == "cuda" else "torch")
        self.name = {"fp8": "unfused-fp8", "bf16": "unfused-bf16"}[precision] + (
            "" if self.kernels == "triton" else "-torch-loop"
        )
        tokens, pairs = ep_size * num_tokens, ep_size * num_tokens * case.topk
        # one message a token: x, x_sf, topk_idx, topk_weights, its length a multiple of 16 so that loads stay wide
        x_bytes, sf_bytes = (case.hidden, case.hidden // 32) if precision == "fp8" else (2 * case.hidden, 0)
        message_bytes = -(-(x_bytes + sf_bytes + 8 * case.topk) // 16) * 16
        self.sent = torch.zeros(ep_size, num_tokens, message_bytes, dtype=torch.uint8, device=device)
        self.received = torch.empty_like(self.sent) if ep_size > 1 else self.sent
        self.send_x, self.send_sf, self.send_idx, self.send_weights = self._fields(self.sent, x_bytes, sf_bytes)
        fields = self._fields(self.received.view(1, tokens, message_bytes), x_bytes, sf_bytes)
        self.x, self.x_sf, self.topk_idx, self.topk_weights = (field[0] for field in fields)
        self.h_sf = torch.empty(pairs, case.intermediate // BLOCK, device=device) if precision == "fp8" else None
        self.h = torch.empty(
            pairs, case.intermediate, dtype=E4M3 if precision == "fp8" else torch.bfloat16, device=device
        )
        # torch's grouped matmul brings its own output
        own_y = precision == "fp8" or self.kernels == "torch"
        self.y = torch.empty(pairs, case.hidden, dtype=torch.bfloat16, device=device) if own_y else None
        self.partial = torch.empty(ep_size, num_tokens, case.hidden, dtype=torch.bfloat16, device=device)
        self.returned = torch.empty_like(self.partial) if ep_size > 1 else self.partial
        self.bounds = torch.arange(self.num_local_experts + 1, dtype=torch.int32, device=device)

    def _fields(self, message: Tensor, x_bytes: int, sf_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        topk, words = self.case.topk, message.view(torch.float32)
        x = message.view(E4M3 if self.precision == "fp8" else torch.bfloat16)[..., : self.case.hidden]
        first = (x_bytes + sf_bytes) // 4
        return (
            x,
            words[..., x_bytes // 4 : first],
            words[..., first : first + topk].view(torch.int32),
            words[..., first + topk : first + 2 * topk],
        )

    def __call__(self, x: Tensor, x_sf: Tensor | None, topk_idx: Tensor, topk_weights: Tensor, out: Tensor) -> Tensor:
        """x: e4m3 [n, hidden] with x_sf, or bf16 without; topk_idx int32, topk_weights fp32 [n, topk]; out: bf16 [n,
        hidden], written."""
        n = x.shape[0]
        self._dispatch(x, x_sf, topk_idx, topk_weights, n)
        if self.capacity:
            pair, offsets = self._sort()
            row = self._experts(pair, offsets)
            self._sum_slots(row)
        if self.ep_size > 1:
            dist.all_to_all_single(self.returned, self.partial, group=self.group)
            return torch.sum(self.returned[:, :n], dim=0, out=out)
        return out.copy_(self.partial[0, :n])

    def _dispatch(self, x, x_sf, topk_idx, topk_weights, n: int) -> None:
        if self.precision == "fp8" and x_sf is None:
            x, x_sf = self._quantize(x)
        for field, value in (
            (self.send_x, x),
            (self.send_sf, x_sf),
            (self.send_idx, topk_idx),
            (self.send_weights, topk_weights),
        ):
            if value is not None:
                field[:, :n].copy_(value)
        if n < self.capacity:
            self.send_idx[:, n:].fill_(-1)
        if self.ep_size > 1:
            dist.all_to_all_single(self.received, self.sent, group=self.group)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kernels == "torch":
            return quantize_rows(x)
        from benchmarks.baselines import kernels

        q = torch.empty(x.shape, dtype=E4M3, device=x.device)
        sf = torch.empty(x.shape[0], x.shape[1] // BLOCK, device=x.device)
        kernels.quantize_rows(x.contiguous(), q, sf)
        return q, sf

    def _sort(self) -> tuple[Tensor, Tensor]:
        """(pair, offsets): pairs (token * topk + slot) sorted by local expert, other ranks' last; where each expert's
        rows begin."""
        expert = self.topk_idx.flatten() - self.first_expert
        here = (expert >= 0) & (expert < self.num_local_experts)
        expert, pair = torch.sort(torch.where(here, expert, self.num_local_experts), stable=True)
        return pair, torch.searchsorted(expert, self.bounds, out_int32=True)

    def _experts(self, pair: Tensor, offsets: Tensor) -> Tensor | None:
        """Both matmuls into self.y; returns the row of y that holds each pair, or None where y is in pair order."""
        limit, topk = self.case.swiglu_limit, self.case.topk
        if self.precision == "bf16":
            return self._experts_bf16(pair, offsets)
        if self.kernels == "torch":
            return self._experts_loop(pair, offsets)
        from benchmarks.baselines import kernels

        weights = self.weights
        block_m = kernels.block_m_for(pair.numel() / self.case.num_experts)
        kernels.linear1_swiglu(
            self.x,
            self.x_sf,
            self.topk_weights,
            pair,
            offsets,
            weights.linear1,
            weights.linear1_sf,
            self.h,
            self.h_sf,
            topk=topk,
            limit=limit,
            block_m=block_m,
        )
        kernels.linear2(self.h, self.h_sf, pair, offsets, weights.linear2, weights.linear2_sf, self.y, block_m=block_m)
        return None

    def _experts_bf16(self, pair: Tensor, offsets: Tensor) -> Tensor:
        row = torch.empty_like(pair)
        row[pair] = torch.arange(pair.numel(), device=pair.device)
        limit, topk = self.case.swiglu_limit, self.case.topk
        if self.kernels == "torch":
            gathered = self.x[pair // topk]
            acc = _matmul_loop(gathered, self.weights.linear1, offsets)
            weight = self.topk_weights.reshape(-1)[pair]
            self.h.copy_(_swiglu(acc.float(), weight, limit))
            self.y.copy_(_matmul_loop(self.h, self.weights.linear2, offsets))
            return row
        from benchmarks.baselines import kernels

        gathered = torch.empty(pair.numel(), self.case.hidden, dtype=torch.bfloat16, device=self.device)
        kernels.gather_rows(self.x, pair, offsets, gathered, topk=topk)
        acc = torch._grouped_mm(gathered, self.weights.linear1.transpose(-2, -1), offs=offsets[1:])
        kernels.swiglu_rows(acc, pair, self.topk_weights, offsets, self.h, topk=topk, limit=limit)
        self.y = torch._grouped_mm(self.h, self.weights.linear2.transpose(-2, -1), offs=offsets[1:])
        return row

    def _experts_loop(self, pair: Tensor, offsets: Tensor) -> None:
        """The FP8 path in plain torch, one expert at a time: the logic of the Triton kernels where there is no GPU."""
        for expert, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
            if begin == end:
                continue
            rows = pair[begin:end]
            token = rows // self.case.topk
            x = dequantize_rows(self.x.view(torch.uint8)[token].view(E4M3), self.x_sf[token])
            acc = x @ dequantize_blocks(self.weights.linear1[expert], self.weights.linear1_sf[expert]).t()
            weight = self.topk_weights.reshape(-1)[rows]
            h = dequantize_rows(*quantize_rows(_swiglu(acc, weight, self.case.swiglu_limit)))
            self.y[rows] = (
                h @ dequantize_blocks(self.weights.linear2[expert], self.weights.linear2_sf[expert]).t()
            ).to(torch.bfloat16)

    def _sum_slots(self, row: Tensor | None) -> None:
        first, num, topk = self.first_expert, self.num_local_experts, self.case.topk
        out = self.partial.view(-1, self.case.hidden)
        if self.kernels == "triton":
            from benchmarks.baselines import kernels

            kernels.sum_slots(self.y, self.topk_idx, out, first_expert=first, num_experts=num, row=row)
            return
        here = (self.topk_idx >= first) & (self.topk_idx < first + num)
        y = (self.y if row is None else self.y[row]).view(-1, topk, self.case.hidden)
        out.copy_(torch.where(here[..., None], y.float(), 0.0).sum(dim=1))


def _swiglu(acc: Tensor, topk_weight: Tensor, limit: float | None) -> Tensor:
    gate, up = acc.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up * topk_weight[:, None]


def _matmul_loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    for expert, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        out[begin:end] = x[begin:end] @ weight[expert].t()
    return out
