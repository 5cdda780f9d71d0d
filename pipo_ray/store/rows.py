"""Looks rows of a stored matrix up: the token embedding, of which a sweep needs a few rows and not the whole."""

from __future__ import annotations

import contextlib
import os
import threading
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

_AT_ONCE: int | None = getattr(os, "RWF_NOWAIT", None)
"""Read only what is in memory."""

_MOST_NOT_AT_HAND = 256
"""Rows that turned out not to be in the page cache before all others count as not being there."""


@dataclass(frozen=True)
class _Part:
    """Rows from `first_row` on, at byte `offset` of an open file."""

    path: Path
    descriptor: int
    offset: int
    first_row: int


class RowReader:
    """Rows of the 2-D tensor `tensor_name`, or of the one that it is an alias of, in parts or whole.

    The rows used last are kept, `cache_bytes` of them; with `keep_all` all are, once a thread has read them, and
    `whole` is not None any more. Numpy only, so that an actor without torch can have one; not for use by several
    threads at once. Raises StoreError if the store has no such matrix or its file cannot be opened.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Manifest,
        tensor_name: str,
        cache_bytes: int = 4 << 20,
        *,
        keep_all: bool = False,
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
        self.whole: NDArray[np.uint8] | None = None
        """All rows, uint8 [num_rows, row_bytes], where they are kept."""
        self._loading: threading.Thread | None = None
        self._closed = False
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
        if keep_all:
            self._loading = threading.Thread(target=self._load, name="embedding", daemon=True)
            self._loading.start()

    def check(self, rows: NDArray[np.int64]) -> None:
        """Raise InputError for a row that does not exist."""
        wrong = rows[(rows < 0) | (rows >= self.num_rows)]
        if len(wrong):
            raise InputError(
                f"token id {wrong[0]} is out of range: {self.name} has rows 0 to {self.num_rows - 1}; check that "
                "prompt and "
                "tokenizer belong to this model"
            )

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The rows' bytes: uint8 of shape (len(rows), row_bytes), in the order asked for, to be viewed as `dtype`.

        Raises InputError for a row that does not exist, DriveError if the file cannot be read, StoreError if it ends
        too early.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        self.check(rows)
        if self.whole is not None:
            return self.whole[rows]
        unique, firsts, inverse = np.unique(rows, return_index=True, return_inverse=True)
        found: NDArray[np.uint8] = np.empty((len(rows), self.row_bytes), np.uint8)
        if not self.row_bytes:
            return found
        if len(unique) <= self._capacity:
            self._read_cached(unique, firsts, found)
        else:  # a long prompt: looking them up takes longer than it saves, and they would push out all others
            self._read_missing(unique, firsts, found)
        again = np.flatnonzero(firsts[inverse] != np.arange(len(rows)))
        if len(again):
            found[again] = found[firsts[inverse[again]]]
        return found

    def close(self) -> None:
        """Close the file."""
        self._closed = True
        if self._loading is not None:
            self._loading.join()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> RowReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> None:
        """Read all rows. What fails here fails again where the row is wanted, and is told then."""
        whole: NDArray[np.uint8] = np.empty((self.num_rows, self.row_bytes), np.uint8)
        at_once = max(1, _RUN_BYTES // max(1, self.row_bytes))
        ends = [part.first_row for part in self._parts[1:]] + [self.num_rows]
        with contextlib.suppress(DriveError, StoreError):
            for part, end in zip(self._parts, ends, strict=True):
                for first in range(part.first_row, end, at_once):
                    if self._closed:
                        return
                    stop = min(first + at_once, end)
                    whole[first:stop] = self._pread(first, stop - first)
            for descriptor in self._descriptors.values():  # the page cache need not keep it, too
                with contextlib.suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self.whole = whole

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            try:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StoreError(f"{path} cannot be read: {error.strerror}; check path and rights") from error
            os.posix_fadvise(self._descriptors[path], 0, 0, os.POSIX_FADV_RANDOM)
        return self._descriptors[path]

    def _read_cached(self, unique: NDArray[np.int64], places: NDArray[np.int64], found: NDArray[np.uint8]) -> None:
        """As `_read_missing`, what is there from the cache; all of it is there then."""
        missing = []
        for position, (row, place) in enumerate(zip(unique.tolist(), places.tolist(), strict=True)):
            slot = self._slots.get(row)
            if slot is None:
                missing.append(position)
            else:
                self._slots.move_to_end(row)
                found[place] = self._cache[slot]
        self._read_missing(unique[missing], places[missing], found)
        for position in missing:
            self._keep(int(unique[position]), found[places[position]])

    def _read_missing(self, wanted: NDArray[np.int64], places: NDArray[np.int64], found: NDArray[np.uint8]) -> None:
        """Read the rows `wanted`, in ascending order, into the rows `places` of `found`."""
        if len(wanted) > 1 and _AT_ONCE is not None:
            late = self._read_at_hand(wanted, places, found, _AT_ONCE)
            wanted, places = wanted[late], places[late]
        if not len(wanted):
            return
        far = (np.diff(wanted) - 1) * self.row_bytes > _COALESCE_BYTES
        # A long run is cut too: it would have the whole matrix in memory.
        cut = np.diff(wanted // max(1, _RUN_BYTES // self.row_bytes)) > 0
        cut |= np.diff(self._part_of(wanted)) > 0
        runs = np.split(np.arange(len(wanted)), np.flatnonzero(far | cut) + 1)
        if len(runs) > 1:  # asked for one behind the other, each would wait for the drive
            for run in runs:
                self._expect(int(wanted[run[0]]), int(wanted[run[-1]]))
        for run in runs:
            first, last = int(wanted[run[0]]), int(wanted[run[-1]])
            data = self._pread(first, last + 1 - first)
            found[places[run]] = data[wanted[run] - first]

    def _read_at_hand(
        self, wanted: NDArray[np.int64], places: NDArray[np.int64], found: NDArray[np.uint8], at_once: int
    ) -> list[int]:
        """As `_read_missing`, those rows that are in the page cache; the indices of the others. A long prompt has ten
        thousand rows: each goes to where it is wanted, with one call.
        """
        numbers = self._part_of(wanted)
        offsets = np.array([part.offset for part in self._parts], np.int64)[numbers]
        offsets += (wanted - self._first_rows[numbers]) * self.row_bytes
        descriptors = np.array([part.descriptor for part in self._parts])[numbers]
        starts = (places * self.row_bytes).tolist()
        targets, row_bytes, preadv = found.reshape(-1).data, self.row_bytes, os.preadv
        late = []
        for index, (descriptor, offset, start) in enumerate(
            zip(descriptors.tolist(), offsets.tolist(), starts, strict=True)
        ):
            try:
                if preadv(descriptor, [targets[start : start + row_bytes]], offset, at_once) == row_bytes:
                    continue
            except OSError:  # not in memory, or the file system cannot tell, or the drive fails: seen when it is read
                pass
            late.append(index)
            if len(late) >= _MOST_NOT_AT_HAND and 2 * len(late) > index:  # then it is not worth asking
                late.extend(range(index + 1, len(wanted)))
                break
        return late

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
