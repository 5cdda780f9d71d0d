"""Reading that gives way to others on the same disk."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from pipo_ray.pipeline import polite_drive
from pipo_ray.pipeline.polite_drive import PoliteDrive, Traffic, disk_bytes

MIB = 1 << 20


def test_our_own_reads_are_nobody_else_s() -> None:
    traffic = Traffic()
    issued = completed = 0
    for step in range(50):  # the disk may be ahead of what we know to be completed, up to what was issued
        completed = issued
        issued += 20 * MIB
        assert not traffic.look(step * 0.05, issued, issued, completed)


def test_others_are_noticed_beside_our_own_reads_and_forgotten_when_they_stop() -> None:
    traffic = Traffic()
    ours = others = 0
    seen = []
    for step in range(60):
        ours += 50 * MIB
        others += 20 * MIB if 20 <= step < 40 else 0
        seen.append(traffic.look(step * 0.05, ours + others, ours + 4 * MIB, ours))
    assert not any(seen[:20])
    assert all(seen[24:40])
    assert not any(seen[44:])


def test_a_few_bytes_of_others_are_no_reason_to_stop() -> None:
    traffic = Traffic()
    assert not any(traffic.look(step * 0.05, step * 50_000, 0, 0) for step in range(50))


def test_disk_bytes_counts_sectors_read_and_written(tmp_path: Path) -> None:
    statistics = tmp_path / "diskstats"
    statistics.write_text(" 254 0 vda 9 1 100 5 3 1 20 7 0 1 2\n 254 1 vda1 9 1 8 5 3 1 2 7 0 1 2\n")
    assert disk_bytes((254, 0), str(statistics)) == 512 * 120
    assert disk_bytes((254, 1), str(statistics)) == 512 * 10
    assert disk_bytes((8, 0), str(statistics)) is None


@pytest.mark.parametrize("busy", [False, True])
def test_what_is_read_is_right_and_pauses_come_only_beside_others(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3 * MIB)
    (tmp_path / "data").write_bytes(content)
    pauses: list[float] = []
    monkeypatch.setattr(polite_drive.time, "sleep", pauses.append)
    monkeypatch.setattr(PoliteDrive, "_others_use_it", lambda self: busy)
    drive = PoliteDrive(tmp_path)
    memory = mmap.mmap(-1, len(content))
    drive.read_into(memoryview(memory), "data", 0)
    drive.close()
    assert memory[:] == content
    assert len(pauses) == (3 if busy else 0)
    assert drive.paused_s == sum(pauses)
