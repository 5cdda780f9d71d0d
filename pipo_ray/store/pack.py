"""Checkpoint to block store: streaming, resumable, and visible only when complete.

Everything happens in `<destination>.partial`, next to the destination, which is renamed when all of it is on the
disk. A file is written from front to back, its blocks' checksums go to the journal when it is on the disk; after a
kill the next run verifies the finished files and goes on with the first that is not.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from pipo_ray.errors import BudgetError, CheckpointError, StoreError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.checksum import range_checksum
from pipo_ray.store.journal import FinishedFile, Journal
from pipo_ray.store.layout import FILE_BYTES, FileLayout, plan_files
from pipo_ray.store.manifest import (
    FORMAT_VERSION,
    JOURNAL_NAME,
    MANIFEST_NAME,
    PLAIN_VERSION,
    Manifest,
    StoredBlock,
    StoredTensor,
    is_store,
    require_free_place,
    sync_folder,
)
from pipo_ray.store.read_ahead import Reading, read_ahead
from pipo_ray.store.stripe_folder import discard_stripe, held_stripes, stripe_folders
from pipo_ray.store.striping import PART_BYTES, PartSource, plan_stripes, split_blocks
from pipo_ray.store.writer import SequentialFile, WriteBuffers

_Place = tuple[str, str | None]
"""A file, and a block in it; no block for the header."""

PARTIAL_SUFFIX = ".partial"
Progress = Callable[[int, int], None]

_CHUNK_LIMIT_BYTES = 8 << 20
_BUFFER_LIMIT_BYTES = 64 << 20
_SPARE_BYTES = 8 << 20
"""For the manifest, the journal and the file system's own needs."""
_READERS = 4
"""Chunks that are read at the same time, as far as they fit: a drive wants several."""
_POLL_S = 0.2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlockSource(Protocol):
    """What is packed: see TensorSource."""

    def require(self, blocks: Sequence[BlockSpec]) -> None: ...

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor: ...

    def reads_apart(self, spec: TensorSpec) -> bool: ...


def pack(
    blocks: Sequence[BlockSpec],
    source: BlockSource,
    destination: str | os.PathLike[str],
    *,
    checkpoint: Checkpoint,
    aliases: dict[str, str],
    architecture: str,
    model_type: str,
    precision: str,
    slot_bytes: int,
    progress: Progress | None = None,
    extra: dict[str, Any] | None = None,
    wait: bool = False,
    file_bytes: int = FILE_BYTES,
    stripes: Sequence[str | os.PathLike[str]] = (),
    part_bytes: int = PART_BYTES,
    content: str = "",
    prepare: Callable[[], str] | None = None,
) -> Manifest:
    """Pack `blocks`, read from `source`, into a block store at `destination`, and return its manifest.

    Takes no more memory than `slot_bytes` plus a constant and what `source` needs for one conversion. `progress`
    gets (bytes done, bytes in all), from this thread and from the writing one. `extra` is JSON for the manifest. If
    `destination` is the store of the same checkpoint and the same blocks already, nothing is done. If another
    process packs to `destination`, `wait` for it or raise. With `stripes`, folders on other drives, what streams is
    cut into parts of at most `part_bytes` and spread evenly over `destination` and them (see `store/striping.py`).
    `content` tells stores apart that differ in nothing else. `prepare` is called when `destination` is held and has no
    such store, before `source` is read: what an earlier run finished stays only if it gives the same answer as then;
    it may add to `extra`.

    Raises BudgetError if the disk is too small (before anything is written) or fills up (what is finished is kept);
    StoreError if `destination` or a stripe is something else; CheckpointError from `source`, and then nothing is left
    behind, but for a file that cannot be read: then what is finished is kept, too.
    """
    destination = Path(destination).absolute()
    others = stripe_folders(destination, stripes)
    parts = split_blocks(blocks, part_bytes) if others else tuple(blocks)
    files = plan_stripes(parts, 1 + len(others), file_bytes) if others else plan_files(blocks, file_bytes)
    fingerprint = plan_fingerprint(files, checkpoint, aliases, precision, others, content)
    json.dumps(extra)  # what cannot be written shall fail now, not after hours
    partial = destination.with_name(destination.name + PARTIAL_SUFFIX)
    total_bytes = sum(file.size for file in files)

    def finish(done: dict[str, FinishedFile]) -> Manifest:
        order = {part.name: number for number, part in enumerate(parts)}
        found = (block for file in files for block in _with_checksums(file, done[file.name]))
        stored = tuple(sorted(found, key=lambda block: order[block.name]))
        return Manifest(
            format_version=FORMAT_VERSION if _has_panels(blocks) else PLAIN_VERSION,
            source=str(checkpoint.origin.absolute()),
            architecture=architecture,
            model_type=model_type,
            precision=precision,
            aliases=dict(aliases),
            blocks=stored,
            total_bytes=sum(block.nbytes for block in stored),
            fingerprint=fingerprint,
            extra=dict(extra or {}),  # as `prepare` left it
            stripes=tuple(str(folder) for folder in others),
        )

    try:
        if (existing := _existing(destination, fingerprint)) is not None:
            return existing
        source.require(blocks)
        side_bytes = sum((checkpoint.folder / path).stat().st_size for path in checkpoint.side_files)
        _require_space((partial, *others), files, side_bytes)
        with _locked(partial, wait), held_stripes(others, destination, fingerprint):
            # Another process may have finished while this one waited.
            if (existing := _existing(destination, fingerprint)) is not None:
                return existing
            if is_store(partial) and (whole := Manifest.load(partial)).fingerprint == fingerprint:
                # Killed between the last two steps.
                os.rename(partial, destination)
                sync_folder(destination.parent)
                return whole
            parts_source = PartSource(source, blocks) if others else source
            packer = _Packer((partial, *others), files, parts_source, slot_bytes, progress)
            try:
                prepared = "" if prepare is None else prepare()
                manifest = finish(packer.run(fingerprint + prepared, checkpoint))
                manifest.save(partial)
            except CheckpointError as error:
                # A checkpoint that must change first makes the finished part worthless; an unreadable disk does not.
                if not isinstance(error.__cause__, OSError):
                    shutil.rmtree(partial)
                    for folder in others:
                        discard_stripe(folder)
                raise
            packer.journal.remove()
            os.rename(partial, destination)
            sync_folder(destination.parent)
            return manifest
    except OSError as error:
        raise _explain(error, (partial, *others), total_bytes) from error


