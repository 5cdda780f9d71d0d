"""Which block of a striped store lies on which drive: pure arithmetic, done before the first byte is written.

A sweep can draw on all drives at the same time only if what it reads ahead, some slots of about 16 MiB, lies on all of
them. So large blocks are stored in parts of no more than a slot, their matrices split by rows, and consecutive parts
go to the drive that has had least so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.layout import FileLayout, plan_files

if TYPE_CHECKING:
    import torch

PART_BYTES = 16 << 20
"""What a slot holds (`plan/transfer.py`): a larger part would only be cut again when a run is planned."""

_ROWS = 64  # parts begin at multiples of so many rows where that is possible: what matrix kernels like


def split_blocks(blocks: Sequence[BlockSpec], part_bytes: int = PART_BYTES) -> tuple[BlockSpec, ...]:
    """`blocks`, those that stream cut into parts of at most `part_bytes`: between tensors, and between the rows of a
    tensor that may be cut by rows. A tensor that may not be has a part to itself. Parts of one block follow each other.
    """
    result: list[BlockSpec] = []
    for block in blocks:
        groups: list[list[TensorSpec]] = [[]]
        filled = 0
        for tensor in block.tensors if _streams(block) else ():
            nbytes = num_bytes(tensor.dtype, tensor.shape)
            if nbytes > part_bytes and tensor.cut == "rows" and tensor.first_row is None:
                groups += [[part] for part in _row_parts(tensor, nbytes, part_bytes)] + [[]]
                filled = 0
                continue
            if groups[-1] and filled + nbytes > part_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(tensor)
            filled += nbytes
        groups = [group for group in groups if group]
        if len(groups) < 2:
            result.append(block)
            continue
        result += [
            replace(block, name=f"{block.name}.part{number}", tensors=tuple(group))
            for number, group in enumerate(groups, 1)
        ]
    return tuple(result)


def distribute(blocks: Sequence[BlockSpec], num_folders: int) -> list[int]:
    """The folder of each block. What streams goes to the folder that has least of it so far, so that in any run of
    consecutive blocks no two folders differ by more than two of the largest blocks. What does not stream, the
    looked-up table and what always stays in memory, lies in folder 0.
    """
    filled = [0] * num_folders
    chosen: list[int] = []
    last = num_folders - 1
    for block in blocks:
        if not _streams(block):
            chosen.append(0)
            continue
        folder = min(range(num_folders), key=lambda n: (filled[n], (n - last - 1) % num_folders))
        filled[folder] += sum(num_bytes(tensor.dtype, tensor.shape) for tensor in block.tensors)
        chosen.append(folder)
        last = folder
    return chosen


def plan_stripes(parts: Sequence[BlockSpec], num_folders: int, file_bytes: int) -> tuple[FileLayout, ...]:
    """The files of a store over `num_folders` folders; their blocks name the folder. Raises ValueError as `plan_files`
    does.
    """
    chosen = distribute(parts, num_folders)
    files: list[FileLayout] = []
    for folder in range(num_folders):
        own = [part for part, where in zip(parts, chosen, strict=True) if where == folder]
        if own:
            prefix = f"drive{folder + 1}" if folder else "blocks"
            files += [
                replace(file, blocks=tuple(replace(block, folder=folder) for block in file.blocks))
                for file in plan_files(own, file_bytes, prefix)
            ]
    return tuple(files)


class PartSource:
    """A BlockSource of parts, on one that knows `blocks`' tensors only whole."""

    def __init__(self, source: Any, blocks: Sequence[BlockSpec]) -> None:
        self._source = source
        self._whole = {(tensor.name, tensor.expert): tensor for block in blocks for tensor in block.tensors}

    def require(self, blocks: Sequence[BlockSpec]) -> None:
        """See `TensorSource.require`."""
        self._source.require(blocks)

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor:
        """Rows of the part `spec`; see `TensorSource.read`."""
        first = spec.first_row or 0
        found: torch.Tensor = self._source.read(
            self._whole[spec.name, spec.expert], first + row_start, first + row_stop
        )
        return found

    def reads_apart(self, spec: TensorSpec) -> bool:
        """See `TensorSource.reads_apart`."""
        apart: bool = self._source.reads_apart(self._whole[spec.name, spec.expert])
        return apart


def _streams(block: BlockSpec) -> bool:
    return block.kind not in ("embedding", "rest")


def _row_parts(tensor: TensorSpec, nbytes: int, part_bytes: int) -> list[TensorSpec]:
    rows = tensor.shape[0]
    most = max(1, part_bytes * rows // nbytes)
    step = -(-rows // -(-rows // most))
    if step > _ROWS and -(-step // _ROWS) * _ROWS <= most:
        step = -(-step // _ROWS) * _ROWS
    return [
        replace(tensor, shape=(min(step, rows - first), *tensor.shape[1:]), first_row=first)
        for first in range(0, rows, step)
    ]
