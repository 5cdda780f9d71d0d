"""Products of many rows of bf16 inputs with a bf16 weight as it lies in a store, by the processor's matrix unit, as
LLVM IR.

The unit (AMX) multiplies tiles: 16 rows of the weight, 32 columns of them, with the same columns of 16 rows of inputs;
256 sums in float32 stay in a tile. Two tiles of weights and two of inputs make four products. The inputs are put into
tiles once for all weights. Of the weights, 32 rows are taken at a time and 256 columns of them, copied into the first
cache: as they lie, the rows would take each other's place there. All inputs go over these columns; the sums wait in
memory until the next columns come. At last they are turned, because outputs lie by rows of inputs.

A sum is added up in the order of its columns, so a row of inputs gives the same bits however many others it is computed
with, and on however many threads. Like VDPBF16PS, the unit takes numbers below 2^-126 for zero.

Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (AMX), TDPBF16PS.
Needs AMX_TILE and AMX_BF16, AVX512F and BF16.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, HALVES, INTS, MASK, WORDS, Function, vector
from pipo_ray.compiled.transpose import transposed

PACK_FIELDS = ("inputs", "packed", "num_inputs", "columns", "stride", "next")
"""The context of `PACK`, 64-bit words: addresses of the inputs bf16 [num_inputs, columns] and of what is made of them,
`packed_bytes`; numbers; bytes from one row of the inputs to the next; `next` is 0 at the start and counts what the
threads have taken.
"""

FIELDS = (
    "packed", "weight", "bias", "output", "num_inputs", "columns", "rows", "next", "stride", "bias_stride",
    "output_stride", "rows_at_once",
)  # fmt: skip
"""The context of `PRODUCT`: addresses of what `PACK` made, of the weight bf16 [rows, columns], of the bias float32
[rows] with room to a multiple of `ROWS`, and of the output bf16 [num_inputs, rows]; numbers; `next` as above; bytes
from one row of the weight to the next, from one number of the bias to the next (0: all are the first 32), and from one
row of the output to the next; rows that a thread takes at once, a multiple of `ROWS`, at most `MOST_ROWS`.
"""

PACK, PRODUCT = "pack_inputs", "product"
ROWS = 32
"""Rows of the weight in a block."""
INPUTS = 32
"""Rows of inputs that are multiplied with it at once."""
MOST_ROWS, MOST_INPUTS = 128, 512
"""Their sums fit into the second cache, beside the inputs' part that is multiplied with a block."""

_SIDE = 16
_TILE = 1024  # bytes: 16 rows of 64
_LINE = 64
_DEPTH = 8  # tiles of a row of weights in a block
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


