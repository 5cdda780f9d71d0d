"""Blocks of low-bit panels for the matrix unit (`amx.py`): 64 rows, unpacked to bf16.

int4, layout "avx512". A weight has 16 values in a group: code times scale plus zero in float32, rounded to bf16. They
make a table, and one instruction takes 32 weights out of it, which lie in a row of a tile. For that, codes that lie
column by column are turned: of 16 times two columns 16 registers, of each two columns 16 numbers of 32 bits, which are
four rows' codes each. After that a register has a number for each two columns, and so in each of 32 words the codes of
four rows at one column. 64 weights take 7 instructions, and a table takes 8.

int8. Codes lie row by row; bf16 holds every one exactly. Scales are applied to the sums.

Needs besides AVX512BW and VBMI. The instructions by name: VPERMB, VPERMW.
"""

from __future__ import annotations

from collections.abc import Callable

from pipo_ray.compiled.amx import DEPTH, LINE, ROWS, TILE_BYTES, TILE_COLUMNS, place_in_block, tile_columns
from pipo_ray.compiled.int4 import ROWS_BY_SHIFT, group_scales, interleaved
from pipo_ray.compiled.ir import FLOATS, INTS, WORDS, Function, vector
from pipo_ray.compiled.panel_blocks import BLOCK, block_places
from pipo_ray.compiled.transpose import SIDE, transposed

_TABLE_BYTES = 32
_PERMUTE = "llvm.x86.avx512.permvar.hi.512"
_CODES = "<" + ", ".join(f"float {code}.0" for code in range(-8, 8)) + ">"


