"""Writing a safetensors file tensor by tensor, so that no more than one of them is in memory.

Layout of a file: 8 bytes little-endian header length, header (JSON: name -> dtype, shape, bytes within the data), data.
Source: the format section of safetensors' README (https://github.com/huggingface/safetensors). Reading is
`megamoe.checkpoint.Checkpoint`'s.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

HASH_CHUNK_BYTES = 1 << 22


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_file(
    path: Path,
    described: dict[str, tuple[str, tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> str:
    """Write `path` at once or not at all (a `.partial` beside it, then a rename); returns the file's sha256.

    described: name -> (dtype as safetensors spells it, shape, torch dtype), in the order of the file; tensors: the same
    names in the same order. ValueError if a tensor is not what was described.
    """
    header, begin = {}, 0
    for name, (dtype, shape, torch_dtype) in described.items():
        end = begin + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial, digest = path.with_name(path.name + ".partial"), hashlib.sha256()
    with partial.open("wb") as file:
        for chunk in _chunks(text, described, tensors):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return digest.hexdigest()


def _chunks(text: bytes, described: dict, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[bytes | memoryview]:
    yield len(text).to_bytes(8, "little")
    yield text
    expected = iter(described.items())
    for name, tensor in tensors:
        wanted, (_, shape, dtype) = next(expected, (None, (None, None, None)))
        if name != wanted or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype} is not {wanted} as described")
        if tensor.numel():
            yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    if (missing := next(expected, None)) is not None:
        raise ValueError(f"{missing[0]} was described but not given")
