"""Attention of one token of a sequence to its keys and values in bf16, as LLVM IR.

Sixteen tokens at a time: their scores for a head are one vector, softmax goes on from one vector to the next ("Online
normalizer calculation for softmax", arXiv 1805.02867), and their values are added up in float32. Up to four heads that
share keys and values read them together. A head's result does not depend on the number of threads.

Needs AVX512F, BW and BF16. The one instruction by name: VDPBF16PS.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, INTS, Function, vector
from pipo_ray.compiled.row_steps import exponential

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

_TOKENS = 16
_MOST_HEADS = 4
_COLUMNS = 64  # of the values that are summed at once
_EVEN = vector("i32", range(0, 32, 2))
_ODD = vector("i32", range(1, 32, 2))
_NUMBERS = vector("i64", range(_TOKENS))
_MORE = f"""
declare {FLOATS} @llvm.roundeven.v16f32({FLOATS})
declare {INTS} @llvm.fptosi.sat.v16i32.v16f32({FLOATS})
declare float @llvm.vector.reduce.fmax.v16f32({FLOATS})
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
"""


def module(dim: int, group: int) -> str:
    """The function for heads of `dim` columns, a multiple of 64, of which `group` share keys."""
    return "\n".join([DECLARATIONS, _MORE, _attend(dim, -(-group // -(-group // _MOST_HEADS))), _attend_each()])


def _attend_each() -> str:
    f = Function(EACH, EACH_FIELDS)
    contexts = f.field("contexts", "ptr")
    with f.loop(f.field("count")) as number:
        f.do(f"call void @{NAME}(ptr {f.at(contexts, f.multiply(number, 8 * len(FIELDS)))})")
    return f.text()


def _attend(dim: int, at_once: int) -> str:
    f = Function(NAME, FIELDS)
    group, length = f.field("group"), f.field("length")
    scale = f.splat("float", f.value(f"bitcast i32 {f.load('i32', f.place_of('scale'))} to float"))
    weights = [f.room(64) for _ in range(at_once)]
    sums = [[f.room(64) for _ in range(dim // 16)] for _ in range(at_once)]
    with f.tasks(f.place_of("next"), f.field("kv_heads")) as number:
        keys, values = (f.at(f.field(w, "ptr"), f.multiply(number, f.field(f"{w}_stride"))) for w in ("keys", "values"))
        for place, what in ((keys, "new_keys"), (values, "new_values")):
            new = f.at(f.field(what, "ptr"), f.multiply(number, f.field(f"{what}_stride")))
            last = f.at(place, f.multiply(f.add(length, -1), 2 * dim))
            f.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {last}, ptr {new}, i64 {2 * dim}, i1 false)")
        with f.loop(group, at_once) as first:
            # Past the end the last head is computed again.
            inside = [f.least(f.add(first, one), f.add(group, -1)) for one in range(at_once)]
            heads = [f.add(f.multiply(number, group), one) for one in inside]
            queries = [f.at(f.field("query", "ptr"), f.multiply(head, f.field("query_stride"))) for head in heads]
            largest = [f.variable("float", "0xFFF0000000000000") for _ in heads]
            totals = [f.variable(FLOATS) for _ in heads]
            for parts in sums:
                for part in parts:
                    f.store(FLOATS, "zeroinitializer", part)
            with f.loop(length, _TOKENS) as token:
                left = f.value(f"sub i64 {length}, {token}")
                changes = []
                for query, most, total, weight in zip(queries, largest, totals, weights, strict=True):
                    scores = _scores(f, dim, query, keys, token, length)
                    scores = f.value(f"fmul {FLOATS} {scores}, {scale}")
                    there = f.value(f"icmp ult <16 x i64> {_NUMBERS}, {f.splat('i64', left)}")
                    scores = f.value(
                        f"select <16 x i1> {there}, {FLOATS} {scores}, {FLOATS} splat (float 0xFFF0000000000000)"
                    )
                    before = f.load("float", most)
                    here = f.value(f"call float @llvm.vector.reduce.fmax.v16f32({FLOATS} {scores})")
                    more = f.value(f"fcmp ogt float {here}, {before}")
                    now = f.value(f"select i1 {more}, float {here}, float {before}")
                    f.store("float", now, most)
                    base = f.splat("float", now)
                    exponentials = exponential(f, f.value(f"fsub {FLOATS} {scores}, {base}"))
                    change = exponential(f, f.value(f"fsub {FLOATS} {f.splat('float', before)}, {base}"))
                    f.store(FLOATS, exponentials, weight)
                    f.store(FLOATS, f.multiply_add(f.load(FLOATS, total), change, exponentials), total)
                    changes.append(change)
                _add_values(
                    f, dim, f.at(values, f.multiply(token, 2 * dim)), f.least(left, _TOKENS), weights, changes, sums
                )
            for head, total, parts in zip(heads, totals, sums, strict=True):
                whole = f.splat("float", f.total(f.load(FLOATS, total)))
                row = f.at(f.field("output", "ptr"), f.multiply(head, 2 * dim))
                for at, part in enumerate(parts):
                    mean = f.value(f"fdiv {FLOATS} {f.load(FLOATS, part)}, {whole}")
                    f.store_rounded(mean, f.at(row, 32 * at), "16")
    return f.text()


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
    while len(dots) > 1:  # neighbours are added until there is a number for each token, in order
        dots = [_neighbours(f, one, other) for one, other in zip(dots[::2], dots[1::2], strict=True)]
    return dots[0]


def _neighbours(f: Function, one: str, other: str) -> str:
    """Sums of each two neighbours, those of `one` first."""
    even, odd = (
        f.value(f"shufflevector {FLOATS} {one}, {FLOATS} {other}, <16 x i32> {mask}") for mask in (_EVEN, _ODD)
    )
    return f.value(f"fadd {FLOATS} {even}, {odd}")


def _add_values(
    f: Function, dim: int, values: str, count: str, weights: list[str], changes: list[str], sums: list[list[str]]
) -> None:
    """Multiply `sums` with `changes`, and add the values of `count` tokens by their weights."""
    for first in range(0, dim, _COLUMNS):
        places = [parts[first // 16 : (first + _COLUMNS) // 16] for parts in sums]
        running = [[f.variable(FLOATS) for _ in parts] for parts in places]
        for parts, current, change in zip(places, running, changes, strict=True):
            for part, variable in zip(parts, current, strict=True):
                f.store(FLOATS, f.value(f"fmul {FLOATS} {f.load(FLOATS, part)}, {change}"), variable)
        with f.loop(count) as token:
            row = f.at(values, f.add(f.multiply(token, 2 * dim), 2 * first))
            columns = [f.widened(f.at(row, 32 * at)) for at in range(_COLUMNS // 16)]
            for weight, current in zip(weights, running, strict=True):
                factor = f.everywhere(f.at(weight, f.multiply(token, 4)), FLOATS)
                for column, variable in zip(columns, current, strict=True):
                    f.store(FLOATS, f.multiply_add(factor, column, f.load(FLOATS, variable)), variable)
        for parts, current in zip(places, running, strict=True):
            for part, variable in zip(parts, current, strict=True):
                f.store(FLOATS, f.load(FLOATS, variable), part)
