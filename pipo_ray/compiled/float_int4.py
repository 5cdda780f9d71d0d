"""Products of float32 inputs with int4 panels (`quant/panels.py`) whose codes lie row by row in a block, as LLVM IR.

For processors that do not multiply 16-bit numbers. Eight bytes of a column are the codes of 16 rows of the weight, two
vectors, which is what is multiplied at a time (a *tile*).

Few rows of inputs: codes are widened in registers and multiplied as they are, and what a group's products add up to is
scaled; what is added to each code, times the group's inputs, comes on top. Tiles lie side by side in memory: it is read
from front to back.

Many rows: 256 columns of a tile are widened, scaled, into a buffer in the first cache, and multiplied with up to six
rows of inputs at a time, whose sums stay in registers; more use the same buffer, and their sums wait in memory.

A row of inputs gives the same bits however many others it is computed with by the same function's kind, and on however
many threads. Needs AVX2 and FMA.
"""

from __future__ import annotations

from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.widened import DECLARATIONS, EIGHT, LANES, VECTOR, everywhere, multiply_add

FIELDS = (
    "panels", "inputs", "sums", "output", "num_inputs", "columns", "panel_blocks", "blocks", "next", "panel_bytes",
    "scales", "output_bytes",
)  # fmt: skip
"""The context, 64-bit words: addresses of the panels, of the inputs float32 [num_inputs, columns], of their sums by
groups, float32 [num_inputs, columns / group], which only few inputs need, and of the output float32
[num_inputs, all rows of the panels]; numbers; blocks of a panel, and of all panels; `next` is 0 at the start and counts
what the threads have taken; bytes of a panel, and of the codes in it, behind which the scales are; bytes of a row
of the output.
"""

MOST_FEW = 4
"""Rows of inputs that are few."""
MOST_INPUTS = 6
"""Of many, those that are multiplied at once."""
KEPT_INPUTS = 256
"""The most rows of inputs: sums are in memory."""

_BLOCK = 256  # columns; a multiple of every group
_AT_ONCE = 4  # columns
_NEAR = 2048  # bytes
_CODES = "<8 x i32>"
_MIDDLE = 8.0  # what a code of 8 stands for has only the zero in it


def few_name(num_inputs: int) -> str:
    """The function for exactly so many rows of inputs."""
    return f"few{num_inputs}"


def many_name(at_once: int) -> str:
    """The function that multiplies so many rows of inputs at once."""
    return f"many{at_once}"


def module(group: int, half: int) -> str:
    """All functions for groups of so many columns, and blocks of twice `half` rows, which are in the low and the high
    halves of so many bytes.
    """
    few = (_few(group, half, count) for count in range(1, MOST_FEW + 1))
    many = (_many(group, half, count) for count in range(1, MOST_INPUTS + 1))
    return "\n".join([DECLARATIONS, *few, *many])


