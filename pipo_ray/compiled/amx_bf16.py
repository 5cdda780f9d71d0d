"""Blocks of a bf16 weight as it lies in a store, for the matrix unit (`amx.py`).

They are copied into the first cache: as they lie, rows would take each other's place there.
"""

from __future__ import annotations

from collections.abc import Callable

from pipo_ray.compiled.amx import LINE, ROWS, TILE_BYTES, place_in_block, tile_columns
from pipo_ray.compiled.ir import FLOATS, HALVES, WORDS, Function


class Bf16Rows:
    """Rows, and a bias that is added to the sums."""

    fields: tuple[str, ...] = ("weight", "stride", "bias", "bias_stride")
    """Address of the weight bf16 [rows, columns], and bytes from one row to the next; address of the bias float32
    [rows] with room to a multiple of `ROWS`, and bytes from one number to the next (0: all are the first `ROWS`).
    """
    block_rows = ROWS
    declarations = ""

    def copy_block(self, f: Function, first: str, block: str, start: str, count: str) -> None:
        """See `Weights`. Past the end the last row is taken again."""
        whole, rest, _ = tile_columns(f, f.field("columns"))
        numbers = [f.least(f.add(first, number), f.add(f.field("rows"), -1)) for number in range(ROWS)]
        weights = [f.at(f.field("weight", "ptr"), f.multiply(number, f.field("stride"))) for number in numbers]
        full = f.least(count, f.without(whole, start))
        with f.loop(full) as tile:
            at = f.multiply(f.add(start, tile), LINE)
            place = f.at(block, f.multiply(tile, TILE_BYTES))
            for number, weight in enumerate(weights):
                line = f.at(weight, at)
                f.store(WORDS, f.load(WORDS, line, align=2), f.at(place, place_in_block(number)), align=LINE)
        with f.loop(f.without(count, full)):  # once, if the columns are no multiple of 32
            at, place = f.multiply(whole, LINE), f.at(block, f.multiply(full, TILE_BYTES))
            for number, weight in enumerate(weights):
                line = f.cast(HALVES, f.load_first(f.at(weight, at), rest), WORDS)
                f.store(WORDS, line, f.at(place, place_in_block(number)), align=LINE)

    def ask_ahead(self, f: Function, first: str, tile: str, part: str, parts: str) -> None:
        """See `Weights`."""
        column = f.at(f.field("weight", "ptr"), f.multiply(tile, LINE))
        each = f.value(f"udiv i64 {f.add(parts, ROWS - 1)}, {parts}")
        begin = f.add(first, f.multiply(part, each))
        with f.loop(each) as number:
            row = f.least(f.add(begin, number), f.add(f.field("rows"), -1))
            f.prefetch(f.at(column, f.multiply(row, f.field("stride"))))

    def finishing(self, f: Function, first: str) -> Callable[[int, str], str]:
        """See `Weights`."""
        place = f.at(f.field("bias", "ptr"), f.multiply(first, f.field("bias_stride")))
        biases = [f.load(FLOATS, f.at(place, half * LINE), align=4) for half in (0, 1)]
        return lambda half, sums: f.value(f"fadd {FLOATS} {sums}, {biases[half]}")
