"""Checking each block against its checksum the first time it is read: piece by piece, or whole where rows are looked
up.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from pipo_ray.errors import DriveError, MisreadError, StoreError
from pipo_ray.pipeline.drive import PAGE, Drive
from pipo_ray.pipeline.slots import U8
from pipo_ray.plan.pieces import Piece
from pipo_ray.store.manifest import StoredBlock

_STEP_BYTES = 4 << 20


@dataclass
class _Progress:
    """How far a block has been checked.

    While its pieces come in file order they are hashed as one: `num_fed` of them, up to the file offset `position`;
    `tail` are the last bytes before it. As soon as that fails the block is read again: `trusted` are the digests of
    its pieces as they must be. Of the pieces that have come, `sound` and `wrong` say how they were in memory.
    """

    position: int
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)
    num_fed: int = 0
    tail: bytes = b""
    trusted: dict[int, str] | None = None
    sound: set[int] = field(default_factory=set)
    wrong: set[int] = field(default_factory=set)


class BlockChecksums:
    """xxh3_128 of each block over its byte range, fed with `pieces` as they arrive. Thread-safe.

    What is checked is what is in memory, every piece's byte of it. Of pieces that are read at the same time, one that
    is too early waits for those in front of it that were announced (`expect`). A block whose pieces do not come in file
    order all the same (after a restart in the middle of it, say), or whose checksum is wrong, is read once more, whole,
    through `drive`: that tells a block that is damaged on the drive (StoreError) from one that came out wrong
    (MisreadError, and DriveError if it happens again).
    """

    def __init__(self, blocks: Mapping[str, StoredBlock], pieces: Sequence[Piece], drive: Drive) -> None:
        self._blocks, self._drive = dict(blocks), drive
        self._pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.block, []).append(piece)
        self._places = {piece.index: at for found in self._pieces.values() for at, piece in enumerate(found)}
        self._expected: set[int] = set()
        self._progress: dict[str, _Progress] = {}
        self._checked: set[str] = set()
        self._misread: set[str] = set()
        self._lock = threading.Condition()

    def expect(self, piece: Piece) -> None:
        """`piece` is being read: `check` or `missed` will follow. To be told in the order in which reads begin, so that
        whoever waits for a piece does not keep it from being read.
        """
        with self._lock:
            if piece.block not in self._checked:
                self._expected.add(piece.index)

    def is_checked(self, piece: Piece) -> bool:
        """Whether the block of `piece` is known to be right: nothing is to be expected, or checked, any more."""
        return piece.block in self._checked

    def missed(self, piece: Piece) -> None:
        """An expected piece could not be read."""
        with self._lock:
            self._expected.discard(piece.index)
            self._lock.notify_all()

    def check(self, piece: Piece, memory: U8) -> None:
        """Take note of `piece`, whose bytes are `memory`. Raises StoreError, MisreadError or DriveError, naming block
        and file, when the block is damaged, or was read wrongly.

        A block may turn out wrong with its last piece only: the sweep that used the others must not end well.
        """
        if piece.block in self._checked and piece.index not in self._expected:
            return  # without the lock: so it is in every sweep but the first
        with self._lock:
            self._lock.wait_for(lambda: self._is_next(piece))
            try:
                self._check(piece, memory)
            finally:
                self._expected.discard(piece.index)
                self._lock.notify_all()

    def _is_next(self, piece: Piece) -> bool:
        """Whether nothing is being read that would let the piece be hashed behind its predecessors."""
        progress = self._progress.get(piece.block)
        if piece.block in self._checked or (progress is not None and progress.trusted is not None):
            return True
        fed = 0 if progress is None else progress.num_fed
        before = self._pieces[piece.block][fed : self._places[piece.index]]
        return not any(other.index in self._expected for other in before)

    def _check(self, piece: Piece, memory: U8) -> None:
        if piece.block in self._checked:
            return
        block = self._blocks[piece.block]
        progress = self._progress.setdefault(piece.block, _Progress(block.offset))
        if progress.trusted is None:
            if self._feed(progress, block, piece, memory):
                if progress.num_fed < len(self._pieces[piece.block]):
                    return
                if progress.position == _end(block) and progress.digest.hexdigest() == block.checksum:
                    self._finish(piece.block)
                    return
            try:
                progress.trusted = self._read_again(progress, block)
            except Exception:
                del self._progress[piece.block]
                raise
        start, stop = _range(block, piece)
        found = xxhash.xxh3_128(memory[start - piece.file_offset : stop - piece.file_offset].data).hexdigest()
        right, other = progress.sound, progress.wrong
        if found != progress.trusted[piece.index]:
            right, other = other, right
        right.add(piece.index)
        other.discard(piece.index)
        if progress.wrong:
            raise self._wrong(block)
        if len(progress.sound) == len(self._pieces[piece.block]):
            self._finish(piece.block)

    def begin_again(self, kept: Collection[int]) -> frozenset[int]:
        """All pieces but those in `kept` are about to be loaded again if they were wrong. Returns these."""
        with self._lock:
            reloaded: set[int] = set()
            for name, progress in self._progress.items():
                if progress.wrong:
                    self._misread.add(name)
                reloaded |= progress.wrong.difference(kept)
                progress.wrong.intersection_update(kept)
            return frozenset(reloaded)

    def _feed(self, progress: _Progress, block: StoredBlock, piece: Piece, memory: U8) -> bool:
        """Hash the piece behind its predecessors. False if it is not their successor, or differs from what they had of
        the page that they share.
        """
        start, stop = _range(block, piece)
        overlap = progress.position - start
        if self._pieces[piece.block][progress.num_fed].index != piece.index:
            return False
        if not 0 <= overlap <= min(len(progress.tail), stop - start):
            return False
        new = start + overlap - piece.file_offset
        if overlap and memory[new - overlap : new].tobytes() != progress.tail[-overlap:]:
            return False
        end = stop - piece.file_offset
        progress.digest.update(memory[new:end].data)
        progress.position, progress.num_fed = stop, progress.num_fed + 1
        progress.tail = memory[max(0, end - PAGE) : end].tobytes()
        return True

    def _read_again(self, progress: _Progress, block: StoredBlock) -> dict[int, str]:
        """The digests of the block's pieces, and what they say of those that were hashed as one. StoreError if the
        block is damaged on the drive.
        """
        pieces = self._pieces[block.name]
        whole, prefix, *digests = _digests(
            self._drive, block, [(block.offset, _end(block)), (block.offset, progress.position)]
            + [_range(block, piece) for piece in pieces],
        )  # fmt: skip
        if whole != block.checksum:
            raise _damaged(self._drive, block, whole)
        fed = {piece.index for piece in pieces[: progress.num_fed]}
        (progress.sound if progress.digest.hexdigest() == prefix else progress.wrong).update(fed)
        return {piece.index: digest for piece, digest in zip(pieces, digests, strict=True)}

    def _wrong(self, block: StoredBlock) -> DriveError:
        kind, times = (DriveError, "again") if block.name in self._misread else (MisreadError, "once")
        return kind(
            f"block {block.name} in {self._drive.folder / block.file}, bytes {block.offset} to {_end(block)}: what was "
            f"read is {times} not what is on the drive, where its checksum is right; check cable, drive and RAM, then "
            "run it again"
        )

    def _finish(self, name: str) -> None:
        del self._progress[name]
        self._checked.add(name)


class LookupChecksums:
    """The same for blocks whose rows are looked up (the embedding), which no piece brings: read once, whole, in a
    thread that starts at once; once more if that comes out wrong.
    """

    def __init__(self, blocks: Sequence[StoredBlock], drive: Drive) -> None:
        self._blocks, self._drive = blocks, drive
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._check, name="lookup-checksums", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all blocks are checked. StoreError, naming block and file, when one is damaged."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _check(self) -> None:
        try:
            for block in self._blocks:
                for _ in range(2):
                    (found,) = _digests(self._drive, block, [(block.offset, _end(block))])
                    if found == block.checksum:
                        break
                else:
                    raise _damaged(self._drive, block, found)
        except Exception as error:
            self._error = error
        finally:
            self._drive.close()


def _end(block: StoredBlock) -> int:
    return block.offset + block.nbytes


def _range(block: StoredBlock, piece: Piece) -> tuple[int, int]:
    """The file offsets of the block's bytes in `piece`."""
    return max(piece.file_offset, block.offset), min(piece.file_offset + piece.read_bytes, _end(block))


def _damaged(drive: Drive, block: StoredBlock, found: str) -> StoreError:
    return StoreError(
        f"block {block.name} in {block.file} is damaged: its checksum is {found}, the manifest says {block.checksum}; "
        f"check the disk, remove the block store {drive.folder} and pack the checkpoint again"
    )


def _digests(drive: Drive, block: StoredBlock, ranges: Sequence[tuple[int, int]]) -> list[str]:
    """Of each range of file offsets within the block, as it is on the drive; the block is read once."""
    digests = [xxhash.xxh3_128() for _ in ranges]
    begin, end = block.offset // PAGE * PAGE, _end(block)
    buffer = memoryview(mmap.mmap(-1, _STEP_BYTES))  # not closed: an error's traceback may still have a view of it
    for start in range(begin, end, _STEP_BYTES):
        view = buffer[: min(_STEP_BYTES, -(-(end - start) // PAGE) * PAGE)]
        drive.read_into(view, block.file, start)
        for digest, (low, high) in zip(digests, ranges, strict=True):
            low, high = max(low - start, 0), min(high - start, len(view))
            if low < high:
                digest.update(view[low:high])
    return [digest.hexdigest() for digest in digests]