class _Block:
    """A block of rows that a thread has taken."""

    def __init__(self, f: Function, task: str, half: int) -> None:
        self.f, self.half, self.columns = f, half, f.field("columns")
        panel_blocks = f.field("panel_blocks")
        panel, number = (f.value(f"{what} i64 {task}, {panel_blocks}") for what in ("udiv", "urem"))
        base = f.at(f.field("panels", "ptr"), f.multiply(panel, f.field("panel_bytes")))
        rows = 2 * half
        self.codes = f.at(base, f.multiply(f.multiply(number, self.columns), self.half))
        self.scales = f.at(f.at(base, f.field("scales")), f.multiply(number, 4 * rows))
        self.scale_bytes = f.multiply(panel_blocks, 4 * rows)  # of a group
        self.first_row = f.multiply(task, rows)

    def scales_of(self, group: str, tile: str) -> list[tuple[str, str]]:
        """Of a tile's two vectors of rows: scales, and what a code of 0 stands for."""
        f = self.f
        first = f.at(self.scales, f.add(f.multiply(group, self.scale_bytes), f.multiply(tile, 4 * LANES)))
        found = []
        for place in (first, f.at(first, 4 * self.half)):
            words = f.load(_CODES, place, align=4)
            scale = f.cast(_CODES, f.value(f"shl {_CODES} {words}, splat (i32 16)"), EIGHT)
            zero = f.cast(_CODES, f.value(f"and {_CODES} {words}, splat (i32 -65536)"), EIGHT)
            found.append((scale, multiply_add(f, scale, f"splat (float {-_MIDDLE})", zero)))
        return found

    def codes_at(self, column: str, tile: str, ahead: int = 0) -> list[str]:
        """Of the two vectors of rows of a tile, so many columns behind `column`, as floats."""
        f = self.f
        place = f.at(self.codes, f.add(f.multiply(column, self.half), f.multiply(tile, LANES)))
        place = f.at(place, ahead * self.half)
        codes = f.value(f"zext <8 x i8> {f.load('<8 x i8>', place, align=1)} to {_CODES}")
        low = f.value(f"and {_CODES} {codes}, splat (i32 15)")
        high = f.value(f"lshr {_CODES} {codes}, splat (i32 4)")
        return [f.value(f"sitofp {_CODES} {one} to {EIGHT}") for one in (low, high)]

    def places(self, index: str, tile: str) -> list[str]:
        """Where the output of row `index` of inputs has the two vectors."""
        f = self.f
        row = f.at(f.field("output", "ptr"), f.multiply(index, f.field("output_bytes")))
        first = f.at(row, f.multiply(f.add(self.first_row, f.multiply(tile, LANES)), 4))
        return [first, f.at(first, 4 * self.half)]


