"""The knobs of the transfer follow from what the drive gave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import InputError
from pipo_ray.plan.drive_curve import DriveCurve, fit_curve
from pipo_ray.plan.drive_probe import GRID
from pipo_ray.plan.pieces import PAGE
from pipo_ray.plan.transfer import (
    WITHOUT_PROFILE,
    Mode,
    ReadRate,
    Transfer,
    check_mode,
    choose_transfer,
    slowest,
)

MIB = 1 << 20


@st.composite
def profiles(draw: st.DrawFn) -> list[ReadRate]:
    """Rates that saturate: a drive wants so many bytes in flight, and gives a fixed rate then, give or take noise."""
    wanted = draw(st.integers(1, 64)) * MIB
    noise = st.floats(0.9, 1.1)
    return [ReadRate(size, n, 2e9 * min(1.0, size * n / wanted) * draw(noise)) for size, n in GRID]


def curve_of(profile: list[ReadRate]) -> DriveCurve:
    """Of bytes in flight."""
    return fit_curve((point.in_flight_bytes, point.bytes_per_s) for point in profile)


@given(profiles())
def test_a_slot_holds_a_transfer_and_staging_what_is_in_flight(profile: list[ReadRate]) -> None:
    chosen = choose_transfer(profile)
    for transfer in (chosen, choose_transfer(profile, "memory-saver")):
        assert 4096 <= transfer.transfer_bytes <= transfer.slot_bytes
        assert transfer.transfer_bytes % 4096 == transfer.slot_bytes % 4096 == 0
        assert transfer.transfer_bytes * transfer.read_threads <= transfer.staging_bytes
        assert transfer.num_slots >= 2
    curve = curve_of(profile)
    best = max(curve.bytes_per_s(size * threads) for size, threads in GRID)
    assert curve.bytes_per_s(chosen.transfer_bytes * chosen.read_threads) >= best / 1.0101


@given(profiles(), st.integers(1, 64), st.integers(1, 64))
def test_staging_is_worth_its_memory(profile: list[ReadRate], model_gib: int, weight_gib: int) -> None:
    """No other point gives a sweep that is shorter by more than 1 %."""
    sizes = {"model_bytes": (model_gib + weight_gib) * 1024 * MIB, "weight_bytes": weight_gib * 1024 * MIB}
    curve = curve_of(profile)

    def seconds(transfer: Transfer) -> float:
        streamed = sizes["model_bytes"] - sizes["weight_bytes"] + transfer.staging_bytes
        return streamed / curve.bytes_per_s(transfer.transfer_bytes * transfer.read_threads)

    chosen = seconds(choose_transfer(profile, **sizes))
    for point in profile:
        if point.threads >= 4 and point.in_flight_bytes >= 8 * MIB:
            only = [ReadRate(point.transfer_bytes, point.threads, point.bytes_per_s)]
            assert chosen <= 1.0101 * seconds(choose_transfer(only, **sizes))


def test_more_in_flight_where_that_reads_more_than_it_takes_from_the_residents() -> None:
    profile = [ReadRate(2 * MIB, 8, 1.1e9), ReadRate(16 * MIB, 16, 1.6e9)]
    deep = choose_transfer(profile, model_bytes=7000 * MIB, weight_bytes=3000 * MIB)
    assert deep.transfer_bytes * deep.read_threads == 256 * MIB
    shallow = choose_transfer(profile, model_bytes=7000 * MIB, weight_bytes=6700 * MIB)
    assert shallow.transfer_bytes * shallow.read_threads == 16 * MIB


@given(profiles() | st.just([]))
def test_saving_takes_a_quarter_of_the_staging(profile: list[ReadRate]) -> None:
    full, saving = choose_transfer(profile), choose_transfer(profile, "memory-saver")
    assert saving.staging_bytes <= max(full.staging_bytes // 4, 5 * 256 * 1024)


@given(profiles() | st.just([]))
def test_saving_on_a_gpu_takes_a_quarter_in_both_places_and_few_pieces(profile: list[ReadRate]) -> None:
    """The host gives orders for each piece, so they are larger than a quarter."""
    full, saving = choose_transfer(profile, on_gpu=True), choose_transfer(profile, "memory-saver", on_gpu=True)
    assert full.slot_bytes >= 32 * MIB
    if profile:
        assert full.read_threads >= 8
        assert full.transfer_bytes * full.read_threads >= 16 * MIB
    else:
        assert full == WITHOUT_PROFILE

    def staging(transfer: Transfer) -> int:
        return transfer.staging_bytes + transfer.num_gpu_slots * transfer.slot_bytes

    assert staging(full) // 4 - 3 * PAGE <= staging(saving) <= staging(full) // 4
    assert (saving.num_slots, saving.num_gpu_slots) == (1, 2)
    assert saving.slot_bytes > full.slot_bytes // 3
    assert saving.transfer_bytes * saving.read_threads <= saving.slot_bytes * -(-saving.num_slots // 2)


@given(profiles() | st.just([]))
def test_saving_asks_for_half_of_the_slots_at_a_time(profile: list[ReadRate]) -> None:
    """A drive that answers all reads together has the next ones while the products use what it has answered."""
    full, saving = choose_transfer(profile), choose_transfer(profile, "memory-saver")
    assert saving.num_slots == full.num_slots
    in_flight = saving.transfer_bytes * saving.read_threads
    assert in_flight <= -(-saving.num_slots // 2) * saving.slot_bytes < in_flight + saving.transfer_bytes


def test_the_least_in_flight_of_what_is_as_fast_as_the_best() -> None:
    profile = [
        ReadRate(1 * MIB, 8, 2.1e9), ReadRate(2 * MIB, 8, 1.99e9), ReadRate(4 * MIB, 8, 1.98e9),
        ReadRate(16 * MIB, 16, 2.0e9),
    ]  # fmt: skip
    chosen = choose_transfer(profile)
    assert (chosen.transfer_bytes, chosen.read_threads) == (1 * MIB, 8)
    assert chosen.staging_bytes < WITHOUT_PROFILE.staging_bytes


def test_more_in_flight_in_larger_pieces_for_a_gpu_and_for_several_drives() -> None:
    """A GPU's host gives orders for each piece; of several drives each has parts of 16 MiB."""
    profile = [ReadRate(2 * MIB, 4, 2e9), ReadRate(2 * MIB, 8, 2e9)]
    alone = choose_transfer(profile)
    assert (alone.read_threads, alone.slot_bytes, alone.num_slots) == (4, 8 * MIB + 2 * PAGE, 2)
    several = choose_transfer(profile, num_drives=2)
    assert (several.read_threads, several.slot_bytes, several.num_slots) == (8, 16 * MIB + 2 * PAGE, 3)
    for num_drives in (1, 2):
        on_gpu = choose_transfer(profile, on_gpu=True, num_drives=num_drives)
        assert (on_gpu.read_threads, on_gpu.slot_bytes) == (8, 32 * MIB + 2 * PAGE)
        assert (on_gpu.num_slots, on_gpu.num_gpu_slots) == (2, 3)


