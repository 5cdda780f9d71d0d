"""A drive is measured once, and remembered."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipo_ray.pipeline.drive import Drive
from pipo_ray.plan import drive_probe
from pipo_ray.plan.drive_probe import describe_drive, drive_profile, drive_profiles, measure_drive
from pipo_ray.plan.transfer import ReadRate, choose_transfer, slowest

MIB = 1 << 20
GRID = ((MIB, 1), (MIB, 2), (MIB // 2, 3))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(drive_probe, "LEAST_FILE_BYTES", 2 * MIB)
    monkeypatch.setattr(drive_probe, "GRID", GRID)
    monkeypatch.setattr(drive_probe, "_READING_S", 0.01)
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "small.safetensors").write_bytes(bytes(MIB))
    (folder / "large.safetensors").write_bytes(bytes(3 * MIB + 5))
    return folder


def test_every_point_is_measured(store: Path) -> None:
    profile = measure_drive(store / "large.safetensors", 0.01, 10.0)
    assert [(rate.transfer_bytes, rate.threads) for rate in profile] == list(GRID)
    assert all(rate.bytes_per_s > 0 for rate in profile)
    assert "when it was measured" in describe_drive(profile, choose_transfer(profile))


def test_once_per_drive(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    cache = tmp_path / "cache"
    first = drive_profile(store, cache, lambda phase, *_: heard.append(phase))
    monkeypatch.setattr(drive_probe, "measure_drive", lambda *_: pytest.fail("measured again"))
    assert drive_profile(store, cache, lambda phase, *_: heard.append(phase)) == first
    assert heard == ["measure"]


def test_every_drive_is_measured_by_itself(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the time that one would take; the line for the user has both."""
    budgets: list[tuple[float, float]] = []
    speeds = iter((1e9, 3e9))

    def measured(file: Path, reading_s: float, deadline_s: float) -> tuple[ReadRate, ...]:
        budgets.append((reading_s, deadline_s))
        return (ReadRate(2 * MIB, 8, next(speeds)),)

    monkeypatch.setattr(drive_probe, "measure_drive", measured)
    monkeypatch.setattr(drive_probe, "_key", lambda file: file.parent.name)
    second = tmp_path / "second"
    second.mkdir()
    (second / "large.safetensors").write_bytes(bytes(3 * MIB))
    profiles = drive_profiles([store, second], tmp_path / "cache")
    assert [profile[0].bytes_per_s for profile in profiles] == [1e9, 3e9]
    assert budgets == [(0.005, 4.35), (0.005, 4.35)]
    assert drive_profiles([store, second], tmp_path / "cache") == profiles
    chosen = choose_transfer(slowest(profiles), num_drives=2)
    assert describe_drive(profiles[0], chosen, *profiles[1:]) == (
        "drives: up to 1.00 and 3.00 GB/s when they were measured; reads of 2.0 MiB, 8 in flight on each"
    )
    (second / "large.safetensors").unlink()
    assert slowest(drive_profiles([store, second], tmp_path / "cache")) == ()


