"""The loader at work: what is in a slot is the right piece, whatever is killed, restarted or broken."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from pipeline.fake_store import SLOT_BYTES, FakeStore, aligned, make_store
from pipeline.loader_process import Shared, kind_of_loader, loads_in

from pipo_ray.errors import DriveError, MisreadError, StoreError
from pipo_ray.pipeline import drive_watch, polite_drive
from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.compiled_loader import CompiledLoader
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.drive_watch import DriveWatch
from pipo_ray.pipeline.polite_drive import PoliteDrive
from pipo_ray.pipeline.slots import PieceUnreadableError, SlotTable, StoppedError
from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter
from pipo_ray.pipeline.weight_stream import HostStream
from pipo_ray.prepare import code_folder

Test = TypeVar("Test", bound=Callable[..., None])

# Blocks of one and of several pieces, small and up to a slot, tensors that end within a page.
SIZES = [(30_000, 30_000, 100), (60_000,), (50_001, 40_000), (10,), (20_000, 20_001, 20_002, 20_003), (61_000,)]


def replaces_reads(test: Test) -> Test:
    """For a test in which a method of Python's takes the place of a read: machine code would not call it."""
    test.replaces_reads = True  # type: ignore[attr-defined]
    return test


@pytest.fixture(autouse=True, params=["compiled", "handing over", "python"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loader of machine code, where there is one, also with all its reads left to Python; and the one that is
    Python's, here and in other processes.
    """
    if request.param == "compiled" and getattr(request.function, "replaces_reads", False):
        pytest.skip("machine code would not call what takes the place of a read here")
    if request.param == "handing over":
        monkeypatch.setattr(CompiledLoader, "_descriptor", lambda *_: -1)
    monkeypatch.setenv("PIPO_TEST_LOADER", request.param)
    return str(request.param)


PROCESS = Path(__file__).with_name("loader_process.py")


class Pipeline:
    """A loader in this process, and the compute side's stream."""

    def __init__(
        self,
        store: FakeStore,
        num_slots: int = 2,
        resident: Sequence[int] = (),
        *,
        threads: int = 3,
        checked: bool = True,
        drive: Drive | None = None,
        trace: TraceWriter = NO_TRACE,
    ) -> None:
        rows = {piece: row for row, piece in enumerate(resident)}
        self.store = store
        self.table = SlotTable(aligned(SlotTable.nbytes(num_slots, len(rows))), num_slots, len(rows))
        self.slots = [aligned(SLOT_BYTES) for _ in range(num_slots)]
        self.residents = [aligned(store.pieces[piece].read_bytes) for piece in resident]
        drive = Drive(store.folder) if drive is None else drive
        self.loader = kind_of_loader()(
            drive, store.pieces, store.loads(num_slots, rows), self.table, self.slots, self.residents, threads=threads,
            checksums=BlockChecksums({b.name: b for b in store.blocks}, store.pieces, drive) if checked else None,
            transfer_bytes=16 << 10, trace=trace, folder=code_folder(),
        )  # fmt: skip
        self.loader.start()
        self.stream = HostStream(
            store.plan, store.loads(num_slots, rows), self.table, [torch.from_numpy(slot) for slot in self.slots],
            [torch.from_numpy(part) for part in self.residents],
        )  # fmt: skip

    def close(self) -> None:
        self.table.stop()
        self.loader.stop()


@contextmanager
def pipeline_of(
    store: FakeStore, *args: int | Sequence[int], **options: int | Drive | TraceWriter
) -> Iterator[Pipeline]:
    pipeline = Pipeline(store, *args, **options)  # type: ignore[arg-type]
    try:
        yield pipeline
    finally:
        pipeline.close()


def check_sweep(stream: HostStream, store: FakeStore, pause_s: float = 0.0, stop: int | None = None) -> None:
    """One sweep, or its first `stop` pieces: each holds what the file has, until it is released."""
    stream.begin_sweep()
    for position, index in enumerate(store.plan.order[:stop]):
        memory = stream.acquire(position).numpy()
        expected = store.content(store.pieces[index])
        assert memory[: len(expected)].tobytes() == expected, f"position {position}"
        if pause_s:
            time.sleep(pause_s)
            assert memory[: len(expected)].tobytes() == expected, f"position {position} was overwritten"
        stream.release(position)
    if stop is None:
        stream.end_sweep()


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return make_store(tmp_path / "store", SIZES)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 20])
@pytest.mark.parametrize("resident", [(), (1, 3), (0,)])
def test_every_sweep_gets_every_piece(num_slots: int, resident: tuple[int, ...], store: FakeStore) -> None:
    with pipeline_of(store, num_slots, resident) as pipeline:
        for _ in range(8):
            check_sweep(pipeline.stream, store)
        assert pipeline.loader.error is None


