"""Attention of one token of a sequence to its keys and values in bf16, as LLVM IR.

Sixteen tokens at a time: their scores for a head are one vector, softmax goes on from one vector to the next ("Online
normalizer calculation for softmax", arXiv 1805.02867), and their values are added up in float32. Up to four heads that
share keys and values read them together. A head's result does not depend on the number of threads.

For AVX512F, BW and BF16, with one instruction by name, VDPBF16PS; or for AVX2 and FMA.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipo_ray.compiled.instruction_sets import FUNCTIONS, Avx2Function
from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, Function, vector
from pipo_ray.compiled.row_steps import exponential
from pipo_ray.compiled.support import InstructionSet

FIELDS = (
    "query", "new_keys", "new_values", "keys", "values", "output", "next", "kv_heads", "group", "length", "scale",
    "query_stride", "new_keys_stride", "new_values_stride", "keys_stride", "values_stride",
)  # fmt: skip
"""The context, 64-bit words. Addresses of bf16: the query [heads, dim], the token's own keys and values [kv_heads,
dim], keys and values [kv_heads, length, dim], whose last token is filled in, and the output [heads, dim], contiguous as
is each token; `next` counts key heads taken by threads; heads for each of them; tokens; float32 `scale`; and bytes from
one head to the next.
"""

NAME = "attend"
EACH = "attend_each"
EACH_FIELDS = ("contexts", "count")
"""The context of the function that attends for several sequences: the address of so many contexts of the other one, one
behind the other. Threads share out each sequence's heads.
"""
MOST_DIM = 256
LEAST = "0xFFF0000000000000"
"""Less than any score."""

_TOKENS = 16
_MOST_HEADS = 4
_EVEN = vector("i32", range(0, 32, 2))
_ODD = vector("i32", range(1, 32, 2))
_NUMBERS = vector("i64", range(_TOKENS))
MORE_DECLARATIONS = f"""
declare {FLOATS} @llvm.fabs.v16f32({FLOATS})
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
"""


def module(dim: int, group: int, instructions: InstructionSet = "avx512") -> str:
    """The function for heads of `dim` columns, a multiple of 64, of which `group` share keys."""
    one = _attend(FUNCTIONS[instructions](NAME, FIELDS), dim, heads_at_once(group))
    return "\n".join([DECLARATIONS, MORE_DECLARATIONS, one, each(EACH, NAME, len(FIELDS))])


def heads_at_once(group: int) -> int:
    """Of `group` heads that share keys, so many are computed at once: about the same every time."""
    return -(-group // -(-group // _MOST_HEADS))


def each(name: str, one: str, num_fields: int) -> str:
    """The function `name`, with the context of EACH_FIELDS, that calls `one` for each of its contexts."""
    f = Function(name, EACH_FIELDS)
    contexts = f.field("contexts", "ptr")
    with f.loop(f.field("count")) as number:
        f.do(f"call void @{one}(ptr {f.at(contexts, f.multiply(number, 8 * num_fields))})")
    return f.text()


@dataclass(frozen=True)
class HeadSoFar:
    """What has come of a head's tokens so far. Variables with the largest score in all lanes, and with the sum of
    exponentials over it, whose lanes are to be added; places of the sums of values by those weights, 16 channels each;
    and room for the weights at work.
    """

    largest: str
    total: str
    sums: list[str]
    weights: str

    @staticmethod
    def rooms(f: Function, dim: int) -> tuple[list[str], str]:
        """Places for `sums` and `weights`."""
        return [f.room(64) for _ in range(dim // 16)], f.room(64)

    @staticmethod
    def empty(f: Function, rooms: tuple[list[str], str]) -> HeadSoFar:
        """Of no token."""
        sums, weights = rooms
        for part in sums:
            f.store(FLOATS, "zeroinitializer", part)
        return HeadSoFar(f.variable(FLOATS, f"splat (float {LEAST})"), f.variable(FLOATS), sums, weights)

    def store_mean(self, f: Function, row: str) -> None:
        """The mean of the values, rounded to bf16."""
        whole = f.splat("float", f.total(f.load(FLOATS, self.total)))
        for at, part in enumerate(self.sums):
            mean = f.value(f"fdiv {FLOATS} {f.load(FLOATS, part)}, {whole}")
            f.store_rounded(mean, f.at(row, 32 * at), "16")


def _attend(f: Function, dim: int, at_once: int) -> str:
    group = f.field("group")
    scale = f.splat("float", f.value(f"bitcast i32 {f.load('i32', f.place_of('scale'))} to float"))
    rooms = [HeadSoFar.rooms(f, dim) for _ in range(at_once)]
    with f.tasks(f.place_of("next"), f.field("kv_heads")) as number:
        keys, values = append_token(f, dim, number)
        with f.loop(group, at_once) as first:
            heads, queries = heads_at(f, number, first, at_once)
            so_far = [HeadSoFar.empty(f, room) for room in rooms]
            add_tokens(f, dim, queries, so_far, keys, values, scale)
            for head, one in zip(heads, so_far, strict=True):
                one.store_mean(f, f.at(f.field("output", "ptr"), f.multiply(head, 2 * dim)))
    return f.text()


def append_token(f: Function, dim: int, number: str) -> tuple[str, str]:
    """Fill in the last token of key head `number`. Addresses of its keys and values."""
    keys, values = (f.at(f.field(w, "ptr"), f.multiply(number, f.field(f"{w}_stride"))) for w in ("keys", "values"))
    for place, what in ((keys, "new_keys"), (values, "new_values")):
        new = f.at(f.field(what, "ptr"), f.multiply(number, f.field(f"{what}_stride")))
        last = f.at(place, f.multiply(f.add(f.field("length"), -1), 2 * dim))
        f.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {last}, ptr {new}, i64 {2 * dim}, i1 false)")
    return keys, values


def heads_at(f: Function, number: str, first: str, at_once: int) -> tuple[list[str], list[str]]:
    """Numbers and queries of `at_once` heads from `first` on of those that share key head `number`. Past the end the
    last one is computed again.
    """
    group = f.field("group")
    inside = [f.least(f.add(first, one), f.add(group, -1)) for one in range(at_once)]
    heads = [f.add(f.multiply(number, group), one) for one in inside]
    return heads, [f.at(f.field("query", "ptr"), f.multiply(head, f.field("query_stride"))) for head in heads]


def add_tokens(
    f: Function, dim: int, queries: list[str], so_far: list[HeadSoFar], keys: str, values: str, scale: str
) -> None:
    """Add `length` tokens, as the context has it, of one key head to several heads."""
    length = f.field("length")
    wide = _WideScores(f, dim, queries) if isinstance(f, Avx2Function) else None
    with f.loop(length, _TOKENS) as token:
        left = f.value(f"sub i64 {length}, {token}")
        if wide is not None:
            wide.multiply(f.at(keys, f.multiply(token, 2 * dim)), f.least(left, _TOKENS))
        changes = []
        for number, (query, one) in enumerate(zip(queries, so_far, strict=True)):
            scores = _scores(f, dim, query, keys, token, length) if wide is None else wide.of(number)
            scores = f.value(f"fmul {FLOATS} {scores}, {scale}")
            there = f.value(f"icmp ult <16 x i64> {_NUMBERS}, {f.splat('i64', left)}")
            scores = f.value(f"select <16 x i1> {there}, {FLOATS} {scores}, {FLOATS} splat (float {LEAST})")
            before = f.load(FLOATS, one.largest)
            now = f.largest([before, f.largest_lane(scores)])
            f.store(FLOATS, now, one.largest)
            exponentials = exponential(f, f.value(f"fsub {FLOATS} {scores}, {now}"))
            change = exponential(f, f.value(f"fsub {FLOATS} {before}, {now}"))
            f.store(FLOATS, exponentials, one.weights)
            f.store(FLOATS, f.multiply_add(f.load(FLOATS, one.total), change, exponentials), one.total)
            changes.append(change)
        place = f.at(values, f.multiply(token, 2 * dim))
        _add_values(f, dim, place, f.least(left, _TOKENS), so_far, changes)


def _scores(f: Function, dim: int, query: str, keys: str, token: str, length: str) -> str:
    """Products of a query with the keys of 16 tokens; of what comes behind the last, again those of the last."""
    parts = [f.load(HALVES, f.at(query, 64 * at), align=2) for at in range(dim // 32)]
    dots = []
    for number in range(_TOKENS):
        row = f.at(keys, f.multiply(f.least(f.add(token, number), f.add(length, -1)), 2 * dim))
        total = "zeroinitializer"
        for at, part in enumerate(parts):
            total = f.dot(total, part, f.load(HALVES, f.at(row, 64 * at), align=2))
        dots.append(total)
    return _totals(f, dots)


class _WideScores:
    """Products of queries with the keys of up to 16 tokens, where they are made in float32. A token's keys are widened
    once for all queries, and then comes the next token: all at once would be more than there are registers.
    """

    def __init__(self, f: Avx2Function, dim: int, queries: list[str]) -> None:
        self._f, self._dim = f, dim
        self._queries, self._dots = ([f.room(size) for _ in queries] for size in (4 * dim, 64 * _TOKENS))
        for query, room in zip(queries, self._queries, strict=True):
            for at in range(dim // 32):
                halves = f.load(HALVES, f.at(query, 64 * at), align=2)
                for odd, floats in enumerate(f.even_and_odd(halves)):
                    f.store(FLOATS, floats, f.at(room, 128 * at + 64 * odd))

    def multiply(self, keys: str, count: str) -> None:
        """Of the first `count` tokens at `keys`."""
        f = self._f
        with f.loop(count) as token:
            row = f.at(keys, f.multiply(token, 2 * self._dim))
            sums = ["zeroinitializer"] * len(self._queries)
            for at in range(self._dim // 32):
                halves = f.load(HALVES, f.at(row, 64 * at), align=2)
                for odd, floats in enumerate(f.even_and_odd(halves)):
                    parts = [f.load(FLOATS, f.at(room, 128 * at + 64 * odd)) for room in self._queries]
                    sums = [f.multiply_add(part, floats, one) for part, one in zip(parts, sums, strict=True)]
            for one, room in zip(sums, self._dots, strict=True):
                f.store(FLOATS, one, f.at(room, f.multiply(token, 64)))

    def of(self, number: int) -> str:
        """Those of one query, as a vector; what it has for further tokens says nothing."""
        f = self._f
        return _totals(f, [f.load(FLOATS, f.at(self._dots[number], 64 * token)) for token in range(_TOKENS)])


def _totals(f: Function, dots: list[str]) -> str:
    """A number for each of 16 vectors, in order: neighbours are added again and again."""
    while len(dots) > 1:
        dots = [_neighbours(f, one, other) for one, other in zip(dots[::2], dots[1::2], strict=True)]
    return dots[0]


def _neighbours(f: Function, one: str, other: str) -> str:
    """Sums of each two neighbours, those of `one` first."""
    even, odd = (
        f.value(f"shufflevector {FLOATS} {one}, {FLOATS} {other}, <16 x i32> {mask}") for mask in (_EVEN, _ODD)
    )
    return f.value(f"fadd {FLOATS} {even}, {odd}")


def _add_values(f: Function, dim: int, values: str, count: str, so_far: list[HeadSoFar], changes: list[str]) -> None:
    """Multiply the sums with `changes`, and add the values of `count` tokens by their weights."""
    at_once = f.KEPT_VECTORS // _MOST_HEADS * 16  # columns whose sums the registers hold
    for first in range(0, dim, at_once):
        places = [one.sums[first // 16 : (first + at_once) // 16] for one in so_far]
        running = [[f.variable(FLOATS) for _ in parts] for parts in places]
        for parts, current, change in zip(places, running, changes, strict=True):
            for part, variable in zip(parts, current, strict=True):
                f.store(FLOATS, f.value(f"fmul {FLOATS} {f.load(FLOATS, part)}, {change}"), variable)
        with f.loop(count) as token:
            row = f.at(values, f.add(f.multiply(token, 2 * dim), 2 * first))
            columns = [f.widened(f.at(row, 32 * at)) for at in range(at_once // 16)]
            for one, current in zip(so_far, running, strict=True):
                factor = f.everywhere(f.at(one.weights, f.multiply(token, 4)), FLOATS)
                for column, variable in zip(columns, current, strict=True):
                    f.store(FLOATS, f.multiply_add(factor, column, f.load(FLOATS, variable)), variable)
        for parts, current in zip(places, running, strict=True):
            for part, variable in zip(parts, current, strict=True):
                f.store(FLOATS, f.load(FLOATS, variable), part)
