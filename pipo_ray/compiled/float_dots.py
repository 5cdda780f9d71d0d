"""Products of a few rows of float32 inputs with a weight in bf16, float16 or int8, row by row, as LLVM IR.

For processors that do not multiply 16-bit numbers. Three or four rows of the weight are read side by side, eight
columns at a time, widened in registers and multiplied with up to four rows of inputs; the sums stay in registers. Every
line is asked for 4096 bytes ahead, as in `bf16.py`: memory is read at its bandwidth.

More rows of inputs go over the same columns of the weight again, which are in the first cache then; their sums wait in
memory meanwhile. A sum is added up in the order of its columns, so a row of inputs gives the same bits however many
others it is computed with, and on however many threads.

Needs AVX2, FMA and F16C.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.row_products import product_name, rows_taken
from pipo_ray.compiled.widened import (
    DECLARATIONS,
    EIGHT,
    ELEMENT_BYTES,
    LANES,
    VECTOR,
    Element,
    multiply_add,
    rounded_halves,
    row_of,
    total,
    widened,
)

FIELDS = (
    "inputs", "weight", "output", "num_inputs", "columns", "rows", "next", "stride", "rows_at_once", "panel_rows",
    "panel_bytes",
)  # fmt: skip
"""The context, 64-bit words: addresses of the inputs float32 [num_inputs, `padded`(columns)], of the weight
[rows, columns], and of the output float32 [num_inputs, rows]; numbers, of which `columns` is 8 or more; `next` is 0 at
the start and counts what the threads have taken; bytes from one row of the weight to the next; rows that a thread takes
at once; rows of the weight in a panel, and bytes from one panel to the next.
"""

ROW, ROW_FIELDS = "row", (*FIELDS, "scales", "scale_bytes", "bias", "bias_bytes")
"""The function for one row of inputs of a model in bf16, and its context: the output is bf16 [rows], the sums times
scales plus the bias, which are bf16 at these addresses, bytes from one row's to the next; 0: the same for all.
"""
WIDEN, WIDEN_FIELDS = "widen", ("row", "inputs", "columns")
"""The function that makes inputs float32 of a row in bf16; `columns` is a multiple of 8 there."""

MOST_INPUTS = 4
"""Rows of inputs at once."""
KEPT_INPUTS = 16
"""The most rows of inputs: their sums are in memory."""

_BLOCK = 1024  # columns
_LINE_BYTES = 64
_NEAR = 4096  # bytes


def padded(columns: int) -> int:
    """Columns of the inputs. Where `columns` is no multiple of 8, the last eight are the weight's last eight, of which
    those that the vector before them has had are 0.
    """
    return -(-columns // LANES) * LANES


def rows_side_by_side(num_inputs: int) -> int:
    """Rows of the weight that are multiplied at once with so many of the inputs: their sums fill the registers."""
    return 3 if num_inputs > 2 else 4


def module(element: Element) -> str:
    """A function for each number of inputs at once; for weights of a model in bf16 those for one row, too."""
    one_row = [] if element == "half" else [_row(element), _widen()]
    return "\n".join([DECLARATIONS, *(_product(element, inputs) for inputs in range(1, MOST_INPUTS + 1)), *one_row])


def _product(element: Element, at_once: int) -> str:
    f = Function(product_name(at_once), FIELDS)
    side = rows_side_by_side(at_once)
    rows, num_inputs = f.field("rows"), f.field("num_inputs")
    kept = f.room(KEPT_INPUTS * side * VECTOR)
    with rows_taken(f, side) as numbers:
        weights = [row_of(f, number) for number in numbers]
        _sums(f, element, at_once, weights, num_inputs, kept)
        with f.loop(num_inputs) as index:
            sums = f.at(kept, f.multiply(index, side * VECTOR))
            row = f.at(f.field("output", "ptr"), f.multiply(f.multiply(index, rows), 4))
            for at, number in enumerate(numbers):
                one = total(f, f.load(EIGHT, f.at(sums, VECTOR * at), align=VECTOR))
                f.store("float", one, f.at(row, f.multiply(number, 4)), align=4)
    return f.text()


def _row(element: Element) -> str:
    f = Function(ROW, ROW_FIELDS)
    side = rows_side_by_side(1)
    kept = f.room(side * VECTOR)
    with rows_taken(f, side) as numbers:
        _sums(f, element, 1, [row_of(f, number) for number in numbers], "1", kept)
        for at, number in enumerate(numbers):
            one = total(f, f.load(EIGHT, f.at(kept, VECTOR * at), align=VECTOR))
            scale, bias = (
                f.widened_one(f.at(f.field(name, "ptr"), f.multiply(number, f.field(stride))))
                for name, stride in (("scales", "scale_bytes"), ("bias", "bias_bytes"))
            )
            one = f.value(f"fadd float {f.value(f'fmul float {one}, {scale}')}, {bias}")
            half = rounded_halves(f, f.cast("float", one, "<1 x float>"), 1)
            f.store("<1 x i16>", half, f.at(f.field("output", "ptr"), f.multiply(number, 2)), align=2)
    return f.text()


def _widen() -> str:
    f = Function(WIDEN, WIDEN_FIELDS)
    with f.loop(f.field("columns"), LANES) as at:
        floats = widened(f, "bfloat", f.at(f.field("row", "ptr"), f.multiply(at, 2)))
        f.store(EIGHT, floats, f.at(f.field("inputs", "ptr"), f.multiply(at, 4)), align=4)
    return f.text()


def _sums(f: Function, element: Element, at_once: int, weights: list[str], num_inputs: str, kept: str) -> None:
    """Fill `kept` with the vectors of sums of all rows of inputs: of each, one for each of `weights`."""
    side = len(weights)
    columns = f.field("columns")
    vectors = f.value(f"udiv i64 {columns}, {LANES}")
    with f.loop(f.multiply(num_inputs, side * VECTOR), VECTOR) as place:
        f.store(EIGHT, "zeroinitializer", f.at(kept, place), align=VECTOR)
    whole = f.multiply(vectors, LANES)
    rest = f.without(columns, whole)
    row_bytes = f.multiply(f.add(whole, f.multiply(f.least(rest, 1), LANES)), 4)
    element_bytes = ELEMENT_BYTES[element]
    line, row_end = _LINE_BYTES // element_bytes, f.multiply(columns, element_bytes)
    to_next = f.value(f"sub i64 {f.multiply(f.field('stride'), side)}, {row_end}")
    with f.loop(columns, _BLOCK) as start, f.loop(num_inputs, at_once) as first:
        # Past the end the last row of inputs is computed again.
        indices = [f.least(f.add(first, index), f.add(num_inputs, -1)) for index in range(at_once)]
        inputs = [f.at(f.field("inputs", "ptr"), f.multiply(index, row_bytes)) for index in indices]
        places = [
            [f.at(kept, f.add(f.multiply(index, side * VECTOR), VECTOR * row)) for row in range(side)]
            for index in indices
        ]
        sums = [[f.variable(EIGHT, f.load(EIGHT, place, align=VECTOR)) for place in row] for row in places]
        length = f.least(f.without(whole, start), _BLOCK)
        lines = f.value(f"and i64 {length}, {-line}")
        with f.loop(lines, line) as offset:
            at = f.add(start, offset)
            near = f.add(f.multiply(at, element_bytes), _NEAR)
            behind = f.value(f"icmp uge i64 {near}, {row_end}")
            near = f.add(near, f.value(f"select i1 {behind}, i64 {to_next}, i64 0"))
            for weight in weights:
                f.prefetch(f.at(weight, near))
            for vector in range(0, line, LANES):
                one = f.add(at, vector)
                _multiply(f, element, sums, weights, inputs, one, f.multiply(one, 4))
        with f.loop(f.without(length, lines), LANES) as offset:
            one = f.add(start, f.add(lines, offset))
            _multiply(f, element, sums, weights, inputs, one, f.multiply(one, 4))
        # The last eight columns, in the last block, if they are no multiple of eight.
        is_last = f.value(f"icmp uge i64 {f.add(start, _BLOCK)}, {columns}")
        with f.loop(f.value(f"select i1 {is_last}, i64 {f.least(rest, 1)}, i64 0")):
            _multiply(f, element, sums, weights, inputs, f.add(columns, -LANES), f.add(row_bytes, -VECTOR))
        for row_places, row_sums in zip(places, sums, strict=True):
            for place, one in zip(row_places, row_sums, strict=True):
                f.store(EIGHT, f.load(EIGHT, one), place, align=VECTOR)


def _multiply(
    f: Function,
    element: Element,
    sums: list[list[str]],
    weights: list[str],
    inputs: list[str],
    column: str,
    offset: str,
) -> None:
    """Add the products of eight columns of the weights from `column` on, and of the inputs from the byte `offset`."""
    wide = [widened(f, element, f.at(weight, f.multiply(column, ELEMENT_BYTES[element]))) for weight in weights]
    for row, row_sums in zip(inputs, sums, strict=True):
        vector = f.load(EIGHT, f.at(row, offset), align=4)
        for place, weight in zip(row_sums, wide, strict=True):
            f.store(EIGHT, multiply_add(f, vector, weight, f.load(EIGHT, place)), place)
