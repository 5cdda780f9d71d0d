"""The staging pool's books: three shares of time that do not overlap."""

from __future__ import annotations

import numpy as np
import pytest

from pipo_ray.pipeline.books import Books
from pipo_ray.pipeline.slots import SlotTable


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


def test_without_slots_nothing_is_full() -> None:
    books = Books(SlotTable(np.zeros(SlotTable.nbytes(0, 1), np.uint8), 0, 1))
    books.sample()
    assert (books.share_busy, books.share_full, books.most_in_use) == (0.0, 0.0, 0)
