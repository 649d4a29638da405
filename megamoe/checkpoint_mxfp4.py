"""MXFP4 experts of a checkpoint, as gpt-oss is published: read for this rank's experts, and their names given back.

All experts of a layer share a tensor, E = num_experts, `prefix` the experts' module:

    {prefix}.gate_up_proj_blocks  uint8 [E, 2 * intermediate, hidden / 32, 16]   rows: gate 0, up 0, gate 1, ...
    {prefix}.gate_up_proj_scales  uint8 [E, 2 * intermediate, hidden / 32]
    {prefix}.down_proj_blocks     uint8 [E, hidden, intermediate / 32, 16]
    {prefix}.down_proj_scales     uint8 [E, hidden, intermediate / 32]
    {prefix}.gate_up_proj_bias [E, 2 * intermediate] and .down_proj_bias [E, hidden], plain, with MoEConfig.bias

A block is 32 codes, the low nibble first, and its scale factor UE8M0: quant/mxfp4.py's form but for the order of rows.
Source: OCP MX v1.0 for the values; names, shapes and the order of rows are those of the published files.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megamoe import checkpoint as files
from megamoe.checkpoint_layouts import PLAIN_DTYPES, Part, find_layout
from megamoe.config import BLOCK, MoEConfig
from megamoe.layout import MXFP4_GROUP
from megamoe.quant.mxfp4 import MIN_QUANTIZED_SF, dequantize
from megamoe.steps import ExpertWeights

NAMES = {"linear1": "gate_up_proj", "linear2": "down_proj"}
HALVES = {"linear1": 2, "linear2": 1}
"""Matrices whose rows alternate in a file, and follow one another in ExpertWeights."""
NAN_SF = 255


def find_problems(
    checkpoint: files.Checkpoint, prefix: str, expert_range: range, config: MoEConfig, sizes: tuple[int, int]
) -> list[str]:
    """As `checkpoint.find_problems`, whatever expert_range is: every tensor holds all experts."""
    odd = [
        f"size: {name}={size} is no multiple of {MXFP4_GROUP}, the elements that share a scale factor"
        for name, size in zip(("hidden", "intermediate"), sizes, strict=True)
        if size % MXFP4_GROUP
    ]
    prefix = find_layout(checkpoint.names, prefix).prefix
    expected = {part.name: (part.shape, part.dtypes) for part in _parts(prefix, config, sizes)}
    return odd or files.compare(checkpoint, prefix, expected, expected)


def expert_bytes(checkpoint: files.Checkpoint, prefix: str, expert_range: range) -> int:
    """Bytes that load_experts reports to its progress for these experts."""
    place = find_layout(checkpoint.names, prefix).prefix + "."
    infos = [checkpoint.describe(name) for name in checkpoint.names if name.startswith(place)]
    return len(expert_range) * sum((info.end - info.begin) // info.shape[0] for info in infos)


def load_experts(
    checkpoint: files.Checkpoint,
    prefix: str,
    expert_range: range,
    *,
    config: MoEConfig,
    sizes: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> ExpertWeights:
    """As `checkpoint.load_experts`, of a checkpoint in which find_problems finds nothing.

    weight_format "mxfp4": codes and scale factors as they are in the files, gate rows and then up rows, padded with
    zero codes whose scale factor is that of a quantized zero; `checkpoint_tensors` is the inverse. "bf16": the values
    in `dtype`, exact in bf16 and fp32. "fp8": the values, quantized by 128x128 block.
    CheckpointError names a NaN scale factor. Memory: the result, and at most one expert on the way.
    """
    prefix = find_layout(checkpoint.names, prefix).prefix
    weights = files.allocate(config, sizes, len(expert_range), dtype, device)
    parts = {part.name: part for part in _parts(prefix, config, sizes) if not part.name.endswith("_scales")}

    def read(name: str, expert: int) -> Tensor:
        tensor = checkpoint.read_row(name, expert)
        if progress is not None:
            progress(tensor.nbytes)
        return tensor.to(device)

    for name in sorted(parts, key=checkpoint.place_of):
        part = parts[name]
        for slot, expert in enumerate(expert_range):
            if part.sf_name is None:
                files.fill(weights, config, part, slot, read(name, expert), None)
                continue
            sf = read(part.sf_name, expert)
            if bool((sf == NAN_SF).any()):
                row, group = (sf == NAN_SF).nonzero()[0].tolist()
                problem = f"NaN: {part.sf_name} is {NAN_SF} at expert {expert}, row {row}, group {group}"
                raise files.CheckpointError(checkpoint.path, [problem])
            _fill(weights, config, part.fills, slot, read(name, expert).flatten(1), sf)
    return weights


def checkpoint_tensors(
    weights: ExpertWeights, prefix: str, sizes: tuple[int, int], bias_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """The inverse of load_experts in MXFP4: the experts' tensors by their names in a checkpoint, padding left out.

    weights: of all experts of a layer, uint8 codes and scale factors as ExpertWeights has them, before the layer packs
    or re-rounds them. sizes: hidden and intermediate of the files. TypeError for weights in another format.
    """
    if weights.linear1.dtype != torch.uint8 or weights.linear2.dtype != torch.uint8:
        raise TypeError(
            f"weights are {weights.linear1.dtype} and {weights.linear2.dtype}; pass MXFP4 codes, uint8 (quant.mxfp4)"
        )
    hidden, inter = sizes
    found = {}
    for linear, rows, columns in (("linear1", inter, hidden), ("linear2", hidden, inter)):
        name, groups = f"{prefix}.{NAMES[linear]}", columns // MXFP4_GROUP
        codes, sf, bias = (getattr(weights, linear + end) for end in ("", "_sf", "_bias"))
        blocks = _alternate(codes, linear, rows)[..., : columns // 2]
        found[f"{name}_blocks"] = blocks.unflatten(-1, (groups, MXFP4_GROUP // 2)).contiguous()
        found[f"{name}_scales"] = _alternate(sf, linear, rows)[..., :groups].contiguous()
        if bias is not None:
            found[f"{name}_bias"] = _alternate(bias[..., None], linear, rows)[..., 0].to(bias_dtype).contiguous()
    return found


def _alternate(tensor: Tensor, linear: str, rows: int) -> Tensor:
    """[E, halves * padded rows, columns], half after half -> [E, halves * rows, columns], a row of each in turn."""
    return tensor.unflatten(1, (HALVES[linear], -1))[:, :, :rows].transpose(1, 2).flatten(1, 2)


def _parts(prefix: str, config: MoEConfig, sizes: tuple[int, int]) -> list[Part]:
    """Every tensor of a layer's experts; fills: of ExpertWeights. A part of codes names its scale factors."""
    num, (hidden, inter) = config.num_experts, sizes
    found = []
    for linear, rows, columns in (("linear1", 2 * inter, hidden), ("linear2", hidden, inter)):
        name, groups = f"{prefix}.{NAMES[linear]}", columns // MXFP4_GROUP
        scales = f"{name}_scales"
        found.append(Part(f"{name}_blocks", (num, rows, groups, MXFP4_GROUP // 2), ("U8",), 0, None, linear, scales))
        found.append(Part(scales, (num, rows, groups), ("U8",), 0, None, linear))
        if config.bias:
            found.append(Part(f"{name}_bias", (num, rows), PLAIN_DTYPES, 0, None, f"{linear}_bias"))
    return found


def allocate(config: MoEConfig, sizes: tuple[int, int], num_experts: int, device) -> ExpertWeights:
    """Codes and scale factors to be filled; padding is the zero that quantize makes."""
    is_padded = sizes != (config.hidden, config.intermediate)

    def matrix(rows: int, columns: int, padding: int) -> Tensor:
        # A tensor that is filled whole need not be filled first
        tensor = torch.empty(num_experts, rows, columns, dtype=torch.uint8, device=device)
        return tensor.fill_(padding) if is_padded else tensor

    tensors = []
    for rows, columns in ((2 * config.intermediate, config.hidden), (config.hidden, config.intermediate)):
        tensors += [matrix(rows, columns // 2, 0), matrix(rows, columns // MXFP4_GROUP, MIN_QUANTIZED_SF)]
    return ExpertWeights(*tensors, *files.allocate_biases(config, num_experts, device))


def _fill(weights: ExpertWeights, config: MoEConfig, linear: str, slot: int, codes: Tensor, sf: Tensor) -> None:
    """Put one expert's matrix, rows as in the file: codes [rows, K / 2], sf [rows, K / 32]."""
    halves = HALVES[linear]
    codes, sf = (t.unflatten(0, (-1, halves)).transpose(0, 1) for t in (codes, sf))
    value, value_sf = (
        None if t is None else t[slot].unflatten(0, (halves, -1))
        for t in (getattr(weights, linear), getattr(weights, f"{linear}_sf"))
    )
    num_rows = codes.shape[1]
    if config.weight_format == "mxfp4":
        value[:, :num_rows, : codes.shape[2]] = codes
        value_sf[:, :num_rows, : sf.shape[2]] = sf
        return
    for half in range(halves):
        for row in range(0, num_rows, BLOCK):  # the fp32 copy stays small beside one expert
            rows, block = slice(row, row + BLOCK), slice(row // BLOCK, row // BLOCK + 1)
            plain = dequantize(codes[half, rows].contiguous(), sf[half, rows])
            files.copy_in(value[half, rows], None if value_sf is None else value_sf[half, block], plain, None)
