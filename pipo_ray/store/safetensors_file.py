"""The header of a safetensors file: a reader that believes nothing, and the encoder that the packer uses.

Format: 8 bytes little-endian length of the header, the header (JSON, may end in spaces), the data section. Offsets
in the header are relative to the data section, which the tensors must cover without holes or overlaps.
Source: https://github.com/huggingface/safetensors#format, `Metadata::validate` in safetensors/src/tensor.rs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipo_ray.errors import CheckpointError
from pipo_ray.store.dtypes import DTYPE_BITS, num_bytes

MAX_HEADER_BYTES = 100_000_000
DATA_ALIGNMENT = 4096
PAD_PREFIX = "__pad__."
"""Tensors with this prefix are padding of ours: the format forbids holes between tensors."""

_AGAIN = "download or convert the checkpoint again"


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies: `offset` is absolute in the file, in bytes; `dtype` is the format's name ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A validated header; `tensors` are in the order of their data, `size` (the file's) and `data_offset` in bytes."""

    path: Path
    size: int
    data_offset: int
    metadata: dict[str, str]
    tensors: dict[str, TensorHeader]


def read_header(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Read and validate the header of the file at `path`; the data is not read.

    Raises CheckpointError naming file, tensor, value and limit: file missing, unreadable or truncated, a header length
    over 100 MB, a header that is not JSON of the right form, an unknown dtype, negative or reversed offsets, offsets
    past the end of the file, a size that contradicts shape and dtype, tensors that overlap, holes, bytes behind the
    last tensor.
    """
    path = Path(path)
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = _read_exactly(file.fileno(), 8)
            if len(prefix) < 8:
                _lie(path, f"is {size} bytes long, the shortest safetensors file has 8; it is truncated")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                _lie(path, f"has a header of {length} bytes, the format allows {MAX_HEADER_BYTES}")
            if 8 + length > size:
                _lie(path, f"has a header of {length} bytes but the file has only {size}; it is truncated")
            raw = _read_exactly(file.fileno(), length)
    except OSError as error:
        raise CheckpointError(
            f"safetensors file {path} cannot be read: {error.strerror}; check path and rights"
        ) from error
    if len(raw) < length:
        _lie(path, f"ended after {8 + len(raw)} bytes, its header needs {8 + length}; it is truncated")
    return _validate(path, size, 8 + length, _parse(path, raw))


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    alignment: int = DATA_ALIGNMENT,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """The length prefix and the header for `tensors` (name, dtype, shape) whose data follow each other in this order.

    Padded with spaces so that the data section begins on a multiple of `alignment` bytes. Raises ValueError on a
    name that comes twice or a header over the format's 100 MB.
    """
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        if name in header:
            raise ValueError(f"tensor {name} comes twice")
        end = position + num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % alignment)
    if len(raw) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(raw)} bytes; the format allows {MAX_HEADER_BYTES}")
    return len(raw).to_bytes(8, "little") + raw


def _read_exactly(descriptor: int, length: int) -> bytes:
    """Up to `length` bytes: fewer only at the end of the file."""
    parts = []
    while length > 0 and (part := os.read(descriptor, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _lie(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"safetensors file {path} {what}; {_AGAIN}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"name {name!r} comes twice")
        result[name] = value
    return result


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _lie(path, f"has a header that is not JSON ({str(error)[:100]})")
    if not isinstance(header, dict):
        _lie(path, f"has a header that is a JSON {type(header).__name__}, not an object")
    return header


def _is_size_list(value: Any) -> bool:
    # `type(x) is int`: JSON's true would pass as an int otherwise.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _tensor(path: Path, name: str, entry: Any, data_offset: int, size: int) -> TensorHeader:
    where = f"tensor {name!r}"
    if not isinstance(entry, dict):
        _lie(path, f"has a header whose {where} is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _lie(path, f"has {where} of unknown dtype {dtype!r}; known are {', '.join(DTYPE_BITS)}")
    if not _is_size_list(shape) or any(item < 0 for item in shape):
        _lie(path, f"has {where} with shape {str(shape)[:80]}; sizes are integers from 0 up")
    if not _is_size_list(offsets) or len(offsets) != 2:
        _lie(path, f"has {where} with data_offsets {str(offsets)[:80]}; two integers are needed")
    begin, end = offsets
    if begin < 0 or end < begin:
        _lie(path, f"has {where} at bytes {begin} to {end}: a negative offset or size")
    if end > size - data_offset:
        _lie(
            path, f"has {where} at bytes {begin} to {end}, past the {size - data_offset} bytes of data; it is truncated"
        )
    try:
        expected = num_bytes(dtype, shape)
    except ValueError as error:
        _lie(path, f"has {where} of shape {shape}: {error}")
    if end - begin != expected:
        _lie(path, f"has {where} with {end - begin} bytes, {dtype} of shape {shape} takes {expected}")
    return TensorHeader(name, dtype, tuple(shape), data_offset + begin, expected)


def _validate(path: Path, size: int, data_offset: int, header: dict[str, Any]) -> SafetensorsFile:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _lie(path, "has a __metadata__ that is not a map of strings")
    tensors = [_tensor(path, name, entry, data_offset, size) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end, before = data_offset, "the header"
    for tensor in tensors:
        if tensor.offset < end:
            _lie(path, f"has tensor {tensor.name!r} overlapping {before!r} by {end - tensor.offset} bytes")
        if tensor.offset > end:
            _lie(path, f"has a hole of {tensor.offset - end} bytes before tensor {tensor.name!r}")
        end, before = tensor.offset + tensor.nbytes, tensor.name
    if end != size:
        _lie(path, f"has {size - end} bytes behind its last tensor {before!r}")
    return SafetensorsFile(path, size, data_offset, metadata, {tensor.name: tensor for tensor in tensors})
