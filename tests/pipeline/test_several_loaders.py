"""Two loaders, one per drive, and one slot table: each fills its own pieces, whoever is slow, killed or out of step."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from pipeline.fake_store import SLOT_BYTES, FakeStore, aligned, make_store
from pipeline.loader_process import Shared, loads_in
from pipeline.test_loader import PROCESS, SIZES, check_sweep

from pipo_ray.errors import DriveError
from pipo_ray.pipeline import drive_watch
from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.drive_watch import DriveWatch
from pipo_ray.pipeline.loader import Loader
from pipo_ray.pipeline.slots import PieceUnreadableError, SlotState, SlotTable
from pipo_ray.pipeline.weight_stream import HostStream

NUM_DRIVES = 2


class GatedDrive(Drive):
    """Reads only while its gate is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def read_into(self, memory: memoryview, file: str, offset: int) -> None:
        assert self.gate.wait(30)
        if self.broken:
            raise DriveError(f"{self.folder} is away")
        super().read_into(memory, file, offset)


class Pipeline:
    """Two loaders in this process, and the compute side's stream."""

    def __init__(self, store: FakeStore, num_slots: int, resident: Sequence[int] = ()) -> None:
        self.deadline = time.monotonic() + 30
        self.store, self.num_slots, self.rows = store, num_slots, {piece: row for row, piece in enumerate(resident)}
        self.table = SlotTable(
            aligned(SlotTable.nbytes(num_slots, len(self.rows), NUM_DRIVES)), num_slots, len(self.rows), NUM_DRIVES
        )
        self.slots = [aligned(SLOT_BYTES) for _ in range(num_slots)]
        self.residents = [aligned(store.pieces[piece].read_bytes) for piece in resident]
        self.drives = [GatedDrive(store.drive(number)) for number in range(NUM_DRIVES)]
        self.loaders = [self._start(number) for number in range(NUM_DRIVES)]
        self.stream = self.new_stream()

    def _start(self, number: int) -> Loader:
        store, drive = self.store, self.drives[number]
        loader = Loader(
            drive, store.pieces, store.loads(self.num_slots, self.rows), self.table, self.slots, self.residents,
            threads=2, transfer_bytes=16 << 10, number=number,
            checksums=BlockChecksums({b.name: b for b in store.blocks}, store.pieces, drive),
        )  # fmt: skip
        loader.start()
        return loader

    def new_stream(self) -> HostStream:
        return HostStream(
            self.store.plan, self.store.loads(self.num_slots, self.rows), self.table,
            [torch.from_numpy(slot) for slot in self.slots], [torch.from_numpy(part) for part in self.residents],
            stopped=lambda: time.monotonic() > self.deadline,
        )  # fmt: skip

    def close(self) -> None:
        for drive in self.drives:
            drive.gate.set()
        self.table.stop()
        for loader in self.loaders:
            loader.stop()

    def ready_loads(self) -> list[int]:
        views = [self.table.view(slot) for slot in range(self.num_slots)]
        return sorted(view.load for view in views if view.state == SlotState.READY)


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    store = make_store(tmp_path / "store", SIZES, num_drives=NUM_DRIVES)
    assert {piece.drive for piece in store.pieces} == {0, 1}
    return store


@pytest.fixture
def pipelines() -> Iterator[list[Pipeline]]:
    """Those that are put in here are closed."""
    opened: list[Pipeline] = []
    yield opened
    for pipeline in opened:
        pipeline.close()


def wait_until(what: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 20])
@pytest.mark.parametrize("resident", ["", "some", "a drive's", "all"])
def test_every_sweep_gets_every_piece(
    num_slots: int, resident: str, store: FakeStore, pipelines: list[Pipeline]
) -> None:
    kept = {
        "": [],
        "some": [0, 3],
        "a drive's": [piece.index for piece in store.pieces if piece.drive == 1],
        "all": list(range(len(store.pieces))),
    }[resident]
    pipelines.append(pipeline := Pipeline(store, num_slots, kept))
    for number in range(12):
        check_sweep(pipeline.stream, store)
        if number % 4 == 3:
            pipeline.stream.abandon()
    own = [loader.snapshot().pieces_read for loader in pipeline.loaders]
    assert all(own)
    assert [loader.error for loader in pipeline.loaders] == [None, None]


def test_a_loader_runs_ahead_of_a_slower_one(store: FakeStore, pipelines: list[Pipeline]) -> None:
    """As far as there are slots, and takes none whose turn is the other's."""
    num_slots = 6
    pipelines.append(pipeline := Pipeline(store, num_slots))
    check_sweep(pipeline.stream, store)
    wait_until(lambda: len(pipeline.ready_loads()) == num_slots)
    pipeline.drives[1].gate.clear()
    # All that was read ahead is used up, and the second drive stands still.
    base = pipeline.table.consumed
    pipeline.stream.begin_sweep()
    for position in range(num_slots):
        pipeline.stream.acquire(position)
        pipeline.stream.release(position)
    order = [store.pieces[store.plan.order[(num_slots + n) % len(store.plan.order)]] for n in range(num_slots)]
    own = [base + num_slots + n for n, piece in enumerate(order) if piece.drive == 0]
    assert 0 < len(own) < num_slots
    wait_until(lambda: pipeline.ready_loads() == own)
    time.sleep(0.1)
    assert pipeline.ready_loads() == own
    pipeline.drives[1].gate.set()
    pipeline.stream.abandon()
    for _ in range(3):
        check_sweep(pipeline.stream, store)


