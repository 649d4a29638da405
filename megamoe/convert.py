"""python -m megamoe convert SRC DST --format F: a whole checkpoint in another number format, shard by shard.

    fp8    experts' plain weights become e4m3 with a `weight_scale_inv` per 128x128 block; all else is copied
    bf16   block-FP8 tensors, experts or not, become bf16, as do experts' plain weights and MXFP4 blocks; all else is
           copied
    mxfp4  gpt-oss's plain stacked experts become its published blocks and scales; all else is copied

Every shard keeps its name. `convert.json` in DST records the sha256 of each source shard and of what was made of it: a
run that was cut short goes on where it ended, and a shard whose source or result has changed is made again.
Another format is an entry of FORMATS: a `Conversion` says what becomes of one tensor.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megamoe.checkpoint import DTYPES, INDEX_NAME, SINGLE_NAME, Checkpoint, CheckpointError
from megamoe.checkpoint_layouts import PLAIN_DTYPES, PROJECTIONS, blocks_of
from megamoe.checkpoint_mxfp4 import NAN_SF
from megamoe.config import BLOCK
from megamoe.layout import MXFP4_GROUP
from megamoe.progress import Progress
from megamoe.quant import mxfp4
from megamoe.quant.fp8 import dequantize_blocks, quantize_blocks
from megamoe.safetensors_file import file_digest, write_file

MANIFEST_NAME = "convert.json"
EXPERT = re.compile(
    r"\.experts\.\d+\.(" + "|".join(name for names in PROJECTIONS.values() for name in names) + r")\.weight$"
)
STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")
BLOCKS = re.compile(r"\.experts\.(gate_up_proj|down_proj)_blocks$")
SCALE = "_scale_inv"
NAMES = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


class Source(NamedTuple):
    """One tensor of the source: dtype as safetensors spells it; has_sf: a scale factor tensor is there for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    has_sf: bool

    @property
    def is_expert(self) -> bool:
        return EXPERT.search(self.name) is not None

    @property
    def is_blocks(self) -> bool:
        return BLOCKS.search(self.name) is not None and self.has_sf


class Conversion(NamedTuple):
    """described: what comes out, name -> (dtype, shape); make: (tensor, sf or None) -> those tensors, in that order."""

    described: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, ...]]


def _copied(source: Source) -> Conversion:
    return Conversion({source.name: (DTYPES[source.dtype], source.shape)}, lambda tensor, _: (tensor,))


def to_bf16(source: Source) -> Conversion:
    """bf16: see the module's docstring."""
    if source.dtype == "F8_E4M3" and source.has_sf:
        return Conversion({source.name: (torch.bfloat16, source.shape)}, lambda tensor, sf: (_dequantize(tensor, sf),))
    if source.is_blocks:
        num_experts, outputs, groups, _ = source.shape
        shape = num_experts, groups * MXFP4_GROUP, outputs
        described = {source.name.removesuffix("_blocks"): (torch.bfloat16, shape)}
        return Conversion(described, lambda codes, sf: (_dequantize_mxfp4(codes, sf, source.name),))
    if (source.is_expert or STACKED.search(source.name)) and source.dtype in PLAIN_DTYPES:
        return Conversion({source.name: (torch.bfloat16, source.shape)}, lambda tensor, _: (tensor.bfloat16(),))
    return _copied(source)


def to_fp8(source: Source) -> Conversion:
    """fp8: see the module's docstring."""
    if source.dtype == "F8_E4M3" and source.has_sf:
        described = _copied(source).described | {
            source.name + SCALE: (torch.float32, tuple(map(blocks_of, source.shape)))
        }
        return Conversion(described, lambda tensor, sf: (tensor, sf))
    if not (source.is_expert and source.dtype in PLAIN_DTYPES):
        return _copied(source)
    described = {
        source.name: (torch.float8_e4m3fn, source.shape),
        source.name + SCALE: (torch.float32, tuple(map(blocks_of, source.shape))),
    }
    return Conversion(described, lambda tensor, _: _quantize(tensor))


