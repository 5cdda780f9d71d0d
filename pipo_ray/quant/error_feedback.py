"""Rounding that looks at data: what is lost in one column is made up for in those behind it.

GPTQ (Frantar et al., 2022, arXiv 2210.17323): with H = X^T X of the inputs X that a matrix is multiplied with, the loss
of rounding a row w to v is (w - v) H (w - v)^T. Columns are rounded one after the other, and what is lost in one is
made up for in the rest as far as they can stand in for it, which the Cholesky factor of the inverse of H says. Beyond
the paper: H is kept in diagonal blocks, so that it fits beside a wide matrix, and the loss is made up for within a
block; a group's scale and zero are those of least loss among several, for what is left to the group when its turn
comes; and when all codes are found, scales and zeros are fitted to them once more, with all of H. A row that came out
worse than rounded to nearest, which nothing in the method excludes, is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import torch

from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.rounding import Rounded, round_to_nearest, values_of

BLOCK_COLUMNS = 2048
"""Columns of a block: H takes 16 MiB for it, and its factors as much."""

_DAMPINGS = (0.05, 0.2, 0.8)
"""Of the mean of H's diagonal, added to it: the first with which float32 can factor it. The paper has 0.01, with which
the bundled model loses somewhat more.
"""

_SHRINKS = tuple(1 - 0.025 * step for step in range(16))
"""Shares of a group's range that are tried: clipping what is rare leaves smaller steps to the rest."""

_FITS = 2
"""Times that scale and zero are fitted to the codes that they give, as part of that search."""

_CHUNK_ROWS = 1024
"""What a thread rounds at once, of a block: 8 MiB in float32, and some six times that on the way."""

CHUNK_BYTES = 7 * 4 * _CHUNK_ROWS * BLOCK_COLUMNS