def _has_panels(blocks: Sequence[BlockSpec]) -> bool:
    return any(tensor.panels is not None for block in blocks for tensor in block.tensors)


def plan_fingerprint(
    files: Sequence[FileLayout],
    checkpoint: Checkpoint,
    aliases: dict[str, str],
    precision: str,
    stripes: Sequence[Path] = (),
    content: str = "",
) -> str:
    """Identifies a store: the checkpoint's files, every block's place and form, and `content` (hex)."""
    digest = xxhash.xxh3_128(
        json.dumps([PLAIN_VERSION, checkpoint.fingerprint(), precision, sorted(aliases.items())]).encode()
    )
    for file in files:
        digest.update(repr(file).encode())
    for folder in stripes:
        digest.update(os.fsencode(folder) + bytes(1))
    digest.update(content.encode())
    return digest.hexdigest()


class _Packer:
    """One run over the files of a plan. `folders` are where they are written, by `FileLayout.folder`."""

    def __init__(
        self,
        folders: Sequence[Path],
        files: Sequence[FileLayout],
        source: BlockSource,
        slot_bytes: int,
        progress: Progress | None,
    ) -> None:
        self.folders, self.files, self.source, self.progress = folders, files, source, progress
        self.partial = folders[0]
        self.journal = Journal(self.partial)
        # Half of the slot for the two write buffers; the rest for chunks of rows that are read ahead.
        self.buffer_bytes = self.ahead_bytes = min(slot_bytes // 2, _BUFFER_LIMIT_BYTES)
        self.chunk_bytes = max(1, min(slot_bytes // 8, _CHUNK_LIMIT_BYTES))
        self.done_bytes = 0
        self.total_bytes = sum(file.size for file in files)

    def advance(self, count: int) -> None:
        self.done_bytes += count
        if self.progress is not None:
            self.progress(self.done_bytes, self.total_bytes)

    def run(self, fingerprint: str, checkpoint: Checkpoint) -> dict[str, FinishedFile]:
        """Write what is not there yet. The finished files by name."""
        before = self.journal.read(fingerprint)
        if before is None:
            _empty(self.partial)
            self.journal.start(fingerprint)
        for path in checkpoint.side_files:
            (self.partial / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.folder / path, self.partial / path)
            _sync_file(self.partial / path)
        done: dict[str, FinishedFile] = {}
        buffers = WriteBuffers(self.buffer_bytes)
        readers = ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="pack-read")
        try:
            for file in self.files:
                finished = (before or {}).get(file.name)
                if finished is not None and self.still_good(file, finished, buffers.pair[0]):
                    done[file.name] = finished
            missing = {file.name: file for file in self.files if file.name not in done}
            with closing(read_ahead(self.parts(missing.values()), readers, self.ahead_bytes)) as parts:
                for name, group in itertools.groupby(parts, key=lambda part: part[0][0]):
                    done[name] = self.write(missing[name], group, buffers)
                    self.journal.add(done[name])
        finally:
            readers.shutdown(wait=True)
            buffers.close()
        return done

    def still_good(self, file: FileLayout, finished: FinishedFile, buffer: memoryview) -> bool:
        """Whether a file of an earlier run is whole: its size, its header and all its checksums."""
        before = self.done_bytes
        try:
            with open(self.folders[file.folder] / file.name, "rb", buffering=0) as opened:
                descriptor = opened.fileno()
                good = os.fstat(descriptor).st_size == file.size == finished.size
                good = good and opened.read(len(file.header)) == file.header
                if good:
                    self.advance(len(file.header))
                    good = all(
                        range_checksum(descriptor, block.offset, block.nbytes, buffer, self.advance)
                        == finished.checksums.get(block.name)
                        for block in file.blocks
                    )
        except (OSError, EOFError):
            good = False
        if not good:
            self.done_bytes = before
        return good

    def write(
        self, file: FileLayout, parts: Iterable[tuple[_Place, memoryview]], buffers: WriteBuffers
    ) -> FinishedFile:
        path = self.folders[file.folder] / file.name
        output = SequentialFile(path, buffers, self.advance)
        checksums = {block.name: xxhash.xxh3_128().hexdigest() for block in file.blocks}
        try:
            for (_, block), group in itertools.groupby(parts, key=lambda part: part[0]):
                digest = xxhash.xxh3_128()
                for _, data in group:
                    output.write(data, digest)
                if block is not None:
                    checksums[block] = digest.hexdigest()
            output.finish()
        except BaseException as error:
            # Half a file is of no use to the next run, and a full disk needs the room.
            output.abandon()
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # which drive it was
            raise
        sync_folder(path.parent)
        return FinishedFile(file.name, file.size, checksums)

    def parts(self, files: Iterable[FileLayout]) -> Iterator[Reading[_Place]]:
        """Everything in `files`, in order, headers and padding included."""
        for file in files:
            yield _known((file.name, None), file.header)
            for block in file.blocks:
                place = file.name, block.name
                position = block.offset
                for tensor in block.tensors:
                    if position < tensor.offset:
                        yield _known(place, bytes(tensor.offset - position))
                    yield from self.chunks(place, tensor)
                    position = tensor.offset + tensor.nbytes
                if position < block.offset + block.nbytes:
                    yield _known(place, bytes(block.offset + block.nbytes - position))

    def chunks(self, place: _Place, tensor: StoredTensor) -> Iterator[Reading[_Place]]:
        """The tensor's bytes, some rows at a time: as many as fit, but at least one."""
        if not tensor.nbytes:
            return
        spec = TensorSpec(
            tensor.name, tensor.shape, tensor.dtype, tensor.expert, tensor.cut, tensor.panels, tensor.first_row
        )
        rows = spec.shape[0] if spec.shape else 1
        step = max(1, self.chunk_bytes * rows // tensor.nbytes)
        alone = not self.source.reads_apart(spec)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            nbytes = tensor.nbytes // rows * (stop - start)
            yield Reading(place, nbytes, partial(self.read, spec, start, stop, nbytes), alone)

    def read(self, spec: TensorSpec, start: int, stop: int, expected: int) -> memoryview:
        data = self.source.read(spec, start, stop)
        if data.numel() * data.element_size() != expected:
            raise ValueError(f"rows {start} to {stop} of {spec} were read as {tuple(data.shape)} of {data.dtype}")
        return data.reshape(-1).view(torch.uint8).numpy().data


def _known(place: _Place, data: bytes) -> Reading[_Place]:
    return Reading(place, len(data), lambda: memoryview(data))


def _existing(destination: Path, fingerprint: str) -> Manifest | None:
    """The wanted store if it is at `destination`, None if nothing is; StoreError if something else is."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return None
    require_free_place(destination)
    try:
        manifest = Manifest.load(destination)
    except StoreError as error:
        raise StoreError(f"destination {destination} exists and is damaged ({error}); remove it first") from error
    if manifest.fingerprint != fingerprint:
        raise StoreError(
            f"destination {destination} is the block store of another checkpoint, version or precision "
            f"({manifest.source}, {manifest.precision}); remove it or choose another destination"
        )
    return manifest


def _with_checksums(file: FileLayout, finished: FinishedFile) -> Iterator[StoredBlock]:
    for block in file.blocks:
        yield replace(block, checksum=finished.checksums[block.name])


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _used_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*")) if folder.is_dir() else 0


def _existing_parent(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _device(folder: Path) -> int:
    return _existing_parent(folder).stat().st_dev


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(_existing_parent(folder))
    return status.f_bavail * status.f_frsize


def _require_space(folders: Sequence[Path], files: Sequence[FileLayout], side_bytes: int) -> None:
    """Of each file system that has some of `folders`; `side_bytes` go to the first."""
    needs: dict[int, tuple[int, Path]] = {}
    for number, folder in enumerate(folders):
        wanted = sum(file.size for file in files if file.folder == number) + (0 if number else side_bytes)
        # What an earlier run left is kept or overwritten: both give its room to this one.
        wanted += _SPARE_BYTES - _used_bytes(folder)
        device = _device(folder)
        before, first = needs.get(device, (0, folder))
        needs[device] = before + wanted, first
    for need, folder in needs.values():
        free = _free_bytes(folder)
        if need > free:
            place = folder.parent if folder == folders[0] else folder
            raise BudgetError(
                f"packing to {place} needs {_size(need)} of disk, {_size(free)} are free; free some, or choose a "
                "destination on another disk"
            )


def _explain(error: OSError, folders: Sequence[Path], total_bytes: int) -> BudgetError | StoreError:
    reason = error.strerror or str(error)
    partial = folders[0]
    if error.errno in _FULL:
        kept = sum(_used_bytes(folder) for folder in folders)
        full = next((folder for folder in folders if str(error.filename).startswith(f"{folder}/")), partial)
        return BudgetError(
            f"disk full while packing into {full} ({reason}): {_size(_free_bytes(full))} are free, "
            f"{_size(max(0, total_bytes - kept))} of {_size(total_bytes)} are still to be written; free some and "
            f"run it again: the {_size(kept)} that are finished are kept"
        )
    return StoreError(f"{error.filename or partial} cannot be used: {reason}; check the disk, the path and its rights")


@contextmanager
def _locked(partial: Path, wait: bool) -> Iterator[None]:
    """Make `partial` and hold it alone. The lock is on the folder itself, so that no lock file stays behind."""
    missing = [folder for folder in partial.parents if not folder.exists()]
    while (descriptor := _lock(partial)) is None:
        if not wait:
            raise StoreError(
                f"another process is packing into {partial}; wait until it is done, or choose another destination"
            )
        time.sleep(_POLL_S)
    try:
        _refuse_foreign(partial)
        yield
    finally:
        with suppress(OSError):
            partial.rmdir()  # only if it is empty: there is nothing to go on with
        with suppress(OSError):  # what was made on the way to it; not empty where there is a store in it
            for folder in missing:
                folder.rmdir()
        os.close(descriptor)


def _lock(partial: Path) -> int | None:
    """An open and locked descriptor of the folder, or None if another process has it."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have renamed or removed what was opened here.
            if os.path.samestat(os.fstat(descriptor), partial.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _refuse_foreign(partial: Path) -> None:
    names = {path.name for path in partial.iterdir()}
    if names and not names & {JOURNAL_NAME, MANIFEST_NAME}:
        raise StoreError(f"{partial} exists and is no half-packed store; move it away, or choose another destination")


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != JOURNAL_NAME:  # it marks the folder as ours until it is written anew
            path.unlink()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