def test_all_resident(store: FakeStore) -> None:
    with pipeline_of(store, 1, range(len(store.pieces))) as pipeline:
        for _ in range(3):
            check_sweep(pipeline.stream, store)
        pipeline.stream.abandon()
        check_sweep(pipeline.stream, store)
        assert pipeline.loader.snapshot().pieces_read == len(store.pieces)


def test_reading_and_waiting_for_slots_do_not_overlap(store: FakeStore) -> None:
    with pipeline_of(store, 2) as pipeline:
        deadline = time.monotonic() + 10
        while pipeline.loader.snapshot().waiting_for_slots_s < 0.2:  # both slots are full, nobody computes
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = pipeline.loader.snapshot()
        assert 0 < found.reading_s < found.running_s
        assert found.reading_s + found.waiting_for_slots_s <= found.running_s


def test_waiting_for_slots_is_in_the_trace_as_it_is_counted(store: FakeStore, tmp_path: Path) -> None:
    trace = TraceWriter(tmp_path / "trace.jsonl", "NvmeLoader")
    with pipeline_of(store, 2, trace=trace) as pipeline:
        for _ in range(3):
            check_sweep(pipeline.stream, store, pause_s=0.01)
        pipeline.close()
        counted = pipeline.loader.snapshot()
    events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    loads, waits = (
        [(event["begin"], event["end"]) for event in events if event["kind"] == kind]
        for kind in ("weight load", "wait for a slot")
    )
    assert len(waits) >= 3 * len(store.plan.order) - 4
    assert sum(end - begin for begin, end in waits) == pytest.approx(counted.waiting_for_slots_s, abs=0.02)
    for begin, end in waits:
        assert all(end <= load_begin or load_end <= begin for load_begin, load_end in loads)


def test_reading_has_no_part_of_the_pauses_that_give_way(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoliteDrive, "_others_use_it", lambda self: True)
    with pipeline_of(store, 2, drive=PoliteDrive(store.folder)) as pipeline:
        deadline = time.monotonic() + 10
        while pipeline.loader.snapshot().waiting_for_slots_s < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = pipeline.loader.snapshot()
        assert found.paused_s > 0.1  # of 50 ms each, after reads of a fraction of one
        assert found.reading_s < found.paused_s / 2
        assert found.reading_s + found.paused_s + found.waiting_for_slots_s <= found.running_s


