"""Blocks are checked against their checksums piece by piece."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from pipeline.fake_store import FakeStore, make_store

from pipo_ray.errors import DriveError, MisreadError, StoreError
from pipo_ray.pipeline.checksums import BlockChecksums, LookupChecksums
from pipo_ray.pipeline.drive import Drive
from pipo_ray.plan.pieces import Piece

SIZES = [(20_000, 20_000, 30_000, 5_000, 61_000, 100), (10,), (50_001, 40_000)]


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return make_store(tmp_path / "store", SIZES)


class CountingDrive(Drive):
    """Counts the bytes that are read for a second time."""

    num_bytes = 0

    def read_into(self, memory: memoryview, file: str, offset: int) -> None:
        self.num_bytes += len(memory)
        super().read_into(memory, file, offset)


def fed(store: FakeStore, pieces: list[Piece]) -> int:
    """Feed `pieces`; the bytes that had to be read again."""
    drive = CountingDrive(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)
    try:
        for piece in pieces:
            checksums.check(piece, np.frombuffer(store.content(piece), np.uint8))
    finally:
        drive.close()
    return drive.num_bytes


def flip(store: FakeStore, offset: int) -> None:
    path = store.folder / store.blocks[0].file
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x80
    path.write_bytes(data)


def test_in_order_nothing_is_read_again(store: FakeStore) -> None:
    assert len([piece for piece in store.pieces if piece.block == "block0"]) >= 3
    assert fed(store, [*store.pieces, *store.pieces]) == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_order_will_do(seed: int, store: FakeStore) -> None:
    pieces = [*store.pieces, *store.pieces]
    random.Random(seed).shuffle(pieces)
    # At most each block once more.
    assert fed(store, pieces) <= sum(block.nbytes for block in store.blocks)


def test_what_is_read_at_the_same_time_is_hashed_in_order(store: FakeStore) -> None:
    """The last piece has been read first: it waits for the others, and nothing is read again."""
    drive = CountingDrive(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)
    for piece in store.pieces:
        checksums.expect(piece)
    threads = []
    for piece in reversed(store.pieces):
        threads.append(
            threading.Thread(target=checksums.check, args=(piece, np.frombuffer(store.content(piece), np.uint8)))
        )
        threads[-1].start()
        threads[-1].join(0.01)
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert drive.num_bytes == 0
    drive.close()


def test_nobody_waits_for_a_piece_that_could_not_be_read(store: FakeStore) -> None:
    drive = CountingDrive(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)
    first, second, *_ = [piece for piece in store.pieces if piece.block == "block0"]
    checksums.expect(first)
    checksums.expect(second)
    memory = np.frombuffer(store.content(second), np.uint8)
    waiting = threading.Thread(target=checksums.check, args=(second, memory))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    checksums.missed(first)
    waiting.join(5)
    assert not waiting.is_alive()
    assert drive.num_bytes > 0
    drive.close()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("where", ["first tensor", "last tensor", "padding"])
def test_a_flipped_byte_is_found_in_any_order(seed: int, where: str, store: FakeStore) -> None:
    block = store.blocks[0]
    end = block.tensors[-1].offset + block.tensors[-1].nbytes
    flip(store, {"first tensor": block.offset + 3, "last tensor": end - 1, "padding": end + 1}[where])
    pieces = list(store.pieces)
    random.Random(seed).shuffle(pieces)
    with pytest.raises(StoreError, match=f"block block0 in {block.file} is damaged: .*{block.checksum}"):
        fed(store, pieces)


def test_a_damaged_block_is_found_again(store: FakeStore) -> None:
    """Whoever goes on after the first report gets another one."""
    flip(store, store.blocks[0].offset)
    drive = Drive(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)
    *first, last = [piece for piece in store.pieces if piece.block == "block0"]
    for _ in range(2):
        for piece in first:
            checksums.check(piece, np.frombuffer(store.content(piece), np.uint8))
        with pytest.raises(StoreError, match="is damaged"):
            checksums.check(last, np.frombuffer(store.content(last), np.uint8))
    drive.close()


def test_several_threads(store: FakeStore) -> None:
    drive = Drive(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)
    failures: list[Exception] = []

    def feed(seed: int) -> None:
        pieces = list(store.pieces)
        random.Random(seed).shuffle(pieces)
        try:
            for piece in pieces:
                checksums.check(piece, np.frombuffer(store.content(piece), np.uint8))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=feed, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drive.close()
    assert not failures


def test_blocks_that_are_looked_up_are_read_whole(store: FakeStore) -> None:
    LookupChecksums(store.blocks, Drive(store.folder)).wait()
    block = store.blocks[2]
    flip(store, block.offset + block.nbytes - 1)
    checksums = LookupChecksums(store.blocks, Drive(store.folder))
    for _ in range(2):
        with pytest.raises(StoreError, match=f"block {block.name} in {block.file} is damaged: .*{block.checksum}"):
            checksums.wait()


# --- what came out wrong although it is right on the drive -----------------------------------------------------------


def misread(store: FakeStore, piece: Piece, offset: int) -> np.ndarray:
    """The piece's bytes, one of them wrong."""
    memory = np.frombuffer(bytearray(store.content(piece)), np.uint8)
    memory[offset] ^= 0x80
    return memory