def _few(group: int, half: int, num_inputs: int) -> str:
    f = Function(few_name(num_inputs), FIELDS)
    tiles = 2 if num_inputs <= 2 else 1  # side by side: their sums fill the registers
    with f.tasks(f.place_of("next"), f.field("blocks")) as task:
        block = _Block(f, task, half)
        groups = f.value(f"udiv i64 {block.columns}, {group}")
        rows = [f.at(f.field("inputs", "ptr"), f.multiply(block.columns, 4 * number)) for number in range(num_inputs)]
        of_groups = [f.at(f.field("sums", "ptr"), f.multiply(groups, 4 * number)) for number in range(num_inputs)]
        with f.loop(str(half // LANES), tiles) as first:
            numbers = [f.add(first, number) for number in range(tiles)]
            totals = [[f.variable(EIGHT) for _ in range(2 * tiles)] for _ in rows]
            with f.loop(groups) as at:
                start = f.multiply(at, group)
                sums = [[f.variable(EIGHT) for _ in range(2 * tiles)] for _ in rows]
                with f.loop(str(group), _AT_ONCE) as offset:
                    column = f.add(start, offset)
                    f.prefetch(f.at(block.codes, f.add(f.multiply(column, half), _NEAR)))
                    at_column = [f.at(row, f.multiply(column, 4)) for row in rows]
                    for ahead in range(_AT_ONCE):
                        codes = [one for tile in numbers for one in block.codes_at(column, tile, ahead)]
                        for row, row_sums in zip(at_column, sums, strict=True):
                            _add(f, row_sums, codes, everywhere(f, f.at(row, 4 * ahead)))
                scales = [one for tile in numbers for one in block.scales_of(at, tile)]
                for row, row_sums, row_totals in zip(of_groups, sums, totals, strict=True):
                    of_group = everywhere(f, f.at(row, f.multiply(at, 4)))
                    for (scale, zero), one, whole in zip(scales, row_sums, row_totals, strict=True):
                        with_zeros = multiply_add(f, zero, of_group, f.load(EIGHT, whole))
                        f.store(EIGHT, multiply_add(f, scale, f.load(EIGHT, one), with_zeros), whole)
            for index, row_totals in enumerate(totals):
                targets = [place for tile in numbers for place in block.places(str(index), tile)]
                for target, one in zip(targets, row_totals, strict=True):
                    f.store(EIGHT, f.load(EIGHT, one), target, align=4)
    return f.text()


def _many(group: int, half: int, at_once: int) -> str:
    f = Function(many_name(at_once), FIELDS)
    num_inputs = f.field("num_inputs")
    kept, wide = f.room(KEPT_INPUTS * 2 * VECTOR), f.room(_BLOCK * 2 * VECTOR)
    with f.tasks(f.place_of("next"), f.field("blocks")) as task:
        block = _Block(f, task, half)
        with f.loop(str(half // LANES)) as tile:
            with f.loop(f.multiply(num_inputs, 2 * VECTOR), VECTOR) as place:
                f.store(EIGHT, "zeroinitializer", f.at(kept, place), align=VECTOR)
            with f.loop(block.columns, _BLOCK) as column:
                length = f.least(f.without(block.columns, column), _BLOCK)
                _widen(f, block, group, tile, column, length, wide)
                with f.loop(num_inputs, at_once) as first:
                    # Past the end the last row of inputs is computed again, from the same sums.
                    indices = [f.least(f.add(first, one), f.add(num_inputs, -1)) for one in range(at_once)]
                    _multiply(f, block, indices, column, length, wide, kept)
            with f.loop(num_inputs) as index:
                for number, place in enumerate(block.places(index, tile)):
                    one = f.at(kept, f.add(f.multiply(index, 2 * VECTOR), number * VECTOR))
                    f.store(EIGHT, f.load(EIGHT, one, align=VECTOR), place, align=4)
    return f.text()


def _widen(f: Function, block: _Block, group: int, tile: str, column: str, length: str, wide: str) -> None:
    """Fill `wide` with `length` columns of a tile, from `column` on, two vectors each."""
    with f.loop(length, group) as start:
        first = f.add(column, start)
        scales = block.scales_of(f.value(f"udiv i64 {first}, {group}"), tile)
        with f.loop(str(group)) as offset:
            at = f.add(first, offset)
            f.prefetch(f.at(block.codes, f.add(f.multiply(at, block.half), _NEAR)))
            target = f.at(wide, f.multiply(f.add(start, offset), 2 * VECTOR))
            for number, (codes, (scale, zero)) in enumerate(zip(block.codes_at(at, tile), scales, strict=True)):
                f.store(EIGHT, multiply_add(f, codes, scale, zero), f.at(target, number * VECTOR), align=VECTOR)


def _multiply(
    f: Function, block: _Block, indices: list[str], column: str, length: str, wide: str, kept: str
) -> None:  # fmt: skip
    """Add to the sums at `kept` the products of a widened tile and of the inputs at `indices`."""
    rows = [f.multiply(f.add(f.multiply(index, block.columns), column), 4) for index in indices]
    inputs = [f.at(f.field("inputs", "ptr"), row) for row in rows]
    places = [f.at(kept, f.multiply(index, 2 * VECTOR)) for index in indices]
    pairs = [[place, f.at(place, VECTOR)] for place in places]
    sums = [[f.variable(EIGHT, f.load(EIGHT, place, align=VECTOR)) for place in pair] for pair in pairs]
    with f.loop(length, _AT_ONCE) as start:
        source = f.at(wide, f.multiply(start, 2 * VECTOR))
        at_column = [f.at(row, f.multiply(start, 4)) for row in inputs]
        for ahead in range(_AT_ONCE):
            places_of = (f.at(source, (2 * ahead + number) * VECTOR) for number in range(2))
            weights = [f.load(EIGHT, place, align=VECTOR) for place in places_of]
            for row, row_sums in zip(at_column, sums, strict=True):
                _add(f, row_sums, weights, everywhere(f, f.at(row, 4 * ahead)))
    for pair, row_sums in zip(pairs, sums, strict=True):
        for place, one in zip(pair, row_sums, strict=True):
            f.store(EIGHT, f.load(EIGHT, one), place, align=VECTOR)


def _add(f: Function, sums: list[str], weights: list[str], number: str) -> None:
    for place, weight in zip(sums, weights, strict=True):
        f.store(EIGHT, multiply_add(f, weight, number, f.load(EIGHT, place)), place)
