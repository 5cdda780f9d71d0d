"""Whole numbers of a query, or of weights, times a page's codes of keys, or of values, as LLVM IR: what instruction
sets have in common.

A number of 16 bits is multiplied in two parts, each by one instruction for several codes: which parts, is the
instruction set's (`packed_bytes.py`, `packed_words.py`). *Digits of a kind* are the one part or the other of 64
numbers, 32 bits for each four of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipo_ray.compiled.attention import HeadSoFar
from pipo_ray.compiled.ir import FLOATS, INTS, Function
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout

HALF = PAGE_TOKENS // 2
"""Of 4 bits a row has a token's codes, and those of the token so many behind it."""

ROWS = 4
STEPS = HALF // ROWS


@dataclass(frozen=True)
class Rooms:
    """Memory of one of the heads at work."""

    query: str
    """The query, times the scores' scale, float32 [dim]."""
    digits: str
    """Those of a page's query, as `PackedProducts.store_query` writes them."""
    products: str
    """Whole numbers of a page's tokens, whose parts are to be added, as `PackedProducts.multiply_keys` writes them."""
    weights: str
    """Digits of a page's weights: [groups of channels, 2 kinds, tokens] bytes."""
    offsets: str
    """Sums of weighted zeros: [groups of channels] FLOATS, whose lanes are to be added."""


def code_rows(bits: int) -> int:
    """Rows of a page's codes."""
    return PAGE_TOKENS * bits // 8


