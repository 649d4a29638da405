"""Expert weights out of a Hugging Face checkpoint: this rank's experts only, one tensor at a time, safetensors only.

A checkpoint is a `.safetensors` file, or a directory with `model.safetensors`, or one with shards and their
`model.safetensors.index.json`. Two layouts of the experts are read, under the names Qwen3-MoE uses
(`model.layers.{layer}.mlp.experts.{expert}.{gate,up,down}_proj.weight`):

    plain      bf16, fp16 or fp32; gate and up [intermediate, hidden], down [hidden, intermediate]
    block-FP8  the same tensors in e4m3 and, for each, `weight_scale_inv` (fp32 or bf16, one per 128x128 block) which
               multiplies. This is the convention of DeepSeek-V3's published weights, which Qwen3's FP8 releases follow.

Pickle files (`*.bin`, `*.pt`) are never opened: reading one can run code.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megamoe.config import BLOCK, MoEConfig
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks
from megamoe.steps import ExpertWeights

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EXPERTS_PREFIX = "model.layers.{layer}.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MAX_HEADER_BYTES = 100_000_000
QUANTIZE_ROWS = 256
"""Rows converted at a time: the fp32 copies of a conversion stay small beside one expert."""

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
    "F64": torch.float64, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip
PLAIN_DTYPES = ("BF16", "F16", "F32")
SF_DTYPES = ("F32", "BF16")


class CheckpointError(ValueError):
    """A checkpoint that does not hold what was asked of it. `problems` lists every one found, the message shows all."""

    def __init__(self, path: Path, problems: list[str]):
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"checkpoint {path}: {len(problems)} problem{'s' * (len(problems) != 1)}:\n{lines}")


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor: dtype as safetensors spells it ("BF16", "F8_E4M3"), shape, place."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte offset in the file
    end: int


class Checkpoint:
    """Names, shapes and dtypes of a checkpoint's tensors, known from index and headers; data is read on request.

    path: a directory or a `.safetensors` file. FileNotFoundError if there is none; ValueError for a directory with
    only pickle files or an index that points outside it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._files = self._find_files()

    @property
    def names(self) -> Iterable[str]:
        return self._files.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file_of(self, name: str) -> str:
        return self._files[name].name

    def describe(self, name: str) -> TensorInfo | None:
        """dtype and shape, or None if the index names a tensor that its file, or no file, holds."""
        return self._header(self._files[name]).get(name)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor on the CPU) file by file, in the order of the file: not that of `names`."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for file, wanted in by_file.items():
            header = self._header(file)
            with file.open("rb", buffering=0) as handle:
                for name in sorted(wanted, key=lambda name: header[name].begin):
                    yield name, _read_tensor(handle, name, header[name])

    def _find_files(self) -> dict[str, Path]:
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise ValueError(f"checkpoint {self.path}: only .safetensors files are read, never pickle; convert it")
            return dict.fromkeys(self._header(self.path), self.path)
        if (self.path / INDEX_NAME).is_file():
            try:
                weight_map = dict(json.loads((self.path / INDEX_NAME).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"checkpoint {self.path}: {INDEX_NAME} is damaged ({error}); copy it again") from error
            outside = sorted({file for file in weight_map.values() if Path(file).name != file})
            if outside:
                raise ValueError(f"checkpoint {self.path}: {INDEX_NAME} names files outside the directory: {outside}")
            return {name: self.path / file for name, file in weight_map.items()}
        if (self.path / SINGLE_NAME).is_file():
            return dict.fromkeys(self._header(self.path / SINGLE_NAME), self.path / SINGLE_NAME)
        if not self.path.exists():
            raise FileNotFoundError(f"checkpoint {self.path} does not exist; give a directory or a .safetensors file")
        raise ValueError(
            f"checkpoint {self.path}: neither {INDEX_NAME} nor {SINGLE_NAME} in it; pickle files are never read, "
            "save the model again with safetensors (save_pretrained does)"
        )

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        if file not in self._headers:
            self._headers[file] = _read_header(file) if file.is_file() else {}
        return self._headers[file]


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Layout of a file: 8 bytes little-endian header length, header (JSON), data. Source: safetensors' format page."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{file} is not a whole safetensors file ({size} bytes); copy or download it again")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            infos = {
                name: TensorInfo(
                    entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"])
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} has a damaged safetensors header ({error}); copy or download it again") from error
    for name, info in infos.items():
        num_bytes = (
            math.prod(info.shape) * DTYPES[info.dtype].itemsize if info.dtype in DTYPES else info.end - info.begin
        )
        if info.end - info.begin != num_bytes or not 8 + length <= info.begin <= info.end <= size:
            raise ValueError(
                f"{file} ({size} bytes) does not hold {name}: {list(info.shape)} {info.dtype} at bytes {info.begin} to "
                f"{info.end}; copy or download it again"
            )
    return infos


def _read_tensor(handle, name: str, info: TensorInfo) -> torch.Tensor:
    # Plain reads, no mapping: pages of a mapped file would count as this process's memory until it is closed
    if info.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {info.dtype}, which is not read here; known: {', '.join(DTYPES)}")
    data = torch.empty(info.end - info.begin, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    handle.seek(info.begin)
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            raise OSError(f"{handle.name} ended {len(view) - done} bytes before the end of {name}")
        done += count
    return data.view(DTYPES[info.dtype]).view(info.shape)


def is_block_fp8(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether the experts under `prefix` come in e4m3 with `weight_scale_inv`."""
    return any(name.startswith(prefix + ".") and name.endswith(".weight_scale_inv") for name in checkpoint.names)


def find_problems(checkpoint: Checkpoint, prefix: str, expert_range: range, config: MoEConfig) -> list[str]:
    """Everything that keeps `load_experts` from serving these experts: one line each, empty if nothing does.

    Names are compared for all `config.num_experts` experts of the layer (the index has them all), shapes and dtypes for
    `expert_range` alone, so that a rank opens only the shards it loads from.
    """
    fp8 = is_block_fp8(checkpoint, prefix)
    layer = [_expected(prefix, expert, config, fp8) for expert in range(config.num_experts)]
    expected = {tensor.name: tensor for expert in layer for tensor in expert}
    local = {tensor.name for expert in expert_range for tensor in layer[expert]}
    present = {name for name in checkpoint.names if name.startswith(prefix + ".")}
    problems = [f"missing: {name}" for name in expected if name not in present]
    problems += [f"extra: {name}" for name in sorted(present - expected.keys())]
    for name in expected:
        if name not in local or name not in present:
            continue
        found, want = checkpoint.describe(name), expected[name]
        if found is None:
            problems.append(
                f"missing: {name} (the index says {checkpoint.file_of(name)}, which is not there or lacks it)"
            )
            continue
        if found.shape != want.shape:
            problems.append(f"misshapen: {name} is {list(found.shape)}, the configuration needs {list(want.shape)}")
        if found.dtype not in want.dtypes:
            problems.append(f"dtype: {name} is {found.dtype}, the layout needs {' or '.join(want.dtypes)}")
    return problems


@dataclass(frozen=True)
class _Expected:
    name: str
    shape: tuple[int, int]
    dtypes: tuple[str, ...]


def _expected(prefix: str, expert: int, config: MoEConfig, fp8: bool) -> list[_Expected]:
    tensors = []
    for projection in PROJECTIONS:
        name = f"{prefix}.{expert}.{projection}.weight"
        rows, columns = config.intermediate, config.hidden
        if projection == "down_proj":
            rows, columns = columns, rows
        tensors.append(_Expected(name, (rows, columns), ("F8_E4M3",) if fp8 else PLAIN_DTYPES))
        if fp8:
            tensors.append(_Expected(f"{name}_scale_inv", (rows // BLOCK, columns // BLOCK), SF_DTYPES))
    return tensors


def load_experts(
    source: str | Path | Checkpoint,
    layer: int,
    expert_range: range,
    *,
    config: MoEConfig,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    prefix: str | None = None,
) -> ExpertWeights:
    """This rank's experts of one layer, as `MoELayer.load_weights` and `steps` take them.

    source        path or an open `Checkpoint` (share one between layers: headers are then parsed once)
    layer         index into `model.layers`; `prefix` (without a trailing dot) overrides the name made from it
    expert_range  logical experts to read, e.g. range(ep_rank * num_local_experts, (ep_rank + 1) * num_local_experts)
    config        hidden, intermediate and num_experts to hold the tensors against, weight_format to return:
                  "fp8": block-FP8 is copied as it is, plain weights are quantized by 128x128 block;
                  "bf16": `dtype` tensors; plain weights are cast, block-FP8 is dequantized.

    Returns linear1 [n, 2 * intermediate, hidden] (gate rows, then up), linear2 [n, hidden, intermediate], n experts of
    expert_range, and for "fp8" their fp32 scale factors per 128x128 block.
    Raises CheckpointError, a ValueError, that lists every missing, extra or misshapen tensor.
    Memory: the result, and at most one expert on the way.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    prefix = prefix or EXPERTS_PREFIX.format(layer=layer)
    first, stop = expert_range.start, expert_range.stop
    if expert_range.step != 1 or not 0 <= first < stop <= config.num_experts:
        raise ValueError(f"expert_range={expert_range} must be a non-empty part of range({config.num_experts}), step 1")
    problems = find_problems(checkpoint, prefix, expert_range, config)
    if problems:
        raise CheckpointError(checkpoint.path, problems)
    weights = _allocate(config, len(expert_range), dtype, device)
    rows_fp8 = is_block_fp8(checkpoint, prefix)
    places = {
        f"{prefix}.{expert}.{projection}.weight": _place(weights, config, slot, projection)
        for slot, expert in enumerate(expert_range)
        for projection in PROJECTIONS
    }
    scales = {}
    if rows_fp8:
        scales = {name: sf.float() for name, sf in checkpoint.read(f"{name}_scale_inv" for name in places)}
    for name, tensor in checkpoint.read(places):
        _copy_in(*places[name], tensor.to(device), scales.pop(f"{name}_scale_inv", None))
    return weights


def _allocate(config: MoEConfig, num_experts: int, dtype: torch.dtype, device) -> ExpertWeights:
    fp8 = config.weight_format == "fp8"

    def empty(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        value = torch.empty(num_experts, rows, columns, dtype=torch.float8_e4m3fn if fp8 else dtype, device=device)
        if not fp8:
            return value, None
        return value, torch.empty(num_experts, rows // BLOCK, columns // BLOCK, dtype=torch.float32, device=device)

    linear1, linear1_sf = empty(2 * config.intermediate, config.hidden)
    linear2, linear2_sf = empty(config.hidden, config.intermediate)
    return ExpertWeights(linear1=linear1, linear1_sf=linear1_sf, linear2=linear2, linear2_sf=linear2_sf)


def _place(weights: ExpertWeights, config: MoEConfig, slot: int, projection: str):
    """Views of the values and scale factors (or None) that one checkpoint tensor fills."""
    if projection == "down_proj":
        return weights.linear2[slot], None if weights.linear2_sf is None else weights.linear2_sf[slot]
    half = 0 if projection == "gate_proj" else 1
    value = weights.linear1[slot].unflatten(0, (2, config.intermediate))[half]
    if weights.linear1_sf is None:
        return value, None
    # Exact halves: intermediate is a multiple of 128, so no block straddles gate and up.
    return value, weights.linear1_sf[slot].unflatten(0, (2, config.intermediate // BLOCK))[half]


def _copy_in(value: torch.Tensor, value_sf: torch.Tensor | None, tensor: torch.Tensor, sf: torch.Tensor | None) -> None:
    if value_sf is None and sf is None:
        value.copy_(tensor)
        return
    for row in range(0, tensor.shape[0], QUANTIZE_ROWS):
        rows, blocks = slice(row, row + QUANTIZE_ROWS), slice(row // BLOCK, (row + QUANTIZE_ROWS) // BLOCK)
        if value_sf is None:
            value[rows] = dequantize_blocks(tensor[rows], sf[blocks].to(tensor.device))
            continue
        quantized, quantized_sf = (tensor[rows], sf[blocks]) if sf is not None else quantize_blocks(tensor[rows])
        value[rows] = quantized
        value_sf[blocks] = quantized_sf
