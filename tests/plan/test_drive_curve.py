"""A drive's rate follows from a curve through all that was measured of it."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.plan.drive_curve import fit_curve
from pipo_ray.plan.drive_probe import GRID
from pipo_ray.plan.transfer import ReadRate, Transfer, choose_transfer

MIB = 1 << 20
IN_FLIGHT = sorted({size * threads for size, threads in GRID})
rates = st.lists(st.tuples(st.sampled_from(IN_FLIGHT), st.floats(1e6, 1e11)), min_size=1, max_size=12)


@given(rates)
def test_rates_rise_and_are_among_those_measured(points: list[tuple[float, float]]) -> None:
    curve = fit_curve(points)
    found = [curve.bytes_per_s(in_flight) for in_flight in IN_FLIGHT]
    assert found == sorted(found)
    measured = [rate for _, rate in points]
    assert min(measured) / 1.001 <= max(curve.bytes_per_s(in_flight) for in_flight, _ in points)
    assert max(measured) * 1.001 >= min(curve.bytes_per_s(in_flight) for in_flight, _ in points)


@given(st.floats(15.0, 29.0), st.sampled_from([1.0, 2.0, 8.0]))
def test_a_drive_on_a_curve_is_found(half: float, sharpness: float) -> None:
    """Its half amount lies between two candidates, 9 % apart: no rate is off by more than half of that."""

    def rate(in_flight: float) -> float:
        return float(2e9 / (1 + (2**half / in_flight) ** sharpness) ** (1 / sharpness))

    curve = fit_curve((in_flight, rate(in_flight)) for in_flight in IN_FLIGHT)
    for in_flight in IN_FLIGHT:
        assert curve.bytes_per_s(in_flight) == pytest.approx(rate(in_flight), rel=0.045)


def test_a_fixed_time_for_each_batch() -> None:
    """Hockney's line, as this virtual drive's: 0.22 ms for a batch, then 2.78 GB/s."""
    curve = fit_curve((in_flight, in_flight / (0.22e-3 + in_flight / 2.78e9)) for in_flight in IN_FLIGHT)
    assert curve.sharpness == 1.0
    assert curve.best_bytes_per_s == pytest.approx(2.78e9, rel=0.005)
    assert curve.bytes_per_s(16 * MIB) / curve.bytes_per_s(64 * MIB) == pytest.approx(0.973, abs=0.002)


def test_one_point_is_the_rate_of_as_much() -> None:
    assert fit_curve([(MIB, 5.0)]).bytes_per_s(MIB) == pytest.approx(5.0)


def test_without_a_point_there_is_no_curve() -> None:
    with pytest.raises(ValueError, match="needs a point"):
        fit_curve([])


def probed(chance: random.Random, spread: float) -> list[ReadRate]:
    """What one probe of that virtual drive sees."""
    return [
        ReadRate(size, threads, math.exp(chance.gauss(0, spread)) / (0.22e-3 / size / threads + 1 / 2.78e9))
        for size, threads in GRID
    ]


@pytest.mark.parametrize("streamed_gib", [3, 5])
def test_probes_of_one_drive_choose_the_same(streamed_gib: int) -> None:
    """Of 50 whose rates are off by 2 %, all but one or two; by single rates three sizes took turns."""
    chance = random.Random(1)
    chosen: Counter[Transfer] = Counter(
        choose_transfer(probed(chance, 0.02), model_bytes=streamed_gib * 1024 * MIB, weight_bytes=96 * MIB)
        for _ in range(50)
    )
    assert chosen.most_common(1)[0][1] >= 48


def test_a_point_that_was_disturbed_does_not_count() -> None:
    """Another program read meanwhile: three of twelve rates are a third of what they would be."""
    quiet = [(size * threads, 1 / (0.22e-3 / size / threads + 1 / 2.78e9)) for size, threads in GRID]
    for disturbed in range(10):
        points = [(n, rate / 3 if disturbed <= at < disturbed + 3 else rate) for at, (n, rate) in enumerate(quiet)]
        assert fit_curve(points).bytes_per_s(16 * MIB) == pytest.approx(2.68e9, rel=0.02)
