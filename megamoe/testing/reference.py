"""The layer once more, as a loop over experts and single rows in numpy float64: what steps.py is checked against.

Shares no arithmetic with the rest of the package: e4m3 and bf16 rounding, quantization, SwiGLU and the sums are
written again here, so that a mistake has to be made twice to go unseen. Only stored bytes (e4m3 to float) are decoded
by torch.
"""

import numpy as np
import torch

FINEST_E4M3 = 2.0**-9  # smallest subnormal
LARGEST_E4M3 = 448.0


def round_e4m3(values: np.ndarray) -> np.ndarray:
    """Nearest e4m3 number, ties to even mantissa, saturating; float64 in and out."""
    with np.errstate(invalid="ignore"):
        _, exponent = np.frexp(values)  # |value| = m * 2**exponent with 0.5 <= m < 1
        step = np.maximum(np.ldexp(1.0, exponent - 4), FINEST_E4M3)  # 4 significant bits
        return np.clip(np.rint(values / step) * step, -LARGEST_E4M3, LARGEST_E4M3)


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest bf16 number, ties to even; float64 in and out."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)).astype(np.uint32)
    return np.where(np.isfinite(values), rounded.view(np.float32), values).astype(np.float64)


def _fake_quantize_group(group: np.ndarray) -> np.ndarray:
    # The format asks for fp32 quotients: exact ties between two e4m3 values are common, and float64 would break them
    # otherwise
    narrow = group.astype(np.float32)
    if not np.isfinite(narrow).all():
        return np.full(group.shape, np.nan)
    sf = np.maximum(np.abs(narrow).max(), np.float32(1e-10)) / np.float32(448)
    return round_e4m3((narrow / sf).astype(np.float64)) * np.float64(sf)


def fake_quantize(vector: np.ndarray) -> np.ndarray:
    """The values a vector has after e4m3 quantization in groups of 128."""
    return np.concatenate([_fake_quantize_group(group) for group in vector.reshape(-1, 128)])


def fake_quantize_blocks(matrix: np.ndarray) -> np.ndarray:
    """The values a matrix has after e4m3 quantization in 128x128 blocks."""
    out = np.empty(matrix.shape)
    for i in range(0, matrix.shape[0], 128):
        for j in range(0, matrix.shape[1], 128):
            out[i : i + 128, j : j + 128] = _fake_quantize_group(matrix[i : i + 128, j : j + 128])
    return out


def _expand(values, sf, rows_per_sf: int) -> np.ndarray:
    wide = values.detach().cpu().to(torch.float64).numpy()
    if sf is None:
        return wide
    factors = np.repeat(np.repeat(sf.detach().cpu().to(torch.float64).numpy(), rows_per_sf, 0), 128, 1)
    return wide * factors


def _expand_mxfp4(codes, sf) -> np.ndarray:
    packed = codes.detach().cpu().numpy()
    nibbles = np.stack((packed % 16, packed // 16), -1).reshape(packed.shape[0], -1)
    exponent, mantissa = nibbles // 2 % 4, nibbles % 2
    magnitude = np.where(exponent == 0, 0.5 * mantissa, np.ldexp(1 + 0.5 * mantissa, exponent.astype(int) - 1))
    scale = np.ldexp(1.0, sf.detach().cpu().numpy().astype(int) - 127)
    return np.where(nibbles < 8, magnitude, -magnitude) * np.repeat(scale, 32, 1)


def _expand_weight(weight_format: str, values, sf) -> np.ndarray:
    if weight_format == "mxfp4":
        return _expand_mxfp4(values, sf)
    return _expand(values, sf, 128)


def moe_reference(config, weights, inputs, tokens: list[list[int]] | None = None) -> list[torch.Tensor]:
    """Expected output of the layer, all ranks at once.

    config: a MoEConfig, or what has its fields. weights, inputs: one per rank,
    with the fields of steps.ExpertWeights and steps.RankInput; e4m3 weights and MXFP4 codes carry sf.
    tokens: per rank the token indices to compute (None = all); other rows stay NaN.
    -> float64 [n, hidden] per rank, on CPU. Rounded to bf16 where the format says so: each linear2 row and the final
    sum.
    """
    fp8 = config.weight_format != "bf16"  # activations
    num_local_experts = config.num_experts // len(weights)
    wanted: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # by rank and local expert
    xs, totals, rows = [], [], {}
    for rank, rank_input in enumerate(inputs):
        n = rank_input.x.shape[0]
        used = n if rank_input.num_tokens is None else int(rank_input.num_tokens)
        picked = range(n) if tokens is None else tokens[rank]
        total = np.full((n, config.hidden), np.nan)
        total[list(picked)] = 0.0
        totals.append(total)
        xs.append(_expand(rank_input.x, rank_input.x_sf, 1))
        ids = rank_input.topk_idx.cpu().tolist()
        for token in picked:
            if token < used:
                for slot in range(config.topk):
                    if ids[token][slot] != -1:
                        home = divmod(ids[token][slot], num_local_experts)
                        wanted.setdefault(home, []).append((rank, token, slot))
                for shared in range(config.num_shared_experts):
                    home = rank, num_local_experts + shared
                    wanted.setdefault(home, []).append((rank, token, config.topk + shared))
    with np.errstate(all="ignore"):  # NaN and infinity are legal inputs
        for (home, local), places in wanted.items():
            rank_weights = weights[home]
            sf1 = rank_weights.linear1_sf[local] if fp8 else None
            sf2 = rank_weights.linear2_sf[local] if fp8 else None
            first = _expand_weight(config.weight_format, rank_weights.linear1[local], sf1)
            second = _expand_weight(config.weight_format, rank_weights.linear2[local], sf2)
            bias1, bias2 = (
                bias[local].double().cpu().numpy() if config.bias else 0.0
                for bias in (rank_weights.linear1_bias, rank_weights.linear2_bias)
            )
            for rank, token, slot in places:
                x = xs[rank][token]
                if fp8 and inputs[rank].x_sf is None:
                    x = fake_quantize(x)
                pre = first @ x + bias1
                gate, up = pre[: config.intermediate], pre[config.intermediate :]
                if config.swiglu_limit is not None:
                    gate = np.minimum(gate, config.swiglu_limit)
                    up = np.minimum(np.maximum(up, -config.swiglu_limit), config.swiglu_limit)
                topk_weight = float(inputs[rank].topk_weights[token, slot]) if slot < config.topk else 1.0
                if config.activation == "swiglu_oai":
                    h = gate * (1.0 / (1.0 + np.exp(-1.702 * gate))) * (up + 1.0) * topk_weight
                else:
                    h = gate * (1.0 / (1.0 + np.exp(-gate))) * up * topk_weight
                if fp8:
                    rows[rank, token, slot] = round_bf16(second @ fake_quantize(h) + topk_weight * bias2)
                else:
                    narrow = inputs[rank].x.dtype == torch.bfloat16
                    y = second @ (round_bf16(h) if narrow else h) + topk_weight * bias2
                    rows[rank, token, slot] = round_bf16(y) if narrow else y
    for rank, token, slot in sorted(rows):
        totals[rank][token] += rows[rank, token, slot]
    narrow = fp8 or inputs[0].x.dtype == torch.bfloat16
    return [torch.from_numpy(round_bf16(total) if narrow else total) for total in totals]
