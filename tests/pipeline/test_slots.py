"""The slot table between threads: one writer per transition, and a word that is waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.pipeline.slots import PieceUnreadableError, SlotState, SlotTable, StoppedError


def make_table(num_slots: int, num_resident: int = 0) -> SlotTable:
    return SlotTable(np.zeros(SlotTable.nbytes(num_slots, num_resident), np.uint8), num_slots, num_resident)


def never() -> bool:
    return False


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slot table needs 320 bytes, got 319"):
        SlotTable(np.zeros(319, np.uint8), 2, 1)


def test_one_load() -> None:
    table = make_table(1)
    assert table.view(0).state == SlotState.FREE
    table.begin_fill(0, 7)
    assert (table.view(0).state, table.view(0).load) == (SlotState.FILLING, 7)
    table.finish_fill(0, 7)
    assert table.is_loaded(0, 7)
    assert not table.is_loaded(0, 8)
    assert table.wait_ready(0, 7, never) == 0
    table.release(0, 7)
    assert table.view(0).state == SlotState.FREE
    assert table.consumed == 8
    assert table.wait_free(0, 0) == 0


def test_the_state_of_the_load_before_is_not_taken_for_that_of_the_next() -> None:
    """Whoever waits looks at state and number while the slot changes hands in between."""
    handed_over: list[bool] = []

    class Table(SlotTable):
        def _state_at(self, row: int) -> int:
            state = super()._state_at(row)
            if not handed_over:
                handed_over.append(True)
                self.release(0, 7)
                self.begin_fill(0, 8)
            return state

    table = Table(np.zeros(SlotTable.nbytes(1, 0), np.uint8), 1, 0)
    table.begin_fill(0, 7)
    table.finish_fill(0, 7)
    with pytest.raises(StoppedError):
        table.wait_ready(0, 8, lambda: bool(handed_over))
    assert table.view(0).state == SlotState.FILLING


def test_a_failed_load_is_an_error_and_is_forgotten_with_its_epoch() -> None:
    table = make_table(1, 1)
    table.begin_fill(0, 0)
    table.finish_fill(0, 0, failed=True)
    with pytest.raises(OSError, match="could not read"):
        table.wait_ready(0, 0, never)
    table.finish_resident(0, failed=True)
    assert not table.resident_ready(0)
    with pytest.raises(OSError, match="could not read"):
        table.wait_resident(0, never)
    table.clear_slots()
    table.finish_resident(0)
    assert table.view(0).state == SlotState.FREE
    assert table.wait_resident(0, never) == 0


@pytest.mark.parametrize(("num_slots", "num_loads"), [(1, 300), (2, 500), (5, 500)])
def test_threads_hand_slots_to_and_fro(num_slots: int, num_loads: int) -> None:
    """Compute sees each load once, in order, whole, and never one that is being overwritten."""
    table = make_table(num_slots)
    slots = np.zeros((num_slots, 512), np.int64)
    failures: list[BaseException] = []

    def load() -> None:
        try:
            for number in range(num_loads):
                slot = number % num_slots
                table.wait_free(slot, 0)
                table.begin_fill(slot, number)
                slots[slot] = -1
                slots[slot] = number
                table.finish_fill(slot, number)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    for number in range(num_loads):
        slot = number % num_slots
        table.wait_ready(slot, number, never)
        assert (slots[slot] == number).all()
        table.release(slot, number)
    thread.join(10)
    assert not failures
    assert table.consumed == num_loads


@pytest.mark.parametrize("waiter", ["wait_free", "wait_ready", "wait_resident", "wait_epoch_change", "wait_epoch_seen"])
def test_stop_wakes_everybody(waiter: str) -> None:
    table = make_table(1, 1)
    table.begin_fill(0, 3)
    calls: dict[str, Callable[[], object]] = {
        "wait_free": lambda: table.wait_free(0, 0),
        "wait_ready": lambda: table.wait_ready(0, 3, never),
        "wait_resident": lambda: table.wait_resident(0, never),
        "wait_epoch_change": lambda: table.wait_epoch_change(0),
        "wait_epoch_seen": lambda: table.wait_epoch_seen(1, never),
    }
    ended: list[str] = []

    def wait() -> None:
        try:
            calls[waiter]()
            ended.append("returned")
        except StoppedError:
            ended.append("stopped")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    assert not ended
    table.stop()
    thread.join(5)
    assert ended == ["returned" if waiter == "wait_epoch_change" else "stopped"]


def test_a_new_epoch_wakes_the_loader() -> None:
    table = make_table(1)
    table.begin_fill(0, 3)
    table.finish_fill(0, 3)
    ended: list[str] = []

    def wait() -> None:
        try:
            table.wait_free(0, 0)
        except StoppedError:
            ended.append("stopped")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    table.restart_sweep(5)
    thread.join(5)
    assert ended == ["stopped"]


def test_compute_stops_waiting_when_its_caller_says_so() -> None:
    table = make_table(1)
    with pytest.raises(StoppedError):
        table.wait_ready(0, 0, lambda: True)


@given(st.integers(1, 6), st.integers(1, 9), st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_epochs_begin_with_a_sweep_and_never_use_a_load_number_again(
    num_slots: int, loads_per_sweep: int, consumed: list[int]
) -> None:
    table = make_table(num_slots)
    first = 0
    for epoch, used in enumerate(consumed, 1):
        for load in range(first, first + used):
            table.release(load % num_slots, load)
        read_ahead = first + used + num_slots  # the loader may have got so far
        first = table.restart_sweep(loads_per_sweep)
        assert table.epoch == epoch
        assert first % loads_per_sweep == 0
        assert first >= read_ahead
        assert first == table.first_load == table.consumed


def test_epochs_without_loads() -> None:
    table = make_table(2, 1)
    assert table.restart_sweep(0) == 0
    assert table.epoch == 1


def test_releases_out_of_order_do_not_lower_the_count() -> None:
    """A parent's piece is released behind its children's."""
    table = make_table(3)
    table.release(1, 1)
    table.release(2, 2)
    table.release(0, 0)
    assert table.consumed == 3


def test_each_loader_clears_what_is_its_own() -> None:
    table = SlotTable(np.zeros(SlotTable.nbytes(4, 2, 2), np.uint8), 4, 2, 2)
    for slot, (loader, failed) in enumerate([(0, False), (1, False), (0, True), (1, True)]):
        table.begin_fill(slot, slot, loader)
        table.finish_fill(slot, slot, failed=failed)
    for loader in (0, 1):
        table.finish_resident(loader, failed=True, loader=loader)

    def states() -> list[SlotState]:
        return [table.view(slot).state for slot in range(4)]

    table.clear_unfinished(1)
    assert states() == [SlotState.READY, SlotState.READY, SlotState.FAILED, SlotState.FREE]
    with pytest.raises(PieceUnreadableError):
        table.wait_resident(0, never)
    with pytest.raises(StoppedError):  # to be read again
        table.wait_resident(1, lambda: True)
    table.clear_slots(0)
    assert states() == [SlotState.FREE, SlotState.READY, SlotState.FREE, SlotState.FREE]


def test_every_loader_must_have_seen_an_epoch() -> None:
    table = SlotTable(np.zeros(SlotTable.nbytes(1, 0, 2), np.uint8), 1, 0, 2)
    table.restart_sweep(1)
    table.acknowledge_epoch(1, 0)
    with pytest.raises(StoppedError):
        table.wait_epoch_seen(1, lambda: True)
    table.acknowledge_epoch(1, 1)
    table.wait_epoch_seen(1, never)


def test_a_slot_is_free_only_for_the_load_whose_turn_it_is() -> None:
    table = make_table(1)
    with pytest.raises(StoppedError):
        table.wait_free(0, 1, after=3)
    table.begin_fill(0, 3)
    table.finish_fill(0, 3)
    table.release(0, 3)
    assert table.wait_free(0, 0, after=3) == 0


def test_a_loader_of_the_old_epoch_still_finds_its_first_load() -> None:
    table = make_table(2)
    first = table.restart_sweep(5)
    assert table.first_load_of(0) == 0
    second = table.restart_sweep(5, preload=True)
    assert (table.first_load_of(1), table.first_load_of(2)) == (first, second)
    assert (table.preloading(1), table.preloading(2)) == (False, True)
