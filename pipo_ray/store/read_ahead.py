"""Reads several things at a time, and hands them out in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Generic, TypeVar

_Place = TypeVar("_Place")


@dataclass(frozen=True)
class Reading(Generic[_Place]):
    """What `read` gives, of `nbytes` bytes, goes to `place`. `alone`: nothing else is read at the same time."""

    place: _Place
    nbytes: int
    read: Callable[[], memoryview]
    alone: bool = False


def read_ahead(
    readings: Iterable[Reading[_Place]], threads: Executor, most_bytes: int
) -> Generator[tuple[_Place, memoryview], None, None]:
    """(place, data) of `readings`, while `threads` read those behind: at most `most_bytes`, but always one.

    Raises what a `read` raises, in its turn. When it is closed, nobody is reading any more.
    """
    pending: deque[tuple[Reading[_Place], Future[memoryview]]] = deque()
    waiting = 0
    source = iter(readings)
    following = next(source, None)
    try:
        while following is not None or pending:
            while following is not None and (
                not pending
                or (waiting + following.nbytes <= most_bytes and not following.alone and not pending[-1][0].alone)
            ):
                pending.append((following, threads.submit(following.read)))
                waiting += following.nbytes
                following = next(source, None)
            reading, future = pending[0]
            data = future.result()
            pending.popleft()
            waiting -= reading.nbytes
            del future
            yield reading.place, data
            del data
    finally:
        for _, future in pending:
            if not future.cancel():
                future.exception()
