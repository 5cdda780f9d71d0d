"""Looks rows of a stored matrix up: the token embedding, of which a sweep needs a few rows and not the whole."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from pipo_ray.errors import DriveError, InputError, StoreError
from pipo_ray.store.manifest import Manifest

_COALESCE_BYTES = 16 << 10
"""Two rows closer than this are read at once: what lies between costs less than another request to the disk."""

_RUN_BYTES = 4 << 20


@dataclass(frozen=True)
class _Part:
    """Rows from `first_row` on, at byte `offset` of an open file."""

    path: Path
    descriptor: int
    offset: int
    first_row: int


class RowReader:
    """Rows of the 2-D tensor `tensor_name`, or of the one that it is an alias of, in parts or whole.

    The rows used last are kept, `cache_bytes` of them. Numpy only, so that an actor without torch can have one; not
    for use by several threads at once. Raises StoreError if the store has no such matrix or its file cannot be opened.
    """

    def __init__(
        self, folder: str | os.PathLike[str], manifest: Manifest, tensor_name: str, cache_bytes: int = 4 << 20
    ) -> None:
        try:
            found = manifest.find_parts(tensor_name)
        except KeyError as error:
            raise StoreError(
                f"block store {folder} has no tensor {tensor_name!r}; pack the checkpoint again"
            ) from error
        tensor = found[0][1]
        if len(tensor.shape) != 2:
            raise StoreError(f"block store {folder}: {tensor_name!r} has shape {list(tensor.shape)}, not a matrix's")
        self.name = tensor_name
        self.dtype = tensor.dtype
        self.num_rows, self.num_columns = sum(part.shape[0] for _, part in found), tensor.shape[1]
        self.row_bytes = sum(part.nbytes for _, part in found) // self.num_rows if self.num_rows else 0
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._capacity = min(self.num_rows, cache_bytes // self.row_bytes) if self.row_bytes else 0
        self._cache: NDArray[np.uint8] = np.empty((self._capacity, self.row_bytes), np.uint8)
        self._descriptors: dict[Path, int] = {}
        self._first_rows = np.array([part.first_row or 0 for _, part in found], np.int64)
        self._parts: list[_Part] = []
        try:
            for block, part in found:
                path = manifest.path(folder, block)
                self._parts.append(_Part(path, self._open(path), part.offset, part.first_row or 0))
        except BaseException:
            self.close()
            raise

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The rows' bytes: uint8 of shape (len(rows), row_bytes), in the order asked for, to be viewed as `dtype`.

        Raises InputError for a row that does not exist, DriveError if the file cannot be read, StoreError if it ends
        too early.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        wrong = rows[(rows < 0) | (rows >= self.num_rows)]
        if len(wrong):
            raise InputError(
                f"token id {wrong[0]} is out of range: {self.name} has rows 0 to {self.num_rows - 1}; check that "
                "prompt and "
                "tokenizer belong to this model"
            )
        unique, inverse = np.unique(rows, return_inverse=True)
        found: NDArray[np.uint8] = np.empty((len(unique), self.row_bytes), np.uint8)
        missing = []
        for position, row in enumerate(unique.tolist()):
            slot = self._slots.get(row)
            if slot is None:
                missing.append(position)
            else:
                self._slots.move_to_end(row)
                found[position] = self._cache[slot]
        self._read_missing(unique, np.asarray(missing, np.int64), found)
        for position in missing[: self._capacity]:
            self._keep(int(unique[position]), found[position])
        return found[inverse.reshape(-1)]

    def close(self) -> None:
        """Close the file."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> RowReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            try:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StoreError(f"{path} cannot be read: {error.strerror}; check path and rights") from error
            os.posix_fadvise(self._descriptors[path], 0, 0, os.POSIX_FADV_RANDOM)
        return self._descriptors[path]

    def _read_missing(self, unique: NDArray[np.int64], missing: NDArray[np.int64], found: NDArray[np.uint8]) -> None:
        if not len(missing) or not self.row_bytes:
            return
        wanted = unique[missing]
        far = (np.diff(wanted) - 1) * self.row_bytes > _COALESCE_BYTES
        # A long run is cut too: it would have the whole matrix in memory.
        cut = np.diff(wanted // max(1, _RUN_BYTES // self.row_bytes)) > 0
        cut |= np.diff(self._part_of(wanted)) > 0
        runs = np.split(missing, np.flatnonzero(far | cut) + 1)
        if len(runs) > 1:  # asked for one behind the other, each would wait for the drive
            for run in runs:
                self._expect(int(unique[run[0]]), int(unique[run[-1]]))
        for run in runs:
            first, last = int(unique[run[0]]), int(unique[run[-1]])
            data = self._pread(first, last + 1 - first)
            found[run] = data[unique[run] - first]

    def _place(self, first: int) -> tuple[_Part, int]:
        """The part that has row `first`, and the row's offset in its file."""
        part = self._parts[int(self._part_of(np.array(first)))]
        return part, part.offset + (first - part.first_row) * self.row_bytes

    def _expect(self, first: int, last: int) -> None:
        """Let the drive begin with these rows."""
        part, offset = self._place(first)
        with contextlib.suppress(OSError):
            os.posix_fadvise(part.descriptor, offset, (last + 1 - first) * self.row_bytes, os.POSIX_FADV_WILLNEED)

    def _pread(self, first: int, count: int) -> NDArray[np.uint8]:
        data: NDArray[np.uint8] = np.empty((count, self.row_bytes), np.uint8)
        view = data.reshape(-1).data
        part, offset = self._place(first)
        done = 0
        while done < len(view):
            try:
                got = os.preadv(part.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise DriveError(
                    f"{part.path}: reading rows of {self.name} at offset {offset + done} failed: {error.strerror}; "
                    "check that the drive is connected and healthy"
                ) from error
            if got == 0:
                raise StoreError(
                    f"{part.path} ends at byte {offset + done}, in row {first} of {self.name}; pack the checkpoint "
                    "again"
                )
            done += got
        return data

    def _part_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which part has each row."""
        return np.asarray(np.searchsorted(self._first_rows, rows, side="right") - 1, np.int64)

    def _keep(self, row: int, data: NDArray[np.uint8]) -> None:
        full = len(self._slots) == self._capacity
        slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
        self._cache[slot] = data
        self._slots[row] = slot
