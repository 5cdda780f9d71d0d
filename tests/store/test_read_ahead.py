"""Several things are read at a time, in bounded memory, and come out in their order."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from pipo_ray.store.read_ahead import Reading, read_ahead


class Drive:
    """Counts what is read at the same time, and how much of it has not been handed out."""

    def __init__(self) -> None:
        self.lock, self.begun, self.reading, self.most = threading.Lock(), [0], 0, 0
        self.go = threading.Event()

    def reading_of(self, number: int, nbytes: int = 10, alone: bool = False) -> Reading[int]:
        def read() -> memoryview:
            with self.lock:
                self.begun.append(number)
                self.reading += 1
                self.most = max(self.most, self.reading)
            assert self.go.wait(10)
            with self.lock:
                self.reading -= 1
            return memoryview(bytes([number]) * nbytes)

        return Reading(number, nbytes, read, alone)


def test_they_come_in_order_and_no_more_is_read_than_fits() -> None:
    drive = Drive()
    drive.go.set()
    with ThreadPoolExecutor(4) as threads:
        for number, (place, data) in enumerate(read_ahead((drive.reading_of(n) for n in range(50)), threads, 30)):
            assert place == number
            assert bytes(data) == bytes([number]) * 10
            assert max(drive.begun) <= number + 3
    assert drive.most <= 3


def test_several_are_read_at_a_time() -> None:
    drive = Drive()
    threading.Timer(0.2, drive.go.set).start()
    with ThreadPoolExecutor(4) as threads:
        assert len(list(read_ahead((drive.reading_of(n) for n in range(4)), threads, 40))) == 4
    assert drive.most == 4


def test_one_that_is_larger_than_the_limit_is_read_by_itself() -> None:
    drive = Drive()
    drive.go.set()
    with ThreadPoolExecutor(4) as threads:
        sizes = [len(data) for _, data in read_ahead((drive.reading_of(n, 100) for n in range(5)), threads, 30)]
    assert sizes == [100] * 5
    assert drive.most == 1


def test_what_is_read_alone_has_the_drive_for_itself() -> None:
    drive = Drive()
    drive.go.set()
    readings = [drive.reading_of(n, alone=n % 2 == 1) for n in range(20)]
    with ThreadPoolExecutor(4) as threads:
        assert [place for place, _ in read_ahead(readings, threads, 1000)] == list(range(20))
    assert drive.most == 1


def test_an_error_comes_in_its_turn_and_nobody_reads_behind_it() -> None:
    drive = Drive()
    drive.go.set()

    def fail() -> memoryview:
        raise OSError("broken")

    readings = [drive.reading_of(0), Reading(1, 10, fail), *(drive.reading_of(n) for n in range(2, 9))]
    with ThreadPoolExecutor(2) as threads:
        ahead = read_ahead(readings, threads, 30)
        assert next(ahead)[0] == 0
        with pytest.raises(OSError, match="broken"):
            next(ahead)
        assert drive.reading == 0
        assert max(drive.begun) < 5


def test_closing_it_waits_for_those_that_read() -> None:
    drive = Drive()
    drive.go.set()
    with ThreadPoolExecutor(2) as threads, closing(read_ahead(map(drive.reading_of, range(9)), threads, 30)) as ahead:
        next(ahead)
        drive.go.clear()
        threading.Timer(0.1, drive.go.set).start()
    assert drive.reading == 0
