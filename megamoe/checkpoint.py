"""Expert weights out of a Hugging Face checkpoint: this rank's experts only, one tensor at a time, safetensors only.

A checkpoint is a `.safetensors` file, or a directory with `model.safetensors`, or one with shards and their
`model.safetensors.index.json`. `megamoe/checkpoint_layouts.py` lists the layouts of experts that are read: plain (bf16,
fp16, fp32) and block-FP8 tensors of Qwen3-MoE, DeepSeek-V3 and Mixtral, and gpt-oss's stacked ones, plain or MXFP4.

Pickle files (`*.bin`, `*.pt`) are never opened: reading one can run code.
"""

import json
import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from megamoe.checkpoint_layouts import SF_DTYPES, Layout, Part, blocks_of, find_layout
from megamoe.config import BLOCK, MoEConfig
from megamoe.quant import mxfp4
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks
from megamoe.steps import ExpertWeights

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EXPERTS_PREFIX = "model.layers.{layer}.mlp.experts"
MAX_HEADER_BYTES = 100_000_000
QUANTIZE_ROWS = 128
"""Rows converted at a time: the fp32 copies of a conversion stay small beside one expert."""

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
    "F64": torch.float64, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip


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

    def read_row(self, name: str, row: int | None) -> torch.Tensor:
        """One index of a tensor's first dimension, without reading the others; row None: the whole tensor."""
        info = self._header(self._files[name])[name]
        if row is not None:
            size = (info.end - info.begin) // info.shape[0]
            info = TensorInfo(info.dtype, info.shape[1:], info.begin + row * size, info.begin + (row + 1) * size)
        with self._files[name].open("rb", buffering=0) as handle:
            return _read_tensor(handle, name, info)

    def place_of(self, name: str) -> tuple[str, int]:
        """(file, first byte): reading in this order goes through each file once."""
        return str(self._files[name]), self._header(self._files[name])[name].begin

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


def find_problems(
    checkpoint: Checkpoint, prefix: str, expert_range: range, config: MoEConfig, sizes: tuple[int, int] | None = None
) -> list[str]:
    """Everything that keeps `load_experts` from serving these experts: one line each, empty if nothing does.

    Names are compared for all `config.num_experts` experts of the layer (the index has them all), shapes and dtypes for
    `expert_range` alone, so that a rank opens only the shards it loads from. sizes: as load_experts takes them.
    """
    layout, sizes = find_layout(checkpoint.names, prefix), sizes or (config.hidden, config.intermediate)
    if layout.kind == "blocks":
        return mxfp4_reader().find_problems(checkpoint, prefix, expert_range, config, sizes)
    expected = _expected(layout, config, sizes, range(config.num_experts))
    return compare(checkpoint, layout.prefix, expected, _expected(layout, config, sizes, expert_range).keys())


def compare(checkpoint: Checkpoint, prefix: str, expected: dict[str, tuple], local: Container[str]) -> list[str]:
    """What find_problems lists. expected: name -> (shape, dtypes); local: the names whose shape and dtype matter."""
    present = {name for name in checkpoint.names if name.startswith(prefix + ".")}
    problems = [f"missing: {name}" for name in expected if name not in present]
    problems += [f"extra: {name}" for name in sorted(present - expected.keys())]
    for name, (shape, dtypes) in expected.items():
        if name not in local or name not in present:
            continue
        found = checkpoint.describe(name)
        if found is None:
            problems.append(
                f"missing: {name} (the index says {checkpoint.file_of(name)}, which is not there or lacks it)"
            )
            continue
        if found.shape != shape:
            problems.append(f"misshapen: {name} is {list(found.shape)}, the configuration needs {list(shape)}")
        if found.dtype not in dtypes:
            problems.append(f"dtype: {name} is {found.dtype}, the layout needs {' or '.join(dtypes)}")
    return problems


def mxfp4_reader():
    """The module that reads MXFP4 blocks: its find_problems, expert_bytes and load_experts do what those here do."""
    from megamoe import checkpoint_mxfp4  # it needs what stands here

    return checkpoint_mxfp4


