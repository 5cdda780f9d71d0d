"""Where every tensor of every block will lie: pure arithmetic, done before the first byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipo_ray.model.blocks import BlockSpec
from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.manifest import StoredBlock, StoredTensor, stored_key
from pipo_ray.store.safetensors_file import DATA_ALIGNMENT, PAD_PREFIX, encode_header

FILE_BYTES = 1 << 30
"""A file is closed when the next block would take it over this. A block that is larger has a file to itself."""

TENSOR_ALIGNMENT = 64
"""A cache line, and what vectorised kernels want."""

BLOCK_ALIGNMENT = 4096
"""What O_DIRECT wants of offset and length; each block ends in padding up to it."""

Placed = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file: `header` is its first bytes, `size` the whole; the blocks' checksums are still empty."""

    name: str
    header: bytes
    size: int
    blocks: tuple[StoredBlock, ...]

    @property
    def folder(self) -> int:
        """The number of the folder that it is in, see `StoredBlock`."""
        return self.blocks[0].folder


def plan_files(
    blocks: Sequence[BlockSpec], file_bytes: int = FILE_BYTES, prefix: str = "blocks"
) -> tuple[FileLayout, ...]:
    """Place `blocks` in their order into files of about `file_bytes`, whose names begin with `prefix`.

    Raises ValueError if there is no block, or if a block or a tensor comes twice.
    """
    _refuse_doubles(blocks)
    groups: list[list[BlockSpec]] = []
    filled = 0
    for block in blocks:
        size = _place(block, 0, 0)[2]
        if not groups or filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(block)
        filled += size
    return tuple(
        _plan_file(f"{prefix}-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    )


def _refuse_doubles(blocks: Sequence[BlockSpec]) -> None:
    if not blocks:
        raise ValueError("there is no block to pack")
    seen: set[str] = set()
    for block in blocks:
        keys = [stored_key(tensor.name, tensor.expert, tensor.first_row) for tensor in block.tensors]
        for key in [f"block {block.name}", *keys]:
            if key in seen:
                raise ValueError(f"{key} comes twice")
            seen.add(key)


def _plan_file(name: str, blocks: Sequence[BlockSpec]) -> FileLayout:
    placed: list[Placed] = []
    relative: list[tuple[BlockSpec, int, list[int], int]] = []
    position = pads = 0
    for block in blocks:
        entries, offsets, nbytes = _place(block, position, pads)
        relative.append((block, position, offsets, nbytes))
        placed += entries
        pads += len(entries) - len(offsets)
        position += nbytes
    header = encode_header(placed, alignment=DATA_ALIGNMENT)
    stored = tuple(
        StoredBlock(
            name=block.name,
            kind=block.kind,
            layer=block.layer,
            file=name,
            offset=len(header) + start,
            nbytes=nbytes,
            checksum="",
            tensors=tuple(
                StoredTensor(
                    name=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    expert=tensor.expert,
                    cut=tensor.cut,
                    offset=len(header) + offset,
                    nbytes=num_bytes(tensor.dtype, tensor.shape),
                    panels=tensor.panels,
                    first_row=tensor.first_row,
                )
                for tensor, offset in zip(block.tensors, offsets, strict=True)
            ),
        )
        for block, start, offsets, nbytes in relative
    )
    return FileLayout(name, header, len(header) + position, stored)


def _place(block: BlockSpec, start: int, pads: int) -> tuple[list[Placed], list[int], int]:
    """Header entries with padding, the tensors' offsets in the data section, and the bytes that the block takes."""
    entries: list[Placed] = []
    offsets: list[int] = []
    position = start

    def align(alignment: int) -> None:
        nonlocal position, pads
        if gap := -position % alignment:
            entries.append((f"{PAD_PREFIX}{pads}", "U8", (gap,)))
            position += gap
            pads += 1

    for tensor in block.tensors:
        align(TENSOR_ALIGNMENT)
        offsets.append(position)
        entries.append((stored_key(tensor.name, tensor.expert, tensor.first_row), tensor.dtype, tensor.shape))
        position += num_bytes(tensor.dtype, tensor.shape)
    align(BLOCK_ALIGNMENT)
    return entries, offsets, position - start