def test_a_damaged_memory_is_measured_again(store: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    drive_profile(store, cache)
    (kept,) = (cache / "profiles").iterdir()
    for damage in ("", "{}", '{"points": [{}]}', '{"points": 3}'):
        kept.write_text(damage)
        assert len(drive_profile(store, cache)) == len(GRID)


def test_a_cache_that_cannot_be_written_is_done_without(store: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert len(drive_profile(store, tmp_path / "cache")) == len(GRID)


def test_a_small_store_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive_probe, "measure_drive", lambda *_: pytest.fail("measured"))
    (tmp_path / "block.safetensors").write_bytes(bytes(4096))
    assert drive_profile(tmp_path, tmp_path) == ()
    assert drive_profile(tmp_path / "nothing", tmp_path) == ()


@pytest.mark.parametrize("mib, threads, staging_mib", [(2, 4, 16), (2, 8, 32), (8, 8, 64)])
def test_reads_go_to_as_much_memory_as_a_run_has_for_them(
    mib: int, threads: int, staging_mib: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One place for all of them would measure the processor's cache, and much more memory would leave out what the
    cache does for a run.
    """
    places: set[int] = set()

    def read_into(_: Drive, memory: memoryview, *__: Any) -> None:
        if len(memory) == mib * MIB:
            places.add(np.frombuffer(memory, np.uint8).ctypes.data)

    monkeypatch.setattr(drive_probe, "GRID", ((mib * MIB, threads),))
    monkeypatch.setattr(Drive, "read_into", read_into)
    measure_drive(store / "large.safetensors", 0.3, 10.0)
    first = min(places)
    assert {place - first for place in places} == set(range(0, staging_mib * MIB, mib * MIB))


class _SlowDrive:
    """A drive and its clock: one request after the other, at `bytes_per_s`, and at `later_bytes_per_s` when
    `burst_bytes` were read; the first one after `asleep_s`.
    """

    def __init__(
        self, bytes_per_s: float, *, burst_bytes: float = 1e18, later_bytes_per_s: float = 1.0, asleep_s: float = 0.0
    ) -> None:
        self._rates = bytes_per_s, later_bytes_per_s
        self._burst_bytes = burst_bytes
        self._lock = threading.Lock()
        self._asleep_s = asleep_s
        self.now_s = self.read_bytes = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def read_into(self, memory: memoryview, file: str, offset: int) -> None:
        with self._lock:
            rate = self._rates[self.read_bytes > self._burst_bytes]
            self.now_s += self._asleep_s + len(memory) / rate
            self._asleep_s = 0.0
            self.read_bytes += len(memory)


@pytest.fixture
def measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[_SlowDrive], tuple[ReadRate, ...]]:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(512 * MIB)

    monkeypatch.setattr(drive_probe, "_MOST_MEMORY_BYTES", 16 * MIB)

    def measure(drive: _SlowDrive) -> tuple[ReadRate, ...]:
        monkeypatch.setattr(drive_probe, "time", drive)
        monkeypatch.setattr(Drive, "read_into", lambda _, *args: drive.read_into(*args))
        return drive_profile(tmp_path, tmp_path / f"cache-{id(drive)}")

    return measure


Measure = Callable[[_SlowDrive], tuple[ReadRate, ...]]
CONFIGURED_S = 10.0
KERNELS_S = 1.3  # what the compute worker measures behind it


@pytest.mark.parametrize("bytes_per_s", [20e9, 2e9, 500e6, 150e6, 60e6, 20e6, 2e6, 0.5e6])
def test_a_drive_of_any_speed_is_measured_within_ten_seconds(measured_on: Measure, bytes_per_s: float) -> None:
    drive = _SlowDrive(bytes_per_s)
    profile = measured_on(drive)
    assert drive.now_s <= CONFIGURED_S - KERNELS_S
    assert all(point.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-6) for point in profile)
    points = {(point.transfer_bytes, point.threads) for point in profile}
    if bytes_per_s >= 150e6:
        assert points == set(drive_probe.GRID)
    if bytes_per_s >= 20e6:  # the same choice as on a fast drive, whose rate is the same for all points, too
        assert choose_transfer(profile) == choose_transfer(measured_on(_SlowDrive(20e9)))


def test_of_what_is_left_out_on_a_slow_drive_much_in_flight_comes_first(measured_on: Measure) -> None:
    """Points that cannot be chosen are for the curve, which those with little in flight say most about."""
    others = sorted(size * threads for size, threads in drive_probe.GRID if not ReadRate(size, threads, 0.0).keeps_busy)
    left_out = set()
    for megabytes_per_s in range(1, 40):
        profile = measured_on(_SlowDrive(megabytes_per_s * 1e6))
        found = sorted(point.in_flight_bytes for point in profile if not point.keeps_busy)
        assert found == others[: len(found)]
        left_out.add(len(others) - len(found))
    assert left_out - {0, len(others)}


@pytest.mark.parametrize("burst_gb", range(1, 16, 3))
def test_a_drive_that_becomes_slow_meanwhile_takes_little_longer(measured_on: Measure, burst_gb: int) -> None:
    """A limiter that lets through so much and then a twentieth: what was asked for just then is still waited for."""
    drive = _SlowDrive(2e9, burst_bytes=burst_gb * 1e9, later_bytes_per_s=100e6)
    assert measured_on(drive)
    assert drive.now_s <= CONFIGURED_S


def test_what_others_read_meanwhile_does_not_count(measured_on: Measure) -> None:
    """Each point's best turn: here the first of three, before another program begins to read."""
    profile = measured_on(_SlowDrive(2e9, burst_bytes=6e9, later_bytes_per_s=1e9))
    assert all(point.bytes_per_s == pytest.approx(2e9, rel=0.05) for point in profile)


def test_a_drive_that_wakes_up_is_measured_as_it_is_awake(measured_on: Measure) -> None:
    drive = _SlowDrive(150e6, asleep_s=6.0)
    profile = measured_on(drive)
    assert drive.now_s <= CONFIGURED_S - KERNELS_S
    assert all(point.bytes_per_s == pytest.approx(150e6, rel=1e-6) for point in profile)
    assert any(point.keeps_busy for point in profile)


def test_a_fast_drive_is_measured_with_every_point_three_times(
    measured_on: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[int, int]] = []
    read = drive_probe._read_for

    def counting(*args: Any) -> tuple[int, float]:
        turns.append(args[5:7])
        return read(*args)

    monkeypatch.setattr(drive_probe, "_read_for", counting)
    measured_on(_SlowDrive(2e9))
    assert Counter(turns) == dict.fromkeys(drive_probe.GRID, 3)
