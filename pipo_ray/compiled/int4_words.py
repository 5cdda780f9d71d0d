"""Products of bf16 inputs with int4 panels (`quant/panels.py`) whose codes lie row by row in a block, as LLVM IR.

For processors with AVX2 only. VPMADDWD multiplies twice as many 16-bit integers as a float32 instruction multiplies
floats, and a code becomes one with a conversion less. So inputs are rounded to whole numbers of 16 bits, each group of
columns by its largest: to 2^-16 of that, where bf16 had rounded each of them to 2^-9 of itself. Sums of a group are
exact then; scales and zeros are applied to them in float32.

16 bytes of two neighbouring columns are the codes of 32 rows of the weight, four vectors of eight pairs, which is what
is unpacked at a time (a *tile*). One or two rows of inputs meet them in registers, and tiles lie side by side in
memory, which is read from front to back. More rows of inputs, six at a time, meet a group's columns unpacked in the
first cache.

A row of inputs gives the same bits in any company and on however many threads: integers have no order, and a group's
part is added to the others in their order.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import Function, float_bits, vector
from pipo_ray.compiled.widened import (
    DECLARATIONS,
    EIGHT,
    LANES,
    VECTOR,
    everywhere,
    multiply_add,
    rounded_halves,
    shuffled,
    splat,
    total,
    widened,
)

WORDS, WORDS_FIELDS = "words", ("rows", "words", "steps", "sums", "middles", "groups", "next")
"""The function that rounds inputs, and its context of 64-bit words: addresses of the rows, bf16, of as many int16, and
of each group what one of these stands for and the sum of the rounded inputs, float32, and eight times the sum of the
words, int32; how many groups all rows have; `next` is 0 at the start and counts what the threads have taken.
"""

SPREAD, SPREAD_BYTES = "spread", 8
"""The function that rounds few inputs, and bytes that it makes of each: of four neighbours four times the first and the
third, and four times the others.
"""

FIELDS = (
    "panels", "words", "steps", "sums", "middles", "output", "num_inputs", "columns", "panel_blocks", "blocks",
    "next", "panel_bytes", "scales", "output_bytes",
)  # fmt: skip
"""The context of a product: addresses of the panels, of what `words` makes, [num_inputs, columns] and three times
[num_inputs, columns / group], and of the output [num_inputs, all rows of the blocks]; numbers; blocks of a panel, and
of all that are multiplied; `next` as above; bytes of a panel, and of the codes in it, behind which the scales are;
bytes of a row of the output.
"""

FEW, MOST_FEW = "few", 2
"""The function for few rows of inputs, and how many those are. It takes what `spread` makes, and its output is bf16;
that of the others is float32.
"""
MOST_INPUTS = 6
"""Of many, those that are multiplied at once."""
KEPT_INPUTS = 128
"""The most rows of inputs: sums are in memory."""

_GROUPS_AT_ONCE = 64  # of inputs: what a thread rounds at a time
_TILE_BYTES = 16
_VECTORS = 4  # of a tile
_NEAR = 4096  # bytes
_MIDDLE = 8  # a code of which stands for the zero
_LARGEST = 32767.0
_LEAST_STEP = 2.0**-126  # one over it is still a number
_CODES = "<16 x i8>"
_PAIRS = "<16 x i16>"
_INTS = "<8 x i32>"
_BOTH = "<32 x i16>"

_DECLARATIONS = f"""{DECLARATIONS}
declare float @llvm.vector.reduce.fmax.v8f32({EIGHT})
declare float @llvm.maxnum.f32(float, float)
declare i32 @llvm.vector.reduce.add.v8i32({_INTS})
declare {EIGHT} @llvm.fabs.v8f32({EIGHT})
declare {EIGHT} @llvm.maxnum.v8f32({EIGHT}, {EIGHT})
declare {_INTS} @llvm.x86.avx.cvt.ps2dq.256({EIGHT})
declare {_INTS} @llvm.x86.avx2.pmadd.wd({_PAIRS}, {_PAIRS})
"""


def many_name(at_once: int) -> str:
    """The function that multiplies so many rows of inputs at once."""
    return f"many{at_once}"


def module(group: int, half: int) -> str:
    """All functions for groups of so many columns, and blocks of twice `half` rows, which are in the low and the high
    halves of so many bytes.
    """
    many = (_many(group, half, count) for count in range(1, MOST_INPUTS + 1))
    return "\n".join([_DECLARATIONS, _words(group, WORDS), _words(group, SPREAD), _few(group, half), *many])


def _words(group: int, name: str) -> str:
    f = Function(name, WORDS_FIELDS)
    groups = f.field("groups")
    tasks = f.value(f"udiv i64 {f.add(groups, _GROUPS_AT_ONCE - 1)}, {_GROUPS_AT_ONCE}")
    with f.tasks(f.place_of("next"), tasks) as task:
        first = f.multiply(task, _GROUPS_AT_ONCE)
        with f.loop(f.least(f.without(groups, first), _GROUPS_AT_ONCE)) as offset:
            number = f.add(first, offset)
            source = f.at(f.field("rows", "ptr"), f.multiply(number, 2 * group))
            target_bytes = 2 if name == WORDS else SPREAD_BYTES
            target = f.at(f.field("words", "ptr"), f.multiply(number, target_bytes * group))
            largest, sums, whole_sums = f.variable(EIGHT), f.variable(EIGHT), f.variable(_INTS)
            with f.loop(str(group), LANES) as at:
                floats = widened(f, "bfloat", f.at(source, f.multiply(at, 2)))
                f.store(EIGHT, f.value(f"fadd {EIGHT} {f.load(EIGHT, sums)}, {floats}"), sums)
                size = f.value(f"call {EIGHT} @llvm.fabs.v8f32({EIGHT} {floats})")
                more = f"{EIGHT} {f.load(EIGHT, largest)}, {EIGHT} {size}"
                f.store(EIGHT, f.value(f"call {EIGHT} @llvm.maxnum.v8f32({more})"), largest)
            most = f.value(f"call float @llvm.vector.reduce.fmax.v8f32({EIGHT} {f.load(EIGHT, largest)})")
            step = f.value(f"fmul float {most}, {float_bits(1 / _LARGEST)}")
            step = f.value(f"call float @llvm.maxnum.f32(float {step}, float {float_bits(_LEAST_STEP)})")
            inverse = f.value(f"fdiv float 1.0, {step}")
            with f.loop(str(group), LANES) as at:
                floats = widened(f, "bfloat", f.at(source, f.multiply(at, 2)))
                scaled = f.value(f"fmul {EIGHT} {floats}, {splat(f, 'float', inverse)}")
                whole = f.value(f"call {_INTS} @llvm.x86.avx.cvt.ps2dq.256({EIGHT} {scaled})")
                words = f.value(f"trunc {_INTS} {whole} to <8 x i16>")
                whole = f.value(f"sext <8 x i16> {words} to {_INTS}")
                f.store(_INTS, f.value(f"add {_INTS} {f.load(_INTS, whole_sums)}, {whole}"), whole_sums)
                place = f.at(target, f.multiply(at, target_bytes))
                if name == WORDS:
                    f.store("<8 x i16>", words, place, align=2)
                for first_word in (0, 4) if name == SPREAD else ():
                    lanes = vector("i32", [first_word + lane for lane in (0, 2) * 4 + (1, 3) * 4])
                    spread = f.value(f"shufflevector <8 x i16> {words}, <8 x i16> poison, <16 x i32> {lanes}")
                    f.store(_PAIRS, spread, f.at(place, first_word * SPREAD_BYTES), align=2)
            place = f.multiply(number, 4)
            of_words = f.value(f"call i32 @llvm.vector.reduce.add.v8i32({_INTS} {f.load(_INTS, whole_sums)})")
            f.store("i32", f.value(f"mul i32 {of_words}, {_MIDDLE}"), f.at(f.field("middles", "ptr"), place), align=4)
            f.store("float", step, f.at(f.field("steps", "ptr"), place), align=4)
            # Of the words, so that zeros meet what codes do; but what is no number, and so has no word, stays one.
            exact = total(f, f.load(EIGHT, sums))
            is_finite = f.value(f"fcmp oeq float {f.value(f'fsub float {exact}, {exact}')}, 0.0")
            rounded = f.value(f"fmul float {step}, {f.value(f'sitofp i32 {of_words} to float')}")
            of_group = f.value(f"select i1 {is_finite}, float {rounded}, float {exact}")
            f.store("float", of_group, f.at(f.field("sums", "ptr"), place), align=4)
    return f.text()


class _Block:
    """A block of rows that a thread has taken."""

    def __init__(self, f: Function, task: str, half: int) -> None:
        self.f, self.half, self.columns = f, half, f.field("columns")
        panel_blocks = f.field("panel_blocks")
        panel, number = (f.value(f"{what} i64 {task}, {panel_blocks}") for what in ("udiv", "urem"))
        base = f.at(f.field("panels", "ptr"), f.multiply(panel, f.field("panel_bytes")))
        self.codes = f.at(base, f.multiply(f.multiply(number, self.columns), half))
        self.scales = f.at(f.at(base, f.field("scales")), f.multiply(number, 8 * half))
        self.scale_bytes = f.multiply(panel_blocks, 8 * half)  # of a group
        self.first_row = f.multiply(task, 2 * half)

    def rows_of(self, tile: str) -> list[str]:
        """Which rows of the block are the first of a tile's vectors: two of low halves, two of high ones."""
        f = self.f
        first = f.multiply(tile, _TILE_BYTES)
        return [f.add(first, more) for more in (0, LANES, self.half, self.half + LANES)]

    def scales_of(self, group: str, tile: str) -> list[tuple[str, str]]:
        """Of a tile's vectors of rows: scales and zeros."""
        f, found = self.f, []
        for row in self.rows_of(tile):
            place = f.at(self.scales, f.add(f.multiply(group, self.scale_bytes), f.multiply(row, 4)))
            words = f.load(_INTS, place, align=4)
            scale = f.cast(_INTS, f.value(f"shl {_INTS} {words}, splat (i32 16)"), EIGHT)
            zero = f.cast(_INTS, f.value(f"and {_INTS} {words}, splat (i32 -65536)"), EIGHT)
            found.append((scale, zero))
        return found

    def pairs_at(self, place: str) -> list[str]:
        """Of a tile whose two columns begin at `place`: of each vector's rows both codes, as integers of 16 bits."""
        f = self.f
        left, right = (f.load(_CODES, f.at(place, ahead * self.half), align=1) for ahead in (0, 1))
        order = vector("i32", [16 * column + row for row in range(16) for column in (0, 1)])
        bytes_ = f.value(f"shufflevector {_CODES} {left}, {_CODES} {right}, <32 x i32> {order}")
        both = f.value(f"zext <32 x i8> {bytes_} to {_BOTH}")
        low = f.value(f"and {_BOTH} {both}, splat (i16 15)")
        high = f.value(f"lshr {_BOTH} {both}, splat (i16 4)")
        return [self._part(whole, start) for whole in (low, high) for start in (0, 16)]

    def quarters_at(self, place: str) -> list[list[str]]:
        """Of a tile whose four columns begin at `place`: for the rows of the first and of the last eight bytes, four
        vectors of integers of 16 bits: codes of the rows 0, 2, 4, 6; 1, 3, 5, 7; and of both in the high halves. The
        first half of a vector has pairs of columns 0 and 2, the other of 1 and 3.
        """
        f = self.f
        lines = [f.load("<8 x i16>", f.at(place, column * self.half), align=1) for column in range(4)]
        join = vector("i32", range(16))
        first, second = (
            f.value(f"shufflevector <8 x i16> {left}, <8 x i16> {right}, <16 x i32> {join}")
            for left, right in (lines[:2], lines[2:])
        )
        found = []
        for start in (0, 4):
            order = [lane + word + column for lane in (0, 8) for word in range(start, start + 4) for column in (0, 16)]
            lanes = vector("i32", order)
            words = f.value(f"shufflevector {_PAIRS} {first}, {_PAIRS} {second}, <16 x i32> {lanes}")
            moved = [words, *(f.value(f"lshr {_PAIRS} {words}, splat (i16 {bits})") for bits in (8, 4, 12))]
            masked = [f.value(f"and {_PAIRS} {one}, splat (i16 15)") for one in moved[:3]]
            found.append([*masked, moved[3]])
        return found

    def _part(self, whole: str, start: int) -> str:
        lanes = vector("i32", range(start, start + 16))
        return self.f.value(f"shufflevector {_BOTH} {whole}, {_BOTH} poison, <16 x i32> {lanes}")

    def output(self, index: str, tile: str, number_bytes: int) -> list[str]:
        """Where the output of row `index` of inputs, of numbers of so many bytes, has a tile's vectors."""
        f = self.f
        row = f.at(f.field("output", "ptr"), f.multiply(index, f.field("output_bytes")))
        return [f.at(row, f.multiply(f.add(self.first_row, one), number_bytes)) for one in self.rows_of(tile)]


