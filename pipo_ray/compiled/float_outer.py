"""Products of many rows of inputs with a weight in bf16, float16 or int8, row by row, in float32, as LLVM IR.

For processors that do not multiply 16-bit numbers. 256 columns of a few rows of the weight are widened into a buffer in
the first cache. Of each, a number is multiplied with 16 or 24 rows of inputs, which lie side by side: an outer
product, whose sums stay in twelve registers. More rows of inputs use the same buffer; their sums wait in memory.

A sum is added up in the order of its columns, one after the other, so a row of inputs gives the same bits however many
others it is computed with, and on however many threads.

Needs AVX2, FMA and F16C.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.row_products import rows_taken
from pipo_ray.compiled.widened import (
    DECLARATIONS,
    EIGHT,
    ELEMENT_BYTES,
    LANES,
    VECTOR,
    Element,
    everywhere,
    multiply_add,
    row_of,
    transposed,
    widened,
)

FIELDS = (
    "inputs", "weight", "output", "groups", "columns", "rows", "next", "stride", "rows_at_once", "panel_rows",
    "panel_bytes",
)  # fmt: skip
"""The context, 64-bit words: addresses of the inputs float32 [groups, columns, `width`], of the weight
[rows, columns], and of the output float32 [groups, rows, `width`]; numbers, of which `columns` is 8 or more and
`groups` at most `MOST_GROUPS`; `next` is 0 at the start and counts what the threads have taken; bytes from one row of
the weight to the next; rows that a thread takes at once; rows of the weight in a panel, and bytes from one panel to the
next.
"""

GROUP_FIELDS = ("rows", "grouped", "num_rows", "groups", "columns", "stride", "next")
"""The context of the functions that lay inputs side by side: addresses of the rows, 16-bit [num_rows, columns] (bf16
for int8), and of the inputs as above, whose last group repeats the last row where it lacks some; numbers; bytes from
one row to the next; `next` as above.
"""

VECTORS = (2, 3)
"""How many vectors of inputs lie side by side: there is a function for each."""
MOST_GROUPS = 8

_BLOCK = 256  # columns
_GROUPED_BLOCKS = 32  # of eight columns: what a thread lays side by side at a time
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


def group_name(vectors: int) -> str:
    """The function that lays inputs side by side for it."""
    return f"group{vectors}"


def module(element: Element) -> str:
    """All functions."""
    functions = (make(element, vectors) for vectors in VECTORS for make in (_product, _group))
    return "\n".join([DECLARATIONS, *functions])


def _group(element: Element, vectors: int) -> str:
    element = "bfloat" if element == "i8" else element  # of the inputs
    f = Function(group_name(vectors), GROUP_FIELDS)
    columns, last = f.field("columns"), f.add(f.field("num_rows"), -1)
    blocks = f.value(f"udiv i64 {f.add(columns, LANES - 1)}, {LANES}")
    with f.tasks(
        f.place_of("next"), f.value(f"udiv i64 {f.add(blocks, _GROUPED_BLOCKS - 1)}, {_GROUPED_BLOCKS}")
    ) as task:
        first = f.multiply(task, _GROUPED_BLOCKS)
        with f.loop(f.least(f.without(blocks, first), _GROUPED_BLOCKS)) as number:
            # The last block repeats some of the columns before it.
            column = f.least(f.multiply(f.add(first, number), LANES), f.add(columns, -LANES))
            with f.loop(f.multiply(f.field("groups"), vectors)) as part:
                row = f.multiply(part, LANES)
                numbers = [f.least(f.add(row, lane), last) for lane in range(LANES)]
                places = [f.at(f.field("rows", "ptr"), f.multiply(one, f.field("stride"))) for one in numbers]
                floats = [widened(f, element, f.at(place, f.multiply(column, 2))) for place in places]
                group = f.value(f"udiv i64 {part}, {vectors}")
                vector = f.multiply(f.value(f"urem i64 {part}, {vectors}"), VECTOR)
                start = f.add(f.multiply(f.add(f.multiply(group, columns), column), vectors * VECTOR), vector)
                target = f.at(f.field("grouped", "ptr"), start)
                for at, one in enumerate(transposed(f, floats)):
                    f.store(EIGHT, one, f.at(target, at * vectors * VECTOR), align=4)
    return f.text()


def _product(element: Element, vectors: int) -> str:
    f = Function(name(vectors), FIELDS)
    side, row_bytes = rows_side_by_side(vectors), vectors * VECTOR
    rows, groups, columns = (f.field(one) for one in ("rows", "groups", "columns"))
    kept = f.room(MOST_GROUPS * side * row_bytes)
    # In front of each row is room for what the last eight columns repeat.
    wide_bytes = 4 * (_BLOCK + LANES)
    wide = f.room(side * wide_bytes)
    with rows_taken(f, side) as numbers:
        weights = [row_of(f, number) for number in numbers]
        with f.loop(f.multiply(groups, side * row_bytes), VECTOR) as place:
            f.store(EIGHT, "zeroinitializer", f.at(kept, place), align=VECTOR)
        with f.loop(columns, _BLOCK) as column:
            length = f.least(f.without(columns, column), _BLOCK)
            _widen(f, element, weights, column, length, wide, wide_bytes)
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
    f: Function, element: Element, weights: list[str], column: str, length: str, wide: str, wide_bytes: int
) -> None:  # fmt: skip
    """Fill `wide`, behind the room in front of each row, with `length` columns of `weights` from `column` on."""
    size = ELEMENT_BYTES[element]
    places = [f.at(weight, f.multiply(column, size)) for weight in weights]
    targets = [f.at(wide, number * wide_bytes + 4 * LANES) for number in range(len(weights))]
    with f.loop(f.value(f"and i64 {length}, {-LANES}"), LANES) as at:
        for place, target in zip(places, targets, strict=True):
            source = f.multiply(at, size)
            f.prefetch(f.at(place, f.add(source, _NEAR)))
            f.store(EIGHT, widened(f, element, f.at(place, source)), f.at(target, f.multiply(at, 4)), align=4)
    with f.loop(f.least(f.value(f"urem i64 {length}, {LANES}"), 1)):
        at = f.add(length, -LANES)
        for place, target in zip(places, targets, strict=True):
            source = f.multiply(at, size)
            f.store(EIGHT, widened(f, element, f.at(place, source)), f.at(target, f.multiply(at, 4)), align=4)


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
