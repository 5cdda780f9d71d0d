"""Attention of one token of a sequence to keys and values in pages of 8 or 4 bits, and to those in bf16 behind them, as
LLVM IR.

Codes are multiplied as they lie, by whole numbers. A score is q.(zero + scale * code): the query is multiplied with a
page's scales and written as whole numbers of 16 bits over their largest; a code is multiplied with their upper and
their lower byte, four codes and four bytes by one instruction, exactly. Likewise for values: a page's weights are
multiplied with their tokens' scales and written so; zeros take the weights themselves. A page goes on from the page
before as in `attention.py`, which then adds the tokens in bf16.

Four tokens' codes are brought together first, four channels of each for keys, and single ones for values; of 4 bits,
before they are parted. Then four heads share what came out. A head's result does not depend on the number of threads.

Needs AVX512F, BW, VNNI and BF16. The instructions by name: VPDPBUSD, VDPBF16PS.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from pipo_ray.compiled import attention
from pipo_ray.compiled.attention import HeadSoFar, add_tokens, append_token, heads_at
from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, INTS, Function, float_bits, vector
from pipo_ray.compiled.row_steps import exponential
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout

FIELDS = (
    *attention.FIELDS, "pages", "num_pages", "unseen", "page_bytes", "value_codes", "key_scales", "key_zeros",
    "value_scales", "value_zeros", "sharing", "runs", "num_runs", "state", "goes_on", "comes_back",
)  # fmt: skip
"""The context of `attention.py`, with keys and values behind the pages; address of the first page, number of pages, of
the first page's tokens those that are not seen, bytes of a page and of where its parts begin, and how many heads share
a value's scale. Pages that lie in several places: the address of `num_runs` pairs of address and number, instead of the
first two; 0: there are none.

A call that *goes on* (1) begins with what one that *comes back* (1) has left of each head at `state`, `state_bytes`
apart; one that comes back adds no tokens behind the pages, and has no output. Either flag is 0 where all is one call.
"""

NAME = "attend_packed"
EACH = "attend_each_packed"
"""As in `attention.py`."""

_LANES = 16
_VECTORS = PAGE_TOKENS // _LANES
_HALF = PAGE_TOKENS // 2  # of 4 bits a row has a token's codes, and those of the token so many behind it
_ROWS = 4
_STEPS = _HALF // _ROWS
_COLUMNS = 64
_LARGEST = 32639  # plus half of what an upper byte counts it is still a number of 16 bits
_LEAST = 1e-30  # and less is zero, of which nothing is a multiple
_MAGIC = 1.5 * 2**23  # with it, a number of less than 2^22 is rounded, and in the lowest bits
_BYTES = "<64 x i8>"
_MORE = f"""
declare {INTS} @llvm.x86.avx512.vpdpbusd.512({INTS}, {INTS}, {INTS})
declare i64 @llvm.umax.i64(i64, i64)
"""


@cache
def takes(layout: PageLayout) -> bool:
    """Whether there is a function for such pages."""
    dim = layout.value_dim
    return layout.key_dim == dim <= attention.MOST_DIM and dim // layout.value_groups % _COLUMNS == 0


@cache
def places(layout: PageLayout) -> tuple[int, ...]:
    """The context's words from `page_bytes` to `sharing`."""
    return (layout.page_bytes, *itertools.accumulate(layout.parts[:-1]), layout.heads_per_group)


