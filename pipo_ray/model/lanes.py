"""Taking turns: several requests walk through one model in lockstep, each alone, sharing every piece that is streamed.

For architectures that mix along the row. Each request's forward pass runs in a thread of its own (a lane), but only one
lane runs at a time, and always the one that is furthest behind: so a piece is bound once, used by every lane, and
released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Lanes:
    """The turn between `count` lanes. A lane's place is the number of the acquisition it wants next."""

    def __init__(self, count: int) -> None:
        self._places = [-1] * count
        lock = threading.Lock()
        # One for each: of many lanes, only the one whose turn it is wakes up.
        self._conditions = [threading.Condition(lock) for _ in range(count)]
        self._turn = 0
        self._failed: BaseException | None = None
        self._local = threading.local()

    @property
    def current(self) -> int:
        """The lane that runs."""
        lane: int = self._local.lane
        return lane

    def arrive(self, place: int) -> None:
        """Called by a lane that wants acquisition `place`: returns when it is this lane's turn and no lane is further
        behind.
        """
        lane = self._local.lane
        with self._conditions[lane]:
            self._places[lane] = place
            self._pass_on()
            self._wait_for_turn(lane)

    def run(self, bodies: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """Run `bodies`, one lane each, and return their results in order. The first exception of any lane ends all and
        is raised.
        """
        results: list[Any] = [None] * len(bodies)
        done = float("inf")

        def walk(lane: int) -> None:
            self._local.lane = lane
            try:
                with self._conditions[lane]:
                    self._wait_for_turn(lane)
                results[lane] = bodies[lane]()
            except BaseException as error:
                with self._conditions[lane]:
                    self._failed = self._failed or error
                    for condition in self._conditions:
                        condition.notify()
            finally:
                with self._conditions[lane]:
                    self._places[lane] = done  # type: ignore[call-overload]
                    self._pass_on()

        threads = [threading.Thread(target=walk, args=(i,), name=f"lane-{i}") for i in range(len(bodies))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed is not None:
            raise self._failed
        return results

    def _pass_on(self) -> None:
        self._turn = min(range(len(self._places)), key=lambda lane: (self._places[lane], lane))
        self._conditions[self._turn].notify()

    def _wait_for_turn(self, lane: int) -> None:
        while self._turn != lane and self._failed is None:
            self._conditions[lane].wait()
        if self._failed is not None:
            raise RuntimeError("another lane failed") from self._failed
