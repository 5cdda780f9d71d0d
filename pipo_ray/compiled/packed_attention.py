"""Attention of one token of a sequence to keys and values in pages of 8 or 4 bits, and to those in bf16 behind them, as
LLVM IR.

Codes are multiplied as they lie, by whole numbers. A score is q.(zero + scale * code): the query is multiplied with a
page's scales and written as whole numbers of 16 bits over their largest, and those are multiplied with the codes,
exactly. Likewise for values: a page's weights are multiplied with their tokens' scales and written so; zeros take the
weights themselves. A page goes on from the page before as in `attention.py`, which then adds the tokens in bf16.

Up to four heads share a page's codes. A head's result does not depend on the number of threads.

For AVX512F, BW, VNNI and BF16 (`packed_bytes.py`), or for AVX2, FMA and F16C (`packed_words.py`): products of whole
numbers differ, and neither rounds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cache

from pipo_ray.compiled import attention
from pipo_ray.compiled.attention import HeadSoFar, add_tokens, append_token, heads_at
from pipo_ray.compiled.instruction_sets import FUNCTIONS
from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, INTS, float_bits, vector
from pipo_ray.compiled.packed_bytes import ByteProducts
from pipo_ray.compiled.packed_products import PackedProducts, Rooms, code_rows
from pipo_ray.compiled.packed_words import WordProducts
from pipo_ray.compiled.row_steps import exponential
from pipo_ray.compiled.support import InstructionSet
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
_COLUMNS = 64
_LARGEST = 32639  # plus half of what an upper byte counts it is still a number of 16 bits
_LEAST = 1e-30  # and less is zero, of which nothing is a multiple
_MAGIC = 1.5 * 2**23  # with it, a number of less than 2^22 is rounded, and in the lowest bits
_MORE = "declare i64 @llvm.umax.i64(i64, i64)"
_PRODUCTS: Mapping[InstructionSet, type[PackedProducts]] = {"avx512": ByteProducts, "avx2": WordProducts}


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


def module(layout: PageLayout, at_once: int, instructions: InstructionSet = "avx512") -> str:
    """The functions for such pages, whatever the number of key heads; so many heads that share keys are computed at
    once (`attention.heads_at_once`).
    """
    one = _Code(layout, at_once, instructions).text()
    each = attention.each(EACH, NAME, len(FIELDS))
    more = _MORE, _PRODUCTS[instructions].DECLARATIONS
    return "\n".join([DECLARATIONS, attention.MORE_DECLARATIONS, *more, one, each])


class _Code:
    """Writes the function."""

    def __init__(self, layout: PageLayout, at_once: int, instructions: InstructionSet) -> None:
        self._layout, self._dim, self._bits = layout, layout.key_dim, layout.bits
        self._groups = layout.value_groups
        self._at_once = at_once
        self._f = FUNCTIONS[instructions](NAME, FIELDS)
        self._products = _PRODUCTS[instructions](self._f, layout)

    def text(self) -> str:
        """The function."""
        f, dim = self._f, self._dim
        scale = f.splat("float", f.value(f"bitcast i32 {f.load('i32', f.place_of('scale'))} to float"))
        rooms = [HeadSoFar.rooms(f, dim) for _ in range(self._at_once)]
        products = self._products
        sizes = (
            4 * dim, products.QUERY_BYTES * dim, products.PRODUCT_BYTES * PAGE_TOKENS, 2 * PAGE_TOKENS * self._groups,
            64 * self._groups,
        )  # fmt: skip
        mine = [Rooms(*map(f.room, sizes)) for _ in range(self._at_once)]
        with f.tasks(f.place_of("next"), f.field("kv_heads")) as number:
            keys, values = append_token(f, dim, number)
            codes = f.multiply(number, code_rows(self._bits) * dim)
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

    def _state(self, head: str, one: HeadSoFar, room: Rooms) -> Iterator[tuple[str, str]]:
        """Places of what has come of a head so far, and those where it is kept between calls."""
        f = self._f
        start = f.at(f.field("state", "ptr"), f.multiply(head, state_bytes(self._layout)))
        offsets = [f.at(room.offsets, 64 * part) for part in range(self._groups)]
        for number, place in enumerate([one.largest, one.total, *one.sums, *offsets]):
            yield place, f.at(start, 64 * number)

    def _page(
        self, pages: str, page: str, before: str, starts: list[str], so_far: list[HeadSoFar], rooms: list[Rooms]
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
        self._products.multiply_keys(key_codes, stride, rooms)
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
        self._products.multiply_values(value_codes, stride, so_far, rooms, weighted)

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

    def _digits(self, numbers: list[str], largest: str) -> tuple[tuple[list[str], list[str]], str, list[str]]:
        """Floats as whole numbers over the `largest` of them: their digits (see `PackedProducts`), what a whole one
        stands for, and what is left of the floats.
        """
        f = self._f
        largest = f.largest([largest, f"splat (float {float_bits(_LEAST)})"])
        factor = f.value(f"fdiv {FLOATS} splat (float {float_bits(_LARGEST)}), {largest}")
        unit = f.value(f"fmul {FLOATS} {largest}, splat (float {float_bits(1 / _LARGEST)})")
        magic = f"splat (float {float_bits(_MAGIC)})"
        shifted = [f.multiply_add(number, factor, magic) for number in numbers]
        whole = [f.value(f"fsub {FLOATS} {magic}, {one}") for one in shifted]
        left = [f.multiply_add(one, unit, number) for one, number in zip(whole, numbers, strict=True)]
        words = [f.cast(FLOATS, one, INTS) for one in shifted]
        return self._products.digits(words), unit, left

    # -- scores
    # ---------------------------------------------------------------------------------------------------------

    def _digits_of_query(self, room: Rooms, scales: list[str], zeros: list[str]) -> tuple[str, str]:
        """A head's query for a page. What its whole numbers stand for, and its product with the zeros."""
        f = self._f
        scaled, sizes, offset = [], [], "zeroinitializer"
        for number, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
            query = f.load(FLOATS, f.at(room.query, 64 * number))
            scaled.append(f.value(f"fmul {FLOATS} {query}, {scale}"))
            sizes.append(f.value(f"call {FLOATS} @llvm.fabs.v16f32({FLOATS} {scaled[-1]})"))
            offset = f.multiply_add(query, zero, offset)
        digits, unit, left = self._digits(scaled, f.largest_lane(f.largest(sizes)))
        for one in left:  # what is left takes all codes for the middle one
            offset = f.multiply_add(one, f"splat (float {float_bits((1 << self._bits - 1) - 0.5)})", offset)
        self._products.store_query(room.digits, digits)
        return unit, f.splat("float", f.total(offset))

    def _scores(self, room: Rooms, unit: str, offset: str, unseen: str) -> list[str]:
        """A page's scores, 16 in a vector."""
        f, scores = self._f, []
        for number in range(_VECTORS):
            whole = self._products.products(room, number)
            score = f.multiply_add(f.value(f"sitofp {INTS} {whole} to {FLOATS}"), unit, offset)
            numbers = vector("i32", range(_LANES * number, _LANES * (number + 1)))
            there = f.value(f"icmp uge {INTS} {numbers}, {unseen}")
            scores.append(
                f.value(f"select <16 x i1> {there}, {FLOATS} {score}, {FLOATS} splat (float {attention.LEAST})")
            )
        return scores

    # -- values
    # ---------------------------------------------------------------------------------------------------------

    def _digits_of_weights(
        self, room: Rooms, weights: list[str], change: str, scales: list[list[str]], zeros: list[list[str]]
    ) -> list[str]:
        """A head's weights for a page, of each group of channels. What their whole numbers stand for."""
        f, units = self._f, []
        for group in range(self._groups):
            scaled = [f.value(f"fmul {FLOATS} {w}, {s}") for w, s in zip(weights, scales[group], strict=True)]
            ((first,), (second,)), unit, _ = self._digits(scaled, f.largest_lane(f.largest(scaled)))
            units.append(unit)
            place = f.at(room.weights, 2 * PAGE_TOKENS * group)
            f.store(INTS, first, place)
            f.store(INTS, second, f.at(place, PAGE_TOKENS))
            offset_at = f.at(room.offsets, 64 * group)
            offset = f.value(f"fmul {FLOATS} {f.load(FLOATS, offset_at)}, {change}")
            for weight, zero in zip(weights, zeros[group], strict=True):
                offset = f.multiply_add(weight, zero, offset)
            f.store(FLOATS, offset, offset_at)
        return units

    def _in_order(self, one: HeadSoFar, room: Rooms) -> None:
        """A head's sums with channels in order, and zeros added."""
        f, chunks = self._f, self._dim // _COLUMNS
        for chunk in range(chunks):
            group = chunk * self._groups // chunks
            offset = f.splat("float", f.total(f.load(FLOATS, f.at(room.offsets, 64 * group))))
            places = one.sums[4 * chunk : 4 * chunk + 4]
            ordered = self._products.in_order([f.load(FLOATS, place) for place in places])
            for floats, place in zip(ordered, places, strict=True):
                f.store(FLOATS, f.value(f"fadd {FLOATS} {floats}, {offset}"), place)
