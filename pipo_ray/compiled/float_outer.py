"""Products of many rows of float32 inputs with a 16-bit weight as it lies in a store, row by row, as LLVM IR.

For processors that do not multiply 16-bit numbers. 256 columns of a few rows of the weight are widened into a buffer in
the first cache. Of each, a number is multiplied with eight, 16 or 24 rows of inputs, which lie side by side: an outer
product, whose sums stay in twelve registers. More rows of inputs use the same buffer; their sums wait in memory.

A sum is added up in the order of its columns, one after the other, so a row of inputs gives the same bits however many
others it is computed with, and on however many threads.

Needs AVX2, FMA and F16C.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.widened import DECLARATIONS, EIGHT, LANES, VECTOR, Half, everywhere, multiply_add, widened

FIELDS = ("inputs", "weight", "output", "groups", "columns", "rows", "next", "stride", "rows_at_once")
"""The context, 64-bit words: addresses of the inputs float32 [groups, columns, `width`], of the weight 16-bit
[rows, columns], and of the output float32 [groups, rows, `width`]; numbers, of which `columns` is 8 or more and
`groups` at most `MOST_GROUPS`; `next` is 0 at the start and counts what the threads have taken; bytes from one row of
the weight to the next; rows that a thread takes at once.
"""

VECTORS = (1, 2, 3)
"""How many vectors of inputs lie side by side: there is a function for each."""
MOST_GROUPS = 8

_BLOCK = 256  # columns
_NEAR = 4096  # bytes
_AT_ONCE = 4  # columns
_REGISTERS = 12  # for sums


def width(vectors: int) -> int:
    """Rows of inputs side by side."""
    return vectors * LANES


def rows_side_by_side(vectors: int) -> int:
    """Rows of the weight, so that the sums fill the registers."""
    return _REGISTERS // vectors


def name(vectors: int) -> str:
    """The function for so many vectors of inputs."""
    return f"outer{vectors}"


def module(half: Half) -> str:
    """All functions."""
    return "\n".join([DECLARATIONS, *(_product(half, vectors) for vectors in VECTORS)])


def _product(half: Half, vectors: int) -> str:
    f = Function(name(vectors), FIELDS)
    side, row_bytes = rows_side_by_side(vectors), vectors * VECTOR
    rows, groups, columns, chunk = (f.field(one) for one in ("rows", "groups", "columns", "rows_at_once"))
    kept = f.room(MOST_GROUPS * side * row_bytes)
    # In front of each row is room for what the last eight columns repeat.
    wide_bytes = 4 * (_BLOCK + LANES)
    wide = f.room(side * wide_bytes)
    tasks = f.value(f"udiv i64 {f.add(rows, f.add(chunk, -1))}, {chunk}")
    with f.tasks(f.place_of("next"), tasks) as task:
        start = f.multiply(task, chunk)
        with f.loop(f.without(f.least(f.add(start, chunk), rows), start), side) as offset:
            first = f.add(start, offset)
            # Past the end the last row is computed again.
            numbers = [f.least(f.add(first, number), f.add(rows, -1)) for number in range(side)]
            weights = [f.at(f.field("weight", "ptr"), f.multiply(number, f.field("stride"))) for number in numbers]
            with f.loop(f.multiply(groups, side * row_bytes), VECTOR) as place:
                f.store(EIGHT, "zeroinitializer", f.at(kept, place), align=VECTOR)
            with f.loop(columns, _BLOCK) as column:
                length = f.least(f.without(columns, column), _BLOCK)
                _widen(f, half, weights, column, length, wide, wide_bytes)
                with f.loop(groups) as group:
                    inputs = f.at(f.field("inputs", "ptr"), f.multiply(f.multiply(group, columns), row_bytes))
                    inputs = f.at(inputs, f.multiply(column, row_bytes))
                    sums = f.at(kept, f.multiply(group, side * row_bytes))
                    _multiply(f, vectors, side, inputs, f.at(wide, 4 * LANES), wide_bytes, sums, length)
            with f.loop(groups) as group:
                sums = f.at(kept, f.multiply(group, side * row_bytes))
                output = f.at(f.field("output", "ptr"), f.multiply(f.multiply(group, rows), row_bytes))
                for at, number in enumerate(numbers):
                    target = f.at(output, f.multiply(number, row_bytes))
                    for vector in range(0, row_bytes, VECTOR):
                        one = f.load(EIGHT, f.at(sums, at * row_bytes + vector), align=VECTOR)
                        f.store(EIGHT, one, f.at(target, vector), align=4)
    return f.text()


def _widen(
    f: Function, half: Half, weights: list[str], column: str, length: str, wide: str, wide_bytes: int
) -> None:  # fmt: skip
    """Fill `wide`, behind the room in front of each row, with `length` columns of `weights` from `column` on."""
    places = [f.at(weight, f.multiply(column, 2)) for weight in weights]
    targets = [f.at(wide, number * wide_bytes + 4 * LANES) for number in range(len(weights))]
    with f.loop(f.value(f"and i64 {length}, {-LANES}"), LANES) as at:
        for place, target in zip(places, targets, strict=True):
            f.prefetch(f.at(place, f.add(f.multiply(at, 2), _NEAR)))
            f.store(EIGHT, widened(f, half, f.at(place, f.multiply(at, 2))), f.at(target, f.multiply(at, 4)), align=4)
    with f.loop(f.least(f.value(f"urem i64 {length}, {LANES}"), 1)):
        at = f.add(length, -LANES)
        for place, target in zip(places, targets, strict=True):
            f.store(EIGHT, widened(f, half, f.at(place, f.multiply(at, 2))), f.at(target, f.multiply(at, 4)), align=4)


def _multiply(
    f: Function, vectors: int, side: int, inputs: str, wide: str, wide_bytes: int, kept: str, length: str
) -> None:
    """Add to the sums at `kept` the products of `length` columns of widened weights and of a group of inputs."""
    row_bytes = vectors * VECTOR
    places = [[f.at(kept, row * row_bytes + one * VECTOR) for one in range(vectors)] for row in range(side)]
    sums = [[f.variable(EIGHT, f.load(EIGHT, place, align=VECTOR)) for place in row] for row in places]

    def one_column(at: str, ahead: int) -> None:
        source = f.at(f.at(inputs, f.multiply(at, row_bytes)), ahead * row_bytes)
        numbers = f.at(wide, f.multiply(at, 4))
        rows = [f.load(EIGHT, f.at(source, one * VECTOR), align=4) for one in range(vectors)]
        for number, row_sums in enumerate(sums):
            weight = everywhere(f, f.at(numbers, number * wide_bytes + 4 * ahead))
            for place, row in zip(row_sums, rows, strict=True):
                f.store(EIGHT, multiply_add(f, weight, row, f.load(EIGHT, place)), place)

    even = f.value(f"and i64 {length}, {-_AT_ONCE}")
    with f.loop(even, _AT_ONCE) as at:
        for ahead in range(_AT_ONCE):
            one_column(at, ahead)
    with f.loop(f.without(length, even)) as at:
        one_column(f.add(even, at), 0)
    for row_places, row_sums in zip(places, sums, strict=True):
        for place, one in zip(row_places, row_sums, strict=True):
            f.store(EIGHT, f.load(EIGHT, one), place, align=VECTOR)
