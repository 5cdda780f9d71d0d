"""Products of few rows of bf16 inputs with int8 panels, as LLVM IR.

Four rows of the weight are read side by side, every line 4096 bytes ahead: in its own row, and behind the row's end in
the next four. The processor's own reading ahead ends with the page. 32 codes of a row become bf16 in eight
instructions: they are widened to 16 bits; each two neighbours become two floats, 2^16 times too large, whose upper
halves are the numbers in bf16, from whose exponents 16 is subtracted. One instruction multiplies them with a row of
inputs and adds to 16 float32 sums; with six rows of inputs the 24 sums fill the registers, and so they do with three
rows of the weight and eight of inputs. More go over the same rows of the weight again, which are in the cache then. The
only roundings are those of float32 sums, and that of the result.

Needs AVX512F, BW, VL and BF16. VDPBF16PS takes numbers below 2^-126 for zero.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, INTS, WORDS, Function, vector
from pipo_ray.compiled.row_products import product_name

FIELDS = (
    "inputs", "codes", "scales", "output", "num_inputs", "columns", "rows", "next", "panel_bytes", "panel_rows",
)  # fmt: skip
"""The context, 64-bit words: addresses of the inputs bf16 [num_inputs, columns], of the first panel's codes and scales,
and of the output bf16 [num_inputs, rows]; numbers; `next` is 0 at the start and counts what the threads have taken;
bytes of a panel, its rows. Columns are a multiple of 16.
"""

MOST_INPUTS = 8
"""Rows of inputs at once."""

_REGISTERS = 24  # for sums
_MOST_ROWS = 4  # of the weight side by side
_TASK_ROWS = 64
_NEAR = 4096  # bytes


def module() -> str:
    """All functions."""
    return "\n".join([DECLARATIONS, *(_product(inputs) for inputs in range(1, MOST_INPUTS + 1))])


def _product(at_once: int) -> str:
    f = Function(product_name(at_once), FIELDS)
    columns, rows, num_inputs = f.field("columns"), f.field("rows"), f.field("num_inputs")
    side_by_side = min(_MOST_ROWS, _REGISTERS // at_once)
    panel_rows = f.field("panel_rows")
    tasks = f.value(f"udiv i64 {f.add(rows, _TASK_ROWS - 1)}, {_TASK_ROWS}")
    with f.tasks(f.place_of("next"), tasks) as task:
        start = f.multiply(task, _TASK_ROWS)
        panel = f.value(f"udiv i64 {start}, {panel_rows}")
        offset, panel_start = f.multiply(panel, f.field("panel_bytes")), f.multiply(panel, panel_rows)
        codes, scales = (f.at(f.field(name, "ptr"), offset) for name in ("codes", "scales"))
        count = f.least(f.without(rows, start), _TASK_ROWS)
        with f.loop(count, side_by_side) as number:
            # Past the end the last row is computed again.
            offsets = [f.least(f.add(number, row), f.add(count, -1)) for row in range(side_by_side)]
            numbers = [f.add(start, offset) for offset in offsets]
            inside = [f.without(row, panel_start) for row in numbers]
            weights = [f.at(codes, f.multiply(row, columns)) for row in inside]
            factors = [f.widened_one(f.at(scales, f.multiply(row, 2))) for row in inside]
            with f.loop(num_inputs, at_once) as first_input:
                indices = [f.least(f.add(first_input, index), f.add(num_inputs, -1)) for index in range(at_once)]
                sums = _sums(f, weights, indices)
                for index, row_sums in zip(indices, sums, strict=True):
                    output = f.at(f.field("output", "ptr"), f.multiply(f.multiply(index, rows), 2))
                    for row, factor, place in zip(numbers, factors, row_sums, strict=True):
                        total = f.value(f"fmul float {f.total(f.load(FLOATS, place))}, {factor}")
                        half = f.value(f"fptrunc float {total} to bfloat")
                        f.store("bfloat", half, f.at(output, f.multiply(row, 2)), align=2)
    return f.text()


def _sums(f: Function, weights: list[str], indices: list[str]) -> list[list[str]]:
    """Of each row of inputs `indices` and each row of codes `weights` a variable with 16 sums."""
    columns = f.field("columns")
    inputs = [f.at(f.field("inputs", "ptr"), f.multiply(f.multiply(index, columns), 2)) for index in indices]
    sums = [[f.variable(FLOATS) for _ in weights] for _ in indices]
    rest = f.value(f"urem i64 {columns}, 64")
    whole, to_next = f.without(columns, rest), f.multiply(columns, len(weights) - 1)
    with f.loop(whole, 64) as column:
        near = f.add(column, _NEAR)
        behind = f.value(f"icmp uge i64 {near}, {columns}")
        near = f.add(near, f.value(f"select i1 {behind}, i64 {to_next}, i64 0"))
        for weight in weights:
            f.prefetch(f.at(weight, near), to_all=True)
        for half in range(2):
            at = f.add(column, 32 * half)
            codes = [f.load("<32 x i8>", f.at(weight, at), align=1) for weight in weights]
            rows = [f.load(HALVES, f.at(row, f.multiply(at, 2)), align=2) for row in inputs]
            _multiply(f, sums, [f.value(f"sext <32 x i8> {code} to {WORDS}") for code in codes], rows)
    with f.loop(rest, 16) as column:
        at = f.add(whole, column)
        codes = [f.load("<16 x i8>", f.at(weight, at), align=1) for weight in weights]
        words = [_with_zeros(f, f.value(f"sext <16 x i8> {code} to <16 x i16>")) for code in codes]
        rows = [f.load("<16 x i16>", f.at(row, f.multiply(at, 2)), align=2) for row in inputs]
        _multiply(f, sums, words, [f.cast(WORDS, _with_zeros(f, row), HALVES) for row in rows])
    return sums


def _multiply(f: Function, sums: list[list[str]], words: list[str], inputs: list[str]) -> None:
    weights = []
    for codes in words:
        two = f.cast(WORDS, codes, INTS)
        first = f.value(f"shl {INTS} {two}, splat (i32 16)")
        weights.append(f.halves_of(first, f.value(f"and {INTS} {two}, splat (i32 -65536)"), 16))
    for row, row_sums in zip(inputs, sums, strict=True):
        for weight, place in zip(weights, row_sums, strict=True):
            f.store(FLOATS, f.dot(f.load(FLOATS, place), weight, row), place)


def _with_zeros(f: Function, half: str) -> str:
    lanes = vector("i32", range(32))
    return f.value(f"shufflevector <16 x i16> {half}, <16 x i16> zeroinitializer, <32 x i32> {lanes}")
