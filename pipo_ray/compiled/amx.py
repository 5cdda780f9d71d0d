"""Products of many rows of bf16 inputs by the processor's matrix unit, as LLVM IR.

The unit (AMX) multiplies tiles: 16 rows of a weight, 32 columns of them, with the same columns of 16 rows of inputs;
256 sums in float32 stay in a tile. Two tiles of weights and two of inputs make four products. The inputs are put into
tiles once for all weights, in the order in which they are read. Of a weight, a block of rows is taken at a time and 256
columns of them, as bf16 in tiles that stay in the nearest caches; `Weights` are where they come from. All inputs go
over these columns; the sums wait in memory until the next columns come. At last they are turned, because outputs lie by
rows of inputs.

Inputs are more than the second cache holds, and are read again for each few rows of a weight. So what a thread reads
next of inputs, and of weights in bf16, it asks for between the products, a little at each: a burst of it would have
them wait.

A sum is added up in the order of its columns, so a row of inputs gives the same bits however many others it is computed
with, and on however many threads. Like VDPBF16PS, the unit takes numbers below 2^-126 for zero.

Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (AMX), TDPBF16PS.
Needs AMX_TILE and AMX_BF16, AVX512F and BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, INTS, MASK, WORDS, Function, vector
from pipo_ray.compiled.transpose import transposed

PACK_FIELDS = ("inputs", "packed", "num_inputs", "columns", "stride", "next")
"""The context of `PACK`, 64-bit words: addresses of the inputs bf16 [num_inputs, columns] and of what is made of them,
`packed_bytes`; numbers; bytes from one row of the inputs to the next; `next` is 0 at the start and counts what the
threads have taken.
"""

FIELDS = (
    "packed", "output", "num_inputs", "columns", "rows", "next", "output_stride", "rows_at_once", "inputs_at_once",
)  # fmt: skip
"""The context of `PRODUCT`, before the fields of the weights: addresses of what `PACK` made and of the output bf16
[num_inputs, rows]; numbers; `next` as above; bytes from one row of the output to the next; rows of the weight and of
inputs that a thread takes at once (`amx_shares.py`): multiples of a block's rows and of `INPUTS`, at most `MOST_SUMS`
sums.
"""

PACK, PRODUCT = "pack_inputs", "product"
ROWS = 32
"""Rows of the weight that are multiplied at once."""
INPUTS = 32
"""Rows of inputs that are multiplied with them at once."""
MOST_INPUTS = 512
"""Rows of inputs in one product."""
MOST_SUMS = 128 * MOST_INPUTS
"""Of what a thread takes at once: they fit into the second cache, beside the inputs that a block is multiplied with."""
DEPTH = 8
"""Tiles of a row of weights in a block."""
TILE_COLUMNS = 32
LINE = 64
"""Bytes of a tile's row."""

TILE_BYTES = 16 * LINE

_SIDE = 16
_PAIR_BYTES = 2 * DEPTH * TILE_BYTES
"""Of `INPUTS` rows of inputs, the columns that are multiplied with a block: a tile of each half, and then the next."""
_AHEAD = 2 * TILE_BYTES
"""Bytes of inputs that are asked for beyond those at work: farther ahead is no faster."""
_A, _B = (4, 5), (6, 7)  # tiles of weights and of inputs; the first four hold sums

_DECLARATIONS = f"""
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
declare void @llvm.masked.store.v32i16.p0({WORDS}, ptr, i32, {MASK})
"""


class Weights(Protocol):
    """Where the blocks of a weight [rows, columns] come from."""

    fields: tuple[str, ...]
    """Of the context of `PRODUCT`, behind `FIELDS`."""
    block_rows: int
    """Rows in a block, a multiple of `ROWS`."""
    declarations: str
    """Of what the functions below call, besides those of `ir.py`."""

    def copy_block(self, f: Function, first: str, block: str, start: str, count: str) -> None:
        """Of the rows from the `first` on, a block's, put `count` tiles of columns in bf16 into `block`, from tile
        number `start` on; see `place_in_block`. Zeros behind the last column; rows behind the last may be anything.
        """
        ...

    def ask_ahead(self, f: Function, first: str, tile: str, part: str, parts: str) -> None:
        """Ask for one of so many `parts` of a tile's columns, number `tile`, of the rows from the `first` on that
        `copy_block` will read. Nothing where that asks by itself.
        """
        ...

    def finishing(self, f: Function, first: str) -> Callable[[int, str], str]:
        """What makes outputs of sums with the `ROWS` rows from the `first` on: of number 0 or 1 of its halves, float32
        of 16 rows in, the same out.
        """
        ...