def _few(group: int, half: int) -> str:
    f = Function(FEW, FIELDS)
    with f.tasks(f.place_of("next"), f.field("blocks")) as task:
        block = _Block(f, task, half)
        groups = f.value(f"udiv i64 {block.columns}, {group}")
        with f.loop(f.field("num_inputs")) as index, f.loop(str(half // _TILE_BYTES)) as tile:
            row = f.at(f.field("words", "ptr"), f.multiply(f.multiply(index, block.columns), SPREAD_BYTES))
            totals = [f.variable(EIGHT) for _ in range(_VECTORS)]
            codes = f.at(block.codes, f.multiply(tile, _TILE_BYTES))
            with f.loop(groups) as at:
                start = f.multiply(at, group)
                sums = [[f.variable(_INTS) for _ in range(_VECTORS)] for _ in range(2)]
                with f.loop(str(group), 4) as offset:
                    column = f.add(start, offset)
                    place = f.at(codes, f.multiply(column, half))
                    f.prefetch(f.at(place, _NEAR))
                    inputs = f.load(_PAIRS, f.at(row, f.multiply(column, SPREAD_BYTES)), align=2)
                    for row_sums, pairs in zip(sums, block.quarters_at(place), strict=True):
                        for sum_, one in zip(row_sums, pairs, strict=True):
                            _add_product(f, sum_, one, inputs)
                whole = [_both_lanes(f, *(f.load(_INTS, one) for one in pair)) for pair in zip(*sums, strict=True)]
                scales = _even_and_odd(f, block.scales_of(at, tile))
                _scale(f, scales, whole, totals, f.add(f.multiply(groups, index), at))
            vectors = [f.load(EIGHT, one) for one in totals]
            for number, place in enumerate(block.output(index, tile, 2)):
                pair = vectors[number - number % 2 :][:2]
                lanes = [lane + 8 * odd for lane in range(4 * (number % 2), 4 * (number % 2) + 4) for odd in (0, 1)]
                halves = rounded_halves(f, shuffled(f, EIGHT, (pair[0], pair[1]), lanes))
                f.store("<8 x i16>", halves, place, align=2)
    return f.text()


def _both_lanes(f: Function, first: str, second: str) -> str:
    """Of two vectors each the sum of its halves, one behind the other."""
    low, high = ([lane + more for lane in (0, 1, 2, 3, 8, 9, 10, 11)] for more in (0, 4))
    return f.value(
        f"add {_INTS} {shuffled(f, _INTS, (first, second), low)}, {shuffled(f, _INTS, (first, second), high)}"
    )


def _even_and_odd(f: Function, scales: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Scales and zeros of each 16 rows: of those with even numbers, and of the others."""
    found = []
    for first in (0, 2):
        for odd in (0, 1):
            lanes = [2 * lane + odd for lane in range(8)]
            pairs = zip(*scales[first : first + 2], strict=True)
            scale, zero = (shuffled(f, EIGHT, pair, lanes) for pair in pairs)
            found.append((scale, zero))
    return found


def _many(group: int, half: int, at_once: int) -> str:
    f = Function(many_name(at_once), FIELDS)
    num_inputs = f.field("num_inputs")
    kept_bytes, pair_bytes = _VECTORS * VECTOR, _VECTORS * VECTOR
    kept, wide = f.room(KEPT_INPUTS * kept_bytes), f.room(group // 2 * pair_bytes)
    with f.tasks(f.place_of("next"), f.field("blocks")) as task:
        block = _Block(f, task, half)
        groups = f.value(f"udiv i64 {block.columns}, {group}")
        with f.loop(str(half // _TILE_BYTES)) as tile:
            codes = f.at(block.codes, f.multiply(tile, _TILE_BYTES))
            with f.loop(f.multiply(num_inputs, kept_bytes), VECTOR) as place:
                f.store(EIGHT, "zeroinitializer", f.at(kept, place), align=VECTOR)
            with f.loop(groups) as at:
                start = f.multiply(at, group)
                with f.loop(str(group), 2) as offset:
                    place = f.at(codes, f.multiply(f.add(start, offset), half))
                    f.prefetch(f.at(place, _NEAR))
                    target = f.at(wide, f.multiply(offset, pair_bytes // 2))
                    for number, pairs in enumerate(block.pairs_at(place)):
                        f.store(_PAIRS, pairs, f.at(target, number * VECTOR), align=VECTOR)
                scales = block.scales_of(at, tile)
                # Two of the four vectors at a time: their sums fill the registers.
                for side in (0, 2):
                    with f.loop(num_inputs, at_once) as first:
                        # Past the end the last row of inputs is computed again, from the same sums.
                        indices = [f.least(f.add(first, one), f.add(num_inputs, -1)) for one in range(at_once)]
                        _multiply(f, block, group, indices, at, groups, f.at(wide, side * VECTOR), kept, side, scales)
            with f.loop(num_inputs) as index:
                for number, place in enumerate(block.output(index, tile, 4)):
                    one = f.at(kept, f.add(f.multiply(index, kept_bytes), number * VECTOR))
                    f.store(EIGHT, f.load(EIGHT, one, align=VECTOR), place, align=4)
    return f.text()


def _multiply(
    f: Function, block: _Block, group: int, indices: list[str], at: str, groups: str, wide: str, kept: str, side: int,
    scales: list[tuple[str, str]],
) -> None:  # fmt: skip
    """Add to the sums at `kept` of the inputs at `indices` the products of group `at` with two vectors of rows."""
    rows = [f.multiply(f.add(f.multiply(index, block.columns), f.multiply(at, group)), 2) for index in indices]
    inputs = [f.at(f.field("words", "ptr"), row) for row in rows]
    sums = [[f.variable(_INTS) for _ in range(2)] for _ in indices]
    with f.loop(str(group), 4) as start:
        source = f.at(wide, f.multiply(start, _VECTORS * VECTOR // 2))
        at_column = [f.at(row, f.multiply(start, 2)) for row in inputs]
        for pair in (0, 1):
            pairs = [f.load(_PAIRS, f.at(source, (_VECTORS * pair + one) * VECTOR), align=VECTOR) for one in range(2)]
            for row, row_sums in zip(at_column, sums, strict=True):
                _add(f, row_sums, pairs, f.at(row, 4 * pair))
    before = [f.at(kept, f.add(f.multiply(index, _VECTORS * VECTOR), side * VECTOR)) for index in indices]
    pairs_before = [[f.load(EIGHT, f.at(place, VECTOR * one), align=VECTOR) for one in range(2)] for place in before]
    totals = [[f.variable(EIGHT, one) for one in pair] for pair in pairs_before]
    for index, row_sums, row_totals in zip(indices, sums, totals, strict=True):
        loaded = [f.load(_INTS, one) for one in row_sums]
        _scale(f, scales[side : side + 2], loaded, row_totals, f.add(f.multiply(index, groups), at))
    for place, row_totals in zip(before, totals, strict=True):
        for number, one in enumerate(row_totals):
            f.store(EIGHT, f.load(EIGHT, one), f.at(place, VECTOR * number), align=VECTOR)


def _scale(
    f: Function, scales: list[tuple[str, str]], sums: list[str], totals: list[str], index: str
) -> None:  # fmt: skip
    """Add to `totals` what a group's `sums` of a row of inputs stand for; `index` is that of its step and its sum."""
    place = f.multiply(index, 4)
    step, of_group = (everywhere(f, f.at(f.field(name, "ptr"), place)) for name in ("steps", "sums"))
    middle = splat(f, "i32", f.load("i32", f.at(f.field("middles", "ptr"), place), align=4))
    for (scale, zero), one, whole in zip(scales, sums, totals, strict=True):
        # Codes below the middle are negative: so an input's rounding counts as little as possible.
        floats = f.value(f"sitofp {_INTS} {f.value(f'sub {_INTS} {one}, {middle}')} to {EIGHT}")
        with_zeros = multiply_add(f, zero, of_group, f.load(EIGHT, whole))
        scaled = f.value(f"fmul {EIGHT} {floats}, {step}")
        f.store(EIGHT, multiply_add(f, scale, scaled, with_zeros), whole)


def _add(f: Function, sums: list[str], pairs: list[str], place: str) -> None:
    """Add to `sums` the products of pairs of codes with the pair of inputs at `place`."""
    both = f.load("i32", place, align=2)
    words = f.cast(_INTS, splat(f, "i32", both), _PAIRS)
    for sum_, one in zip(sums, pairs, strict=True):
        _add_product(f, sum_, one, words)


def _add_product(f: Function, sum_: str, codes: str, inputs: str) -> None:
    product = f.value(f"call {_INTS} @llvm.x86.avx2.pmadd.wd({_PAIRS} {codes}, {_PAIRS} {inputs})")
    f.store(_INTS, f.value(f"add {_INTS} {f.load(_INTS, sum_)}, {product}"), sum_)
