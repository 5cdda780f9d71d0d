"""Products of many rows of inputs with a weight in bf16, float16 or int8, row by row, in float32, as LLVM IR.

For processors that do not multiply 16-bit numbers. 256 columns of some rows of the weight are widened into a buffer in
the first caches. Of a few of them, a number is multiplied with 16 or 24 rows of inputs, which lie side by side: an
outer product, whose sums stay in twelve registers. These inputs, 256 columns of them, stay in the first cache while the
other rows in the buffer are multiplied with them: they come once from where they are for all of these rows. More rows
of inputs use the same buffer. Meanwhile sums wait in memory, and in the end they are turned, rounded and stored.

A sum is added up in the order of its columns, one after the other, so a row of inputs gives the same bits however many
others it is computed with, and on however many threads.

Needs AVX2, FMA and F16C.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.widened import (
    DECLARATIONS,
    EIGHT,
    ELEMENT_BYTES,
    LANES,
    VECTOR,
    Element,
    everywhere,
    multiply_add,
    rounded_halves,
    row_of,
    transposed,
    widened,
)

FIELDS = (
    "inputs", "weight", "output", "groups", "columns", "rows", "next", "stride", "rows_at_once", "panel_rows",
    "panel_bytes", "groups_at_once", "num_inputs", "output_bytes", "scales", "scale_bytes", "bias",
    "bias_bytes",
)  # fmt: skip
"""The context, 64-bit words: addresses of the inputs float32 [groups, columns, `width`], of the weight
[rows, columns], and of the output, 16-bit [num_inputs, rows] (float16 for float16, else bf16); numbers, of which
`columns` is 8 or more; `next` is 0 at the start and counts what the threads have taken; bytes from one row of the
weight to the next; how many rows and how many groups a thread takes at once, a multiple of `rows_side_by_side` up to
`MOST_ROWS` and at most `MOST_GROUPS`; rows of the weight in a panel, and bytes from one panel to the next; numbers of
inputs, and bytes from one row of the output to the next; addresses of what sums are multiplied with, and of what is
added then, float32 [rows] with room to a multiple of 8 behind, each followed by the bytes from one number to the next:
4, or 0 where 8 numbers are for all rows.
"""

GROUP_FIELDS = ("rows", "grouped", "num_rows", "groups", "columns", "stride", "next")
"""The context of the functions that lay inputs side by side: addresses of the rows, 16-bit [num_rows, columns] (bf16
for int8), and of the inputs as above, whose last group repeats the last row where it lacks some; numbers; bytes from
one row to the next; `next` as above.
"""

VECTORS = (2, 3)
"""How many vectors of inputs lie side by side: there is a function for each."""
MOST_ROWS = 48
"""Of a weight that a thread takes at once. Their widened columns, 50 KiB, come from the second cache."""
MOST_GROUPS = 32

_BLOCK = 256  # columns
_GROUPED_BLOCKS = 32  # of eight columns: what a thread lays side by side at a time
_NEAR = 1024  # bytes: two blocks of columns
_AT_ONCE = 4  # columns
_LINE_BYTES = 64
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
    columns, at_once = f.field("columns"), f.field("rows_at_once")
    kept = f.room(MOST_GROUPS * MOST_ROWS * row_bytes)
    # In front of each row is room for what the last eight columns repeat.
    wide_bytes = 4 * (_BLOCK + LANES)
    wide = f.room(MOST_ROWS * wide_bytes)
    with _shares(f) as (first, rows, first_group, groups):
        blocks = f.value(f"udiv i64 {f.add(rows, side - 1)}, {side}")
        with f.loop(f.multiply(f.multiply(groups, at_once), row_bytes), VECTOR) as place:
            f.store(EIGHT, "zeroinitializer", f.at(kept, place), align=VECTOR)
        with f.loop(columns, _BLOCK) as column:
            length = f.least(f.without(columns, column), _BLOCK)
            with f.loop(blocks) as block:
                numbers = [f.add(first, f.add(f.multiply(block, side), one)) for one in range(side)]
                last = f.add(f.field("rows"), -1)  # past the end it comes again
                weights = [row_of(f, f.least(number, last)) for number in numbers]
                target = f.at(wide, f.multiply(block, side * wide_bytes))
                _widen(f, element, weights, column, length, target, wide_bytes)
            with f.loop(groups) as group:
                place = f.add(f.multiply(f.add(first_group, group), columns), column)
                inputs = f.at(f.field("inputs", "ptr"), f.multiply(place, row_bytes))
                # What comes next: the same columns of the next group, or the next columns of the first one.
                is_last = f.value(f"icmp uge i64 {f.add(group, 1)}, {groups}")
                first_next = f.add(f.add(f.multiply(first_group, columns), column), _BLOCK)
                next_place = f.value(f"select i1 {is_last}, i64 {first_next}, i64 {f.add(place, columns)}")
                coming = f.at(f.field("inputs", "ptr"), f.multiply(next_place, row_bytes))
                sums = f.at(kept, f.multiply(f.multiply(group, at_once), row_bytes))
                with f.loop(blocks) as block:
                    numbers_at = f.at(wide, f.add(f.multiply(block, side * wide_bytes), 4 * LANES))
                    target = f.at(sums, f.multiply(block, side * row_bytes))
                    line = f.at(coming, f.multiply(block, _BLOCK // _AT_ONCE * _LINE_BYTES))
                    _multiply(f, vectors, side, inputs, line, numbers_at, wide_bytes, target, length)
        with f.loop(groups) as group, f.loop(rows, LANES) as row:
            sums = f.at(kept, f.multiply(f.add(f.multiply(group, at_once), row), row_bytes))
            _finish(f, element, vectors, f.add(first_group, group), f.add(first, row), f.without(rows, row), sums)
    return f.text()


@contextlib.contextmanager
def _shares(f: Function) -> Iterator[tuple[str, str, str, str]]:
    """For each share of the rows and groups that this thread takes: the first row, how many, the first group, how
    many.
    """
    rows, groups = f.field("rows"), f.field("groups")
    counts = []
    for every, name in ((rows, "rows_at_once"), (groups, "groups_at_once")):
        at_once = f.field(name)
        counts.append(f.value(f"udiv i64 {f.add(every, f.add(at_once, -1))}, {at_once}"))
    with f.tasks(f.place_of("next"), f.multiply(*counts)) as task:
        first = f.multiply(f.value(f"udiv i64 {task}, {counts[1]}"), f.field("rows_at_once"))
        first_group = f.multiply(f.value(f"urem i64 {task}, {counts[1]}"), f.field("groups_at_once"))
        yield (
            first, f.least(f.without(rows, first), f.field("rows_at_once")),
            first_group, f.least(f.without(groups, first_group), f.field("groups_at_once")),
        )  # fmt: skip


def _finish(f: Function, element: Element, vectors: int, group: str, row: str, rows: str, sums: str) -> None:
    """Store the sums of a group's inputs with up to eight of the weight's rows from `row` on, of which `rows` are
    wanted.
    """
    row_bytes, kind, last = vectors * VECTOR, f"<{LANES} x i16>", f.add(f.field("num_inputs"), -1)
    scales, bias = (
        f.load(EIGHT, f.at(f.field(name, "ptr"), f.multiply(row, f.field(stride))), align=4)
        for name, stride in (("scales", "scale_bytes"), ("bias", "bias_bytes"))
    )
    few = f.room(2 * LANES)
    is_whole = f.value(f"icmp uge i64 {rows}, {LANES}")
    whole = f.value(f"zext i1 {is_whole} to i64")
    some = f.value(f"select i1 {is_whole}, i64 0, i64 {rows}")
    for vector in range(vectors):
        lines = [f.load(EIGHT, f.at(sums, one * row_bytes + vector * VECTOR), align=VECTOR) for one in range(LANES)]
        for lane, one in enumerate(transposed(f, lines)):
            one = f.value(f"fadd {EIGHT} {f.value(f'fmul {EIGHT} {one}, {scales}')}, {bias}")
            if element == "half":
                halves = f.cast("<8 x half>", f.value(f"fptrunc {EIGHT} {one} to <8 x half>"), kind)
            else:
                halves = rounded_halves(f, one)
            # Past the end the last row of inputs was computed again.
            number = f.least(f.add(f.multiply(group, vectors * LANES), vector * LANES + lane), last)
            place = f.at(f.field("output", "ptr"), f.multiply(number, f.field("output_bytes")))
            place = f.at(place, f.multiply(row, 2))
            with f.loop(whole):
                f.store(kind, halves, place, align=2)
            f.store(kind, halves, few, align=16)
            with f.loop(some) as at:
                offset = f.multiply(at, 2)
                f.store("i16", f.load("i16", f.at(few, offset), align=2), f.at(place, offset), align=2)


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
    f: Function, vectors: int, side: int, inputs: str, coming: str, wide: str, wide_bytes: int, kept: str, length: str
) -> None:
    """Add to the sums at `kept` the products of `length` columns of widened weights and of a group of inputs. Those
    that are `coming` are brought near.
    """
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
        f.prefetch(f.at(coming, f.multiply(at, _LINE_BYTES // _AT_ONCE)))
        for ahead in range(_AT_ONCE):
            one_column(at, ahead)
    with f.loop(f.without(length, even)) as at:
        one_column(f.add(even, at), 0)
    for row_places, row_sums in zip(places, sums, strict=True):
        for place, one in zip(row_places, row_sums, strict=True):
            f.store(EIGHT, f.load(EIGHT, one), place, align=VECTOR)