def state_bytes(layout: PageLayout) -> int:
    """Of what a head's call leaves for the next one."""
    return 64 * (2 + layout.value_dim // _LANES + layout.value_groups)


def module(layout: PageLayout, at_once: int) -> str:
    """The functions for such pages, whatever the number of key heads; so many heads that share keys are computed at
    once (`attention.heads_at_once`).
    """
    one = _Code(layout, at_once).text()
    each = attention.each(EACH, NAME, len(FIELDS))
    return "\n".join([DECLARATIONS, attention.MORE_DECLARATIONS, _MORE, one, each])


@dataclass(frozen=True)
class _Rooms:
    """Memory of one of the heads at work."""

    query: str
    """The query, times the scores' scale, float32 [dim]."""
    digits: str
    """Upper bytes of a page's query, then lower ones: [2, dim / 64, 4], vectors of four channels four times."""
    products: str
    """Whole numbers of a page, four tokens in a vector: [tokens / 4]; their parts are to be added."""
    weights: str
    """Upper and lower bytes of a page's weights: [groups of channels, 2, tokens]."""
    offsets: str
    """Sums of weighted zeros: [groups of channels] FLOATS, whose lanes are to be added."""


def _code_rows(bits: int) -> int:
    """Rows of a page's codes."""
    return PAGE_TOKENS * bits // 8


class _Code:
    """Writes the function. A *block* is a fourth of a vector."""

    def __init__(self, layout: PageLayout, at_once: int) -> None:
        self._layout, self._dim, self._bits = layout, layout.key_dim, layout.bits
        self._groups = layout.value_groups
        self._at_once = at_once
        self._chunks = self._dim // _COLUMNS
        self._f = Function(NAME, FIELDS)

    def text(self) -> str:
        """The function."""
        f, dim = self._f, self._dim
        scale = f.splat("float", f.value(f"bitcast i32 {f.load('i32', f.place_of('scale'))} to float"))
        rooms = [HeadSoFar.rooms(f, dim) for _ in range(self._at_once)]
        sizes = 4 * dim, 8 * dim, 16 * PAGE_TOKENS, 2 * PAGE_TOKENS * self._groups, 64 * self._groups
        mine = [_Rooms(*map(f.room, sizes)) for _ in range(self._at_once)]
        with f.tasks(f.place_of("next"), f.field("kv_heads")) as number:
            keys, values = append_token(f, dim, number)
            codes = f.multiply(number, _code_rows(self._bits) * dim)
            of_keys = f.multiply(number, 2 * dim)
            sharing = f.value(f"udiv i64 {number}, {f.field('sharing')}")
            of_values = f.multiply(sharing, 2 * PAGE_TOKENS * self._groups)
            starts = [codes, f.add(codes, f.field("value_codes"))]
            starts += [f.add(of_keys, f.field(part)) for part in ("key_scales", "key_zeros")]
            starts += [f.add(of_values, f.field(part)) for part in ("value_scales", "value_zeros")]
            with f.loop(f.field("group"), self._at_once) as first:
                heads, queries = heads_at(f, number, first, self._at_once)
                so_far = [HeadSoFar.empty(f, room) for room in rooms]
                for query, room in zip(queries, mine, strict=True):
                    for at in range(0, dim, _LANES):
                        scaled = f.value(f"fmul {FLOATS} {f.widened(f.at(query, 2 * at))}, {scale}")
                        f.store(FLOATS, scaled, f.at(room.query, 4 * at))
                    for part in range(self._groups):
                        f.store(FLOATS, "zeroinitializer", f.at(room.offsets, 64 * part))
                with f.loop(f.field("goes_on")):
                    for head, one, room in zip(heads, so_far, mine, strict=True):
                        for place, kept in self._state(head, one, room):
                            f.store(FLOATS, f.load(FLOATS, kept), place)
                several = f.value(f"icmp ne i64 {f.field('num_runs')}, 0")
                runs = f.value(f"select i1 {several}, ptr {f.field('runs', 'ptr')}, ptr {f.place_of('pages')}")
                with f.loop(f.value(f"call i64 @llvm.umax.i64(i64 {f.field('num_runs')}, i64 1)")) as run:
                    pair = f.at(runs, f.multiply(run, 16))
                    with f.loop(f.load("i64", f.at(pair, 8))) as page:
                        before = f.value(f"or i64 {run}, {page}")
                        self._page(f.load("ptr", pair), page, before, starts, so_far, mine)
                with f.loop(f.field("comes_back")):
                    for head, one, room in zip(heads, so_far, mine, strict=True):
                        for place, kept in self._state(head, one, room):
                            f.store(FLOATS, f.load(FLOATS, place), kept)
                with f.loop(f.without("1", f.field("comes_back"))):
                    for one, room in zip(so_far, mine, strict=True):
                        self._in_order(one, room)
                    add_tokens(f, dim, queries, so_far, keys, values, scale)
                    for head, one in zip(heads, so_far, strict=True):
                        one.store_mean(f, f.at(f.field("output", "ptr"), f.multiply(head, 2 * dim)))
        return f.text()

    def _state(self, head: str, one: HeadSoFar, room: _Rooms) -> Iterator[tuple[str, str]]:
        """Places of what has come of a head so far, and those where it is kept between calls."""
        f = self._f
        start = f.at(f.field("state", "ptr"), f.multiply(head, state_bytes(self._layout)))
        offsets = [f.at(room.offsets, 64 * part) for part in range(self._groups)]
        for number, place in enumerate([one.largest, one.total, *one.sums, *offsets]):
            yield place, f.at(start, 64 * number)

    def _page(
        self, pages: str, page: str, before: str, starts: list[str], so_far: list[HeadSoFar], rooms: list[_Rooms]
    ) -> None:
        """Add number `page` of `pages` to several heads; of the call's first page `before` is 0."""
        f = self._f
        stride = f.field("page_bytes")
        start = f.at(pages, f.multiply(page, stride))
        key_codes, value_codes, key_scales, key_zeros, value_scales, value_zeros = (f.at(start, at) for at in starts)
        for place, num_bytes in (
            (key_scales, 2 * self._dim), (key_zeros, 2 * self._dim),
            (value_scales, 2 * PAGE_TOKENS * self._groups), (value_zeros, 2 * PAGE_TOKENS * self._groups),
        ):  # fmt: skip
            for line in range(0, num_bytes, 64):
                f.prefetch(f.at(f.at(place, stride), line))
        scales = [self._half_floats(key_scales, at) for at in range(0, self._dim, _LANES)]
        zeros = [self._half_floats(key_zeros, at) for at in range(0, self._dim, _LANES)]
        units = [self._digits_of_query(room, scales, zeros) for room in rooms]
        self._multiply_keys(key_codes, stride, rooms)
        tokens_scales, tokens_zeros = self._of_values(value_scales), self._of_values(value_zeros)
        is_first = f.value(f"icmp eq i64 {before}, 0")
        unseen = f.value(f"select i1 {is_first}, i64 {f.field('unseen')}, i64 0")
        unseen = f.splat("i32", f.value(f"trunc i64 {unseen} to i32"))
        weighted = []
        for one, room, (unit, offset) in zip(so_far, rooms, units, strict=True):
            scores = self._scores(room, unit, offset, unseen)
            before = f.load(FLOATS, one.largest)
            now = f.largest([before, f.largest_lane(f.largest(scores))])
            f.store(FLOATS, now, one.largest)
            weights = [exponential(f, f.value(f"fsub {FLOATS} {score}, {now}")) for score in scores]
            change = exponential(f, f.value(f"fsub {FLOATS} {before}, {now}"))
            total = f.value(f"fmul {FLOATS} {f.load(FLOATS, one.total)}, {change}")
            for weight in weights:
                total = f.value(f"fadd {FLOATS} {total}, {weight}")
            f.store(FLOATS, total, one.total)
            weighted.append((change, self._digits_of_weights(room, weights, change, tokens_scales, tokens_zeros)))
        self._multiply_values(value_codes, stride, so_far, rooms, weighted)

    # -- whole numbers
    # --------------------------------------------------------------------------------------------------

    def _half_floats(self, place: str, at: int) -> str:
        """16 float16 numbers from number `at` on."""
        f = self._f
        halves = f.load("<16 x half>", f.at(place, 2 * at), align=2)
        return f.value(f"fpext <16 x half> {halves} to {FLOATS}")

    def _of_values(self, place: str) -> list[list[str]]:
        """A page's scales or zeros of values: of each group of channels, the tokens'."""
        f = self._f
        if self._groups == 1:
            return [[self._half_floats(place, at) for at in range(0, PAGE_TOKENS, _LANES)]]
        kind = f"<{_LANES * self._groups} x half>"
        found: list[list[str]] = []
        for group in range(self._groups):
            which = vector("i32", range(group, _LANES * self._groups, self._groups))
            found.append([])
            for at in range(0, PAGE_TOKENS, _LANES):
                together = f.load(kind, f.at(place, 2 * at * self._groups), align=2)
                halves = f.value(f"shufflevector {kind} {together}, {kind} poison, {INTS} {which}")
                found[-1].append(f.value(f"fpext <16 x half> {halves} to {FLOATS}"))
        return found

    def _digits(self, numbers: list[str], largest: str) -> tuple[list[str], list[str], str, list[str]]:
        """Floats as whole numbers over the `largest` of them: upper and lower bytes, both signed, of each 64 numbers;
        what a whole one stands for; and what is left of the floats.
        """
        f = self._f
        largest = f.largest([largest, f"splat (float {float_bits(_LEAST)})"])
        factor = f.value(f"fdiv {FLOATS} splat (float {float_bits(_LARGEST)}), {largest}")
        unit = f.value(f"fmul {FLOATS} {largest}, splat (float {float_bits(1 / _LARGEST)})")
        magic = f"splat (float {float_bits(_MAGIC)})"
        shifted = [f.multiply_add(number, factor, magic) for number in numbers]
        whole = [f.value(f"fsub {FLOATS} {magic}, {one}") for one in shifted]
        left = [f.multiply_add(one, unit, number) for one, number in zip(whole, numbers, strict=True)]
        lower = [f.cast(FLOATS, one, INTS) for one in shifted]
        upper = [f.value(f"add {INTS} {one}, splat (i32 128)") for one in lower]
        return (
            [self._bytes(upper[at : at + 4], 1) for at in range(0, len(upper), 4)],
            [self._bytes(lower[at : at + 4], 0) for at in range(0, len(lower), 4)],
            unit,
            left,
        )

    def _bytes(self, words: list[str], which: int) -> str:
        """A byte of each 32-bit word of four vectors."""
        f = self._f
        one, two, three, four = (f.cast(INTS, word, _BYTES) for word in words)
        first, second = (
            self._shuffled(_BYTES, left, right, [*range(which, 128, 4), *[-1] * 32])
            for left, right in ((one, two), (three, four))
        )
        return f.cast(_BYTES, self._shuffled(_BYTES, first, second, [*range(32), *range(64, 96)]), INTS)

    def _shuffled(self, kind: str, left: str, right: str, which: list[int]) -> str:
        """Elements of both, `right` numbered behind `left`; -1: any."""
        mask = ", ".join("i32 poison" if one < 0 else f"i32 {one}" for one in which)
        return self._f.value(f"shufflevector {kind} {left}, {kind} {right}, <{len(which)} x i32> <{mask}>")

    def _in_blocks(self, kind: str, two: Sequence[str], size: int, upper: bool) -> str:
        """`size` elements of one and of the other in turns, from each block's lower or `upper` half."""
        count = int(kind[1:].split()[0])
        which = []
        for block in range(0, count, count // 4):
            first = block + count // 8 * upper
            for at in range(first, first + count // 8, size):
                which += [*range(at, at + size), *range(count + at, count + at + size)]
        return self._shuffled(kind, two[0], two[1], which)

    def _dot(self, sums: str, codes: str, digits: str) -> str:
        """`sums` plus, in each lane, four unsigned bytes times four signed ones."""
        arguments = ", ".join(f"{INTS} {one}" for one in (sums, codes, digits))
        return self._f.value(f"call {INTS} @llvm.x86.avx512.vpdpbusd.512({arguments})")

    def _rows(self, codes: str, step: str, column: int) -> list[list[str]]:
        """64 columns of the rows of codes of a step: four rows of 4 bits have eight tokens, otherwise there are two
        times four.
        """
        f = self._f
        start = f.at(codes, f.multiply(step, _ROWS * self._dim))
        return [
            [f.load(INTS, f.at(start, row * self._dim + column), align=1) for row in range(first, first + _ROWS)]
            for first in ((0,) if self._bits == 4 else (0, _HALF))
        ]

    def _bring_near(self, codes: str, step: str, column: int, stride: str, rows: range) -> None:
        """Of the next page 64 columns of some of a step's rows of codes, as many as are worked on meanwhile."""
        f = self._f
        count = _code_rows(self._bits) // _STEPS
        start = f.at(f.at(codes, f.multiply(step, count * self._dim)), stride)
        for row in rows:
            f.prefetch(f.at(start, row * self._dim + column))

    def _in_halves(self, together: list[list[str]]) -> list[list[str]]:
        """Codes in bytes, of tokens in the first half of a page and of those in the second; of 4 bits they are parted
        here.
        """
        f = self._f
        if self._bits == 8:
            return together
        (raw,) = together
        low = [f.value(f"and {INTS} {one}, splat (i32 {0x0F0F0F0F})") for one in raw]
        shifted = [f.value(f"lshr {INTS} {one}, splat (i32 4)") for one in raw]
        return [low, [f.value(f"and {INTS} {one}, splat (i32 {0x0F0F0F0F})") for one in shifted]]

    # -- scores
    # ---------------------------------------------------------------------------------------------------------

    def _digits_of_query(self, room: _Rooms, scales: list[str], zeros: list[str]) -> tuple[str, str]:
        """A head's query for a page. What its whole numbers stand for, and its product with the zeros."""
        f = self._f
        scaled, sizes, offset = [], [], "zeroinitializer"
        for number, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
            query = f.load(FLOATS, f.at(room.query, 64 * number))
            scaled.append(f.value(f"fmul {FLOATS} {query}, {scale}"))
            sizes.append(f.value(f"call {FLOATS} @llvm.fabs.v16f32({FLOATS} {scaled[-1]})"))
            offset = f.multiply_add(query, zero, offset)
        *both, unit, left = self._digits(scaled, f.largest_lane(f.largest(sizes)))
        for one in left:  # what is left takes all codes for the middle one
            offset = f.multiply_add(one, f"splat (float {float_bits((1 << self._bits - 1) - 0.5)})", offset)
        for kind, digits in enumerate(both):
            for chunk, one in enumerate(digits):
                for quarter in range(4):
                    which = [4 * block + quarter for block in range(4) for _ in range(4)]
                    place = f.at(room.digits, 64 * (4 * (self._chunks * kind + chunk) + quarter))
                    f.store(INTS, self._shuffled(INTS, one, "poison", which), place)
        return unit, f.splat("float", f.total(offset))

    def _multiply_keys(self, codes: str, stride: str, rooms: list[_Rooms]) -> None:
        """Products of the heads' whole numbers with a page's codes. The next page's codes are brought near."""
        f = self._f
        with f.loop(_STEPS) as step:
            tokens: list[list[str]] = [[], []]  # of both halves of the page: four channels of four tokens in a block
            for chunk in range(self._chunks):
                together = [self._four_by_four(rows) for rows in self._rows(codes, step, _COLUMNS * chunk)]
                for half, vectors in zip(tokens, self._in_halves(together), strict=True):
                    half += vectors
                self._bring_near(codes, step, _COLUMNS * chunk, stride, range(_code_rows(self._bits) // _STEPS))
            sums = [["zeroinitializer"] * 2 for _ in rooms]
            for kind in range(2):
                if kind:
                    sums = [[f.value(f"shl {INTS} {one}, splat (i32 8)") for one in both] for both in sums]
                for number, two in enumerate(zip(*tokens, strict=True)):
                    for room, both in zip(rooms, sums, strict=True):
                        digits = f.load(INTS, f.at(room.digits, 64 * (4 * self._chunks * kind + number)))
                        both[:] = [self._dot(one, codes_, digits) for one, codes_ in zip(both, two, strict=True)]
            for room, both in zip(rooms, sums, strict=True):
                for half_number, one in enumerate(both):
                    f.store(INTS, one, f.at(f.at(room.products, f.multiply(step, 64)), 64 * _STEPS * half_number))

    def _four_by_four(self, rows: list[str]) -> list[str]:
        """Of each block of four vectors: the first words of all, then the second ones, and so on."""
        first, second = rows[:2], rows[2:]
        pairs = [[self._in_blocks(INTS, two, 1, upper) for two in (first, second)] for upper in (False, True)]
        return [self._in_blocks(INTS, pair, 2, upper) for pair in pairs for upper in (False, True)]

    def _scores(self, room: _Rooms, unit: str, offset: str, unseen: str) -> list[str]:
        """A page's scores, 16 in a vector."""
        f, scores = self._f, []
        for number in range(_VECTORS):
            parts = [f.load(INTS, f.at(room.products, 64 * (4 * number + part))) for part in range(4)]
            halves = [
                self._sum_of(one, other, [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
                for one, other in (parts[:2], parts[2:])
            ]
            even, odd = (
                [4 * block + lane for block in blocks for lane in range(4)] for blocks in ((0, 2, 4, 6), (1, 3, 5, 7))
            )
            whole = self._sum_of(halves[0], halves[1], even, odd)
            score = f.multiply_add(f.value(f"sitofp {INTS} {whole} to {FLOATS}"), unit, offset)
            numbers = vector("i32", range(_LANES * number, _LANES * (number + 1)))
            there = f.value(f"icmp uge {INTS} {numbers}, {unseen}")
            scores.append(
                f.value(f"select <16 x i1> {there}, {FLOATS} {score}, {FLOATS} splat (float {attention.LEAST})")
            )
        return scores

    def _sum_of(self, one: str, other: str, left: list[int], right: list[int]) -> str:
        """Elements of both plus others."""
        parts = [self._shuffled(INTS, one, other, which) for which in (left, right)]
        return self._f.value(f"add {INTS} {parts[0]}, {parts[1]}")

    # -- values
    # ---------------------------------------------------------------------------------------------------------

    def _digits_of_weights(
        self, room: _Rooms, weights: list[str], change: str, scales: list[list[str]], zeros: list[list[str]]
    ) -> list[str]:
        """A head's weights for a page, of each group of channels. What their whole numbers stand for."""
        f, units = self._f, []
        for group in range(self._groups):
            scaled = [f.value(f"fmul {FLOATS} {w}, {s}") for w, s in zip(weights, scales[group], strict=True)]
            (upper,), (lower,), unit, _ = self._digits(scaled, f.largest_lane(f.largest(scaled)))
            units.append(unit)
            place = f.at(room.weights, 2 * PAGE_TOKENS * group)
            f.store(INTS, upper, place)
            f.store(INTS, lower, f.at(place, PAGE_TOKENS))
            offset_at = f.at(room.offsets, 64 * group)
            offset = f.value(f"fmul {FLOATS} {f.load(FLOATS, offset_at)}, {change}")
            for weight, zero in zip(weights, zeros[group], strict=True):
                offset = f.multiply_add(weight, zero, offset)
            f.store(FLOATS, offset, offset_at)
        return units

    def _multiply_values(
        self, codes: str, stride: str, so_far: list[HeadSoFar], rooms: list[_Rooms],
        weighted: list[tuple[str, list[str]]],
    ) -> None:  # fmt: skip
        """Multiply the heads' sums with their changes, and add a page's values by its weights. In the sums channels
        are in the order in which four tokens' codes come together.
        """
        f = self._f
        for chunk in range(self._chunks):
            group = chunk * self._groups // self._chunks
            for upper in (False, True):
                # Of each head upper and lower bytes' sums, of two vectors.
                sums = [[[f.variable(INTS) for _ in range(2)] for _ in range(2)] for _ in rooms]
                with f.loop(_STEPS) as step:
                    rows = [self._two_of_four(four, upper) for four in self._rows(codes, step, _COLUMNS * chunk)]
                    together = self._in_halves(rows)
                    half_step = _code_rows(self._bits) // _STEPS // 2
                    which = range(half_step * upper, half_step * (upper + 1))
                    self._bring_near(codes, step, _COLUMNS * chunk, stride, which)
                    for half, vectors in enumerate(together):
                        for room, of_head in zip(rooms, sums, strict=True):
                            for kind, variables in enumerate(of_head):
                                place = f.at(room.weights, PAGE_TOKENS * (2 * group + kind) + _HALF * half)
                                digits = f.everywhere(f.at(place, f.multiply(step, _ROWS)), INTS)
                                for vector_, variable in zip(vectors, variables, strict=True):
                                    f.store(INTS, self._dot(f.load(INTS, variable), vector_, digits), variable)
                for one, of_head, (change, units) in zip(so_far, sums, weighted, strict=True):
                    for number, (high, low) in enumerate(zip(*of_head, strict=True)):
                        shifted = f.value(f"shl {INTS} {f.load(INTS, high)}, splat (i32 8)")
                        whole = f.value(f"add {INTS} {shifted}, {f.load(INTS, low)}")
                        more = f.value(f"fmul {FLOATS} {f.value(f'sitofp {INTS} {whole} to {FLOATS}')}, {units[group]}")
                        place = one.sums[4 * chunk + 2 * upper + number]
                        f.store(FLOATS, f.multiply_add(f.load(FLOATS, place), change, more), place)

    def _two_of_four(self, rows: list[str], upper: bool) -> list[str]:
        """Two vectors that have the bytes of four rows side by side: those of the lower or `upper` half of each block;
        the first four channels of each block in the first one.
        """
        f = self._f
        codes = [f.cast(INTS, row, _BYTES) for row in rows]
        pairs = [self._in_blocks(_BYTES, two, 1, upper) for two in (codes[:2], codes[2:])]
        return [f.cast(_BYTES, self._in_blocks(_BYTES, pairs, 2, half), INTS) for half in (False, True)]

    def _in_order(self, one: HeadSoFar, room: _Rooms) -> None:
        """A head's sums with channels in order, and zeros added."""
        f = self._f
        for chunk in range(self._chunks):
            group = chunk * self._groups // self._chunks
            offset = f.splat("float", f.total(f.load(FLOATS, f.at(room.offsets, 64 * group))))
            places = one.sums[4 * chunk : 4 * chunk + 4]
            floats = [f.load(FLOATS, place) for place in places]
            for block, place in enumerate(places):
                lanes = range(4 * block, 4 * block + 4)
                first, second = (
                    self._shuffled(FLOATS, left, right, [*lanes, *(16 + lane for lane in lanes), *[-1] * 8])
                    for left, right in (floats[:2], floats[2:])
                )
                ordered = self._shuffled(FLOATS, first, second, [*range(8), *range(16, 24)])
                f.store(FLOATS, f.value(f"fadd {FLOATS} {ordered}, {offset}"), place)
