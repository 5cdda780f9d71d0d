"""The compute worker's thread: one sweep after the other, in the order in which the scheduler sent them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from pipo_ray.messages import SweepRequest
from pipo_ray.model import engine_thread
from pipo_ray.model.engine_thread import EngineThread, OvertookError
from pipo_ray.session.processes import identify


def _request(turn: int, ahead: bool = True) -> SweepRequest:
    return SweepRequest(turn, (), sent_ahead_by=identify(os.getpid()) if ahead else None, turn=turn)


def _in_threads(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_sweep_that_overtook_another_waits_for_it() -> None:
    thread = EngineThread()
    ran: list[tuple[int, int]] = []
    waits = threading.Event()

    def sweep(turn: int, ahead: bool) -> None:
        if not ahead:
            waits.wait(0.05)  # the one sent behind it is here first
        thread.sweep(_request(turn, ahead), lambda: ran.append((turn, threading.get_ident())))

    _in_threads(lambda: sweep(2, ahead=True), lambda: sweep(1, ahead=False))
    assert [turn for turn, _ in ran] == [1, 2]
    assert len({ident for _, ident in ran}) == 1


def test_the_next_sweep_begins_before_the_first_ones_answer_is_taken() -> None:
    """While the first one runs, the second is already queued: nobody has to come for the result in between."""
    thread = EngineThread()
    running, go_on, second = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        running.set()
        assert go_on.wait(10)

    one = thread._queue(_request(1, ahead=False), first)
    assert running.wait(10)
    two = thread._queue(_request(2), second.set)
    assert not second.is_set()
    go_on.set()
    assert second.wait(10)
    assert one.exception() is None
    assert two.exception() is None


def test_a_sweep_whose_predecessor_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_thread, "_PATIENCE_S", 0.01)
    thread = EngineThread()
    with pytest.raises(OvertookError, match="sweep 3 came, and not 2 in front of it"):
        thread.sweep(_request(3), lambda: None)
    assert thread.sweep(_request(7, ahead=False), lambda: "ran") == "ran"  # a new scheduler, or a step tried again


def test_what_it_raises_is_the_callers() -> None:
    thread = EngineThread()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0)
    assert thread.call(lambda: 2) == 2
