"""Products of bf16 inputs with a bf16 weight as it lies in a store, row by row, as LLVM IR.

Four rows of the weight are read side by side and multiplied with up to four rows of inputs: one instruction multiplies
32 columns of both and adds to 16 float32 sums, which stay in registers. Every line is asked for 4096 bytes ahead: in
its own row, and behind the row's end in the next four. That is how memory is read at its bandwidth; the processor's own
reading ahead ends with the page.

More rows of inputs go over the same 1024 columns of the four rows again, which are in the first cache then, four at a
time; their sums wait in memory meanwhile. A sum is added up in the order of its columns, so a row of inputs gives the
same bits however many others it is computed with, and on however many threads.

Needs AVX512F, BW, VL and BF16. VDPBF16PS takes numbers below 2^-126 for zero.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, Function
from pipo_ray.compiled.row_products import product_name, rows_taken

FIELDS = (
    "inputs", "weight", "bias", "output", "num_inputs", "columns", "rows", "next", "stride", "bias_stride",
    "rows_at_once", "block",
)  # fmt: skip
"""The context, 64-bit words: addresses of the inputs bf16 [num_inputs, columns], of the weight bf16 [rows, columns], of
the bias bf16 [rows] and of the output bf16 [num_inputs, rows]; numbers; `next` is 0 at the start and counts what the
threads have taken; bytes from one row of the weight to the next, and from one number of the bias to the next (0: all
are the first); rows that a thread takes at once, a multiple of `ROWS`; bytes of a block of columns, a multiple of 64.
"""

ROWS = 4
"""Rows of the weight side by side."""
MOST_INPUTS = 4
"""Rows of inputs at once."""
BLOCK_BYTES = 2048
"""Of columns, where all rows of inputs do not fit into registers."""

_VECTOR = 64
_NEAR = 4096  # bytes
_KEPT_INPUTS = 64  # whose sums are in memory
_SUMS_BYTES = _VECTOR * ROWS  # of one row of inputs


def module() -> str:
    """All functions."""
    return "\n".join([DECLARATIONS, *(_product(inputs) for inputs in range(1, MOST_INPUTS + 1))])


def _product(at_once: int) -> str:
    f = Function(product_name(at_once), FIELDS)
    num_inputs, stride = f.field("num_inputs"), f.field("stride")
    kept = f.room(_KEPT_INPUTS * _SUMS_BYTES)
    with rows_taken(f, ROWS) as numbers:
        weights = [f.at(f.field("weight", "ptr"), f.multiply(number, stride)) for number in numbers]
        with f.loop(num_inputs, _KEPT_INPUTS) as first_input:
            count = f.least(f.without(num_inputs, first_input), _KEPT_INPUTS)
            _sums(f, at_once, weights, first_input, count, kept)
            with f.loop(count) as index:
                sums = f.at(kept, f.multiply(index, _SUMS_BYTES))
                _store(f, sums, numbers, f.add(first_input, index))
    return f.text()


def _sums(f: Function, at_once: int, weights: list[str], first_input: str, count: str, kept: str) -> None:
    """Fill `kept` with the vectors of sums of `count` rows of inputs from `first_input` on: of each, one for each of
    the rows of the weight that begin at `weights`.
    """
    row_bytes, block = f.multiply(f.field("columns"), 2), f.field("block")
    with f.loop(f.multiply(count, _SUMS_BYTES), _VECTOR) as place:
        f.store(FLOATS, "zeroinitializer", f.at(kept, place), align=_VECTOR)
    to_next = f.value(f"sub i64 {f.multiply(f.field('stride'), ROWS)}, {row_bytes}")
    with f.loop(f.value(f"udiv i64 {f.add(row_bytes, f.add(block, -1))}, {block}")) as number:
        start = f.multiply(number, block)
        length = f.least(f.without(row_bytes, start), block)
        rest = f.value(f"urem i64 {length}, {_VECTOR}")
        with f.loop(count, at_once) as first:
            indices = [f.least(f.add(first, index), f.add(count, -1)) for index in range(at_once)]
            rows = [f.multiply(f.add(first_input, index), row_bytes) for index in indices]
            inputs = [f.at(f.field("inputs", "ptr"), row) for row in rows]
            places = [
                [f.at(kept, f.add(f.multiply(index, _SUMS_BYTES), _VECTOR * row)) for row in range(ROWS)]
                for index in indices
            ]
            sums = [[f.variable(FLOATS, f.load(FLOATS, place, align=_VECTOR)) for place in row] for row in places]
            with f.loop(f.without(length, rest), _VECTOR) as offset:
                at = f.add(start, offset)
                near = f.add(at, _NEAR)
                behind = f.value(f"icmp uge i64 {near}, {row_bytes}")
                near = f.add(near, f.value(f"select i1 {behind}, i64 {to_next}, i64 0"))
                for weight in weights:
                    f.prefetch(f.at(weight, near))
                halves = [f.load(HALVES, f.at(weight, at), align=2) for weight in weights]
                for row, row_sums in zip(inputs, sums, strict=True):
                    _multiply(f, row_sums, halves, f.load(HALVES, f.at(row, at), align=2))
            with f.loop(f.least(rest, 1)):  # once, if the columns are no multiple of 32
                at, columns = f.add(start, f.without(length, rest)), f.value(f"lshr i64 {rest}, 1")
                halves = [f.load_first(f.at(weight, at), columns) for weight in weights]
                for row, row_sums in zip(inputs, sums, strict=True):
                    _multiply(f, row_sums, halves, f.load_first(f.at(row, at), columns))
            for row_places, row_sums in zip(places, sums, strict=True):
                for place, total in zip(row_places, row_sums, strict=True):
                    f.store(FLOATS, f.load(FLOATS, total), place, align=_VECTOR)


def _multiply(f: Function, sums: list[str], weights: list[str], inputs: str) -> None:
    for place, weight in zip(sums, weights, strict=True):
        f.store(FLOATS, f.dot(f.load(FLOATS, place), weight, inputs), place)


def _store(f: Function, sums: str, numbers: list[str], index: str) -> None:
    """What the vectors at `sums` add up to, plus the bias, into columns `numbers` of row `index` of the output."""
    row = f.at(f.field("output", "ptr"), f.multiply(f.multiply(index, f.field("rows")), 2))
    for at, number in enumerate(numbers):
        total = f.total(f.load(FLOATS, f.at(sums, _VECTOR * at), align=_VECTOR))
        bias = f.widened_one(f.at(f.field("bias", "ptr"), f.multiply(number, f.field("bias_stride"))))
        half = f.value(f"fptrunc float {f.value(f'fadd float {total}, {bias}')} to bfloat")
        f.store("bfloat", half, f.at(row, f.multiply(number, 2)), align=2)