def test_a_drive_that_gives_way_is_not_called_silent(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers wait for others' pauses, for longer than a drive may be silent."""
    monkeypatch.setattr(PoliteDrive, "_others_use_it", lambda self: True)
    monkeypatch.setattr(polite_drive, "_WINDOW_S", 0.01)
    monkeypatch.setattr(drive_watch, "SILENT_S", 0.2)
    with pipeline_of(store, 2, drive=PoliteDrive(store.folder)) as pipeline:
        watch = DriveWatch(pipeline.table, "the/store")
        pipeline.stream.begin_sweep()
        pipeline.stream.acquire(0)
        monkeypatch.setattr(polite_drive, "_WINDOW_S", 0.7)
        pipeline.stream.release(0)  # so there is one to be read
        paused_s = pipeline.loader.snapshot().paused_s
        deadline = time.monotonic() + 10
        while pipeline.loader.snapshot().paused_s < paused_s + 0.34:
            assert watch.news() == []
            assert time.monotonic() < deadline
            time.sleep(0.001)
        monkeypatch.setattr(polite_drive, "_WINDOW_S", 0.01)


@replaces_reads
def test_resident_pieces_are_read_once(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the loader is a sweep ahead before the first read is through."""
    real = Drive.read_into
    reads: Counter[tuple[str, int]] = Counter()
    first = store.pieces[0]

    def slow(self: Drive, memory: memoryview, file: str, offset: int) -> None:
        reads[file, offset] += 1
        if (file, offset) == (first.file, first.file_offset):
            time.sleep(0.2)  # time enough for three sweeps of read-ahead
        real(self, memory, file, offset)

    monkeypatch.setattr(Drive, "read_into", slow)
    with pipeline_of(store, 3 * len(store.pieces), (0,), checked=False) as pipeline:
        for _ in range(4):
            check_sweep(pipeline.stream, store)
    assert reads[first.file, first.file_offset] == 1


def test_abandoned_sweeps_begin_anew(store: FakeStore) -> None:
    rng = random.Random(3)
    with pipeline_of(store, 3, (2,)) as pipeline:
        for _ in range(25):
            check_sweep(pipeline.stream, store, stop=rng.randrange(len(store.plan.order)))
            pipeline.stream.abandon()
            if rng.random() < 0.5:
                check_sweep(pipeline.stream, store)
        assert pipeline.loader.error is None


def test_a_new_compute_worker_starts_where_its_predecessor_was_killed(store: FakeStore) -> None:
    with pipeline_of(store, 2) as pipeline:
        for killed_at in (0, 3, 5):
            check_sweep(pipeline.stream, store)
            for position in range(killed_at):  # acquired and not released: it was killed with the slots in hand
                pipeline.stream.acquire(position)
                if position >= 1:
                    pipeline.stream.release(position - 1)
            pipeline.stream = HostStream(
                store.plan, store.loads(2), pipeline.table, [torch.from_numpy(slot) for slot in pipeline.slots], []
            )
        check_sweep(pipeline.stream, store)


def test_stop_ends_a_loader_that_waits_for_slots_and_a_compute_that_waits_for_pieces(store: FakeStore) -> None:
    pipeline = Pipeline(store, 1)
    pipeline.stream.acquire(0)
    ended: list[str] = []

    def wait() -> None:
        try:
            pipeline.stream.acquire(1)  # there is one slot, and it is held
        except StoppedError:
            ended.append("stopped")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    begin = time.perf_counter()
    pipeline.close()
    thread.join(5)
    assert ended == ["stopped"]
    assert time.perf_counter() - begin < 3


# --- a drive that fails -----------------------------------------------------------------------------------------------


def flip(store: FakeStore, block: int) -> Path:
    stored = store.blocks[block]
    path = store.folder / stored.file
    data = bytearray(path.read_bytes())
    data[stored.tensors[-1].offset + 5] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("block", [0, 1, 4])
@pytest.mark.parametrize("resident", [(), (0, 1, 2, 3)])
def test_a_flipped_byte_is_reported_at_the_first_load(block: int, resident: tuple[int, ...], store: FakeStore) -> None:
    path = flip(store, block)
    with pipeline_of(store, 2, resident) as pipeline:
        with pytest.raises(OSError, match="could not read this piece"):
            check_sweep(pipeline.stream, store)
        error = pipeline.loader.error
    assert isinstance(error, StoreError)
    assert str(error).startswith(f"block block{block} in {path.name} is damaged: its checksum is ")


@replaces_reads
def test_a_drive_that_breaks_fails_the_sweep_and_the_next_one_succeeds(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    broken = threading.Event()

    def maybe(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", maybe)
    with pipeline_of(store, 1) as pipeline:
        check_sweep(pipeline.stream, store)
        broken.set()
        with suppress(OSError):
            check_sweep(pipeline.stream, store)  # what had been read ahead
        pipeline.stream.abandon()
        with pytest.raises(OSError, match="could not read this piece"):
            check_sweep(pipeline.stream, store)
        broken.clear()
        pipeline.stream.abandon()
        check_sweep(pipeline.stream, store)
        assert "Input/output error (after 4 attempts)" in str(pipeline.loader.error)


@pytest.mark.parametrize("resident", [(), (0, 1, 2, 3), range(12)])
@pytest.mark.parametrize("block", [0, 1, 4])
@replaces_reads
def test_bytes_that_came_out_wrong_once_are_loaded_again(
    block: int, resident: Sequence[int], store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residents too, those included that were taken for good before the block's last piece came."""
    real = os.preadv
    stored = store.blocks[block]
    at = stored.tensors[0].offset + 7
    left = [1]

    def flipped(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = real(descriptor, buffers, offset)
        if left[0] and offset <= at < offset + count:
            left[0] -= 1
            buffers[0][at - offset] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", flipped)
    resident = [piece for piece in resident if piece < len(store.pieces)]
    with pipeline_of(store, 2, resident) as pipeline:
        with suppress(AssertionError, PieceUnreadableError):  # it may have been found before the stream began
            check_sweep(pipeline.stream, store)
        pipeline.stream.abandon()
        check_sweep(pipeline.stream, store)
        check_sweep(pipeline.stream, store)
        assert left == [0]
        error = pipeline.loader.error  # none where the piece was dropped before the rest of its block came
        assert error is None or (isinstance(error, MisreadError) and f"block {stored.name} in " in str(error))


@pytest.mark.parametrize("resident", [(), (0, 1, 2, 3), range(12)])
@replaces_reads
def test_a_resident_piece_that_failed_is_read_when_the_drive_is_back(
    resident: Sequence[int], store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = threading.Event()
    broken.set()
    real = Drive.read_into

    def maybe(self: Drive, memory: memoryview, file: str, offset: int) -> None:
        if broken.is_set():
            raise DriveError("away")
        real(self, memory, file, offset)

    monkeypatch.setattr(Drive, "read_into", maybe)
    resident = [piece for piece in resident if piece < len(store.pieces)]
    with pipeline_of(store, 2, resident) as pipeline:
        for _ in range(2):
            with pytest.raises(PieceUnreadableError):
                check_sweep(pipeline.stream, store)
            assert str(pipeline.loader.error).endswith(" cannot be read: away")
            pipeline.stream.abandon()
        broken.clear()
        with suppress(PieceUnreadableError):  # what had been tried before the drive was back
            check_sweep(pipeline.stream, store)
        pipeline.stream.abandon()
        check_sweep(pipeline.stream, store)


@replaces_reads
def test_a_drive_that_does_not_answer_is_told_once(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive_watch, "SILENT_S", 0.2)
    answer = threading.Event()
    answer.set()
    real = Drive.read_into

    def slow(self: Drive, memory: memoryview, file: str, offset: int) -> None:
        answer.wait(20)
        real(self, memory, file, offset)

    monkeypatch.setattr(Drive, "read_into", slow)
    with pipeline_of(store, 2) as pipeline:
        watch = DriveWatch(pipeline.table, "the/store")
        for _ in range(2):
            check_sweep(pipeline.stream, store)
            time.sleep(0.3)
            assert watch.news() == []  # all slots are full: it is asked nothing
            answer.clear()
            pipeline.stream.acquire(0)
            pipeline.stream.release(0)
            time.sleep(0.3)
            (line,) = watch.news()
            assert line.startswith("the/store: the drive has not answered for 0 s; the run goes on as soon as")
            assert watch.news() == []
            answer.set()
            pipeline.stream.abandon()


def test_that_reads_are_buffered_is_told_once(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pipeline_of(store, 2) as pipeline:
        check_sweep(pipeline.stream, store)
        watch = DriveWatch(pipeline.table, "the/store")
        (line,) = watch.news()
        assert line.startswith("the/store: its file system refuses direct access (O_DIRECT)")
        assert watch.news() == []


# --- a loader that is killed ------------------------------------------------------------------------------------------


def test_a_killed_loader_loses_nothing(kind: str, tmp_path: Path) -> None:
    """SIGKILL a loader process again and again; what its successor finds READY is not read again, everything else
    is."""
    store = make_store(tmp_path / "store", SIZES)
    resident = {1: 0, 4: 1}
    shared = Shared(tmp_path / "memory", 3, SLOT_BYTES, tuple(store.pieces[piece].read_bytes for piece in resident))
    shared.create()
    specification = tmp_path / "specification.pickle"
    # No class of this module's: the process has another name for it.
    specification.write_bytes(
        pickle.dumps(
            {
                "folders": (store.folder,),
                "blocks": store.blocks,
                "plan": store.plan,
                "resident_rows": resident,
                "shared": asdict(shared),
            }
        )
    )
    trace = tmp_path / "trace"

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(PROCESS), str(specification), "-" if kind == "compiled" else str(trace), "0"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    table, slots, residents = shared.open()
    processes = [start()]
    finished = threading.Event()
    rng = random.Random(11)
    num_kills = 5

    def kill_and_restart() -> None:
        for _ in range(num_kills):
            processes[-1].stdout.readline()  # type: ignore[union-attr]
            time.sleep(rng.uniform(0.02, 0.15))
            processes[-1].kill()
            processes[-1].wait()
            processes.append(start())
        finished.set()

    killer = threading.Thread(target=kill_and_restart, daemon=True)
    killer.start()
    loads = store.loads(3, resident)
    try:
        stream = HostStream(
            store.plan, store.loads(3, resident), table, [torch.from_numpy(slot) for slot in slots],
            [torch.from_numpy(part) for part in residents], stopped=lambda: processes[-1].poll() not in (None, -9),
        )  # fmt: skip
        num_sweeps = 0
        while not finished.is_set() or num_sweeps < 3:
            check_sweep(stream, store, pause_s=0.003)
            num_sweeps += 1
        check_sweep(stream, store)
    finally:
        table.stop()
        killer.join(30)
        status = processes[-1].wait(timeout=30)
    assert status == 0
    if kind == "compiled":
        return  # who is traced is Python's
    times = Counter(loads_in(trace))
    assert sum(times.values()) >= num_sweeps * loads.loads_per_sweep - 2 * num_kills
    # Read twice is only what was in a reading thread's hands when it was killed.
    assert sum(count - 1 for count in times.values()) <= 3 * num_kills
