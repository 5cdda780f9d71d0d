"""Checking each block against its checksum the first time it is read: piece by piece, or whole where rows are looked
up.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import xxhash

from pipo_ray.errors import StoreError
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.slots import U8
from pipo_ray.plan.pieces import Piece
from pipo_ray.store.manifest import StoredBlock


@dataclass
class _Progress:
    """How far a block has been hashed, and the pieces that came before their turn (by file offset)."""

    position: int
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)


class BlockChecksums:
    """xxh3_128 of each block over its byte range, fed with pieces as they arrive. Thread-safe.

    A block whose pieces do not arrive in file order (after a restart in the middle of it, say) is read once more,
    whole, through `drive`.
    """

    def __init__(self, blocks: Mapping[str, StoredBlock], drive: Drive) -> None:
        self._blocks, self._drive = dict(blocks), drive
        self._progress: dict[str, _Progress] = {}
        self._checked: set[str] = set()
        self._lock = threading.Lock()

    def check(self, piece: Piece, memory: U8) -> None:
        """Take note of `piece`, whose bytes are `memory`. StoreError, naming block and file, when a block turns out
        damaged.
        """
        with self._lock:
            if piece.block in self._checked:
                return
            block = self._blocks[piece.block]
            progress = self._progress.setdefault(piece.block, _Progress(block.offset))
            stop = min(piece.file_offset + piece.read_bytes, block.offset + block.nbytes)
            if piece.file_offset > progress.position or stop < progress.position:
                found = _read_whole(self._drive, block)
            else:
                progress.digest.update(memory[progress.position - piece.file_offset : stop - piece.file_offset].data)
                progress.position = stop
                if stop < block.offset + block.nbytes:
                    return
                found = progress.digest.hexdigest()
            del self._progress[piece.block]
            if found == block.checksum:
                self._checked.add(piece.block)
                return
        raise _damaged(self._drive, block, found)


class LookupChecksums:
    """The same for blocks whose rows are looked up (the embedding), which no piece brings: read once, whole, in a
    thread that starts at once.
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
                if (found := _read_whole(self._drive, block)) != block.checksum:
                    raise _damaged(self._drive, block, found)
        except Exception as error:
            self._error = error
        finally:
            self._drive.close()


def _damaged(drive: Drive, block: StoredBlock, found: str) -> StoreError:
    return StoreError(
        f"block {block.name} in {block.file} is damaged: its checksum is {found}, the manifest says {block.checksum}; "
        f"check the disk, remove the block store {drive.folder} and pack the checkpoint again"
    )


def _read_whole(drive: Drive, block: StoredBlock) -> str:
    digest = xxhash.xxh3_128()
    step = 4 << 20
    with mmap.mmap(-1, step) as buffer:
        begin = block.offset // 4096 * 4096
        end = block.offset + block.nbytes
        for start in range(begin, end, step):
            view = memoryview(buffer)[: min(step, -(-(end - start) // 4096) * 4096)]
            drive.read_into(view, block.file, start)
            digest.update(view[max(block.offset - start, 0) : end - start])
            view.release()
    return digest.hexdigest()
