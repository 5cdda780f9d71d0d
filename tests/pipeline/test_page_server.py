"""KV pages to the drive and back: what was written comes back or is an error, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.page_loader import PAGE, Pages

from pipo_ray.pipeline import drive_watch
from pipo_ray.pipeline.drive_watch import DriveWatch
from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.pipeline.page_table import FrameState, PageTable, Seal
from pipo_ray.pipeline.slots import U8, SlotTable
from pipo_ray.pipeline.tracing import TraceWriter
from pipo_ray.session.kv_file import KVFile, read_key

NUM_FRAMES, NUM_PAGES, PAGE_BYTES = 7, 40, 4 * PAGE
PATIENCE_S = 30.0


@pytest.fixture
def encrypted_file(tmp_path: Path) -> Iterator[KVFile]:
    made = KVFile(tmp_path, NUM_PAGES * PAGE_BYTES)
    yield made
    made.close()


@pytest.fixture(params=[True, False], ids=["encrypted", "plain"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[KVFile]:
    made = KVFile(tmp_path, NUM_PAGES * PAGE_BYTES, encrypted=request.param)
    yield made
    made.close()


def aligned(nbytes: int = PAGE_BYTES) -> U8:
    memory = np.zeros(nbytes + PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE :][:nbytes]


def filled(seed: int) -> U8:
    page = aligned()
    page[:] = np.random.default_rng(seed).integers(0, 256, PAGE_BYTES, np.uint8)
    return page


def page_file(file: KVFile) -> PageFile:
    numbers = iter(range(1, 1000))
    return PageFile(file.path, PAGE_BYTES, read_key(file.key_path), lambda: next(numbers))


def content(file: KVFile, page: int) -> bytes:
    with open(file.path, "rb") as opened:
        return os.pread(opened.fileno(), PAGE_BYTES, page * PAGE_BYTES)


def test_a_page_comes_back_and_only_with_a_key_is_it_hidden(file: KVFile) -> None:
    opened, page, back = page_file(file), filled(1), aligned()
    seals = opened.save([page.data], 3)
    opened.load([back.data], 3, seals)
    assert np.array_equal(back, page)
    assert (content(file, 3) == page.tobytes()) == (file.key_path is None)
    assert np.array_equal(page, filled(1)), "what is in RAM has changed"
    opened.close()


def test_the_same_page_is_never_encrypted_alike(tmp_path: Path) -> None:
    file = KVFile(tmp_path, NUM_PAGES * PAGE_BYTES)
    opened = page_file(file)
    written = set()
    for page in (0, 0, 1):
        opened.save([filled(1).data], page)
        written.add(content(file, page))
    assert len(written) == 3
    opened.close()
    file.close()


@pytest.mark.parametrize("damage", ["bit", "older", "other"])
def test_what_is_not_what_was_written_last_is_an_error(file: KVFile, damage: str) -> None:
    opened = page_file(file)
    seals = opened.save([filled(1).data], 3)
    if damage == "bit":
        with open(file.path, "r+b") as raw:
            byte = content(file, 3)[77] ^ 4
            os.pwrite(raw.fileno(), bytes([byte]), 3 * PAGE_BYTES + 77)
    elif damage == "older":
        older = content(file, 3)
        seals = opened.save([filled(2).data], 3)
        with open(file.path, "r+b") as raw:
            os.pwrite(raw.fileno(), older, 3 * PAGE_BYTES)
    else:
        seals = opened.save([filled(2).data], 4)
    assert opened.load([aligned().data], 3, seals) == [False]
    opened.close()


def test_a_file_system_without_direct_access_is_read_through_the_cache(
    file: KVFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    opened = page_file(file)
    assert not opened.direct
    back = aligned()
    opened.load([back.data], 0, opened.save([filled(5).data], 0))
    assert np.array_equal(back, filled(5))
    opened.close()


def test_errors_that_pass_are_tried_again_and_others_come_through(
    file: KVFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, failures, real = page_file(file), [errno.EIO, errno.EINTR], os.pwritev

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if failures:
            raise OSError(failures.pop(), "no")
        return real(descriptor, [buffers[0][:PAGE]], offset)  # and what is written in parts is written whole

    monkeypatch.setattr(os, "pwritev", fail)
    back = aligned()
    opened.load([back.data], 0, opened.save([filled(5).data], 0))
    assert np.array_equal(back, filled(5))
    assert opened.retries == 2
    failures.append(errno.ENOSPC)
    with pytest.raises(OSError) as caught:
        opened.save([filled(6).data], 0)
    assert caught.value.errno == errno.ENOSPC
    opened.close()


class Mover:
    """The compute worker's side, at random: saves frames, loads them into others, and knows what must be in them."""

    def __init__(self, table: PageTable, frames: U8, seed: int) -> None:
        self._table, self._frames, self._random = table, frames, random.Random(seed)
        self._stored: dict[int, int] = {}
        self._open: dict[int, tuple[FrameState, int, int]] = {}
        self.checked = 0

    def step(self) -> None:
        """Post something, or wait for something to end."""
        if len(self._open) == NUM_FRAMES or (self._open and self._random.random() < 0.2):
            self.end(self._random.choice(list(self._open)))
        else:
            self.post_one()

    def post_one(self) -> None:
        """Post something in a frame that is free, if one is."""
        free = [frame for frame in range(NUM_FRAMES) if frame not in self._open]
        if not free:
            return
        frame = self._random.choice(free)
        busy = {page for _, page, _ in self._open.values()}
        readable = [page for page in self._stored if page not in busy]
        if readable and self._random.random() < 0.6:
            page = self._random.choice(readable)
            self._frames[frame] = 0
            self._post(FrameState.LOAD, frame, page, self._stored[page])
        else:
            page = self._random.choice([page for page in range(NUM_PAGES) if page not in busy])
            seed = self._random.randrange(1 << 30)
            self._frames[frame] = filled(seed)
            self._stored.pop(page, None)
            self._post(FrameState.SAVE, frame, page, seed)

    def _post(self, kind: FrameState, frame: int, page: int, seed: int) -> None:
        self._open[frame] = (kind, page, seed)
        self._table.post(kind, [(frame, page)])

    def end(self, frame: int) -> None:
        """Wait for the frame's request, and look at what came."""
        kind, page, seed = self._open.pop(frame)
        self._table.wait(frame)
        assert self._table.state(frame) is FrameState.DONE, os.strerror(self._table.error(frame))
        assert np.array_equal(self._frames[frame], filled(seed))
        self._stored[page] = seed
        self.checked += kind is FrameState.LOAD

    def end_all(self) -> None:
        for frame in list(self._open):
            self.end(frame)


