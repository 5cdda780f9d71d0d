"""Measured seconds in, a choice out."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.model.kernel_profile import Cost, KernelProfile, cleaned

rates = st.lists(st.floats(1e-12, 1e-6), min_size=1, max_size=6)


def test_a_cost_is_linear_between_what_was_measured_and_in_proportion_beyond() -> None:
    cost = Cost(1.0, (1, 4, 8), (2.0, 5.0, 7.0))
    assert [cost.seconds(rows, 10) for rows in (1, 2, 4, 6, 8, 16)] == pytest.approx([21, 31, 51, 61, 71, 141])
    assert Cost(0.5, (1,), (2.0,)).seconds(3, 1) == pytest.approx(6.5)


@given(rates)
def test_cleaned_rates_rise_and_are_never_above_what_was_measured(measured: list[float]) -> None:
    result = cleaned(measured)
    assert list(result) == sorted(result)
    assert all(clean <= rate for clean, rate in zip(result, measured, strict=True))
    assert cleaned(result) == result


def a_profile() -> KernelProfile:
    """A processor without 16-bit arithmetic: torch's own product is cheap to start and for one row."""
    return KernelProfile(
        "bfloat16", 2,
        {"linear": {"native": Cost(1e-6, (1, 8), (1e-10, 8e-10)), "wide": Cost(1e-4, (1, 8), (3e-10, 4e-10)),
                    "tall": Cost(1e-4, (1, 8), (3e-10, 9e-10))},
         "matmul": {"native": Cost(1e-6, (1,), (1e-9,)), "wide": Cost(1e-4, (1,), (1e-9,))}},
    )  # fmt: skip


def test_the_least_time_is_chosen() -> None:
    profile = a_profile()
    assert [profile.choose("linear", rows, 1 << 24) for rows in (1, 2, 4, 8, 512)] == ["native"] * 2 + ["wide"] * 3
    assert profile.choose("linear", 512, 64) == "native"
    assert profile.choose("matmul", 5, 1 << 24) == "native"


def test_fast_16_bit_arithmetic_keeps_torchs_own_product() -> None:
    costs = {"native": Cost(1e-6, (1, 32), (1e-10, 1.1e-10)), "wide": Cost(1e-4, (1, 32), (2e-10, 3e-10)),
             "tall": Cost(1e-4, (1, 32), (2e-10, 3e-10))}  # fmt: skip
    profile = KernelProfile("bfloat16", 2, {"linear": costs})
    assert {profile.choose("linear", rows, 1 << 24) for rows in (1, 7, 32, 4096)} == {"native"}


def test_a_profile_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    assert KernelProfile.load(file) is None
    a_profile().save(file)
    assert KernelProfile.load(file) == a_profile()
    assert list(tmp_path.iterdir()) == [file]