class InputMoments:
    """H of the inputs of a matrix with `columns` columns, divided by their number, in diagonal blocks."""

    def __init__(self, columns: int) -> None:
        self.ranges = [(at, min(at + BLOCK_COLUMNS, columns)) for at in range(0, columns, BLOCK_COLUMNS)]
        self.count = 0
        self._sums = [torch.zeros(stop - start, stop - start) for start, stop in self.ranges]
        self._factors: list[torch.Tensor] | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Inputs, float32 [tokens, columns]."""
        self.count += len(inputs)
        self._factors = None
        for total, (start, stop) in zip(self._sums, self.ranges, strict=True):
            part = inputs[:, start:stop]
            total.addmm_(part.T, part)

    def block(self, index: int) -> torch.Tensor:
        """Of `ranges[index]`: float32 [columns, columns]."""
        return self._sums[index] / max(1, self.count)

    def factors(self) -> list[torch.Tensor]:
        """Per block the upper Cholesky factor of the inverse of the damped H. Made once."""
        if self._factors is None:
            self._factors = [_inverse_factor(self.block(index)) for index in range(len(self.ranges))]
        return self._factors

    @property
    def finite(self) -> bool:
        """Whether no input was infinite or NaN."""
        return all(bool(total.isfinite().all()) for total in self._sums)


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    diagonal = moments.diagonal()
    mean = float(diagonal.mean()) or 1.0
    for damping in _DAMPINGS:
        # Of a column that is always zero, any code will do: it gets a place of its own in the diagonal.
        damped = moments + torch.diag(torch.where(diagonal > 0, damping * mean, mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return torch.as_tensor(factor)
    return torch.diag(torch.where(diagonal > 0, diagonal, mean).rsqrt())  # nothing is made up for


class _Scale(NamedTuple):
    """Scale and zero of a group of each row, float32 [rows], as bf16 keeps them."""

    scale: torch.Tensor
    zero: torch.Tensor


class ErrorFeedback:
    """Rounds int4 weights with what is known of their inputs, in `num_threads` threads. A context manager."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "round")

    def __enter__(self) -> ErrorFeedback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)

    def round(self, weight: torch.Tensor, low_bit: LowBitFormat, moments: InputMoments) -> Rounded:
        """Round `weight` [rows, columns], finite, in the int4 format `low_bit`. In each of `moments`' blocks, the
        H-weighted loss of no row is more than `round_to_nearest` gives it.
        """
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales = torch.empty(rows, columns // low_bit.group, dtype=torch.bfloat16)
        zeros = torch.empty_like(scales)
        factors = moments.factors()

        def one(start: int, index: int) -> None:
            first, last = moments.ranges[index]
            at, groups = slice(start, start + _CHUNK_ROWS), slice(first // low_bit.group, last // low_bit.group)
            with torch.no_grad():
                part = weight[at, first:last].float()
                rounded = round_block(part, low_bit, moments.block(index), factors[index])
            codes[at, first:last], scales[at, groups], zeros[at, groups] = rounded

        with one_thread_each():
            tasks = [
                self._threads.submit(one, start, index)
                for index in range(len(moments.ranges))
                for start in range(0, rows, _CHUNK_ROWS)
            ]
            for task in tasks:
                task.exception()  # nobody may still be writing when one has failed
        for task in tasks:
            task.result()
        return Rounded(codes, scales, zeros)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within this context torch's products start no threads: the threads that ask for them are enough."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def round_block(weight: torch.Tensor, low_bit: LowBitFormat, moments: torch.Tensor, factor: torch.Tensor) -> Rounded:
    """Round `weight`, float32 [rows, columns], with `moments` (H) and its `factor`, both [columns, columns]."""
    nearest = round_to_nearest(weight, low_bit)
    original = weight.T.contiguous()
    codes, scales = _feed_back(original.clone(), low_bit, factor)
    found = Rounded(codes.T.to(torch.uint8), *(torch.stack(parts, 1).bfloat16() for parts in zip(*scales, strict=True)))
    fitted = _fit_all(original, codes, scales, low_bit, moments)
    best, least = nearest, loss(weight, nearest, low_bit, moments)
    for other in (found, fitted):
        lost = loss(weight, other, low_bit, moments)
        better = (lost < least)[:, None]
        best = Rounded(*(torch.where(better, new, old) for new, old in zip(other, best, strict=True)))
        least = torch.minimum(lost, least)
    return best


def loss(weight: torch.Tensor, rounded: Rounded, low_bit: LowBitFormat, moments: torch.Tensor) -> torch.Tensor:
    """(w - v) H (w - v)^T of each row, [rows]."""
    error = weight - values_of(rounded, low_bit)
    return (error @ moments).mul_(error).sum(1)


def _feed_back(rest: torch.Tensor, low_bit: LowBitFormat, factor: torch.Tensor) -> tuple[torch.Tensor, list[_Scale]]:
    """Codes, float32 [columns, rows], and scales by group. `rest` [columns, rows] is used up: it becomes what is left
    to each column when its turn comes.
    """
    group = low_bit.group
    codes = torch.empty_like(rest)
    scales: list[_Scale] = []
    # What an error in a column costs, when those behind it make up for it as well as they can.
    costs = factor.diagonal().square().reciprocal()
    errors = torch.empty(group, rest.shape[1])
    for start in range(0, len(rest), group):
        stop = start + group
        chosen = _choose_scale(rest[start:stop], costs[start:stop], low_bit)
        scales.append(chosen)
        inverse = _inverse(chosen.scale)
        for column in range(start, stop):
            wanted, code = rest[column], codes[column]
            _code(wanted, chosen, inverse, out=code)
            error = errors[column - start]
            torch.addcmul(chosen.zero, code - 8, chosen.scale, out=error)
            torch.sub(wanted, error, out=error).div_(factor[column, column])
            rest[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes, scales


def _code(values: torch.Tensor, at: _Scale, inverse: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The nearest codes, 0 to 15, of `values` [..., rows]."""
    return torch.mul(torch.sub(values, at.zero, out=out), inverse, out=out).add_(8).round_().clamp_(0, 15)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale).reciprocal()


def _kept(scale: torch.Tensor, zero: torch.Tensor) -> _Scale:
    return _Scale(scale.bfloat16().float(), zero.bfloat16().float())


def _choose_scale(values: torch.Tensor, costs: torch.Tensor, low_bit: LowBitFormat) -> _Scale:
    """For a group's `values` [group, rows]: least sum of `costs` [group] times the squared errors, among shares of its
    range, and fits to the codes of the best of them.
    """
    low, high = values.amin(0), values.amax(0)
    zero = torch.zeros_like(low)
    best: _Scale | None = None
    least = torch.full_like(low, torch.inf)
    weights = costs[:, None]

    def attempt(candidate: _Scale) -> None:
        nonlocal best
        errors = _code(values, candidate, _inverse(candidate.scale)).sub_(8)
        torch.addcmul(candidate.zero, errors, candidate.scale, out=errors).sub_(values)
        lost = costs @ errors.square_()
        better = lost < least
        if best is None:
            best = candidate
        best = _Scale(*(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)))
        least.copy_(torch.minimum(lost, least))

    for share in _SHRINKS:
        if low_bit.symmetric:
            # As in `round_to_nearest`: codes reach from -8 to 7, and the largest magnitude gets the -8.
            attempt(_kept(torch.where(high > -low, high, low).mul_(share / -8), zero))
        else:
            scale = high.sub(low).mul_(share / 15)
            attempt(_kept(scale, torch.add(low, high).div_(2).add_(scale, alpha=0.5)))
    assert best is not None
    for _ in range(_FITS):
        codes = _code(values, best, _inverse(best.scale)).sub_(8)
        if low_bit.symmetric:
            square = costs @ codes.square()
            scale = torch.where(square > 0, costs @ (codes * values) / square, best.scale)
            attempt(_kept(scale, zero))
            continue
        mean_code, mean = costs @ codes / costs.sum(), costs @ values / costs.sum()
        codes -= mean_code
        square = costs @ codes.square()
        scale = torch.where(square > 0, (weights * codes * (values - mean)).sum(0) / square, best.scale)
        attempt(_kept(scale, mean - scale * mean_code))
    return best


def _fit_all(
    original: torch.Tensor, codes: torch.Tensor, scales: Sequence[_Scale], low_bit: LowBitFormat, moments: torch.Tensor
) -> Rounded:
    """With the codes as they are, group by group the scale and zero of least loss, that of all columns counted."""
    group = low_bit.group
    centred = codes - 8
    gradient = original.clone()
    for index, one in enumerate(scales):
        at = slice(index * group, (index + 1) * group)
        gradient[at] -= torch.addcmul(one.zero, centred[at], one.scale)
    gradient = moments @ gradient
    fitted: list[_Scale] = []
    for index, one in enumerate(scales):
        at = slice(index * group, (index + 1) * group)
        part, own = centred[at], moments[at, at]
        by_code = own @ part
        # The normal equations of two unknowns: how much the scale, and how much the zero is to change.
        codes_codes, codes_ones, ones_ones = (by_code * part).sum(0), by_code.sum(0), own.sum()
        wanted_codes, wanted_ones = (gradient[at] * part).sum(0), gradient[at].sum(0)
        if low_bit.symmetric:
            scale = torch.where(codes_codes > 0, wanted_codes / codes_codes, torch.zeros_like(codes_codes))
            zero = torch.zeros_like(scale)
        else:
            determinant = codes_codes * ones_ones - codes_ones.square()
            solvable = determinant > 1e-6 * codes_codes * ones_ones
            divisor = torch.where(solvable, determinant, torch.full_like(determinant, torch.inf))
            scale = (wanted_codes * ones_ones - wanted_ones * codes_ones) / divisor
            zero = (wanted_ones * codes_codes - wanted_codes * codes_ones) / divisor
        new = _kept(one.scale + scale, one.zero + zero)
        gradient.addmm_(moments[:, at], torch.addcmul(new.zero - one.zero, part, new.scale - one.scale), alpha=-1)
        fitted.append(new)
    return Rounded(codes.T.to(torch.uint8), *(torch.stack(parts, 1).bfloat16() for parts in zip(*fitted, strict=True)))