def test_loaders_may_be_killed_at_any_point(tmp_path: Path, encrypted_file: KVFile) -> None:
    pages = Pages.create(tmp_path, encrypted_file, NUM_FRAMES, NUM_PAGES, PAGE_BYTES)
    stop, table, frames = pages.open()
    process = pages.start_process()
    table.restart()
    mover, chance = Mover(table, frames, seed=3), random.Random(4)
    for _ in range(3):
        for _ in range(chance.randrange(60, 120)):
            mover.step()
        process.kill()
        process.wait()
        for _ in range(3):
            mover.post_one()
        process = pages.start_process()
    mover.end_all()
    assert mover.checked > 50
    stop[0] = 1
    assert process.wait(PATIENCE_S) == 0


def test_a_new_compute_worker_hears_when_nothing_moves_any_more(tmp_path: Path, encrypted_file: KVFile) -> None:
    pages = Pages.create(tmp_path, encrypted_file, NUM_FRAMES, NUM_PAGES, PAGE_BYTES)
    stop, table, frames = pages.open()
    server = pages.serve(table, frames)
    for seed in range(5):
        table.restart()
        assert all(table.state(frame) is FrameState.IDLE for frame in range(NUM_FRAMES))
        mover = Mover(table, frames, seed)
        for _ in range(60):
            mover.step()
    mover.end_all()
    stop[0] = 1
    server.stop()