def packed_bytes(num_inputs: int, columns: int) -> int:
    """Of inputs in tiles."""
    return -(-num_inputs // _SIDE) * -(-columns // 32) * _TILE


def module() -> str:
    """All functions."""
    # One shape for all tiles: palette 1; of each of eight, 64 bytes in a row (words from byte 16 on) and 16 rows.
    shape = [1, *[0] * 15, *[_LINE, 0] * 8, *[0] * 16, *[_SIDE] * 8, *[0] * 8]
    config = f"@shape = private constant [64 x i8] {vector('i8', shape).replace('<', '[').replace('>', ']')}, align 64"
    return "\n".join([DECLARATIONS, _DECLARATIONS, config, _pack(), _product()])


def _pack() -> str:
    f = Function(PACK, PACK_FIELDS)
    num_inputs, columns = f.field("num_inputs"), f.field("columns")
    whole, rest, depth = _depth(f, columns)
    with f.tasks(f.place_of("next"), _tiles(f, num_inputs)) as task:
        first = f.multiply(task, _SIDE)
        # Past the end the last row is taken again: its products are not stored.
        numbers = [f.least(f.add(first, number), f.add(num_inputs, -1)) for number in range(_SIDE)]
        rows = [f.at(f.field("inputs", "ptr"), f.multiply(number, f.field("stride"))) for number in numbers]
        target = f.at(f.field("packed", "ptr"), f.multiply(f.multiply(task, depth), _TILE))
        with f.loop(whole) as tile:
            lines = [f.load(INTS, f.at(row, f.multiply(tile, _LINE)), align=2) for row in rows]
            _store_tile(f, lines, f.at(target, f.multiply(tile, _TILE)))
        with f.loop(f.least(rest, 1)):
            at = f.multiply(whole, _LINE)
            lines = [f.cast(HALVES, f.load_first(f.at(row, at), rest), INTS) for row in rows]
            _store_tile(f, lines, f.at(target, f.multiply(whole, _TILE)))
    return f.text()


def _store_tile(f: Function, lines: Sequence[str], place: str) -> None:
    """Of 16 rows of inputs 32 columns each: two neighbours of all rows are a row of the tile."""
    for number, line in enumerate(transposed(f, lines, "i32")):
        f.store(INTS, line, f.at(place, number * _LINE), align=_LINE)


def _product() -> str:
    f = Function(PRODUCT, FIELDS)
    num_inputs, rows, at_once = f.field("num_inputs"), f.field("rows"), f.field("rows_at_once")
    whole, rest, depth = _depth(f, f.field("columns"))
    tiles = _tiles(f, num_inputs)
    even = f.value(f"and i64 {tiles}, -2")
    of_block = f.multiply(tiles, 2 * _TILE)
    sums = f.room(MOST_ROWS // ROWS * 2 * _TILE * (MOST_INPUTS // _SIDE))
    block = f.room(2 * _TILE * _DEPTH)
    f.do("call void @llvm.x86.ldtilecfg(ptr @shape)")
    with f.tasks(f.place_of("next"), f.value(f"udiv i64 {f.add(rows, f.add(at_once, -1))}, {at_once}")) as task:
        first = f.multiply(task, at_once)
        blocks = f.value(f"lshr i64 {f.add(f.least(f.without(rows, first), at_once), ROWS - 1)}, 5")
        with f.loop(depth, _DEPTH) as start:
            count = f.least(f.without(depth, start), _DEPTH)
            packed = f.at(f.field("packed", "ptr"), f.multiply(start, _TILE))
            with f.loop(blocks) as number:
                _copy_block(f, f.add(first, f.multiply(number, ROWS)), block, start, count, whole, rest)
                here = f.at(sums, f.multiply(number, of_block))
                with f.loop(even, 2) as tile:
                    _multiply(f, 2, packed, depth, tile, block, count, here, start)
                with f.loop(f.without(tiles, even)):
                    _multiply(f, 1, packed, depth, even, block, count, here, start)
        with f.loop(blocks) as number:
            here = f.at(sums, f.multiply(number, of_block))
            _store(f, here, f.add(first, f.multiply(number, ROWS)), tiles)
    f.do("call void @llvm.x86.tilerelease()")
    return f.text()


def _copy_block(f: Function, first: str, block: str, start: str, count: str, whole: str, rest: str) -> None:
    """`count` tiles of each 16 of the rows from the `first` on, from tile number `start` on."""
    numbers = [f.least(f.add(first, number), f.add(f.field("rows"), -1)) for number in range(ROWS)]
    weights = [f.at(f.field("weight", "ptr"), f.multiply(number, f.field("stride"))) for number in numbers]
    full = f.least(count, f.without(whole, start))
    with f.loop(full) as tile:
        at = f.multiply(f.add(start, tile), _LINE)
        place = f.at(block, f.multiply(tile, _TILE))
        for number, weight in enumerate(weights):
            line = f.at(weight, at)
            f.prefetch(f.at(line, _DEPTH * _LINE))
            f.store(WORDS, f.load(WORDS, line, align=2), f.at(place, _place_in_block(number)), align=_LINE)
    with f.loop(f.without(count, full)):  # once, if the columns are no multiple of 32
        at, place = f.multiply(whole, _LINE), f.at(block, f.multiply(full, _TILE))
        for number, weight in enumerate(weights):
            line = f.cast(HALVES, f.load_first(f.at(weight, at), rest), WORDS)
            f.store(WORDS, line, f.at(place, _place_in_block(number)), align=_LINE)


def _place_in_block(row: int) -> int:
    return row // _SIDE * _DEPTH * _TILE + row % _SIDE * _LINE


def _multiply(
    f: Function, at_once: int, packed: str, depth: str, tile: str, block: str, count: str, sums: str, start: str
) -> None:
    """Add to the sums of tile number `tile` of inputs, or of that and the next, what the block gives."""
    inputs = f.at(packed, f.multiply(f.multiply(tile, depth), _TILE))
    to_next = f.multiply(depth, _TILE)
    of_tile = f.at(sums, f.multiply(tile, 2 * _TILE))
    places = [
        (2 * half + index, f.at(of_tile, _TILE * (2 * index + half))) for index in range(at_once) for half in (0, 1)
    ]
    is_first = f.value(f"zext i1 {f.value(f'icmp eq i64 {start}, 0')} to i64")
    with f.loop(is_first):
        for number, _ in places:
            f.do(f"call void @llvm.x86.tilezero(i8 {number})")
    with f.loop(f.without("1", is_first)):
        for number, place in places:
            _load_tile(f, number, place)
    with f.loop(count) as step:
        at = f.multiply(step, _TILE)
        for half in (0, 1):
            _load_tile(f, _A[half], f.at(f.at(block, at), half * _DEPTH * _TILE))
        of_step = f.at(inputs, at)
        for index in range(at_once):
            _load_tile(f, _B[index], f.at(of_step, to_next) if index else of_step)
        for half in (0, 1):
            for index in range(at_once):
                f.do(f"call void @llvm.x86.tdpbf16ps(i8 {2 * half + index}, i8 {_A[half]}, i8 {_B[index]})")
    for number, place in places:
        f.do(f"call void @llvm.x86.tilestored64(i8 {number}, ptr {place}, i64 {_LINE})")


def _load_tile(f: Function, number: int, place: str) -> None:
    f.do(f"call void @llvm.x86.tileloadd64(i8 {number}, ptr {place}, i64 {_LINE})")


def _store(f: Function, sums: str, first: str, tiles: str) -> None:
    """All sums with the rows from the `first` on, plus the bias, into their columns of the output."""
    columns = f.least(f.without(f.field("rows"), first), ROWS)
    mask = f.first_lanes(columns)
    place = f.at(f.field("bias", "ptr"), f.multiply(first, f.field("bias_stride")))
    biases = [f.load(FLOATS, f.at(place, half * _LINE), align=4) for half in (0, 1)]
    output = f.at(f.field("output", "ptr"), f.multiply(first, 2))
    with f.loop(tiles) as tile:
        of_tile = f.at(sums, f.multiply(tile, 2 * _TILE))
        halves = []
        for half, bias in enumerate(biases):
            places = [f.at(of_tile, half * _TILE + number * _LINE) for number in range(_SIDE)]
            turned = transposed(f, [f.load(FLOATS, place, align=_LINE) for place in places], "float")
            totals = [f.value(f"fadd {FLOATS} {line}, {bias}") for line in turned]
            halves.append([f.value(f"fptrunc {FLOATS} {total} to <16 x bfloat>") for total in totals])
        row = f.multiply(tile, _SIDE)
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
    return f.value(f"udiv i64 {f.add(num_inputs, _SIDE - 1)}, {_SIDE}")


def _depth(f: Function, columns: str) -> tuple[str, str, str]:
    """Tiles that 32 columns fill, columns in one behind them, and tiles in all."""
    whole = f.value(f"lshr i64 {columns}, 5")
    return whole, f.value(f"and i64 {columns}, 31"), f.value(f"lshr i64 {f.add(columns, 31)}, 5")
