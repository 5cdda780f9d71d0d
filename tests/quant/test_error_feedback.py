"""Rounding with inputs: the codes of the method as the paper has it, and no row worse than rounded to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipo_ray.quant.error_feedback as module
from pipo_ray.quant.error_feedback import ErrorFeedback, InputMoments, loss, round_block
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.rounding import Rounded, round_to_nearest, values_of

NAMES = ("int4-g32", "int4", "int4-g32-sym", "int4-g128-sym")


def correlated(tokens: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs as a model has them: fewer directions than columns, and some columns much larger than others."""
    mixing = torch.randn(max(2, columns // 3), columns, generator=generator)
    inputs = torch.randn(tokens, len(mixing), generator=generator) @ mixing
    inputs += 0.1 * torch.randn(tokens, columns, generator=generator)
    return inputs * torch.rand(columns, generator=generator).mul_(3).exp_()


def moments_of(inputs: torch.Tensor) -> InputMoments:
    moments = InputMoments(inputs.shape[1])
    for part in inputs.split(100):
        moments.add(part)
    return moments


@settings(max_examples=12)
@given(st.sampled_from(NAMES), st.integers(1, 40), st.integers(1, 2), st.integers(1, 400), st.integers(0, 1 << 30))
def test_no_row_loses_more_than_rounded_to_nearest(name: str, rows: int, groups: int, tokens: int, seed: int) -> None:
    low_bit = LowBitFormat.parse(name)
    generator = torch.Generator().manual_seed(seed)
    columns = groups * low_bit.group
    moments = moments_of(correlated(tokens, columns, generator))
    weight = torch.randn(rows, columns, generator=generator)
    with ErrorFeedback(1) as feedback:
        rounded = feedback.round(weight, low_bit, moments)
    nearest = round_to_nearest(weight, low_bit)
    lost, before = (loss(weight, one, low_bit, moments.block(0)) for one in (rounded, nearest))
    assert bool((lost <= before * (1 + 1e-4) + 1e-6).all())
    assert int(rounded.codes.max()) <= 15
    if low_bit.symmetric:
        assert not rounded.zeros.any()


@pytest.mark.parametrize("name", NAMES)
def test_it_loses_much_less_where_inputs_are_correlated(name: str) -> None:
    low_bit = LowBitFormat.parse(name)
    generator = torch.Generator().manual_seed(1)
    moments = moments_of(correlated(2000, 256, generator))
    weight = torch.randn(128, 256, generator=generator)
    with ErrorFeedback(2) as feedback:
        rounded = feedback.round(weight.bfloat16(), low_bit, moments)
    nearest = round_to_nearest(weight, low_bit)
    lost, before = (float(loss(weight, one, low_bit, moments.block(0)).sum()) for one in (rounded, nearest))
    assert lost < 0.4 * before


def test_codes_are_those_of_solving_for_the_rest_after_each_column() -> None:
    """What the Cholesky factor does, done the slow way: round a column, then solve least squares for those behind."""
    low_bit = LowBitFormat(4, 4)
    generator = torch.Generator().manual_seed(3)
    moments = moments_of(correlated(50, 12, generator))
    weight = torch.randn(9, 12, generator=generator)
    factor = moments.factors()[0]
    codes, scales = module._feed_back(weight.T.clone(), low_bit, factor)
    inverse = (factor.double().T @ factor.double()).inverse()  # the damped H
    rest = weight.double().T.clone()
    for column in range(12):
        scale, zero = (part.double() for part in scales[column // 4])
        code = ((rest[column] - zero) / scale + 8).round().clamp(0, 15)
        assert torch.equal(code.float(), codes[column])
        error = rest[column] - (zero + (code - 8) * scale)
        if column < 11:
            behind = slice(column + 1, None)
            rest[behind] += torch.linalg.solve(inverse[behind, behind], inverse[behind, column])[:, None] * error


def test_codes_are_near_the_best_there_are() -> None:
    """All codes of four columns tried: with the same scales none loses much less in the mean, and none more than it."""
    low_bit = LowBitFormat(4, 4)
    generator = torch.Generator().manual_seed(5)
    moments = moments_of(correlated(200, 4, generator))
    weight = torch.randn(24, 4, generator=generator)
    found = round_block(weight, low_bit, moments.block(0), moments.factors()[0])
    every = torch.tensor(list(itertools.product(range(16), repeat=4)), dtype=torch.uint8)
    best, nearest = [], []
    for row, scale, zero in zip(weight, found.scales, found.zeros, strict=True):
        tried = Rounded(every, scale.expand(len(every), 1), zero.expand(len(every), 1))
        lost = loss(row.expand(len(every), 4), tried, low_bit, moments.block(0))
        best.append(float(lost.min()))
        plain = ((row - zero.float()) / scale.float() + 8).round().clamp(0, 15).to(torch.uint8)[None]
        nearest.append(float(loss(row[None], Rounded(plain, scale[None], zero[None]), low_bit, moments.block(0))))
    lost = loss(weight, found, low_bit, moments.block(0))
    assert all(float(one) >= least * (1 - 1e-4) for one, least in zip(lost, best, strict=True))
    assert float(lost.sum()) < 2 * sum(best)
    assert float(lost.sum()) < 0.75 * sum(nearest)


def test_blocks_of_columns_and_rows_are_rounded_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_COLUMNS", 64)
    monkeypatch.setattr(module, "_CHUNK_ROWS", 16)
    low_bit = LowBitFormat.parse("int4-g32")
    generator = torch.Generator().manual_seed(2)
    inputs = correlated(300, 160, generator)
    weight = torch.randn(40, 160, generator=generator)
    with ErrorFeedback(2) as feedback:
        whole = feedback.round(weight, low_bit, moments_of(inputs))
        parts = [
            feedback.round(weight[:, at], low_bit, moments_of(inputs[:, at]))
            for at in (slice(0, 64), slice(64, 128), slice(128, 160))
        ]
    for got, expected in zip(whole, (torch.cat(some, 1) for some in zip(*parts, strict=True)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["unused columns", "one token", "no inputs", "constant"])
def test_inputs_that_say_little(kind: str) -> None:
    low_bit = LowBitFormat.parse("int4-g32")
    generator = torch.Generator().manual_seed(7)
    inputs = correlated(200, 64, generator)
    weight = torch.randn(8, 64, generator=generator)
    if kind == "unused columns":
        inputs[:, 10:40] = 0
    elif kind == "one token":
        inputs = inputs[:1]
    elif kind == "no inputs":
        inputs = torch.zeros_like(inputs)
    else:
        weight[:] = -1.25
    with ErrorFeedback(1) as feedback:
        rounded = feedback.round(weight, low_bit, moments_of(inputs))
    assert bool(rounded.scales.isfinite().all())
    assert float((values_of(rounded, low_bit) - weight).abs().max()) < 2
    if kind == "constant":
        assert torch.equal(values_of(rounded, low_bit), weight)


def test_moments_are_the_mean_product_of_inputs() -> None:
    inputs = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    moments = moments_of(inputs)
    assert moments.count == 300
    assert torch.allclose(moments.block(0), inputs.T @ inputs / 300, atol=1e-5)
    assert moments.finite
    moments.add(torch.full((1, 24), torch.inf))
    assert not moments.finite
