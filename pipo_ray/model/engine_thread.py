"""The one thread that the compute worker's engine lives in, and the order in which it is given sweeps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipo_ray.messages import SweepRequest

Result = TypeVar("Result")

_PATIENCE_S = 10.0


class OvertookError(Exception):
    """The sweep in front of this one never came."""


class EngineThread:
    """Runs what it is given, one after the other, in one thread; any thread may ask.

    A sweep that was sent ahead waits here, and begins as soon as the one in front has ended: by itself a Ray actor's
    thread would first answer the call before, and then be given the next one, which took 4 - 9 ms beside a GPU that
    had nothing to copy meanwhile. Calls of an actor with several threads may overtake each other, so the order is
    kept here.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._changed = threading.Condition()
        self._latest = 0

    def call(self, function: Callable[[], Result]) -> Result:
        """What `function` returns or raises."""
        return self._executor.submit(function).result()

    def sweep(self, request: SweepRequest, function: Callable[[], Result]) -> Result:
        """`call`; behind the sweep sent before it if `request` was sent ahead. Raises OvertookError if that one does
        not come.
        """
        return self._queue(request, function).result()

    def _queue(self, request: SweepRequest, function: Callable[[], Result]) -> Future[Result]:
        with self._changed:
            if request.sent_ahead_by is not None and not self._changed.wait_for(
                lambda: self._latest == request.turn - 1, _PATIENCE_S
            ):
                raise OvertookError(f"sweep {request.turn} came, and not {request.turn - 1} in front of it")
            self._latest = request.turn
            self._changed.notify_all()
            return self._executor.submit(function)


__all__ = ["EngineThread", "OvertookError"]
