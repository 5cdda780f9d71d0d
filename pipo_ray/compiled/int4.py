"""Products of bf16 inputs with int4 panels of the layout "avx512", as LLVM IR.

64 rows of a weight at a time, four vectors of 16. Two columns of them are 64 bytes of codes: a permutation puts the
four codes of row r and two columns into lane r of four vectors; a shift and two bit operations, which are one
instruction, make them bf16 numbers from 16 to 31; and one instruction multiplies both columns with two inputs and adds
to float32. A sum begins at -24 times the sum of the inputs, so that codes count from -8. bf16 holds all of that
exactly: the only roundings are those of float32 sums, and that of the result. A group's sum is multiplied with its
scales; its zeros are multiplied with the sum of its inputs.

That takes 13 instructions for 128 weights and one row of inputs and 4 for each further one. With six rows the 24 sums
fill the registers; more rows go over the same 64 rows of the weight again, which are in the cache then. A row of inputs
gives the same bits however many others it is computed with, and on however many threads.

One row of inputs alone is bound by memory, and by the order in which it is read: see `_stream`.

Needs AVX512F, BW, VL, VBMI and BF16. The instructions by name: VPERMB, VPTERNLOGD, VDPBF16PS.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, INTS, WORDS, Function, bf16_bits, float_bits, vector
from pipo_ray.compiled.panel_blocks import BLOCK, block_places
from pipo_ray.compiled.row_products import product_name

FIELDS = (
    "inputs", "sums", "codes", "scales", "output", "num_inputs", "groups", "rows", "next", "panel_bytes",
    "panel_blocks", "scales_bytes",
)  # fmt: skip
"""The context, 64-bit words: addresses of the inputs bf16 [num_inputs, columns], of their sums float32 [num_inputs,
groups], of the first panel's codes and scales, and of the output bf16 [num_inputs, rows]; numbers; `next` is 0 at the
start and counts what the threads have taken; bytes of a panel, its blocks of 64 rows, bytes of a group's scales.
"""

MOST_INPUTS = 6
"""Rows of inputs at once."""

_VECTORS = 4
_STREAMS = 2
_NEAR = 4096  # bytes of codes: the processor's own reading ahead ends with the page
_SIXTEEN = bf16_bits(16.0)  # whose lower bits count eighths: with a code in the upper four of them it is 16 more
_CODE_BITS = 15 << 3
_ZERO = 24.0  # 16, and the 8 that a code of zero is below zero
_ONES = "<" + ", ".join(["bfloat 1.0"] * 32) + ">"
# Of two columns' bytes, the four that have codes of rows r, r + 16, r + 32 and r + 48, for each r.
_INTERLEAVED = vector("i32", [byte + row for row in range(16) for byte in (0, 16, 32, 48)])
ROWS_BY_SHIFT = (0, 2, 1, 3)
"""Which 16 rows are in the lowest four bits of a word of `interleaved`, the next four, and so on."""


def module(group: int) -> str:
    """All functions for groups of `group` columns."""
    parts = [_product(group, inputs) for inputs in range(2, MOST_INPUTS + 1)]
    return "\n".join([DECLARATIONS, _sums(group), _stream(group), *parts])


SUMS_NAME = "sums"
"""The function that fills the inputs' sums, which comes before."""