class Int4Panels:
    """Groups of `group` columns."""

    fields: tuple[str, ...] = ("codes", "scales", "panel_bytes", "panel_blocks", "scales_bytes")
    """Addresses of the first panel's codes and scales; bytes of a panel, its blocks of 64 rows, bytes of a group's
    scales.
    """
    block_rows = BLOCK
    declarations = f"declare {WORDS} @{_PERMUTE}({WORDS}, {WORDS})"

    def __init__(self, group: int) -> None:
        self._tiles = group // TILE_COLUMNS

    def copy_block(self, f: Function, first: str, block: str, start: str, count: str) -> None:
        """See `Weights`."""
        number = f.value(f"udiv i64 {first}, {BLOCK}")
        codes, scales = block_places(f, number, f.multiply(f.field("columns"), BLOCK // 2), 4 * BLOCK)
        tables = f.room(BLOCK * _TABLE_BYTES)
        with f.loop(count, self._tiles) as tile:
            group = f.value(f"udiv i64 {f.add(start, tile)}, {self._tiles}")
            _fill_tables(f, f.at(scales, f.multiply(group, f.field("scales_bytes"))), tables)
            with f.loop(self._tiles) as inner:
                index = f.add(tile, inner)
                of_tile = f.at(codes, f.multiply(f.add(start, index), BLOCK // 2 * TILE_COLUMNS))
                _look_up(f, of_tile, tables, f.at(block, f.multiply(index, TILE_BYTES)))

    def ask_ahead(self, f: Function, first: str, tile: str, part: str, parts: str) -> None:
        """See `Weights`: `copy_block` asks."""

    def finishing(self, f: Function, first: str) -> Callable[[int, str], str]:
        """See `Weights`: nothing is left to be done."""
        return lambda half, sums: sums


def _fill_tables(f: Function, scales: str, tables: str) -> None:
    """The 16 values of a group of each row of a block, in bf16."""
    with f.loop(BLOCK) as row:
        scale, zero = group_scales(f, f.everywhere(f.at(scales, f.multiply(row, 4)), INTS))
        values = f.multiply_add(_CODES, scale, zero)
        halves = f.value(f"fptrunc {FLOATS} {values} to <16 x bfloat>")
        f.store("<16 x bfloat>", halves, f.at(tables, f.multiply(row, _TABLE_BYTES)), align=_TABLE_BYTES)


def _look_up(f: Function, codes: str, tables: str, place: str) -> None:
    """A tile's columns of a block."""
    pairs = []
    for number in range(TILE_COLUMNS // 2):
        line = f.at(codes, number * BLOCK)
        f.prefetch(f.at(line, DEPTH * TILE_COLUMNS * BLOCK // 2))
        pairs.append(f.cast(WORDS, interleaved(f, line), INTS))
    for number, turned in enumerate(transposed(f, pairs, "i32")):
        words = f.cast(INTS, turned, WORDS)
        for at, rows in enumerate(ROWS_BY_SHIFT):
            row = SIDE * rows + number
            # The instruction looks at five bits. A table stands there twice, so the next row's lowest does not matter.
            index = f.value(f"lshr {WORDS} {words}, splat (i16 {4 * at})") if at else words
            table = f.load("<16 x i16>", f.at(tables, row * _TABLE_BYTES), align=_TABLE_BYTES)
            twice = vector("i32", [*range(16), *range(16)])
            both = f.value(f"shufflevector <16 x i16> {table}, <16 x i16> poison, <32 x i32> {twice}")
            line = f.value(f"call {WORDS} @{_PERMUTE}({WORDS} {both}, {WORDS} {index})")
            f.store(WORDS, line, f.at(place, place_in_block(row)), align=LINE)


class Int8Panels:
    """Columns in multiples of 16."""

    fields: tuple[str, ...] = ("codes", "scales", "panel_bytes", "panel_blocks")
    """As those of `Int4Panels`."""
    block_rows = BLOCK
    declarations = ""

    def copy_block(self, f: Function, first: str, block: str, start: str, count: str) -> None:
        """See `Weights`."""
        columns = f.field("columns")
        whole, _, _ = tile_columns(f, columns)
        codes, _ = self._places(f, first)
        full = f.least(count, f.without(whole, start))
        with f.loop(BLOCK) as row:
            line = f.at(f.at(codes, f.multiply(row, columns)), f.multiply(start, TILE_COLUMNS))
            side, inside = f.value(f"udiv i64 {row}, {SIDE}"), f.value(f"urem i64 {row}, {SIDE}")
            target = f.at(f.at(block, f.multiply(side, place_in_block(SIDE))), f.multiply(inside, place_in_block(1)))
            with f.loop(full) as tile:
                here = f.at(line, f.multiply(tile, TILE_COLUMNS))
                f.prefetch(f.at(here, DEPTH * TILE_COLUMNS))
                place = f.at(target, f.multiply(tile, TILE_BYTES))
                for half in (0, 1):
                    _widen(f, f.at(here, 16 * half), f.at(place, 32 * half))
            with f.loop(f.without(count, full)):  # once, if the columns are no multiple of 32
                place = f.at(target, f.multiply(full, TILE_BYTES))
                _widen(f, f.at(line, f.multiply(full, TILE_COLUMNS)), place)
                f.store("<16 x bfloat>", "zeroinitializer", f.at(place, 32), align=32)

    def ask_ahead(self, f: Function, first: str, tile: str, part: str, parts: str) -> None:
        """See `Weights`: `copy_block` asks."""

    def finishing(self, f: Function, first: str) -> Callable[[int, str], str]:
        """See `Weights`."""
        _, of_block = self._places(f, first)
        scales = f.at(of_block, f.multiply(f.value(f"urem i64 {first}, {BLOCK}"), 2))
        factors = [f.widened(f.at(scales, half * ROWS)) for half in (0, 1)]
        return lambda half, sums: f.value(f"fmul {FLOATS} {sums}, {factors[half]}")

    def _places(self, f: Function, first: str) -> tuple[str, str]:
        number = f.value(f"udiv i64 {first}, {BLOCK}")
        return block_places(f, number, f.multiply(f.field("columns"), BLOCK), 2 * BLOCK)


def _widen(f: Function, codes: str, place: str) -> None:
    """16 codes to bf16."""
    raw = f.load("<16 x i8>", codes, align=1)
    floats = f.value(f"sitofp {INTS} {f.value(f'sext <16 x i8> {raw} to {INTS}')} to {FLOATS}")
    f.store("<16 x bfloat>", f.value(f"fptrunc {FLOATS} {floats} to <16 x bfloat>"), place, align=32)
