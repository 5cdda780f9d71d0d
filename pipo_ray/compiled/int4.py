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

Needs AVX512F, BW, VL, VBMI and BF16. The instructions by name: VPERMB, VPTERNLOGD, VDPBF16PS.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, INTS, WORDS, Function, bf16_bits, float_bits, vector

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

_BLOCK = 64
_VECTORS = 4
_NEAR = 512  # bytes: with one row the weights come from memory
_SIXTEEN = bf16_bits(16.0)  # whose lower bits count eighths: with a code in the upper four of them it is 16 more
_CODE_BITS = 15 << 3
_ZERO = 24.0  # 16, and the 8 that a code of zero is below zero
_ONES = "<" + ", ".join(["bfloat 1.0"] * 32) + ">"
# Of two columns' bytes, the four that have codes of rows r, r + 16, r + 32 and r + 48, for each r.
_INTERLEAVED = vector("i32", [byte + row for row in range(16) for byte in (0, 16, 32, 48)])
_ROWS_BY_SHIFT = (0, 2, 1, 3)  # which 16 rows are in the lowest four bits of a word, the next four, and so on


def module(group: int) -> str:
    """All functions for groups of `group` columns."""
    parts = [_product(group, inputs) for inputs in range(1, MOST_INPUTS + 1)]
    return "\n".join([DECLARATIONS, _sums(group), *parts])


def product_name(num_inputs: int) -> str:
    """The function that computes `num_inputs` rows at once, or fewer where they do not divide all rows of inputs."""
    return f"product{num_inputs}"


SUMS_NAME = "sums"
"""The function that fills the inputs' sums, which comes before."""


def inputs_at_once(num_inputs: int) -> int:
    """Rows of inputs that are computed at once: about the same every time."""
    return -(-num_inputs // -(-num_inputs // MOST_INPUTS))


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
    blocks = f.value(f"lshr i64 {f.add(rows, _BLOCK - 1)}, 6")
    block_bytes = f.multiply(groups, group * _BLOCK // 2)
    with f.tasks(f.place_of("next"), blocks) as block:
        panel = f.value(f"udiv i64 {block}, {f.field('panel_blocks')}")
        inside = f.value(f"urem i64 {block}, {f.field('panel_blocks')}")
        offset = f.multiply(panel, f.field("panel_bytes"))
        codes = f.at(f.at(f.field("codes", "ptr"), offset), f.multiply(inside, block_bytes))
        scales = f.at(f.at(f.field("scales", "ptr"), offset), f.multiply(inside, 4 * _BLOCK))
        with f.loop(num_inputs, at_once) as first:
            # Past the end the last row is computed again.
            indices = [f.least(f.add(first, number), f.add(num_inputs, -1)) for number in range(at_once)]
            totals = _block(f, group, indices, codes, scales)
            start = f.multiply(block, _BLOCK)
            for index, vectors in zip(indices, totals, strict=True):
                row = f.at(f.field("output", "ptr"), f.multiply(f.multiply(index, rows), 2))
                for number, total in enumerate(vectors):
                    place = f.add(start, 16 * number)
                    left = f.value(f"sub i64 {rows}, {f.least(place, rows)}")
                    f.store_rounded(f.load(FLOATS, total), f.at(row, f.multiply(place, 2)), left)
    return f.text()


def _block(f: Function, group: int, indices: list[str], codes: str, scales: str) -> list[list[str]]:
    """Variables with the products of rows `indices` of the inputs and 64 rows of the weight: of each, four vectors."""
    groups, stride = f.field("groups"), f.field("scales_bytes")
    rows = [f.multiply(index, groups) for index in indices]
    inputs = [f.at(f.field("inputs", "ptr"), f.multiply(row, 2 * group)) for row in rows]
    sums = [f.at(f.field("sums", "ptr"), f.multiply(row, 4)) for row in rows]
    totals = [[f.variable(FLOATS) for _ in range(_VECTORS)] for _ in indices]
    with f.loop(groups) as number:
        of_inputs = [f.everywhere(f.at(row, f.multiply(number, 4)), FLOATS) for row in sums]
        zeros = [f.value(f"fmul {FLOATS} {total}, splat (float {float_bits(-_ZERO)})") for total in of_inputs]
        parts = [[f.variable(FLOATS, zero) for _ in range(_VECTORS)] for zero in zeros]
        start = f.at(codes, f.multiply(number, group * _BLOCK // 2))
        starts = [f.at(row, f.multiply(number, 2 * group)) for row in inputs]
        with f.loop(group // 2) as pair:
            place = f.at(start, f.multiply(pair, _BLOCK))
            if len(indices) == 1:
                f.prefetch(f.at(place, _NEAR))
            weights = _weights(f, place)
            for row, part in zip(starts, parts, strict=True):
                two = f.everywhere(f.at(row, f.multiply(pair, 4)), HALVES)
                for weight, place in zip(weights, part, strict=True):
                    f.store(FLOATS, f.dot(f.load(FLOATS, place), weight, two), place)
        here = f.at(scales, f.multiply(number, stride))
        for quarter in range(_VECTORS):
            scale, zero = _scales(f, f.at(here, 64 * quarter))
            for total, part, of_input in zip(totals, parts, of_inputs, strict=True):
                scaled = f.multiply_add(scale, f.load(FLOATS, part[quarter]), f.load(FLOATS, total[quarter]))
                f.store(FLOATS, f.multiply_add(zero, of_input, scaled), total[quarter])
    return totals


def _weights(f: Function, place: str) -> list[str]:
    """Two columns of 64 rows, 16 plus their codes in bf16: of each 16 rows a vector with the columns side by side."""
    raw = f.load("<64 x i8>", place, align=1)
    mixed = f.value(f"shufflevector <64 x i8> {raw}, <64 x i8> poison, <64 x i32> {_INTERLEAVED}")
    words = f.cast("<64 x i8>", mixed, WORDS)
    found: dict[int, str] = {}
    for at, rows in enumerate(_ROWS_BY_SHIFT):
        shift = f"shl {WORDS} {words}, splat (i16 3)" if at == 0 else f"lshr {WORDS} {words}, splat (i16 {4 * at - 3})"
        digits = f.value(f"and {WORDS} {f.value(shift)}, splat (i16 {_CODE_BITS})")
        found[rows] = f.cast(WORDS, f.value(f"or {WORDS} {digits}, splat (i16 {_SIXTEEN})"), HALVES)
    return [found[rows] for rows in range(_VECTORS)]


def _scales(f: Function, place: str) -> tuple[str, str]:
    """Scales and zeros of 16 rows, float32."""
    pairs = f.load(INTS, place, align=1)
    scales = f.cast(INTS, f.value(f"shl {INTS} {pairs}, splat (i32 16)"), FLOATS)
    zeros = f.cast(INTS, f.value(f"and {INTS} {pairs}, splat (i32 -65536)"), FLOATS)
    return scales, zeros