def _sums(group: int) -> str:
    f = Function(SUMS_NAME, FIELDS)
    inputs, sums, groups = f.field("inputs", "ptr"), f.field("sums", "ptr"), f.field("groups")
    with f.tasks(f.place_of("next"), f.field("num_inputs")) as row:
        first = f.multiply(row, groups)
        with f.loop(groups) as number:
            index = f.add(first, number)
            start = f.at(inputs, f.multiply(index, 2 * group))
            total = "zeroinitializer"
            for part in range(group // 32):
                total = f.dot(total, f.load(HALVES, f.at(start, 64 * part), align=2), _ONES)
            f.store("float", f.total(total), f.at(sums, f.multiply(index, 4)))
    return f.text()


def _product(group: int, at_once: int) -> str:
    f = Function(product_name(at_once), FIELDS)
    groups, rows, num_inputs = f.field("groups"), f.field("rows"), f.field("num_inputs")
    blocks = f.value(f"lshr i64 {f.add(rows, BLOCK - 1)}, 6")
    block_bytes = f.multiply(groups, group * BLOCK // 2)
    with f.tasks(f.place_of("next"), blocks) as block:
        codes, scales = block_places(f, block, block_bytes, 4 * BLOCK)
        with f.loop(num_inputs, at_once) as first:
            # Past the end the last row is computed again.
            indices = [f.least(f.add(first, number), f.add(num_inputs, -1)) for number in range(at_once)]
            totals = _block(f, group, indices, codes, scales)
            start = f.multiply(block, BLOCK)
            for index, vectors in zip(indices, totals, strict=True):
                row = f.at(f.field("output", "ptr"), f.multiply(f.multiply(index, rows), 2))
                _store(f, [f.load(FLOATS, total) for total in vectors], row, start, rows)
    return f.text()


def _stream(group: int) -> str:
    """The product of one row of inputs. Two blocks of rows are read side by side, a group of each in turns: the scales
    of neighbours lie side by side and those of the next group far off. That is how memory is read faster than block
    after block. The last blocks are taken one by one, so that threads end together.
    """
    f = Function(product_name(1), FIELDS)
    groups, rows, stride = f.field("groups"), f.field("rows"), f.field("scales_bytes")
    inputs, sums, output = f.field("inputs", "ptr"), f.field("sums", "ptr"), f.field("output", "ptr")
    group_bytes = group * BLOCK // 2
    block_bytes = f.multiply(groups, group_bytes)
    ahead = max(1, _NEAR // group_bytes)
    with_next = f.without(groups, ahead)
    codes_at, scales_at, totals = f.room(8 * _STREAMS), f.room(8 * _STREAMS), f.room(_STREAMS * 4 * BLOCK)
    blocks = f.value(f"lshr i64 {f.add(rows, BLOCK - 1)}, 6")
    shared = f.value(f"udiv i64 {f.without(blocks, 2 * _STREAMS)}, {_STREAMS}")
    single = f.without(blocks, f.multiply(shared, _STREAMS))
    with f.tasks(f.place_of("next"), f.add(shared, single)) as task:
        are_shared = f.value(f"icmp ult i64 {task}, {shared}")
        first = f.add(f.multiply(f.least(task, shared), _STREAMS), f.without(task, shared))
        count = f.value(f"select i1 {are_shared}, i64 {_STREAMS}, i64 1")
        with f.loop(count) as number:
            codes, scales = block_places(f, f.add(first, number), block_bytes, 4 * BLOCK)
            f.store("ptr", codes, f.at(codes_at, f.multiply(number, 8)))
            f.store("ptr", scales, f.at(scales_at, f.multiply(number, 8)))
            for vector_number in range(_VECTORS):
                place = f.at(totals, f.add(f.multiply(number, 4 * BLOCK), 64 * vector_number))
                f.store(FLOATS, "zeroinitializer", place)
        with f.loop(groups) as group_number:
            of_inputs = f.everywhere(f.at(sums, f.multiply(group_number, 4)), FLOATS)
            row = f.at(inputs, f.multiply(group_number, 2 * group))
            there = f.value(f"icmp ult i64 {group_number}, {with_next}")
            near = f.value(f"select i1 {there}, i64 {ahead * group_bytes}, i64 0")
            with f.loop(count) as number:
                codes = f.load("ptr", f.at(codes_at, f.multiply(number, 8)))
                start = f.at(codes, f.multiply(group_number, group_bytes))
                scales = f.load("ptr", f.at(scales_at, f.multiply(number, 8)))
                here = f.at(scales, f.multiply(group_number, stride))
                for line in range(_VECTORS):
                    f.prefetch(f.at(f.at(here, stride), 64 * line), to_all=True)
                total = f.at(totals, f.multiply(number, 4 * BLOCK))
                places = [f.at(total, 64 * vector_number) for vector_number in range(_VECTORS)]
                _group(f, group, [row], [of_inputs], start, here, [places], near)
        with f.loop(count) as number:
            total = f.at(totals, f.multiply(number, 4 * BLOCK))
            floats = [f.load(FLOATS, f.at(total, 64 * vector_number)) for vector_number in range(_VECTORS)]
            _store(f, floats, output, f.multiply(f.add(first, number), BLOCK), rows)
    return f.text()


def _store(f: Function, vectors: list[str], row: str, start: str, rows: str) -> None:
    """A block's sums into a row of the output, from column `start` on; there are `rows` columns."""
    for number, floats in enumerate(vectors):
        place = f.add(start, 16 * number)
        f.store_rounded(floats, f.at(row, f.multiply(place, 2)), f.without(rows, place))


def _block(f: Function, group: int, indices: list[str], codes: str, scales: str) -> list[list[str]]:
    """Variables with the products of rows `indices` of the inputs and 64 rows of the weight: of each, four vectors."""
    groups, stride = f.field("groups"), f.field("scales_bytes")
    rows = [f.multiply(index, groups) for index in indices]
    inputs = [f.at(f.field("inputs", "ptr"), f.multiply(row, 2 * group)) for row in rows]
    sums = [f.at(f.field("sums", "ptr"), f.multiply(row, 4)) for row in rows]
    totals = [[f.variable(FLOATS) for _ in range(_VECTORS)] for _ in indices]
    with f.loop(groups) as number:
        of_inputs = [f.everywhere(f.at(row, f.multiply(number, 4)), FLOATS) for row in sums]
        start = f.at(codes, f.multiply(number, group * BLOCK // 2))
        starts = [f.at(row, f.multiply(number, 2 * group)) for row in inputs]
        _group(f, group, starts, of_inputs, start, f.at(scales, f.multiply(number, stride)), totals)
    return totals


def _group(
    f: Function, group: int, rows: list[str], of_inputs: list[str], codes: str, scales: str, totals: list[list[str]],
    near: str | None = None,
) -> None:  # fmt: skip
    """Add a group's products to `totals`: of `rows` of inputs, whose sums are `of_inputs`, and 64 rows of the weight.
    What lies `near` bytes behind its codes is brought near.
    """
    zeros = [f.value(f"fmul {FLOATS} {total}, splat (float {float_bits(-_ZERO)})") for total in of_inputs]
    parts = [[f.variable(FLOATS, zero) for _ in range(_VECTORS)] for zero in zeros]
    with f.loop(group // 2) as pair:
        place = f.at(codes, f.multiply(pair, BLOCK))
        if near is not None:
            f.prefetch(f.at(place, near))
        weights = _weights(f, place)
        for row, part in zip(rows, parts, strict=True):
            two = f.everywhere(f.at(row, f.multiply(pair, 4)), HALVES)
            for weight, place in zip(weights, part, strict=True):
                f.store(FLOATS, f.dot(f.load(FLOATS, place), weight, two), place)
    for quarter in range(_VECTORS):
        scale, zero = group_scales(f, f.load(INTS, f.at(scales, 64 * quarter), align=1))
        for total, part, of_input in zip(totals, parts, of_inputs, strict=True):
            scaled = f.multiply_add(scale, f.load(FLOATS, part[quarter]), f.load(FLOATS, total[quarter]))
            f.store(FLOATS, f.multiply_add(zero, of_input, scaled), total[quarter])


def _weights(f: Function, place: str) -> list[str]:
    """Two columns of 64 rows, 16 plus their codes in bf16: of each 16 rows a vector with the columns side by side."""
    words = interleaved(f, place)
    found: dict[int, str] = {}
    for at, rows in enumerate(ROWS_BY_SHIFT):
        shift = f"shl {WORDS} {words}, splat (i16 3)" if at == 0 else f"lshr {WORDS} {words}, splat (i16 {4 * at - 3})"
        digits = f.value(f"and {WORDS} {f.value(shift)}, splat (i16 {_CODE_BITS})")
        found[rows] = f.cast(WORDS, f.value(f"or {WORDS} {digits}, splat (i16 {_SIXTEEN})"), HALVES)
    return [found[rows] for rows in range(_VECTORS)]


def interleaved(f: Function, place: str) -> str:
    """Two columns of 64 rows: a word for each column of each of 16 rows, with the codes of four rows that are 16
    apart.
    """
    raw = f.load("<64 x i8>", place, align=1)
    mixed = f.value(f"shufflevector <64 x i8> {raw}, <64 x i8> poison, <64 x i32> {_INTERLEAVED}")
    return f.cast("<64 x i8>", mixed, WORDS)


def group_scales(f: Function, pairs: str) -> tuple[str, str]:
    """Of 16 rows' scales and zeros as they lie, as a vector of i32: scales and zeros in float32."""
    scales = f.cast(INTS, f.value(f"shl {INTS} {pairs}, splat (i32 16)"), FLOATS)
    zeros = f.cast(INTS, f.value(f"and {INTS} {pairs}, splat (i32 -65536)"), FLOATS)
    return scales, zeros