def test_a_page_that_fails_is_told_with_its_cause(tmp_path: Path, encrypted_file: KVFile) -> None:
    pages = Pages.create(tmp_path, encrypted_file, NUM_FRAMES, NUM_PAGES, PAGE_BYTES)
    stop, table, frames = pages.open()
    server = pages.serve(table, frames)
    table.restart()
    table.set_seal(7, Seal(1, bytes(16)))
    table.post(FrameState.LOAD, [(2, 7)])  # nothing was written there
    table.wait(2)
    assert (table.state(2), table.error(2)) == (FrameState.FAILED, errno.EBADMSG)
    stop[0] = 1
    server.stop()


def test_neighbours_move_at_once_and_one_that_changed_fails_alone(tmp_path: Path, encrypted_file: KVFile) -> None:
    pages = Pages.create(tmp_path, encrypted_file, NUM_FRAMES, NUM_PAGES, PAGE_BYTES)
    stop, table, frames = pages.open()
    moved: list[tuple[str, int]] = []
    real = {name: getattr(os, name) for name in ("pwritev", "preadv")}

    def count(name: str) -> Any:
        return lambda file, parts, offset: (moved.append((name, len(parts))), real[name](file, parts, offset))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(os, name, count(name))
        server = pages.serve(table, frames)
        table.restart()
        for frame in range(5):
            frames[frame] = filled(frame)
        table.post(FrameState.SAVE, [(frame, 10 + frame) for frame in range(5)])
        table.post(FrameState.SAVE, [(5, 15)])  # a neighbour, too, but not of the same call
        for frame in range(6):
            table.wait(frame)
        with open(encrypted_file.path, "r+b") as raw:
            os.pwrite(raw.fileno(), bytes(8), 12 * PAGE_BYTES)
        frames[:] = 0
        table.post(FrameState.LOAD, [(4 - frame, 10 + frame) for frame in range(5)])  # in any frames
        for frame in range(5):
            table.wait(frame)
        stop[0] = 1
        server.stop()
    assert sorted(moved) == [("preadv", 5), ("preadv", 5), ("pwritev", 1), ("pwritev", 5)]
    states = [table.state(4 - frame) for frame in range(5)]
    assert states == [FrameState.FAILED if frame == 2 else FrameState.DONE for frame in range(5)]
    assert all(np.array_equal(frames[4 - frame], filled(frame)) for frame in (0, 1, 3, 4))


def test_a_drive_that_hangs_is_told_once_with_its_folder(
    tmp_path: Path, encrypted_file: KVFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages.create(tmp_path, encrypted_file, NUM_FRAMES, NUM_PAGES, PAGE_BYTES)
    stop, table, frames = pages.open()
    server = pages.serve(table, frames)
    table.restart()
    slots = SlotTable(np.zeros(SlotTable.nbytes(1, 0), np.uint8), 1, 0)
    watch = DriveWatch(slots, "the/store", pages=table, pages_folder="the/folder")
    monkeypatch.setattr(drive_watch, "SILENT_S", 0.05)
    answer, real = threading.Event(), os.pwritev

    def hang(*arguments: Any) -> int:
        answer.wait()
        return real(*arguments)

    monkeypatch.setattr(os, "pwritev", hang)
    assert watch.news() == []
    table.post(FrameState.SAVE, [(0, 0)])
    deadline = time.monotonic() + PATIENCE_S
    while not (news := watch.news()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert news == [
        "the/folder: the drive has not answered for 0 s; the run goes on as soon as it does (Ctrl-C ends it)"
    ]
    assert watch.news() == []
    table.trace = TraceWriter(tmp_path / "trace.jsonl", "ComputeWorker")
    threading.Timer(0.05, answer.set).start()
    waited = table.wait(0)
    (wait,) = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines() if "wait for" in line]
    assert wait["kind"] == "wait for KV pages"
    assert wait["end"] - wait["begin"] == pytest.approx(waited)
    assert waited > 0
    while table.drive_silent_s and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.news() == []
    stop[0] = 1
    server.stop()
