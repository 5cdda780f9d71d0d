"""Text of LLVM functions."""

from __future__ import annotations

import pytest

from pipo_ray.compiled import int4
from pipo_ray.compiled.instruction_sets import FUNCTIONS
from pipo_ray.compiled.ir import Function, bf16_bits
from pipo_ray.compiled.row_products import inputs_at_once


def test_every_name_is_used_once() -> None:
    function = Function("f", ("count", "next"))
    with function.tasks(function.place_of("next"), function.field("count")), function.loop(4):
        function.variable("i64", "0")
    names = [line.split(" = ")[0].strip() for line in function.text().splitlines() if " = " in line]
    labels = [line for line in function.text().splitlines() if line.endswith(":")]
    assert len(set(names)) == len(names)
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("value", [0.0, 1.0, -8.0, 0.5, 7.0])
def test_bf16_is_the_upper_half_of_float32(value: float) -> None:
    sign, exponent, mantissa = bf16_bits(value) >> 15, bf16_bits(value) >> 7 & 255, bf16_bits(value) & 127
    assert value == (0.0 if not exponent else (-1) ** sign * 2.0 ** (exponent - 127) * (1 + mantissa / 128))


def test_numbers_that_bf16_has_not() -> None:
    with pytest.raises(ValueError, match=r"0\.1 is no bf16 number"):
        bf16_bits(0.1)


@pytest.mark.parametrize("num_inputs", range(1, 40))
def test_inputs_are_divided_into_few_parts_of_about_the_same_size(num_inputs: int) -> None:
    at_once = inputs_at_once(num_inputs, int4.MOST_INPUTS)
    parts = -(-num_inputs // at_once)
    assert 1 <= at_once <= int4.MOST_INPUTS
    assert parts == -(-num_inputs // int4.MOST_INPUTS)
    assert parts * at_once - num_inputs < parts


def test_avx2_stores_whole_vectors_of_bf16() -> None:
    """A kernel that leaves numbers out is noticed when it is written, not by what it overwrites."""
    function = FUNCTIONS["avx2"]("f", ("row", "count"))
    with pytest.raises(ValueError, match="AVX2 stores 16 numbers in bf16 and not %v"):
        function.store_rounded(function.load("<16 x float>", "%context"), "%context", function.field("count"))
