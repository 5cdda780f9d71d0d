"""Reading that gives way to others on the same disk."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipo_ray.pipeline import polite_drive
from pipo_ray.pipeline.polite_drive import PoliteDrive, Traffic, cannot_give_way
from pipo_ray.pipeline.tracing import TraceWriter

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


@pytest.mark.parametrize("busy", [False, True])
def test_what_is_read_is_right_and_pauses_come_only_beside_others(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(3 * MIB)
    (tmp_path / "data").write_bytes(content)
    pauses: list[float] = []
    now_s = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        pauses.append(seconds)
        now_s += seconds / 2
        assert drive.paused_s == pytest.approx(sum(pauses) - seconds / 2)  # a pause counts while it lasts
        now_s += seconds / 2

    monkeypatch.setattr(polite_drive, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: now_s))
    monkeypatch.setattr(PoliteDrive, "_others_use_it", lambda self: busy)
    trace = TraceWriter(tmp_path / "trace.jsonl", "NvmeLoader")
    drive = PoliteDrive(tmp_path, trace=trace)
    memory = mmap.mmap(-1, len(content))
    drive.read_into(memoryview(memory), "data", 0)
    drive.close()
    assert memory[:] == content
    assert len(pauses) == (3 if busy else 0)
    assert drive.paused_s == pytest.approx(sum(pauses))
    events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    gave_way = [event["end"] - event["begin"] for event in events if event["kind"] == "give way"]
    assert gave_way == pytest.approx(pauses)


def test_the_user_hears_of_a_folder_whose_disk_nobody_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = cannot_give_way(["/dev/shm"])
    assert line.startswith("background: the kernel does not tell which disk is under /dev/shm (tmpfs), so reading does")
    monkeypatch.setattr(polite_drive, "disks_under", lambda folder: frozenset({(8, len(str(folder)))}))
    monkeypatch.setattr(polite_drive, "disk_bytes", lambda disks: 512 if (8, 2) in disks else None)
    assert cannot_give_way(["/a"]) == []
    (line,) = cannot_give_way(["/a", "/bcd"])
    assert "/bcd" in line
    assert "/a" not in line
