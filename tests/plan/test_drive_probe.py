"""A drive is measured once, and remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo_ray.plan import drive_probe
from pipo_ray.plan.drive_probe import describe_drive, drive_profile, measure_drive
from pipo_ray.plan.transfer import choose_transfer

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