def pieces_of(store: FakeStore, block: str) -> list[Piece]:
    return [piece for piece in store.pieces if piece.block == block]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("which", [0, 1, -1])
@pytest.mark.parametrize("where", ["first byte", "last byte"])
def test_every_byte_of_every_piece_counts_in_any_order(seed: int, which: int, where: str, store: FakeStore) -> None:
    """Also those of a page that two pieces share."""
    block = store.blocks[0]
    pieces = pieces_of(store, "block0")
    bad = pieces[which]
    stop = min(bad.file_offset + bad.read_bytes, block.offset + block.nbytes)
    offset = 0 if where == "first byte" else stop - bad.file_offset - 1
    if seed:
        random.Random(seed).shuffle(pieces)
    drive = Drive(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)

    def feed(memory_of_bad: np.ndarray) -> None:
        for piece in pieces:
            content = np.frombuffer(store.content(piece), np.uint8)
            checksums.check(piece, memory_of_bad if piece is bad else content)

    with pytest.raises(MisreadError, match=f"block block0 in {store.folder / block.file}.*read is once not what is on"):
        feed(misread(store, bad, offset))
    assert bad.index in checksums.begin_again(kept=())
    with pytest.raises(DriveError, match="read is again not what is on the drive"):
        feed(misread(store, bad, offset))
    assert bad.index in checksums.begin_again(kept=())
    feed(np.frombuffer(store.content(bad), np.uint8))
    feed(misread(store, bad, offset))  # checked is checked: from now on nothing is looked at
    drive.close()


def test_what_is_not_loaded_again_stays_wrong(store: FakeStore) -> None:
    """A piece on the GPU: no sweep may end well with it."""
    *_, bad, last = pieces_of(store, "block0")
    drive = Drive(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)
    with pytest.raises(MisreadError):
        checksums.check(bad, misread(store, bad, 5))
    for _ in range(2):
        assert checksums.begin_again(kept=[bad.index]) == frozenset()
        with pytest.raises(DriveError, match="again not what is on the drive"):
            checksums.check(last, np.frombuffer(store.content(last), np.uint8))
    drive.close()


def test_a_drive_that_fails_while_a_block_is_read_again_says_why(store: FakeStore) -> None:
    """And not that memory is still in use; when the drive is back, so is the check."""

    class Failing(Drive):
        broken = True

        def read_into(self, memory: memoryview, file: str, offset: int) -> None:
            part = memory[4096:]  # a view that the traceback keeps
            if self.broken:
                raise DriveError(f"away, {len(part)} bytes missing")
            super().read_into(memory, file, offset)

    drive = Failing(store.folder)
    checksums = BlockChecksums({block.name: block for block in store.blocks}, store.pieces, drive)
    *_, last = pieces_of(store, "block0")
    content = np.frombuffer(store.content(last), np.uint8)
    with pytest.raises(DriveError, match="away"):
        checksums.check(last, content)
    drive.broken = False
    checksums.check(last, content)
    drive.close()