def to_mxfp4(source: Source) -> Conversion:
    """mxfp4: see the module's docstring; names and shapes: megamoe/checkpoint_mxfp4.py."""
    if source.is_blocks:
        described = {source.name: (torch.uint8, source.shape), sf_name(source.name): (torch.uint8, source.shape[:-1])}
        return Conversion(described, lambda codes, sf: (codes, sf))
    if source.has_sf:
        return to_fp8(source)
    if not (STACKED.search(source.name) and source.dtype in PLAIN_DTYPES):
        return _copied(source)
    num_experts, inputs, outputs = source.shape
    groups = num_experts, outputs, inputs // MXFP4_GROUP
    described = {
        f"{source.name}_blocks": (torch.uint8, (*groups, MXFP4_GROUP // 2)),
        f"{source.name}_scales": (torch.uint8, groups),
    }
    return Conversion(described, lambda tensor, _: _quantize_mxfp4(tensor))


FORMATS: dict[str, Callable[[Source], Conversion]] = {"bf16": to_bf16, "fp8": to_fp8, "mxfp4": to_mxfp4}
MXFP4_LEFT_OUT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def _quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, sf = mxfp4.quantize(weight.mT)
    return codes.unflatten(-1, (-1, MXFP4_GROUP // 2)), sf


def _dequantize_mxfp4(codes: torch.Tensor, sf: torch.Tensor, name: str) -> torch.Tensor:
    """[E, outputs, inputs / 32, 16] -> bf16 [E, inputs, outputs]; an expert at a time: the fp32 copy stays small."""
    if bool((sf == NAN_SF).any()):
        raise ValueError(f"{sf_name(name)} has a scale factor of {NAN_SF}, which is NaN; copy the checkpoint again")
    whole = torch.empty(codes.shape[0], codes.shape[2] * MXFP4_GROUP, codes.shape[1], dtype=torch.bfloat16)
    for expert, matrix in enumerate(whole):
        matrix.copy_(mxfp4.dequantize(codes[expert].flatten(1), sf[expert]).t())
    return whole


def sf_name(name: str) -> str:
    """Of the tensor with a quantized tensor's scale factors."""
    return name.removesuffix("_blocks") + "_scales" if BLOCKS.search(name) else name + SCALE


def _owner(name: str) -> str | None:
    """Whose scale factors `name` are, or None: the inverse of sf_name."""
    if BLOCKS.search(blocks := name.removesuffix("_scales") + "_blocks") and name.endswith("_scales"):
        return blocks
    return name.removesuffix(SCALE) if name.endswith(SCALE) else None


def _refusal(name: str, shape: tuple[int, ...], make) -> str | None:
    """Why an expert's tensor has no place in the target's format."""
    if make is to_fp8 and (STACKED.search(name) or BLOCKS.search(name)):
        return (
            "all experts of a layer in one tensor, which no published FP8 layout has; load it with "
            "weight_format='fp8' instead"
        )
    if make is to_mxfp4 and EXPERT.search(name):
        return (
            "one expert, and MXFP4 files have all of a layer in one tensor; load it with weight_format='mxfp4' instead"
        )
    if make is to_mxfp4 and STACKED.search(name) and (len(shape) != 3 or shape[1] % MXFP4_GROUP):
        return f"{list(shape)}; MXFP4 needs [experts, inputs, outputs], inputs a multiple of {MXFP4_GROUP}"
    return None


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    return torch.nn.functional.pad(matrix.view(_bytes_of(matrix)), (0, -columns % BLOCK, 0, -rows % BLOCK)).view(
        matrix.dtype
    )


def _bytes_of(matrix: torch.Tensor) -> torch.dtype:
    return torch.uint8 if matrix.element_size() == 1 else matrix.dtype  # e4m3 is padded as what it is stored in


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, sf = quantize_blocks(_padded(weight))
    rows, columns = weight.shape
    return values.view(torch.uint8)[:rows, :columns].contiguous().view(values.dtype), sf


def _dequantize(values: torch.Tensor, sf: torch.Tensor) -> torch.Tensor:
    rows, columns = values.shape
    whole = torch.empty(rows, columns, dtype=torch.bfloat16)
    for row in range(0, rows, BLOCK):  # one row of blocks at a time: the fp32 copy stays small
        part = values[row : row + BLOCK]
        wide = dequantize_blocks(_padded(part), sf[row // BLOCK : row // BLOCK + 1])
        whole[row : row + BLOCK] = wide[: len(part), :columns]
    return whole


def convert(
    source: str | Path, target: str | Path, weight_format: str, *, progress: Callable[[int], object] | None = None
) -> list[str]:
    """Convert the checkpoint directory `source` to `target`; returns the names of the shards written by this call.

    weight_format: a key of FORMATS. progress: called with the source bytes done. Peak memory: one tensor and what it
    becomes. CheckpointError lists all that is wrong with the source, before anything is written; ValueError for a
    target that is the source, holds another conversion, or lies on too small a disk.
    """
    source, target = Path(source), Path(target)
    if weight_format not in FORMATS:
        raise ValueError(f"weight_format={weight_format!r} must be one of {', '.join(map(repr, FORMATS))}")
    make = FORMATS[weight_format]
    checkpoint = Checkpoint(source)
    if not source.is_dir():
        raise ValueError(f"SRC {source} is a file; give the directory it is in")
    if source.resolve() == target.resolve() or (target.exists() and not target.is_dir()):
        raise ValueError(f"DST {target}: source and destination must be two directories")
    shards = _plan(checkpoint, make)
    config = json.loads((source / "config.json").read_text()) if (source / "config.json").is_file() else None
    target.mkdir(parents=True, exist_ok=True)
    manifest = _open_manifest(target, weight_format)
    needed = sum(_bytes(c.described) for shard in shards.values() for _, c in shard)
    free = shutil.disk_usage(target).free + sum(file.stat().st_size for file in target.glob("*.safetensors"))
    if needed > free:
        raise ValueError(f"DST {target}: {needed} bytes are needed, {free} are free; make room, the run then goes on")
    written = []
    for file, conversions in shards.items():
        digest = file_digest(source / file)
        entry, done = manifest["shards"].get(file), target / file
        if entry is None or entry["source"] != digest or not done.is_file() or file_digest(done) != entry["sha256"]:
            described = {
                name: (NAMES[dtype], shape, dtype)
                for _, conversion in conversions
                for name, (dtype, shape) in conversion.described.items()
            }
            sha256 = write_file(done, described, _tensors(checkpoint, conversions, progress))
            manifest["shards"][file] = {"source": digest, "sha256": sha256}
            _write_json(target / MANIFEST_NAME, manifest)
            written.append(file)
        elif progress is not None:
            progress(sum(_source_bytes(checkpoint, conversion_source.name) for conversion_source, _ in conversions))
    _write_rest(checkpoint, target, shards, config, weight_format)
    return written


def _plan(checkpoint: Checkpoint, make) -> dict[str, list[tuple[Source, Conversion]]]:
    """Shard file -> its tensors in the order of the file, scale factors with the tensor that they belong to."""
    names, problems, refused = set(checkpoint.names), [], {}
    shards: dict[str, list[tuple[Source, Conversion]]] = {}
    for name in names:
        info = checkpoint.describe(name)
        if info is None:
            problems.append(f"missing: {name} (the index says {checkpoint.file_of(name)}, which lacks it)")
        elif info.dtype not in DTYPES:
            problems.append(f"dtype: {name} is {info.dtype}, which is not read here; known: {', '.join(DTYPES)}")
        elif (refusal := _refusal(name, info.shape, make)) is not None:
            refused.setdefault(refusal, []).append(name)
        elif BLOCKS.search(name):
            problems += _blocks_problems(checkpoint, name, info)
        elif name + SCALE in names and (info.dtype, len(info.shape)) != ("F8_E4M3", 2):
            problems.append(
                f"layout: {name} is {info.dtype} {list(info.shape)}; scale factors such as {name}{SCALE} are read of "
                "F8_E4M3 matrices only"
            )
        elif info.dtype == "F8_E4M3" and len(info.shape) == 2:
            sf = checkpoint.describe(name + SCALE) if name + SCALE in names else None
            wanted = tuple(map(blocks_of, info.shape))
            if sf is None:
                problems.append(f"missing: {name}{SCALE}, the scale factors of an e4m3 tensor")
            elif sf.shape != wanted:
                problems.append(f"misshapen: {name}{SCALE} is {list(sf.shape)}, blocks of 128 give {list(wanted)}")
        if (owner := _owner(name)) is not None and owner not in names:
            problems.append(f"extra: {name} belongs to no tensor")
    for refusal, of in refused.items():  # a whole layout: every layer's and expert's name would say the same
        rest = f" and {len(of) - 1} more" * (len(of) > 1)
        problems.append(f"layout: {min(of)}{rest}: {refusal}")
    if problems:
        raise CheckpointError(checkpoint.path, sorted(problems))
    for name in sorted(names, key=checkpoint.place_of):
        if _owner(name) is None:
            info = checkpoint.describe(name)
            source = Source(name, info.dtype, info.shape, sf_name(name) in names)
            shards.setdefault(checkpoint.file_of(name), []).append((source, make(source)))
    return shards


def _blocks_problems(checkpoint: Checkpoint, name: str, info) -> list[str]:
    if info.dtype != "U8" or len(info.shape) != 4 or info.shape[3] != MXFP4_GROUP // 2:
        return [
            f"misshapen: {name} is {info.dtype} {list(info.shape)}, MXFP4 blocks are U8 [experts, rows, groups, 16]"
        ]
    sf = checkpoint.describe(sf_name(name)) if sf_name(name) in checkpoint else None
    if sf is None:
        return [f"missing: {sf_name(name)}, the scale factors of MXFP4 blocks"]
    if (sf.dtype, sf.shape) != ("U8", info.shape[:3]):
        return [f"misshapen: {sf_name(name)} is {sf.dtype} {list(sf.shape)}, its blocks need U8 {list(info.shape[:3])}"]
    return []


def _tensors(checkpoint: Checkpoint, conversions, progress) -> Iterator[tuple[str, torch.Tensor]]:
    for source, conversion in conversions:
        tensor = checkpoint.read_row(source.name, None)
        num_bytes = tensor.nbytes
        sf = checkpoint.read_row(sf_name(source.name), None) if source.has_sf else None
        sf = sf.float() if source.has_sf and not source.is_blocks else sf
        yield from zip(conversion.described, conversion.make(tensor, sf), strict=True)
        if progress is not None:
            progress(num_bytes)


def _bytes(described: dict) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in described.values())


def _source_bytes(checkpoint: Checkpoint, name: str) -> int:
    info = checkpoint.describe(name)
    return info.end - info.begin


def _open_manifest(target: Path, weight_format: str) -> dict:
    path = target / MANIFEST_NAME
    manifest = {"format": weight_format, "shards": {}}
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            manifest = {"format": found["format"], "shards": dict(found["shards"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); remove it and the shards beside it") from error
    if manifest["format"] != weight_format or (not path.is_file() and any(target.glob("*.safetensors"))):
        raise ValueError(f"DST {target} holds another checkpoint; give an empty directory, or remove it first")
    return manifest


def _write_json(path: Path, value: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def _write_rest(checkpoint: Checkpoint, target: Path, shards: dict, config: dict | None, weight_format: str) -> None:
    """Index, configuration, and the files that are no weights."""
    made = {file: [name for _, c in shard for name in c.described] for file, shard in shards.items()}
    if list(made) != [SINGLE_NAME]:
        total = sum(_bytes(c.described) for shard in shards.values() for _, c in shard)
        weight_map = {name: file for file, names in made.items() for name in names}
        _write_json(target / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in checkpoint.path.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name not in (INDEX_NAME, "config.json"):
            shutil.copyfile(file, target / file.name)
    if config is None:
        return
    config.pop("quantization_config", None)
    if weight_format == "mxfp4":
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": MXFP4_LEFT_OUT}
    if weight_format == "fp8":
        quantized = {name for names in made.values() for name in names if name + SCALE in set(names)}
        plain = {
            name for names in made.values() for name in names if name.endswith(".weight") and name not in quantized
        }
        config["quantization_config"] = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": sorted(name.removesuffix(".weight") for name in plain),
        }  # fmt: skip
    _write_json(target / "config.json", config)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megamoe convert", description=__doc__.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("src", metavar="SRC", help="directory with safetensors (pickle is never read)")
    parser.add_argument("dst", metavar="DST", help="directory to make, or to go on with")
    parser.add_argument("--format", choices=sorted(FORMATS), required=True, help="number format of the experts")
    given = parser.parse_args(argv)
    try:
        checkpoint = Checkpoint(given.src)
        total = sum(_source_bytes(checkpoint, name) for name in checkpoint.names if checkpoint.describe(name))
        with Progress("convert", total) as progress:
            written = convert(given.src, given.dst, given.format, progress=progress)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    shards = json.loads((Path(given.dst) / MANIFEST_NAME).read_text())["shards"]
    print(f"{given.dst}: {len(shards)} shard(s) in {given.format}, {len(written)} written now, "
          f"{len(shards) - len(written)} found complete by their sha256")  # fmt: skip
    return 0
