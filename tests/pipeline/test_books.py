"""The staging pool's books: three shares of time that do not overlap."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipo_ray.pipeline import books as books_module
from pipo_ray.pipeline.books import Books
from pipo_ray.pipeline.slots import SlotTable
from pipo_ray.pipeline.tracing import TraceWriter


@pytest.fixture
def table() -> SlotTable:
    return SlotTable(np.zeros(SlotTable.nbytes(3, 0), np.uint8), 3, 0)


def test_shares_of_time(table: SlotTable) -> None:
    books = Books(table)
    assert (books.share_busy, books.share_full) == (0.0, 0.0)
    books.sample()  # nothing is there
    table.begin_fill(0, 0)
    books.sample()  # being read: nothing to compute with yet
    table.finish_fill(0, 0)
    table.begin_fill(1, 1)
    books.sample()  # one is read, one is used
    table.finish_fill(1, 1)
    table.begin_fill(2, 2)
    table.finish_fill(2, 2)
    for _ in range(5):
        books.sample()  # all are full
    assert (books.share_busy, books.share_full) == (1 / 8, 5 / 8)
    assert books.most_in_use == 3
    assert books.entries() == [("READY", 0), ("READY", 1), ("READY", 2)]


def test_the_trace_has_the_same_shares(table: SlotTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In spans that end when something else is the case, or are a second long."""
    now_s = 10.0
    monkeypatch.setattr(books_module, "time", SimpleNamespace(perf_counter=lambda: now_s))
    books = Books(table, TraceWriter(tmp_path / "trace.jsonl", "StagingPool"))

    def samples(count: int) -> None:
        nonlocal now_s
        for _ in range(count):
            books.sample()
            now_s += 0.25

    samples(2)
    table.begin_fill(0, 0)
    table.finish_fill(0, 0)
    samples(6)
    for slot in (1, 2):
        table.begin_fill(slot, slot)
        table.finish_fill(slot, slot)
    samples(1)
    table.release(0, 0)
    samples(1)
    events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["begin"], event["end"]) for event in events if "end" in event] == [
        ("no slot ready", 10.0, 10.5), ("some slots ready", 10.5, 11.5), ("some slots ready", 11.5, 12.0),
        ("all slots ready", 12.0, 12.25),
    ]  # fmt: skip


def test_without_slots_nothing_is_full() -> None:
    books = Books(SlotTable(np.zeros(SlotTable.nbytes(0, 1), np.uint8), 0, 1))
    books.sample()
    assert (books.share_busy, books.share_full, books.most_in_use) == (0.0, 0.0, 0)