def _expected(layout: Layout, config: MoEConfig, sizes: tuple[int, int], experts: range) -> dict[str, tuple]:
    """name -> (shape, dtypes) in the files."""
    found = {}
    for part in layout.parts(config, sizes, experts):
        found[part.name] = part.shape, part.dtypes
        if part.sf_name is not None:
            found[part.sf_name] = tuple(map(blocks_of, part.shape)), SF_DTYPES
    return found


def expert_bytes(
    checkpoint: Checkpoint, prefix: str, expert_range: range, config: MoEConfig, sizes: tuple[int, int]
) -> int:
    """Bytes that load_experts reports to its progress for these experts."""
    layout = find_layout(checkpoint.names, prefix)
    if layout.kind == "blocks":
        return mxfp4_reader().expert_bytes(checkpoint, prefix, expert_range)
    total = 0
    for part in layout.parts(config, sizes, expert_range):
        info = checkpoint.describe(part.name)
        total += (info.end - info.begin) // (1 if part.row is None else info.shape[0])
    return total


def load_experts(
    source: str | Path | Checkpoint,
    layer: int,
    expert_range: range,
    *,
    config: MoEConfig,
    sizes: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    prefix: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> ExpertWeights:
    """This rank's experts of one layer, as `MoELayer.load_weights` and `steps` take them.

    source        path or an open `Checkpoint` (share one between layers: headers are then parsed once)
    layer         index into `model.layers`; `prefix` (without a trailing dot) overrides the name made from it
    expert_range  logical experts to read, e.g. range(ep_rank * num_local_experts, (ep_rank + 1) * num_local_experts)
    config        hidden, intermediate and num_experts to hold the tensors against, weight_format to return:
                  "fp8": block-FP8 is copied as it is, plain weights are quantized by 128x128 block;
                  "bf16": `dtype` tensors; plain weights are cast, block-FP8 and MXFP4 are dequantized;
                  "mxfp4": MXFP4 blocks are copied as they are, all else is quantized by 32 of K on the way.
    sizes         hidden and intermediate in the files, where config has them rounded up to 128: padded with zeros
    progress      called with the bytes of every tensor read

    Returns linear1 [n, 2 * intermediate, hidden] (gate rows, then up), linear2 [n, hidden, intermediate], n experts of
    expert_range, with scale factors where the format has them (steps.ExpertWeights), with config.bias the fp32 biases.
    Raises CheckpointError, a ValueError, that lists every missing, extra or misshapen tensor.
    Memory: the result, and at most one expert on the way.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    prefix, sizes = prefix or EXPERTS_PREFIX.format(layer=layer), sizes or (config.hidden, config.intermediate)
    first, stop = expert_range.start, expert_range.stop
    if expert_range.step != 1 or not 0 <= first < stop <= config.num_experts:
        raise ValueError(f"expert_range={expert_range} must be a non-empty part of range({config.num_experts}), step 1")
    problems = find_problems(checkpoint, prefix, expert_range, config, sizes)
    if problems:
        raise CheckpointError(checkpoint.path, problems)
    layout = find_layout(checkpoint.names, prefix)
    if layout.kind == "blocks":
        return mxfp4_reader().load_experts(
            checkpoint, prefix, expert_range, config=config, sizes=sizes, dtype=dtype, device=device, progress=progress
        )
    weights = allocate(config, sizes, len(expert_range), dtype, device)
    parts = layout.parts(config, sizes, expert_range)
    sf_names = [part.sf_name for part in parts if part.sf_name is not None]
    scales = {name: sf.float() for name, sf in checkpoint.read(sf_names)}
    for part in sorted(parts, key=lambda part: (*checkpoint.place_of(part.name), part.expert)):
        tensor = checkpoint.read_row(part.name, part.row)
        if progress is not None:
            progress(tensor.nbytes)
        tensor = tensor.to(device)
        sf = scales.pop(part.sf_name, None)
        fill(weights, config, part, part.expert - first, tensor.t() if part.swap else tensor, sf)
    return weights


def allocate(config: MoEConfig, sizes: tuple[int, int], num_experts: int, dtype: torch.dtype, device) -> ExpertWeights:
    if config.weight_format == "mxfp4":
        return mxfp4_reader().allocate(config, sizes, num_experts, device)
    fp8 = config.weight_format == "fp8"
    # A tensor that is filled whole need not be cleared first
    make = torch.empty if sizes == (config.hidden, config.intermediate) else torch.zeros

    def matrices(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        value = make(num_experts, rows, columns, dtype=torch.float8_e4m3fn if fp8 else dtype, device=device)
        if not fp8:
            return value, None
        return value, make(num_experts, rows // BLOCK, columns // BLOCK, dtype=torch.float32, device=device)

    linear1, linear1_sf = matrices(2 * config.intermediate, config.hidden)
    linear2, linear2_sf = matrices(config.hidden, config.intermediate)
    return ExpertWeights(linear1, linear1_sf, linear2, linear2_sf, *allocate_biases(config, num_experts, device))


def allocate_biases(config: MoEConfig, num_experts: int, device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if not config.bias:
        return None, None
    return tuple(torch.zeros(num_experts, n, device=device) for n in (2 * config.intermediate, config.hidden))


def fill(weights: ExpertWeights, config: MoEConfig, part: Part, slot: int, tensor: torch.Tensor, sf) -> None:
    """Copy one tensor, [outputs, inputs] or a bias [outputs], to its place in `weights`, quantized if need be."""
    if part.fills == "linear2_bias":
        weights.linear2_bias[slot, : len(tensor)] = tensor
    elif part.fills == "linear1_bias":
        gate_up = weights.linear1_bias[slot].unflatten(0, (2, config.intermediate))
        gate_up[:, : len(tensor) // 2] = tensor.view(-1, 2).t()
    elif part.fills == "down":
        copy_in(weights.linear2[slot], None if weights.linear2_sf is None else weights.linear2_sf[slot], tensor, sf)
    else:
        halves = {"gate": ((0, tensor),), "up": ((1, tensor),), "gate_up": ((0, tensor[0::2]), (1, tensor[1::2]))}
        for half, rows in halves[part.fills]:
            value = weights.linear1[slot].unflatten(0, (2, config.intermediate))[half]
            # Exact halves: intermediate is a multiple of 128, so no block straddles gate and up
            value_sf = weights.linear1_sf
            if value_sf is not None:
                value_sf = value_sf[slot].unflatten(0, (2, -1))[half]
            copy_in(value, value_sf, rows, sf)


def copy_in(value: torch.Tensor, value_sf: torch.Tensor | None, tensor: torch.Tensor, sf: torch.Tensor | None) -> None:
    num_rows, num_columns = tensor.shape
    if value_sf is None and sf is None:
        value[:num_rows, :num_columns].copy_(tensor)
        return
    for row in range(0, num_rows, QUANTIZE_ROWS):
        chunk = tensor[row : row + QUANTIZE_ROWS]
        if len(chunk) % BLOCK or num_columns % BLOCK:  # blocks are whole in `value`, with zeros
            padded = (0, -num_columns % BLOCK, 0, -len(chunk) % BLOCK)
            chunk = F.pad(chunk.view(torch.uint8), padded).view(chunk.dtype) if sf is not None else F.pad(chunk, padded)
        rows, blocks = slice(row, row + len(chunk)), slice(row // BLOCK, (row + len(chunk)) // BLOCK)
        if value_sf is None or value_sf.dtype == torch.uint8:
            whole = chunk if sf is None else dequantize_blocks(chunk, sf[blocks].to(chunk.device))
            if value_sf is None:
                value[rows, : whole.shape[1]] = whole
            else:
                codes, codes_sf = mxfp4.quantize(whole)
                value[rows, : codes.shape[1]], value_sf[rows, : codes_sf.shape[1]] = codes, codes_sf
            continue
        quantized, quantized_sf = (chunk, sf[blocks]) if sf is not None else quantize_blocks(chunk)
        value[rows, : quantized.shape[1]] = quantized
        value_sf[blocks, : quantized_sf.shape[1]] = quantized_sf
