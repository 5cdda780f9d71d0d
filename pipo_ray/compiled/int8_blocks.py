"""Products of many rows of bf16 inputs with int8 panels, as LLVM IR.

64 rows and 2048 columns of a weight at a time are unpacked to bf16, which holds every code exactly, into memory that
stays in the second cache: of two columns four vectors of 16 rows. One instruction multiplies both columns with those of
an input and adds to float32; with six rows of inputs the 24 sums fill the registers, and all rows of inputs go over the
same weights, while sums wait in memory. The only roundings are those of float32 sums, and that of the result. A row of
inputs gives the same bits however many others it is computed with, and on however many threads.

Unpacking takes 11 instructions for 32 weights: codes lie row by row, so 16 rows are transposed, four columns as one
32-bit number. Each column is moved to the upper eight bits and becomes a float, 2^24 times too large; its upper half is
that number in bf16, from whose exponent 24 is subtracted. Zero stays zero: the subtraction saturates. What will be
unpacked next is asked for meanwhile, and comes while rows of inputs are multiplied.

Needs AVX512F, BW, VL and BF16. VDPBF16PS takes numbers below 2^-126 for zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, INTS, Function, vector
from pipo_ray.compiled.panel_blocks import BLOCK, block_places

FIELDS = (
    "inputs", "codes", "scales", "output", "num_inputs", "columns", "rows", "next", "panel_bytes", "panel_blocks",
)  # fmt: skip
"""The context, 64-bit words: addresses of the inputs bf16 [num_inputs, columns], of the first panel's codes and scales,
and of the output bf16 [num_inputs, rows]; numbers; `next` is 0 at the start and counts what the threads have taken;
bytes of a panel, its blocks of 64 rows. Behind a panel's codes 48 bytes more are read.
"""

PRODUCT = "product"
"""The function."""

_VECTORS = 4
_COLUMNS = 2048
_INPUTS = 6
_KEPT_INPUTS = 512
_SUMS_BYTES = 4 * BLOCK  # of one row of inputs


def module() -> str:
    """The function."""
    return f"{DECLARATIONS}\n{_product()}"


def _product() -> str:
    f = Function(PRODUCT, FIELDS)
    columns, rows, num_inputs = f.field("columns"), f.field("rows"), f.field("num_inputs")
    weights, sums = f.room(2 * BLOCK * _COLUMNS), f.room(_KEPT_INPUTS * _SUMS_BYTES)
    blocks = f.value(f"lshr i64 {f.add(rows, BLOCK - 1)}, 6")
    with f.tasks(f.place_of("next"), blocks) as block:
        codes, scales = block_places(f, block, f.multiply(columns, BLOCK), 2 * BLOCK)
        with f.loop(num_inputs, _KEPT_INPUTS) as first_input:
            count = f.least(f.without(num_inputs, first_input), _KEPT_INPUTS)
            with f.loop(f.multiply(count, _SUMS_BYTES), 64) as place:
                f.store(FLOATS, "zeroinitializer", f.at(sums, place), align=64)
            inputs = f.at(f.field("inputs", "ptr"), f.multiply(f.multiply(first_input, columns), 2))
            with f.loop(columns, _COLUMNS) as start:
                length = f.least(f.without(columns, start), _COLUMNS)
                # Behind a row's end are the first columns of the next 64 rows.
                following = f.value(f"sub i64 {f.multiply(columns, BLOCK)}, {start}")
                inside = f.value(f"icmp ult i64 {f.add(start, _COLUMNS)}, {columns}")
                near = f.value(f"select i1 {inside}, i64 {_COLUMNS}, i64 {following}")
                _unpack(f, f.at(codes, start), length, weights, near)
                _multiply(f, f.at(inputs, f.multiply(start, 2)), count, length, weights, sums)
            output = f.at(f.field("output", "ptr"), f.multiply(f.multiply(first_input, rows), 2))
            _store(f, sums, count, scales, f.multiply(block, BLOCK), output)
    return f.text()


def _unpack(f: Function, codes: str, length: str, weights: str, near: str) -> None:
    """Fill `weights` with 64 rows and `length` columns in bf16. What lies `near` bytes behind them is brought near."""
    columns = f.field("columns")
    for quarter in range(_VECTORS):
        first = f.at(codes, f.multiply(columns, 16 * quarter))
        with f.loop(length, 64) as column:
            places = [f.at(first, column)]
            for _ in range(15):
                places.append(f.at(places[-1], columns))
            for place in places:
                f.prefetch(f.at(place, near))
            to = f.at(weights, f.add(f.multiply(column, 2 * BLOCK), 64 * quarter))
            for number, four in enumerate(_transposed(f, [f.load(INTS, place, align=1) for place in places])):
                for half, pair in enumerate(_widened(f, four)):
                    f.store(HALVES, pair, f.at(to, (2 * number + half) * 64 * _VECTORS), align=64)


def _transposed(f: Function, rows: Sequence[str]) -> list[str]:
    """Of 16 vectors of 16 i32 the vectors of their first numbers, of their second, and so on."""

    def mix(left: str, right: str, lanes: Sequence[int]) -> str:
        return f.value(f"shufflevector {INTS} {left}, {INTS} {right}, {INTS} {vector('i32', lanes)}")

    def in_each_quarter(four: Sequence[int]) -> list[int]:
        return [4 * quarter + lane for quarter in range(4) for lane in four]

    def quarters(*numbers: int) -> list[int]:
        return [4 * number + lane for number in numbers for lane in range(4)]

    ones = (in_each_quarter((0, 16, 1, 17)), in_each_quarter((2, 18, 3, 19)))
    twos = (in_each_quarter((0, 1, 16, 17)), in_each_quarter((2, 3, 18, 19)))
    fours: list[list[str]] = []  # of four rows: quarter q of the vector c has their numbers 4q + c
    for first in range(0, 16, 4):
        a, b, c, d = rows[first : first + 4]
        fours.append([mix(mix(a, b, one), mix(c, d, one), two) for one in ones for two in twos])
    result = [""] * 16
    for column in range(4):
        a, b, c, d = (four[column] for four in fours)
        for odd in range(2):
            pair = quarters(odd, odd + 2, odd + 4, odd + 6)
            left, right = mix(a, b, pair), mix(c, d, pair)
            for high in range(2):
                result[8 * high + 4 * odd + column] = mix(left, right, quarters(high, high + 2, high + 4, high + 6))
    return result


def _widened(f: Function, four: str) -> list[str]:
    """Of four codes in each lane the first two in bf16, and the last two."""
    alone = []
    for number in range(4):
        moved = f.value(f"shl {INTS} {four}, splat (i32 {24 - 8 * number})") if number < 3 else four
        alone.append(f.value(f"and {INTS} {moved}, splat (i32 {-1 << 24})") if number else moved)
    return [f.halves_of(low, high, 24) for low, high in (alone[:2], alone[2:])]


def _multiply(f: Function, inputs: str, count: str, length: str, weights: str, sums: str) -> None:
    """Add to `sums` what `count` rows of inputs make of `length` columns."""
    rest = f.value(f"urem i64 {count}, {_INPUTS}")
    whole = f.without(count, rest)
    with f.loop(whole, _INPUTS) as first:
        _tile(f, inputs, first, _INPUTS, length, weights, sums)
    for number in range(1, _INPUTS):
        with f.loop(f.value(f"zext i1 {f.value(f'icmp eq i64 {rest}, {number}')} to i64")):
            _tile(f, inputs, whole, number, length, weights, sums)


def _tile(f: Function, inputs: str, first: str, at_once: int, length: str, weights: str, sums: str) -> None:
    row_bytes = f.multiply(f.field("columns"), 2)
    rows = [f.at(inputs, f.multiply(f.add(first, number), row_bytes)) for number in range(at_once)]
    places = [
        [f.at(sums, f.add(f.multiply(f.add(first, number), _SUMS_BYTES), 64 * quarter)) for quarter in range(_VECTORS)]
        for number in range(at_once)
    ]
    totals = [[f.variable(FLOATS, f.load(FLOATS, place, align=64)) for place in row] for row in places]
    with f.loop(f.value(f"lshr i64 {length}, 1")) as pair:
        at = f.at(weights, f.multiply(pair, 64 * _VECTORS))
        halves = [f.load(HALVES, f.at(at, 64 * quarter), align=64) for quarter in range(_VECTORS)]
        for row, row_totals in zip(rows, totals, strict=True):
            two = f.everywhere(f.at(row, f.multiply(pair, 4)), HALVES)
            for half, total in zip(halves, row_totals, strict=True):
                f.store(FLOATS, f.dot(f.load(FLOATS, total), half, two), total)
    for row_places, row_totals in zip(places, totals, strict=True):
        for place, total in zip(row_places, row_totals, strict=True):
            f.store(FLOATS, f.load(FLOATS, total), place, align=64)


def _store(f: Function, sums: str, count: str, scales: str, start: str, output: str) -> None:
    """`sums` of `count` rows of inputs times the scales, into the columns from `start` on of the output's rows."""
    rows = f.field("rows")
    factors = [f.widened(f.at(scales, 32 * quarter)) for quarter in range(_VECTORS)]
    with f.loop(count) as index:
        row = f.at(output, f.multiply(f.multiply(index, rows), 2))
        for quarter, factor in enumerate(factors):
            total = f.load(FLOATS, f.at(sums, f.add(f.multiply(index, _SUMS_BYTES), 64 * quarter)), align=64)
            place = f.add(start, 16 * quarter)
            product = f.value(f"fmul {FLOATS} {total}, {factor}")
            f.store_rounded(product, f.at(row, f.multiply(place, 2)), f.without(rows, place))
