"""The knobs of the transfer follow from what the drive gave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import InputError
from pipo_ray.plan.transfer import WITHOUT_PROFILE, ReadRate, check_mode, choose_transfer

MIB = 1 << 20
GRID = [(size * MIB, threads) for size in (1, 2, 4, 8, 16) for threads in (1, 2, 4, 8)]


@st.composite
def profiles(draw: st.DrawFn) -> list[ReadRate]:
    """Rates that saturate: a drive wants so many bytes in flight, and gives a fixed rate then, give or take noise."""
    wanted = draw(st.integers(1, 64)) * MIB
    noise = st.floats(0.9, 1.1)
    return [ReadRate(size, n, 2e9 * min(1.0, size * n / wanted) * draw(noise)) for size, n in GRID]


@given(profiles())
def test_a_slot_holds_a_transfer_and_staging_what_is_in_flight(profile: list[ReadRate]) -> None:
    chosen = choose_transfer(profile)
    for transfer in (chosen, choose_transfer(profile, "memory-saver")):
        assert 4096 <= transfer.transfer_bytes <= transfer.slot_bytes
        assert transfer.transfer_bytes % 4096 == transfer.slot_bytes % 4096 == 0
        assert transfer.transfer_bytes * transfer.read_threads <= transfer.staging_bytes
        assert transfer.num_slots >= 3
    point = next(r for r in profile if (r.transfer_bytes, r.threads) == (chosen.transfer_bytes, chosen.read_threads))
    assert point.bytes_per_s >= 0.98 * max(rate.bytes_per_s for rate in profile)


@given(profiles() | st.just([]))
def test_saving_takes_a_quarter_of_the_staging(profile: list[ReadRate]) -> None:
    full, saving = choose_transfer(profile), choose_transfer(profile, "memory-saver")
    assert saving.staging_bytes <= max(full.staging_bytes // 4, 5 * 256 * 1024)


def test_the_least_in_flight_of_what_is_as_fast_as_the_best() -> None:
    profile = [
        ReadRate(1 * MIB, 1, 0.8e9), ReadRate(2 * MIB, 2, 1.99e9), ReadRate(1 * MIB, 4, 1.98e9),
        ReadRate(16 * MIB, 4, 2.0e9),
    ]  # fmt: skip
    chosen = choose_transfer(profile)
    assert (chosen.transfer_bytes, chosen.read_threads) == (2 * MIB, 2)
    assert chosen.staging_bytes < WITHOUT_PROFILE.staging_bytes


def test_a_drive_that_was_not_measured() -> None:
    assert choose_transfer([]) == WITHOUT_PROFILE


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(InputError, match=r"--mode 'fast' is not known; give one of performance, memory-saver"):
        check_mode("fast")
