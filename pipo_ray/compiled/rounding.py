"""Rounding bf16 weights to nearest, straight into a panel, as LLVM IR.

What `quant/rounding.py` and `quant/codec.py` do in a dozen passes over memory is one here: every weight is read once
and every code is written once. All operations are those of `round_to_nearest`, each rounded by itself, so codes, scales
and zeros are the same bit for bit. Vectors are LLVM's own, of no instruction set: for AVX2 it makes two of each.

int4: 32 rows of one group at a time, those whose codes share bytes. Extremes are found among the words of the weights,
which order like whole numbers when those of negative ones are turned; 16 rows of extremes become one vector, so scales
are computed for 16 rows at once. Then two rows of codes become one row of bytes, and 16 rows of bytes are transposed
into the order of the panel. int8: a row at a time.

`flags` says afterwards whether anything was met whose codes are left to `round_to_nearest`: a value or a scale that is
not finite, or an int4 scale below the least normal number, whose inverse may be infinite.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import FLOATS, INTS, Function, vector
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import INT4_LAYOUTS, CodeOrder

FIELDS = ("source", "codes", "scales", "columns", "blocks", "scales_bytes", "flags")
"""The context, 64-bit words: addresses of the weights, bf16 [rows, columns], and of where their codes and scales begin
in the panel; numbers, of which `blocks` counts `rows_at_once`; bytes of a group's scales; `flags`, 0 if all is well.
"""

NAME = "round_rows"
"""The function."""

_RUN = 16  # rows whose scales are one vector
_HALVES, _WORDS = "<16 x i16>", "<32 x i16>"
_AHEAD = 512  # bytes: the rows of a block are more streams than a processor follows by itself

_DECLARATIONS = "\n".join(
    [
        f"declare {kind} @llvm.{name}.{suffix}({kind}, {kind})"
        for kind, suffix in ((_HALVES, "v16i16"), (_WORDS, "v32i16"))
        for name in ("smin", "smax")
    ]
    + [
        f"declare i32 @llvm.vector.reduce.or.v16i32({INTS})",
        f"declare i16 @llvm.vector.reduce.smax.v16i16({_HALVES})",
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
    ]
)


def module(low_bit: LowBitFormat, layout: str) -> str:
    """The function for one format, and for int4 one of INT4_LAYOUTS."""
    f = Function(NAME, FIELDS)
    flags = f.variable(INTS)
    if low_bit.bits == 8:
        _int8(f, flags)
    else:
        _int4(f, flags, low_bit, INT4_LAYOUTS[layout])
    found = f.value(f"call i32 @llvm.vector.reduce.or.v16i32({INTS} {f.load(INTS, flags)})")
    f.store("i64", f.value(f"zext i32 {found} to i64"), f.place_of("flags"))
    return f"{_DECLARATIONS}\n{f.text()}"


def rows_at_once(low_bit: LowBitFormat, layout: str) -> int:
    """What the number of rows must be a multiple of."""
    return 1 if low_bit.bits == 8 else INT4_LAYOUTS[layout].block


# --- int4 ------------------------------------------------------------------------------------------------------------


def _int4(f: Function, flags: str, low_bit: LowBitFormat, order: CodeOrder) -> None:
    group, half = low_bit.group, order.block // 2
    source, codes, scales = (f.field(name, "ptr") for name in ("source", "codes", "scales"))
    columns, stride = f.field("columns"), f.field("scales_bytes")
    row_bytes = f.multiply(columns, 2)
    groups = f.value(f"udiv i64 {columns}, {group}")
    # Of the 32 rows, in the cache: their words, extremes, and what turns them into codes; then their bytes.
    words, packed = f.room(2 * _RUN * 2 * group), f.room(_RUN * group)
    lows, highs = f.room(_RUN * 32), f.room(_RUN * 32)
    factors, offsets = f.room(2 * _RUN * 4), f.room(2 * _RUN * 4)
    with f.loop(f.field("blocks")) as block:
        rows = f.multiply(block, order.block)
        block_source = f.at(source, f.multiply(rows, row_bytes))
        block_codes = f.at(codes, f.multiply(f.multiply(block, half), columns))
        block_scales = f.at(scales, f.multiply(rows, 4))
        with f.loop(groups) as number:
            group_source = f.at(block_source, f.multiply(number, 2 * group))
            group_scales = f.at(block_scales, f.multiply(number, stride))
            group_codes = f.at(block_codes, f.multiply(number, group * half))
            with f.loop(half // _RUN) as part:
                for side in (0, 1):
                    first = f.add(f.multiply(part, _RUN), side * half)
                    start = f.at(group_source, f.multiply(first, row_bytes))
                    _extremes(f, group, start, row_bytes, f.at(words, side * _RUN * 2 * group), lows, highs)
                    low = _gathered(f, lows, "smin")
                    high = _gathered(f, highs, "smax")
                    places = [f.at(place, side * _RUN * 4) for place in (factors, offsets)]
                    pairs = _scales_and_zeros(f, flags, low, high, places, low_bit.symmetric)
                    f.store(INTS, pairs, f.at(group_scales, f.multiply(first, 4)), align=1)
                _bytes(f, group, order, words, factors, offsets, packed)
                _transpose(f, group, half, packed, f.at(group_codes, f.multiply(part, _RUN)))


def _extremes(f: Function, group: int, start: str, row_bytes: str, words: str, lows: str, highs: str) -> None:
    """Of one group of 16 rows: the words are copied, the least and largest of each 16 columns kept."""
    with f.loop(_RUN) as row:
        place = f.at(start, f.multiply(row, row_bytes))
        copy = f.at(words, f.multiply(row, 2 * group))
        for line in range(group // 32):
            f.prefetch(f.at(place, _AHEAD + 64 * line))
        low = high = ""
        for part in range(group // 32):
            loaded = f.load(_WORDS, f.at(place, 64 * part), align=2)
            f.store(_WORDS, loaded, f.at(copy, 64 * part), align=64)
            turned = _turned(f, loaded, _WORDS)
            low = _extreme(f, "smin", _WORDS, low, turned) if part else turned
            high = _extreme(f, "smax", _WORDS, high, turned) if part else turned
        for name, value, kept in (("smin", low, lows), ("smax", high, highs)):
            left, right = (_shuffled(f, _WORDS, value, value, range(first, first + 16)) for first in (0, 16))
            f.store(_HALVES, _extreme(f, name, _HALVES, left, right), f.at(kept, f.multiply(row, 32)), align=32)


def _gathered(f: Function, place: str, name: str) -> str:
    """Of 16 vectors of 16 words the extreme of each, as one vector in their order: 15 steps for all of them, where each
    by itself would take four.
    """
    vectors = [f.load(_HALVES, f.at(place, 32 * row), align=32) for row in range(_RUN)]
    width = 1  # words in a row of which each is another vector's
    while len(vectors) > 1:
        merged = []
        for pair in zip(vectors[::2], vectors[1::2], strict=True):
            halves = [_shuffled(f, _HALVES, *pair, mask) for mask in _merging(width)]
            merged.append(_extreme(f, name, _HALVES, *halves))
        vectors, width = merged, 2 * width
    return vectors[0]


def _merging(width: int) -> tuple[list[int], list[int]]:
    """Which words of two vectors are compared: runs of `width` from both in turns, one half of all and the other.
    Within 128 bits as far as that goes: such shuffles are cheap.
    """
    lanes = ((0, 8), (4, 8)) if width < 8 else ((0, 16), (8, 16))
    halves = []
    for first, step in lanes:
        runs = [lane + run for lane in range(first, 16, step) for run in range(0, max(4, width), width)]
        halves.append([start + place for run in runs for start in (run, run + 16) for place in range(width)])
    return halves[0], halves[1]


def _scales_and_zeros(f: Function, flags: str, low: str, high: str, places: list[str], symmetric: bool) -> str:
    """Of 16 rows, as bf16 side by side. What multiplies a weight and what is added then go to `places`."""
    ends = []
    for words in (low, high):
        bits = f.value(f"zext {_HALVES} {_turned(f, words, _HALVES)} to {INTS}")
        magnitude = f.value(f"and {INTS} {bits}, {_ints(0x7FFF)}")
        _flag(f, flags, f.value(f"icmp uge {INTS} {magnitude}, {_ints(0x7F80)}"))
        ends.append(f.cast(INTS, f.value(f"shl {INTS} {bits}, {_ints(16)}"), FLOATS))
    lowest, highest = ends
    if symmetric:
        opposite = f.value(f"fneg {FLOATS} {lowest}")
        larger = f.value(f"fcmp ogt {FLOATS} {highest}, {opposite}")
        largest = f.value(f"select <16 x i1> {larger}, {FLOATS} {highest}, {FLOATS} {lowest}")
        scales = _rounded(f, f.value(f"fdiv {FLOATS} {largest}, {_floats(-8.0)}"))
        zeros = "zeroinitializer"
    else:
        width = f.value(f"fsub {FLOATS} {highest}, {lowest}")
        scales = _rounded(f, f.value(f"fdiv {FLOATS} {width}, {_floats(15.0)}"))
        eight = f.value(f"fmul {FLOATS} {f.cast(INTS, scales, FLOATS)}, {_floats(8.0)}")
        zeros = _rounded(f, f.value(f"fadd {FLOATS} {lowest}, {eight}"))
    magnitude = f.value(f"and {INTS} {scales}, {_ints(0x7FFFFFFF)}")
    _flag(f, flags, f.value(f"icmp uge {INTS} {magnitude}, {_ints(0x7F800000)}"))
    less = f.value(f"sub {INTS} {magnitude}, {_ints(1)}")
    _flag(f, flags, f.value(f"icmp ult {INTS} {less}, {_ints(0x007FFFFF)}"))
    # A group of equal values has scale 0, and any divisor will do.
    none = f.value(f"icmp eq {INTS} {magnitude}, zeroinitializer")
    divisor = f.value(f"select <16 x i1> {none}, {FLOATS} {_floats(1.0)}, {FLOATS} {f.cast(INTS, scales, FLOATS)}")
    factor = f.value(f"fdiv {FLOATS} {_floats(1.0)}, {divisor}")
    shift = f.value(f"fmul {FLOATS} {f.cast(INTS, zeros, FLOATS)}, {factor}")
    f.store(FLOATS, factor, places[0], align=64)
    f.store(FLOATS, f.value(f"fsub {FLOATS} {_floats(8.5)}, {shift}"), places[1], align=64)
    low_half = f.value(f"lshr {INTS} {scales}, {_ints(16)}")
    return f.value(f"or {INTS} {low_half}, {zeros}")


def _bytes(f: Function, group: int, order: CodeOrder, words: str, factors: str, offsets: str, packed: str) -> None:
    """Codes of two rows in each of 16 rows of bytes."""
    with f.loop(_RUN) as row:
        # In the 32 rows that are here, as in a block: those of the high halves are one further, or half of them.
        pair = [f.multiply(row, order.stride), f.add(f.multiply(row, order.stride), _RUN if order.stride == 1 else 1)]
        starts = [f.at(words, f.multiply(index, 2 * group)) for index in pair]
        by = [f.everywhere(f.at(factors, f.multiply(index, 4)), FLOATS) for index in pair]
        plus = [f.everywhere(f.at(offsets, f.multiply(index, 4)), FLOATS) for index in pair]
        out = f.at(packed, f.multiply(row, group))
        for part in range(group // 16):
            low, high = (
                _codes(f, _values(f, f.at(start, 32 * part), 32), factor, offset)
                for start, factor, offset in zip(starts, by, plus, strict=True)
            )
            both = f.value(f"or {INTS} {low}, {f.value(f'shl {INTS} {high}, {_ints(4)}')}")
            f.store("<16 x i8>", f.value(f"trunc {INTS} {both} to <16 x i8>"), f.at(out, 16 * part), align=16)


def _codes(f: Function, values: str, factor: str, offset: str) -> str:
    scaled = f.value(f"fmul {FLOATS} {values}, {factor}")
    return _whole(f, _clamped(f, f.value(f"fadd {FLOATS} {scaled}, {offset}"), 0.0, 15.5))


def _transpose(f: Function, group: int, half: int, packed: str, codes: str) -> None:
    """16 rows of `group` bytes become columns of 16 bytes, `half` bytes apart."""
    width = 32
    kind = f"<{width} x i8>"
    lower = [lane + place for lane in range(0, width, 16) for place in range(8)]
    upper = [place + 8 for place in lower]
    interleaved = [[i for low in half_ for i in (low, low + width)] for half_ in (lower, upper)]
    for first in range(0, group, width):
        rows = [f.load(kind, f.at(packed, row * group + first), align=16) for row in range(_RUN)]
        # Four times: each row with the one eight further. Within 16 columns that turns rows into columns.
        for _ in range(4):
            pairs = zip(rows[:8], rows[8:], strict=True)
            rows = [_shuffled(f, kind, left, right, mask) for left, right in pairs for mask in interleaved]
        for column, vector_ in enumerate(rows):
            for lane in range(0, width, 16):
                part = _shuffled(f, kind, vector_, vector_, range(lane, lane + 16)) if width > 16 else vector_
                f.store("<16 x i8>", part, f.at(codes, (first + lane + column) * half), align=1)


# --- int8 ------------------------------------------------------------------------------------------------------------


def _int8(f: Function, flags: str) -> None:
    source, codes, scales = (f.field(name, "ptr") for name in ("source", "codes", "scales"))
    columns = f.field("columns")
    with f.loop(f.field("blocks")) as row:
        start = f.at(source, f.multiply(f.multiply(row, columns), 2))
        out = f.at(codes, f.multiply(row, columns))
        largest = f.variable(_HALVES)
        with f.loop(columns, 16) as column:
            loaded = f.load(_HALVES, f.at(start, f.multiply(column, 2)), align=2)
            magnitudes = f.value(f"and {_HALVES} {loaded}, splat (i16 32767)")
            f.store(_HALVES, _extreme(f, "smax", _HALVES, f.load(_HALVES, largest), magnitudes), largest)
        most = f.value(f"call i16 @llvm.vector.reduce.smax.v16i16({_HALVES} {f.load(_HALVES, largest)})")
        bits = _splat(f, f.value(f"shl i32 {f.value(f'zext i16 {most} to i32')}, 16"))
        _flag(f, flags, f.value(f"icmp uge {INTS} {bits}, {_ints(0x7F800000)}"))
        scale = _rounded(f, f.value(f"fdiv {FLOATS} {f.cast(INTS, bits, FLOATS)}, {_floats(127.0)}"))
        first = f.value(f"extractelement {INTS} {scale}, i32 0")
        word = f.value(f"trunc i32 {f.value(f'lshr i32 {first}, 16')} to i16")
        f.store("i16", word, f.at(scales, f.multiply(row, 2)), align=2)
        none = f.value(f"icmp eq {INTS} {scale}, zeroinitializer")
        divisor = f.value(f"select <16 x i1> {none}, {FLOATS} {_floats(1.0)}, {FLOATS} {f.cast(INTS, scale, FLOATS)}")
        with f.loop(columns, 16) as column:
            values = _values(f, f.at(start, f.multiply(column, 2)), 2)
            steps = f.value(f"fdiv {FLOATS} {values}, {divisor}")
            # Adding this rounds to even as `round` does, and leaves the whole number in the lowest bits.
            moved = f.value(f"fadd {FLOATS} {_clamped(f, steps, -127.0, 127.0)}, {_floats(1.5 * 2**23)}")
            low = f.value(f"trunc {INTS} {f.cast(FLOATS, moved, INTS)} to <16 x i8>")
            f.store("<16 x i8>", low, f.at(out, column), align=1)


# --- both ------------------------------------------------------------------------------------------------------------


def _values(f: Function, place: str, align: int) -> str:
    """16 weights as float32."""
    wide = f.value(f"zext {_HALVES} {f.load(_HALVES, place, align=align)} to {INTS}")
    return f.cast(INTS, f.value(f"shl {INTS} {wide}, {_ints(16)}"), FLOATS)


def _rounded(f: Function, floats: str) -> str:
    """To the nearest bf16, to even, as the upper half of float32 bits; subnormal numbers, too, which the processor's
    own instruction takes for 0.
    """
    bits = f.cast(FLOATS, floats, INTS)
    odd = f.value(f"and {INTS} {f.value(f'lshr {INTS} {bits}, {_ints(16)}')}, {_ints(1)}")
    raised = f.value(f"add {INTS} {f.value(f'add {INTS} {bits}, {odd}')}, {_ints(0x7FFF)}")
    return f.value(f"and {INTS} {raised}, {_ints(-0x10000)}")


def _clamped(f: Function, floats: str, least: float, most: float) -> str:
    above = f.value(f"fcmp ogt {FLOATS} {floats}, {_floats(least)}")
    raised = f.value(f"select <16 x i1> {above}, {FLOATS} {floats}, {FLOATS} {_floats(least)}")
    below = f.value(f"fcmp olt {FLOATS} {raised}, {_floats(most)}")
    return f.value(f"select <16 x i1> {below}, {FLOATS} {raised}, {FLOATS} {_floats(most)}")


def _whole(f: Function, floats: str) -> str:
    return f.value(f"fptosi {FLOATS} {floats} to {INTS}")


def _turned(f: Function, words: str, kind: str) -> str:
    """bf16 words in the order of their values, and back."""
    signs = f.value(f"ashr {kind} {words}, splat (i16 15)")
    return f.value(f"xor {kind} {words}, {f.value(f'and {kind} {signs}, splat (i16 32767)')}")


def _extreme(f: Function, name: str, kind: str, left: str, right: str) -> str:
    count = kind[1:].split()[0]
    return f.value(f"call {kind} @llvm.{name}.v{count}i16({kind} {left}, {kind} {right})")


def _shuffled(f: Function, kind: str, left: str, right: str, mask: range | list[int]) -> str:
    return f.value(f"shufflevector {kind} {left}, {kind} {right}, <{len(mask)} x i32> {vector('i32', mask)}")


def _splat(f: Function, number: str) -> str:
    first = f.value(f"insertelement {INTS} poison, i32 {number}, i32 0")
    return f.value(f"shufflevector {INTS} {first}, {INTS} poison, {INTS} zeroinitializer")


def _flag(f: Function, flags: str, bad: str) -> None:
    f.store(INTS, f.value(f"or {INTS} {f.load(INTS, flags)}, {f.value(f'zext <16 x i1> {bad} to {INTS}')}"), flags)


def _ints(number: int) -> str:
    return f"splat (i32 {number})"


def _floats(number: float) -> str:
    return f"splat (float {number!r})"