def test_an_epoch_begins_only_when_both_loaders_have_ended_their_reads(
    store: FakeStore, pipelines: list[Pipeline]
) -> None:
    """The other one's late read would fall into a slot that is in use again."""
    pipelines.append(pipeline := Pipeline(store, 3))
    check_sweep(pipeline.stream, store)
    pipeline.drives[1].gate.clear()
    filling = [s for s in range(3) if pipeline.table.view(s).state == SlotState.FILLING]
    ended = threading.Event()

    def abandon() -> None:
        pipeline.stream.abandon()
        ended.set()

    thread = threading.Thread(target=abandon, daemon=True)
    # Something of the second drive must be in flight: what was read ahead is used up until it is.
    position = 0
    while not filling:
        pipeline.stream.acquire(position)
        pipeline.stream.release(position)
        position += 1
        time.sleep(0.05)
        filling = [s for s in range(3) if pipeline.table.view(s).state == SlotState.FILLING]
    before = pipeline.table.epoch
    thread.start()
    wait_until(lambda: pipeline.table.epoch_seen(0) > before)  # who is just falling asleep wakes after half a second
    time.sleep(0.2)
    epoch = pipeline.table.epoch
    assert pipeline.table.epoch_seen(0) == epoch
    assert pipeline.table.epoch_seen(1) == epoch - 1
    assert not ended.is_set()
    states = {pipeline.table.view(slot).state for slot in range(3)}
    assert states <= {SlotState.FREE, SlotState.FILLING, SlotState.READY}
    first = pipeline.table.first_load
    assert all(pipeline.table.view(slot).load < first for slot in range(3)), "a slot was filled for the new epoch"
    pipeline.drives[1].gate.set()
    assert ended.wait(10)
    for _ in range(3):
        check_sweep(pipeline.stream, store)