class PackedProducts(ABC):
    """Writes them into a function. A *block* is 128 bits of a vector; a *row* has a byte for each channel."""

    INTS: str
    """The type of vectors that rows are read in, as 32-bit words."""
    BYTES: str
    """The same, as bytes."""
    COLUMNS: int
    """Bytes in it."""
    QUERY_BYTES: int
    """Of a query's digits, for each channel."""
    PRODUCT_BYTES: int
    """Of a token's product with a query, in parts."""
    DECLARATIONS: str

    def __init__(self, f: Function, layout: PageLayout) -> None:
        self._f, self._dim, self._bits, self._groups = f, layout.key_dim, layout.bits, layout.value_groups

    # -- by instruction set
    # -----------------------------------------------------------------------------------------------

    @abstractmethod
    def digits(self, words: list[str]) -> tuple[list[str], list[str]]:
        """Both kinds of whole numbers, the lower halves of `words`, INTS each. Of each 64 numbers INTS."""

    @abstractmethod
    def store_query(self, room: str, digits: tuple[list[str], list[str]]) -> None:
        """Write a query's digits for `multiply_keys`."""

    @abstractmethod
    def multiply_keys(self, codes: str, stride: str, rooms: list[Rooms]) -> None:
        """Products of the heads' whole numbers with a page's codes. The next page's codes, `stride` bytes behind, are
        brought near.
        """

    @abstractmethod
    def products(self, room: Rooms, number: int) -> str:
        """Of tokens from 16 times `number` on, INTS."""

    @abstractmethod
    def _new_sums(self) -> list[list[str]]:
        """Of each kind of digits variables for two vectors."""

    @abstractmethod
    def _everywhere(self, place: str) -> str:
        """The 32 bits at `place` in all lanes."""

    @abstractmethod
    def _of_kinds(self, codes: list[str]) -> list[list[str]]:
        """Of each kind of digits what `_dot` takes of vectors of codes in bytes."""

    @abstractmethod
    def _dot(self, sums: str, codes: str, digits: str) -> str:
        """`sums` plus, in each lane, the products of `codes` with digits of their kind."""

    @abstractmethod
    def _whole(self, sums: list[list[str]]) -> Iterator[str]:
        """What the variables that `_new_sums` gave stand for, INTS."""

    @abstractmethod
    def in_order(self, sums: Sequence[str]) -> Iterator[str]:
        """Sums of 64 channels, in the order in which `multiply_values` has them, in that of channels; FLOATS."""

    # -- values
    # ---------------------------------------------------------------------------------------------------------

    def multiply_values(
        self, codes: str, stride: str, so_far: list[HeadSoFar], rooms: list[Rooms],
        weighted: list[tuple[str, list[str]]],
    ) -> None:  # fmt: skip
        """Multiply the heads' sums with their changes, and add a page's values by its weights: `weighted` has of each
        head the change, and what whole numbers stand for in each group of channels. In the sums channels are in the
        order in which four tokens' codes come together.
        """
        f = self._f
        for chunk, column in enumerate(range(0, self._dim, self.COLUMNS)):
            group = column * self._groups // self._dim
            for upper in (False, True):
                sums = [self._new_sums() for _ in rooms]
                with f.loop(STEPS) as step:
                    rows = [self._two_of_four(four, upper) for four in self._rows(codes, step, column)]
                    together = self._in_halves(rows)
                    # A line has 64 columns, of which each pass brings some rows' near.
                    passes = 2 * 64 // self.COLUMNS
                    rows_each = code_rows(self._bits) // STEPS // passes
                    first = rows_each * ((2 * chunk + upper) % passes)
                    self._bring_near(codes, step, column, stride, range(first, first + rows_each))
                    for half, vectors in enumerate(together):
                        parts = self._of_kinds(vectors)
                        for room, of_head in zip(rooms, sums, strict=True):
                            for kind, variables in enumerate(of_head):
                                place = f.at(room.weights, PAGE_TOKENS * (2 * group + kind) + HALF * half)
                                digits = self._everywhere(f.at(place, f.multiply(step, ROWS)))
                                for part, variable in zip(parts[kind], variables, strict=True):
                                    f.store(self.INTS, self._dot(f.load(self.INTS, variable), part, digits), variable)
                for one, of_head, (change, units) in zip(so_far, sums, weighted, strict=True):
                    first = (2 * chunk + upper) * self.COLUMNS // 32
                    for number, whole in enumerate(self._whole(of_head), first):
                        more = f.value(f"fmul {FLOATS} {f.value(f'sitofp {INTS} {whole} to {FLOATS}')}, {units[group]}")
                        place = one.sums[number]
                        f.store(FLOATS, f.multiply_add(f.load(FLOATS, place), change, more), place)

    def _two_of_four(self, rows: list[str], upper: bool) -> list[str]:
        """Two vectors that have the bytes of four rows side by side: those of the lower or `upper` half of each block;
        the first four channels of each block in the first one.
        """
        f = self._f
        codes = [f.cast(self.INTS, row, self.BYTES) for row in rows]
        pairs = [self._in_blocks(self.BYTES, two, 1, upper) for two in (codes[:2], codes[2:])]
        return [f.cast(self.BYTES, self._in_blocks(self.BYTES, pairs, 2, half), self.INTS) for half in (False, True)]

    # -- codes
    # ----------------------------------------------------------------------------------------------------------

    def _rows(self, codes: str, step: str, column: int) -> list[list[str]]:
        """A vector's columns of the rows of codes of a step: four rows of 4 bits have eight tokens, otherwise there are
        two times four.
        """
        f = self._f
        start = f.at(codes, f.multiply(step, ROWS * self._dim))
        return [
            [f.load(self.INTS, f.at(start, row * self._dim + column), align=1) for row in range(first, first + ROWS)]
            for first in ((0,) if self._bits == 4 else (0, HALF))
        ]

    def _bring_near(self, codes: str, step: str, column: int, stride: str, rows: range, steps: int = STEPS) -> None:
        """Of the next page a line of some of a step's rows of codes, of which there are as many as are worked on
        meanwhile.
        """
        f = self._f
        count = code_rows(self._bits) // steps
        start = f.at(f.at(codes, f.multiply(step, count * self._dim)), stride)
        for row in rows:
            f.prefetch(f.at(start, row * self._dim + column))

    def _in_halves(self, together: list[list[str]]) -> list[list[str]]:
        """Codes in bytes, of tokens in the first half of a page and of those in the second; of 4 bits they are parted
        here.
        """
        f, kind = self._f, self.INTS
        if self._bits == 8:
            return together
        (raw,) = together
        low = [f.value(f"and {kind} {one}, splat (i32 {0x0F0F0F0F})") for one in raw]
        shifted = [f.value(f"lshr {kind} {one}, splat (i32 4)") for one in raw]
        return [low, [f.value(f"and {kind} {one}, splat (i32 {0x0F0F0F0F})") for one in shifted]]

    def _in_blocks(self, kind: str, two: Sequence[str], size: int, upper: bool) -> str:
        """`size` elements of one and of the other in turns, from each block's lower or `upper` half."""
        count, bits = int(kind[1:].split()[0]), int(kind[:-1].split("i")[1])
        in_block = 128 // bits
        which = []
        for block in range(0, count, in_block):
            first = block + in_block // 2 * upper
            for at in range(first, first + in_block // 2, size):
                which += [*range(at, at + size), *range(count + at, count + at + size)]
        return self._f.chosen(kind, two[0], two[1], which)
