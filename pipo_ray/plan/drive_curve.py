"""What a drive gives with so much in flight: a curve through all that was measured of it.

r(n) = r_best / (1 + (n_half / n)^m)^(1/m) bytes per second with n bytes in flight. With m = 1 it is Hockney's line
(r_infinity, n_1/2; Hockney and Jesshope, Parallel Computers 2, 1988): each batch of requests costs a fixed time before
its bytes, as on a virtual drive, which answers all that it was asked for together. With a large m it is the roofline
min(r_best, r_best / n_half n): a drive whose answers take their time, but overlap. Points with little in flight, where
rates differ by factors, settle n_half, and with it the last percents far beyond: what no single rate could, because two
measurements of one point differ by more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

_SHARPNESS = (8.0, 2.0, 1.0)
_HALVES = tuple(2.0 ** (14 + step / 8) for step in range(8 * 16))
"""Candidates for n_half: 16 KiB to 1 GiB, 9 % apart."""


@dataclass(frozen=True)
class DriveCurve:
    """`best_bytes_per_s` with any amount in flight, and `half_bytes` of it (n_half)."""

    best_bytes_per_s: float
    half_bytes: float
    sharpness: float

    def bytes_per_s(self, in_flight_bytes: float) -> float:
        """With so much in flight: rises with it."""
        return self.best_bytes_per_s / _lost(self.half_bytes / in_flight_bytes, self.sharpness)


def fit_curve(points: Iterable[tuple[float, float]]) -> DriveCurve:
    """The curve nearest to `points`: bytes in flight, bytes per second.

    That is the one with the least sum of distances in logarithms: with their squares a point that was measured while
    another program read would count most.

    Raises ValueError if there are none.
    """
    measured = [(in_flight, math.log(rate)) for in_flight, rate in points]
    if not measured:
        raise ValueError("a drive's curve needs a point")
    least, best = math.inf, DriveCurve(0.0, 0.0, 1.0)
    for sharpness in _SHARPNESS:
        for half in _HALVES:
            tops = [rate + math.log(_lost(half / in_flight, sharpness)) for in_flight, rate in measured]
            middle = statistics.median(tops)
            distance = math.fsum(abs(top - middle) for top in tops)
            if distance < least:
                least, best = distance, DriveCurve(math.exp(middle), half, sharpness)
    return best


def _lost(half_per_in_flight: float, sharpness: float) -> float:
    """By what factor a drive is slower than its best."""
    lost: float = (1 + half_per_in_flight**sharpness) ** (1 / sharpness)
    return lost