def test_a_slot_is_not_taken_twice_when_an_epoch_begins(
    store: FakeStore, pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a loader that knows of the new epoch, and by one that has found it free just before and will know later."""
    real = SlotTable.begin_fill
    arrived, go_on = threading.Event(), threading.Event()
    go_on.set()

    def late(self: SlotTable, slot: int, load: int, loader: int = 0) -> None:
        if loader == 1 and not go_on.is_set():
            arrived.set()
            assert go_on.wait(20)
        real(self, slot, load, loader)

    monkeypatch.setattr(SlotTable, "begin_fill", late)
    num_slots = len(store.plan.order)
    pipelines.append(pipeline := Pipeline(store, num_slots))
    check_sweep(pipeline.stream, store)
    wait_until(lambda: len(pipeline.ready_loads()) == num_slots)
    go_on.clear()
    check_sweep(pipeline.stream, store)
    assert arrived.wait(10)
    thread = threading.Thread(target=pipeline.stream.abandon, daemon=True)
    before = pipeline.table.epoch
    thread.start()
    wait_until(lambda: pipeline.table.epoch_seen(0) > before)
    time.sleep(0.2)
    assert pipeline.table.epoch_seen(0) == pipeline.table.epoch
    first = pipeline.table.first_load
    assert all(pipeline.table.view(slot).load < first for slot in range(num_slots)), "filled for the new epoch"
    go_on.set()
    thread.join(10)
    for _ in range(3):
        check_sweep(pipeline.stream, store)


def test_random_disturbances(store: FakeStore, pipelines: list[Pipeline]) -> None:
    """Gates that open and close, sweeps that are given up, computes that start anew."""
    pipelines.append(pipeline := Pipeline(store, 3, (2,)))
    rng = random.Random(5)
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            drive = rng.choice(pipeline.drives)
            drive.gate.clear()
            time.sleep(rng.uniform(0, 0.01))
            drive.gate.set()
            time.sleep(rng.uniform(0, 0.01))

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    try:
        for number in range(60):
            check_sweep(pipeline.stream, store, stop=rng.randrange(len(store.plan.order)))
            if number % 5 == 0:
                pipeline.stream = pipeline.new_stream()
            else:
                pipeline.stream.abandon()
            if rng.random() < 0.5:
                check_sweep(pipeline.stream, store)
    finally:
        over.set()
        thread.join()
    assert [loader.error for loader in pipeline.loaders] == [None, None]


@pytest.mark.parametrize("resident", [(), range(12)])
def test_who_could_not_read_is_named(resident: Sequence[int], store: FakeStore, pipelines: list[Pipeline]) -> None:
    resident = [piece for piece in resident if piece < len(store.pieces)]
    pipelines.append(pipeline := Pipeline(store, 2, resident))
    for broken in (1, 0):
        check_sweep(pipeline.stream, store)
        pipeline.drives[broken].broken = True
        if resident:  # one is to be read again
            pipeline.table.reset_resident(next(piece.index for piece in store.pieces if piece.drive == broken))
        pipeline.stream.abandon()
        with pytest.raises(PieceUnreadableError, match="could not read this piece") as caught:
            check_sweep(pipeline.stream, store)
        assert pickle.loads(pickle.dumps(caught.value)).loader == broken
        assert f"{store.drive(broken)} is away" in str(pipeline.loaders[broken].error)
        pipeline.drives[broken].broken = False
        pipeline.stream.abandon()
        check_sweep(pipeline.stream, store)


def test_the_drive_that_is_silent_is_named(
    store: FakeStore, pipelines: list[Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive_watch, "SILENT_S", 0.2)
    pipelines.append(pipeline := Pipeline(store, 2))
    watch = DriveWatch(pipeline.table, "the/first", "the/second")
    check_sweep(pipeline.stream, store)
    pipeline.drives[1].gate.clear()
    pipeline.stream.acquire(0)
    pipeline.stream.release(0)
    lines: list[str] = []
    wait_until(lambda: lines.extend(watch.news()) or lines)
    assert [line.split(":")[0] for line in lines] == ["the/second"]
    pipeline.drives[1].gate.set()


@pytest.mark.parametrize("traced", [False, True], ids=["compiled", "traced"])
def test_killed_loaders_lose_nothing(traced: bool, tmp_path: Path) -> None:
    """SIGKILL one of two loader processes again and again, also while an epoch begins: every piece is whole, and the
    other one's slots are left alone."""
    store = make_store(tmp_path / "store", SIZES, num_drives=NUM_DRIVES)
    resident = {1: 0, 4: 1}
    sizes = tuple(store.pieces[piece].read_bytes for piece in resident)
    shared = Shared(tmp_path / "memory", 4, SLOT_BYTES, sizes, NUM_DRIVES)
    shared.create()
    specification = tmp_path / "specification.pickle"
    specification.write_bytes(
        pickle.dumps(
            {
                "folders": tuple(store.drive(number) for number in range(NUM_DRIVES)),
                "blocks": store.blocks,
                "plan": store.plan,
                "resident_rows": resident,
                "shared": asdict(shared),
            }
        )
    )
    traces = [tmp_path / f"trace{number}" for number in range(NUM_DRIVES)]

    def start(number: int) -> subprocess.Popen[str]:
        trace = str(traces[number]) if traced else "-"
        command = [sys.executable, str(PROCESS), str(specification), trace, str(number)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    table, slots, residents = shared.open()
    processes = [start(number) for number in range(NUM_DRIVES)]
    finished = threading.Event()
    rng = random.Random(13)
    num_kills = 6

    def kill_and_restart() -> None:
        for kill in range(num_kills):
            victim = kill % NUM_DRIVES
            processes[victim].stdout.readline()  # type: ignore[union-attr]
            time.sleep(rng.uniform(0.02, 0.15))
            processes[victim].kill()
            processes[victim].wait()
            processes[victim] = start(victim)
        finished.set()

    killer = threading.Thread(target=kill_and_restart, daemon=True)
    killer.start()
    loads = store.loads(4, resident)
    num_sweeps = num_loads = 0
    try:
        stream = HostStream(
            store.plan, store.loads(4, resident), table, [torch.from_numpy(slot) for slot in slots],
            [torch.from_numpy(part) for part in residents],
            stopped=lambda: any(process.poll() not in (None, -9) for process in processes),
        )  # fmt: skip
        while not finished.is_set() or num_sweeps < 3:
            check_sweep(stream, store, pause_s=0.003)
            num_sweeps += 1
            num_loads += loads.loads_per_sweep
            if num_sweeps % 4 == 0:
                stream.abandon()
        check_sweep(stream, store)
    finally:
        table.stop()
        killer.join(30)
        statuses = [process.wait(timeout=30) for process in processes]
    assert statuses == [0, 0]
    if not traced:
        return  # what each has read is not known then
    times: Counter[int] = Counter()
    readers: dict[int, set[int]] = {}
    for number, trace in enumerate(traces):
        for load in loads_in(trace):
            times[load] += 1
            readers.setdefault(load, set()).add(number)
    assert all(len(who) == 1 for who in readers.values()), "a piece was read by the loader of another drive"
    assert sum(times.values()) >= num_loads - 2 * num_kills
    # Read twice is only what was in a reading thread's hands when it was killed.
    assert sum(count - 1 for count in times.values()) <= 3 * num_kills