def test_saving_has_two_reads_in_flight_at_least() -> None:
    """With a single one a drive has nothing to do between them."""
    saving = choose_transfer([ReadRate(2 * MIB, 4, 2e9)], "memory-saver")
    assert (saving.num_slots, saving.slot_bytes) == (2, 2 * MIB)
    assert (saving.transfer_bytes, saving.read_threads) == (MIB, 2)


def test_reads_have_slots_beside_what_the_drive_has_answered() -> None:
    """A slot is computed with."""
    for threads, transfer, slots in ((4, 2, 2), (8, 2, 2), (8, 4, 3), (8, 8, 5), (8, 16, 9), (16, 16, 17)):
        assert choose_transfer([ReadRate(transfer * MIB, threads, 2e9)]).num_slots == slots


def test_few_reads_in_flight_are_not_enough_for_busy_cores() -> None:
    chosen = choose_transfer([ReadRate(8 * MIB, 1, 2.0e9), ReadRate(1 * MIB, 4, 2.0e9), ReadRate(8 * MIB, 8, 2.0e9)])
    assert chosen.transfer_bytes == 8 * MIB


def test_a_drive_that_was_not_measured() -> None:
    assert choose_transfer([]) == WITHOUT_PROFILE


@given(profiles() | st.just([]), st.integers(2, 4), st.sampled_from(["performance", "memory-saver"]))
def test_several_drives_share_the_slots(profile: list[ReadRate], num_drives: int, mode: Mode) -> None:
    """Each has as many as it would have alone with such pieces; a part of 16 MiB fits into one."""
    one = choose_transfer(profile, mode, on_gpu=mode == "performance")
    several = choose_transfer(profile, mode, num_drives=num_drives)
    assert several.transfer_bytes <= several.slot_bytes
    if mode == "performance":
        assert several.slot_bytes == 16 * MIB + 8192
        assert several.transfer_bytes * several.read_threads * num_drives <= several.staging_bytes
        if profile:
            assert (several.transfer_bytes, several.read_threads) == (one.transfer_bytes, one.read_threads)
            assert several.num_slots - 1 >= num_drives * (one.num_slots - 1) - num_drives
    else:
        assert several.num_slots >= (one.num_slots if profile else 2)
        assert several.read_threads >= 1


def test_a_sweep_ends_when_the_slowest_drive_does() -> None:
    fast = [ReadRate(MIB, 8, 3.0), ReadRate(2 * MIB, 8, 5.0)]
    slow = [ReadRate(MIB, 8, 1.0), ReadRate(2 * MIB, 8, 6.0)]
    assert slowest([fast, slow]) == (ReadRate(MIB, 8, 1.0), ReadRate(2 * MIB, 8, 5.0))
    assert slowest([fast]) == tuple(fast)
    assert slowest([fast, ()]) == ()
    assert slowest([]) == ()


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(InputError, match=r"--mode 'fast' is not known; give one of performance, memory-saver"):
        check_mode("fast")


def test_the_same_memory_in_fewer_slots() -> None:
    fewer = Transfer(slot_bytes=30, num_slots=5).in_fewer_slots(2)
    assert (fewer.slot_bytes, fewer.num_slots) == (60, 3)
    assert Transfer(num_slots=2).in_fewer_slots(4).num_slots == 2
    assert Transfer(num_slots=1).in_fewer_slots(2).num_slots == 1