def packed_bytes(num_inputs: int, columns: int) -> int:
    """Of inputs in tiles, with room for whole pairs and whole blocks' columns."""
    return -(-num_inputs // INPUTS) * -(-columns // (TILE_COLUMNS * DEPTH)) * _PAIR_BYTES


def pack_module() -> str:
    """The function that puts inputs into tiles."""
    return f"{DECLARATIONS}\n{_pack()}"


def module(weights: Weights) -> str:
    """The function that multiplies."""
    # One shape for all tiles: palette 1; of each of eight, 64 bytes in a row (words from byte 16 on) and 16 rows.
    shape = [1, *[0] * 15, *[LINE, 0] * 8, *[0] * 16, *[_SIDE] * 8, *[0] * 8]
    config = f"@shape = private constant [64 x i8] {vector('i8', shape).replace('<', '[').replace('>', ']')}, align 64"
    return "\n".join([DECLARATIONS, _DECLARATIONS, weights.declarations, config, _product(weights)])


def _pack() -> str:
    f = Function(PACK, PACK_FIELDS)
    num_inputs, columns = f.field("num_inputs"), f.field("columns")
    whole, rest, _ = tile_columns(f, columns)
    with f.tasks(f.place_of("next"), _tiles(f, num_inputs)) as task:
        first = f.multiply(task, _SIDE)
        # Past the end the last row is taken again: its products are not stored.
        numbers = [f.least(f.add(first, number), f.add(num_inputs, -1)) for number in range(_SIDE)]
        rows = [f.at(f.field("inputs", "ptr"), f.multiply(number, f.field("stride"))) for number in numbers]
        of_chunk = f.multiply(_pairs(f, num_inputs), _PAIR_BYTES)
        in_chunk = f.add(
            f.multiply(f.value(f"lshr i64 {task}, 1"), _PAIR_BYTES),
            f.multiply(f.value(f"and i64 {task}, 1"), TILE_BYTES),
        )
        target = f.at(f.field("packed", "ptr"), in_chunk)

        def place(tile: str) -> str:
            chunk, inside = f.value(f"udiv i64 {tile}, {DEPTH}"), f.value(f"urem i64 {tile}, {DEPTH}")
            return f.at(f.at(target, f.multiply(chunk, of_chunk)), f.multiply(inside, 2 * TILE_BYTES))

        with f.loop(whole) as tile:
            lines = [f.load(INTS, f.at(row, f.multiply(tile, LINE)), align=2) for row in rows]
            _store_tile(f, lines, place(tile))
        with f.loop(f.least(rest, 1)):
            at = f.multiply(whole, LINE)
            lines = [f.cast(HALVES, f.load_first(f.at(row, at), rest), INTS) for row in rows]
            _store_tile(f, lines, place(whole))
    return f.text()


def _store_tile(f: Function, lines: Sequence[str], place: str) -> None:
    """Of 16 rows of inputs 32 columns each: two neighbours of all rows are a row of the tile."""
    for number, line in enumerate(transposed(f, lines, "i32")):
        f.store(INTS, line, f.at(place, number * LINE), align=LINE)


def _product(weights: Weights) -> str:
    f = Function(PRODUCT, (*FIELDS, *weights.fields))
    num_inputs, rows = f.field("num_inputs"), f.field("rows")
    rows_at_once, inputs_at_once = f.field("rows_at_once"), f.field("inputs_at_once")
    _, _, depth = tile_columns(f, f.field("columns"))
    of_chunk = f.multiply(_pairs(f, num_inputs), _PAIR_BYTES)
    sums = f.room(4 * MOST_SUMS)
    block = f.room(weights.block_rows // _SIDE * TILE_BYTES * DEPTH)
    f.do("call void @llvm.x86.ldtilecfg(ptr @shape)")
    shares = _times(f, num_inputs, inputs_at_once)
    with f.tasks(f.place_of("next"), f.multiply(_times(f, rows, rows_at_once), shares)) as task:
        first = f.multiply(f.value(f"udiv i64 {task}, {shares}"), rows_at_once)
        first_input = f.multiply(f.value(f"urem i64 {task}, {shares}"), inputs_at_once)
        taken = f.least(f.without(rows, first), rows_at_once)
        tiles = _tiles(f, f.least(f.without(num_inputs, first_input), inputs_at_once))
        of_rows = f.multiply(tiles, 2 * TILE_BYTES)  # bytes of sums with `ROWS` rows
        packed = f.at(f.field("packed", "ptr"), f.multiply(first_input, DEPTH * LINE))
        with f.loop(depth, DEPTH) as start:
            count = f.least(f.without(depth, start), DEPTH)
            inputs = f.at(packed, f.multiply(f.value(f"udiv i64 {start}, {DEPTH}"), of_chunk))
            with f.loop(taken, weights.block_rows) as row:
                weights.copy_block(f, f.add(first, row), block, start, count)
                with f.loop(f.least(f.without(taken, row), weights.block_rows), ROWS) as inner:
                    number = f.add(row, inner)
                    of_block = f.at(block, f.multiply(inner, DEPTH * LINE))
                    here = f.at(sums, f.multiply(f.value(f"lshr i64 {number}, 5"), of_rows))
                    ask = _asking(f, weights, first, taken, f.add(number, ROWS), start, tiles)
                    _multiply_all(f, f.without(taken, number), tiles, inputs, of_block, count, here, start, ask)
        with f.loop(taken, ROWS) as row:
            here = f.at(sums, f.multiply(f.value(f"lshr i64 {row}, 5"), of_rows))
            _store(f, weights, here, f.add(first, row), tiles, first_input)
    f.do("call void @llvm.x86.tilerelease()")
    return f.text()


def _asking(
    f: Function, weights: Weights, first: str, taken: str, following: str, start: str, tiles: str
) -> Callable[[str, str], None]:
    """What asks for the block behind the one at work, with each pair of tiles of inputs, by the first one's number, and
    each step over its columns: rows from number `following` of those `taken` on, or of all columns the next ones.
    """
    more = f.value(f"icmp ult i64 {following}, {taken}")
    row = f.add(first, f.value(f"select i1 {more}, i64 {following}, i64 0"))
    column = f.value(f"select i1 {more}, i64 {start}, i64 {f.add(start, DEPTH)}")
    parts = f.value(f"lshr i64 {f.add(tiles, 1)}, 1")

    def ask(tile: str, step: str) -> None:
        weights.ask_ahead(f, row, f.add(column, step), f.value(f"lshr i64 {tile}, 1"), parts)

    return ask


def _multiply_all(
    f: Function, rows: str, tiles: str, inputs: str, block: str, count: str, sums: str, start: str,
    ask: Callable[[str, str], None],
) -> None:  # fmt: skip
    """`_multiply` with each pair of tiles of inputs, and with one that is left; half of a block where no more rows
    are.
    """
    even = f.value(f"and i64 {tiles}, -2")
    wide = f.value(f"icmp ugt i64 {rows}, {_SIDE}")
    for halves, those in ((2, f"i1 {wide}, i64 {tiles}, i64 0"), (1, f"i1 {wide}, i64 0, i64 {tiles}")):
        wanted = f.value(f"select {those}")
        with f.loop(f.value(f"and i64 {wanted}, -2"), 2) as tile:
            _multiply(f, halves, 2, inputs, tile, block, count, sums, start, ask)
        with f.loop(f.value(f"and i64 {wanted}, 1")):
            _multiply(f, halves, 1, inputs, even, block, count, sums, start, ask)


def place_in_block(row: int) -> int:
    """Bytes from the beginning of a block to the first tile's row with this row of the weight; the next tile with the
    same rows is `TILE_BYTES` further.
    """
    return row // _SIDE * DEPTH * TILE_BYTES + row % _SIDE * LINE


def _multiply(
    f: Function, halves: int, at_once: int, inputs: str, tile: str, block: str, count: str, sums: str, start: str,
    ask: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Add to the sums of tile number `tile` of inputs, or of that and the next, what the block or the first half of it
    gives.
    """
    pair = f.at(inputs, f.multiply(tile, DEPTH * TILE_BYTES))
    of_tile = f.at(sums, f.multiply(tile, 2 * TILE_BYTES))
    places = [
        (2 * half + index, f.at(of_tile, TILE_BYTES * (2 * index + half)))
        for index in range(at_once)
        for half in range(halves)
    ]
    is_first = f.value(f"zext i1 {f.value(f'icmp eq i64 {start}, 0')} to i64")
    with f.loop(is_first):
        for number, _ in places:
            f.do(f"call void @llvm.x86.tilezero(i8 {number})")
    with f.loop(f.without("1", is_first)):
        for number, place in places:
            _load_tile(f, number, place)
    with f.loop(count) as step:
        of_block, of_step = f.at(block, f.multiply(step, TILE_BYTES)), f.at(pair, f.multiply(step, 2 * TILE_BYTES))
        for line in range(0, 2 * TILE_BYTES, LINE):
            f.prefetch(f.at(of_step, _AHEAD + line), to_all=True)
        ask(tile, step)
        # Products begin as soon as two tiles are there: with all four before them it took a fifth longer.
        _load_tile(f, _B[0], of_step)
        for half in range(halves):
            _load_tile(f, _A[half], f.at(of_block, half * DEPTH * TILE_BYTES))
            for index in range(at_once):
                if index and not half:
                    _load_tile(f, _B[index], f.at(of_step, TILE_BYTES))
                f.do(f"call void @llvm.x86.tdpbf16ps(i8 {2 * half + index}, i8 {_A[half]}, i8 {_B[index]})")
    for number, place in places:
        f.do(f"call void @llvm.x86.tilestored64(i8 {number}, ptr {place}, i64 {LINE})")


def _load_tile(f: Function, number: int, place: str) -> None:
    f.do(f"call void @llvm.x86.tileloadd64(i8 {number}, ptr {place}, i64 {LINE})")


def _store(f: Function, weights: Weights, sums: str, first: str, tiles: str, first_input: str) -> None:
    """What the sums of `tiles` tiles of inputs, of which the first row has the number `first_input`, with `ROWS` rows
    from the `first` on make into their columns of the output.
    """
    columns = f.least(f.without(f.field("rows"), first), ROWS)
    mask = f.first_lanes(columns)
    finished = weights.finishing(f, first)
    output = f.at(f.field("output", "ptr"), f.multiply(first, 2))
    with f.loop(tiles) as tile:
        of_tile = f.at(sums, f.multiply(tile, 2 * TILE_BYTES))
        halves = []
        for half in (0, 1):
            places = [f.at(of_tile, half * TILE_BYTES + number * LINE) for number in range(_SIDE)]
            turned = transposed(f, [f.load(FLOATS, place, align=LINE) for place in places], "float")
            totals = [finished(half, line) for line in turned]
            halves.append([f.value(f"fptrunc {FLOATS} {total} to <16 x bfloat>") for total in totals])
        row = f.add(first_input, f.multiply(tile, _SIDE))
        for number, (low, high) in enumerate(zip(*halves, strict=True)):
            both = vector("i32", range(32))
            line = f.value(f"shufflevector <16 x bfloat> {low}, <16 x bfloat> {high}, <32 x i32> {both}")
            index = f.add(row, number)
            wanted = f.value(f"icmp ult i64 {index}, {f.field('num_inputs')}")
            lanes = f.value(f"select i1 {wanted}, {MASK} {mask}, {MASK} zeroinitializer")
            target = f.at(output, f.multiply(index, f.field("output_stride")))
            words = f.cast(HALVES, line, WORDS)
            f.do(f"call void @llvm.masked.store.v32i16.p0({WORDS} {words}, ptr {target}, i32 2, {MASK} {lanes})")


def _tiles(f: Function, num_inputs: str) -> str:
    return _times(f, num_inputs, str(_SIDE))


def _pairs(f: Function, num_inputs: str) -> str:
    return _times(f, num_inputs, str(INPUTS))


def _times(f: Function, number: str, at_once: str) -> str:
    """So many at once, how often."""
    return f.value(f"udiv i64 {f.add(number, f.add(at_once, -1))}, {at_once}")


def tile_columns(f: Function, columns: str) -> tuple[str, str, str]:
    """Tiles that 32 columns fill, columns in one behind them, and tiles in all."""
    whole = f.value(f"lshr i64 {columns}, 5")
    return whole, f.value(f"and i64 {columns}, 31"), f.value(f"lshr i64 {f.add(columns, 31)}, 5")
