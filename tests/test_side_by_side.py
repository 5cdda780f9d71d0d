"""Which tests may run at the same time, when there are several processes for them."""

from __future__ import annotations

import threading
from pathlib import Path

from side_by_side import Turns

SOON_S, LATER_S = 0.1, 10.0


class Contender:
    """Wants a turn, in a thread of its own, with locks of its own as another process has them."""

    def __init__(self, folder: Path, alone: bool) -> None:
        self._turns, self._alone = Turns(folder), alone
        self._inside, self._finish = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._turns.turn(self._alone):
            self._inside.set()
            self._finish.wait()

    def has_it(self) -> bool:
        return self._inside.wait(LATER_S)

    def waits(self) -> bool:
        return not self._inside.wait(SOON_S)

    def finish(self) -> None:
        self._finish.set()
        self._thread.join(LATER_S)
        assert not self._thread.is_alive()


def test_ordinary_tests_run_side_by_side(tmp_path: Path) -> None:
    both = [Contender(tmp_path, alone=False) for _ in range(2)]
    assert all(one.has_it() for one in both)
    for one in both:
        one.finish()


def test_who_is_alone_waits_for_all_and_all_wait_for_it(tmp_path: Path) -> None:
    before = [Contender(tmp_path, alone=False) for _ in range(2)]
    assert all(one.has_it() for one in before)
    alone = Contender(tmp_path, alone=True)
    assert alone.waits()
    behind = Contender(tmp_path, alone=False)
    assert behind.waits()  # or who wants to be alone would wait for whoever comes next, for ever
    before[0].finish()
    assert alone.waits()
    before[1].finish()
    assert alone.has_it()
    assert behind.waits()
    alone.finish()
    assert behind.has_it()
    behind.finish()


def test_a_test_that_raises_gives_its_turn_back(tmp_path: Path) -> None:
    for alone in (True, False):
        try:
            with Turns(tmp_path).turn(alone):
                raise KeyError
        except KeyError:
            pass
        follower = Contender(tmp_path, alone=True)
        assert follower.has_it()
        follower.finish()
