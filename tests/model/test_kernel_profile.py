"""Measured seconds in, a choice out."""

from __future__ import annotations

import json
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


PIECE = 8192 * 7168


def h200(slower: float) -> KernelProfile:
    """An H200's device with a piece of OPT-30B's in int4, as a former kernel multiplied it, and a host that is so many
    times slower than it is alone.
    """

    def cost(launch_s: float, **seconds: float) -> Cost:
        by_rows = {int(name[1:]): taken / PIECE for name, taken in seconds.items()}
        return Cost(0.0, tuple(by_rows), tuple(by_rows.values()), slower * launch_s)

    codes = cost(27e-6, _8=50e-6, _16=57e-6, _24=69e-6, _32=79e-6, _64=108e-6)
    native = cost(45e-6, _8=88e-6, _64=88e-6, _256=100e-6)
    return KernelProfile("bfloat16", 2, {"cuda-int4": {"codes": codes, "native": native}})


@pytest.mark.parametrize("slower", [1.0, 3.0])
def test_what_takes_the_host_longer_than_the_device_is_chosen_by_the_host(slower: float) -> None:
    """The piece is unpacked in two chunks, four launches, which hold up whoever waits for the host."""

    def chosen(rows: int, chunks: int = 2) -> str:
        return h200(slower).choose("cuda-int4", rows, PIECE, (), {"native": chunks})

    assert {chosen(rows) for rows in range(5, 33)} == {"codes"}
    assert chosen(256) == "native"
    assert chosen(64) == ("native" if slower == 1.0 else "codes")
    assert chosen(256, chunks=20) == "codes"


def test_of_kernels_that_the_host_launches_as_fast_the_one_that_computes_faster_is_chosen() -> None:
    vector, tiles = Cost(0.0, (1, 4), (2e-13, 5e-13), 81e-6), Cost(0.0, (1, 4), (3e-13, 4e-13), 81e-6)
    profile = KernelProfile("bfloat16", 2, {"cuda-int8": {"vector": vector, "tiles": tiles}})
    assert [profile.choose("cuda-int8", rows, 1 << 24) for rows in (1, 4)] == ["vector", "tiles"]


def test_a_profile_without_launches_is_read(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    h200(1.0).save(file)
    assert KernelProfile.load(file) == h200(1.0)
    raw = json.loads(file.read_text())
    for cost in raw["costs"]["cuda-int4"].values():
        del cost["launch_s"]
    file.write_text(json.dumps(raw))
    assert KernelProfile.load(file) == h200(0.0)


def test_a_profile_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    assert KernelProfile.load(file) is None
    a_profile().save(file)
    assert KernelProfile.load(file) == a_profile()
    assert list(tmp_path.iterdir()) == [file]
