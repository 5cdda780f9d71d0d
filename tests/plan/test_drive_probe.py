"""A drive is measured once, and remembered."""

from __future__ import annotations

from pathlib import Path

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
    monkeypatch.setattr(drive_probe, "_BUDGET_S", 0.01)
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "small.safetensors").write_bytes(bytes(MIB))
    (folder / "large.safetensors").write_bytes(bytes(3 * MIB + 5))
    return folder


def test_every_point_is_measured(store: Path) -> None:
    profile = measure_drive(store / "large.safetensors", 0.01)
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
    budgets: list[float] = []
    speeds = iter((1e9, 3e9))

    def measured(file: Path, budget_s: float) -> tuple[ReadRate, ...]:
        budgets.append(budget_s)
        return (ReadRate(2 * MIB, 8, next(speeds)),)

    monkeypatch.setattr(drive_probe, "measure_drive", measured)
    monkeypatch.setattr(drive_probe, "_key", lambda file: file.parent.name)
    second = tmp_path / "second"
    second.mkdir()
    (second / "large.safetensors").write_bytes(bytes(3 * MIB))
    profiles = drive_profiles([store, second], tmp_path / "cache")
    assert [profile[0].bytes_per_s for profile in profiles] == [1e9, 3e9]
    assert budgets == [0.005, 0.005]
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


def test_reads_go_to_more_memory_than_a_cache_holds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place for all of them would measure the processor's cache."""
    places: set[int] = set()
    monkeypatch.setattr(drive_probe, "_MEMORY_BYTES", 4 * MIB)
    monkeypatch.setattr(
        Drive, "read_into", lambda _, memory, *__: places.add(np.frombuffer(memory, np.uint8).ctypes.data)
    )
    measure_drive(store / "large.safetensors", 0.3)
    first = min(places)
    assert {place - first for place in places} == set(range(0, 4 * MIB, MIB // 2))
