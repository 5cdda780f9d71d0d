"""A square of numbers in registers, turned: rows become columns. For code as `ir.py` writes it.

Neighbouring rows are interleaved number by number, then two and more at a time, until each quarter of a register holds
the part of a column that so many rows make; then the quarters change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipo_ray.compiled.ir import Function, vector

SIDE = 16
_LANE = 4  # numbers in a quarter of a register


def transposed(f: Function, lines: Sequence[str], element: str) -> list[str]:
    """16 vectors of 16 numbers of 32 bits, of which the first has the first of each of `lines`, and so on."""
    for numbers in (1, 2):
        lines = [line for pair in _pairs(lines, numbers) for line in _interleaved(f, *pair, numbers, element)]
    # Now the vector 4 g + i has in its lane l column 4 l + i of the rows 4 g to 4 g + 3.
    turned = [""] * SIDE
    for number in range(_LANE):
        for lane, line in enumerate(_lanes_turned(f, lines[number::_LANE], element)):
            turned[_LANE * lane + number] = line
    return turned


def _pairs(lines: Sequence[str], numbers: int) -> Iterator[tuple[str, str]]:
    """Those that hold the same columns of neighbouring rows, in an order in which what they make is ordered by columns:
    `numbers` vectors in a row hold the same rows.
    """
    for group in range(0, len(lines), 2 * numbers):
        yield from zip(lines[group : group + numbers], lines[group + numbers : group + 2 * numbers], strict=True)


def _interleaved(f: Function, left: str, right: str, numbers: int, element: str) -> Iterator[str]:
    """So many numbers of `left` and of `right` in turn, in each lane by itself: of the lanes' first halves, and of the
    second ones.
    """
    for half in (0, 1):
        taken = [
            lane + half * _LANE // 2 + unit + number + source
            for lane in range(0, SIDE, _LANE)
            for unit in range(0, _LANE // 2, numbers)
            for source in (0, SIDE)
            for number in range(numbers)
        ]
        yield _shuffled(f, left, right, taken, element)


def _lanes_turned(f: Function, lines: Sequence[str], element: str) -> list[str]:
    """Four vectors, of which the first has the first lane of each of four."""
    halves = [
        _lanes(f, lines[first], lines[first + 1], (lane, lane + 1, lane + 4, lane + 5), element)
        for lane in (0, 2)
        for first in (0, 2)
    ]
    pairs = ((halves[0], halves[1]), (halves[2], halves[3]))
    return [_lanes(f, *pair, (odd, odd + 2, odd + 4, odd + 6), element) for pair in pairs for odd in (0, 1)]


def _lanes(f: Function, left: str, right: str, lanes: Sequence[int], element: str) -> str:
    """Four of the eight lanes of two vectors."""
    return _shuffled(f, left, right, [_LANE * lane + number for lane in lanes for number in range(_LANE)], element)


def _shuffled(f: Function, left: str, right: str, numbers: Sequence[int], element: str) -> str:
    kind = f"<{SIDE} x {element}>"
    mask = vector("i32", numbers)
    return f.value(f"shufflevector {kind} {left}, {kind} {right}, <{SIDE} x i32> {mask}")
