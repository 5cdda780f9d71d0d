"""Products of whole numbers with codes for AVX2, as LLVM IR: codes at even and at odd places, widened to 16 bits, two
of them with two whole numbers by one instruction, VPMADDWD, exactly. (VPMADDUBSW takes bytes, but the sums of two
products with codes of 8 bits do not fit its 16.)

Keys are taken row by row: to bring four tokens together would cost more than to add up a product's eight parts. For
values four tokens' codes are brought together, of 4 bits before they are parted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipo_ray.compiled.ir import FLOATS, INTS
from pipo_ray.compiled.packed_products import HALF, PackedProducts, Rooms
from pipo_ray.compiled.widened import splat

_EIGHT = "<8 x i32>"
_WORDS = "<16 x i16>"
_COLUMNS = 32


class WordProducts(PackedProducts):
    """Digits of the first kind are whole numbers at even places, and of the second those at odd ones."""

    INTS = _EIGHT
    BYTES = "<32 x i8>"
    COLUMNS = _COLUMNS
    QUERY_BYTES = 2
    PRODUCT_BYTES = 32
    DECLARATIONS = f"declare {_EIGHT} @llvm.x86.avx2.pmadd.wd({_WORDS}, {_WORDS})"

    def digits(self, words: list[str]) -> tuple[list[str], list[str]]:
        """See `PackedProducts`."""
        f = self._f
        even: list[str] = []
        odd: list[str] = []
        for at in range(0, len(words), 4):
            # Each block: of four numbers those at even places, those at odd ones, and the same of four others.
            pairs = [self._lower_halves(words[first : first + 2]) for first in (at, at + 2)]
            for found, place in ((even, 0), (odd, 1)):
                which = [
                    16 * pair + 4 * block + 2 * other for pair in range(2) for other in range(2) for block in range(4)
                ]
                found.append(f.chosen(INTS, pairs[0], pairs[1], [place + lane for lane in which]))
        return even, odd

    def _lower_halves(self, two: list[str]) -> str:
        """Of four numbers in a block of each of two vectors: the first and the third one, the second and the fourth."""
        f = self._f
        low, high = (self._in_blocks(INTS, two, 2, upper) for upper in (False, True))
        lower = f.value(f"and {INTS} {low}, splat (i32 {0xFFFF})")
        return f.value(f"or {INTS} {lower}, {f.value(f'shl {INTS} {high}, splat (i32 16)')}")

    # -- keys
    # -----------------------------------------------------------------------------------------------------------

    def store_query(self, room: str, digits: tuple[list[str], list[str]]) -> None:
        """[2 kinds, dim / 2] numbers of 16 bits."""
        f = self._f
        for kind, vectors in enumerate(digits):
            for number, one in enumerate(vectors):
                f.store(INTS, one, f.at(room, kind * self._dim + 64 * number))

    def multiply_keys(self, codes: str, stride: str, rooms: list[Rooms]) -> None:
        """See `PackedProducts`. A token has a vector of parts: [tokens]."""
        f = self._f
        with f.loop(HALF) as row:
            start = f.at(codes, f.multiply(row, self._dim))
            sums = [["zeroinitializer"] * 2 for _ in rooms]
            for column in range(0, self._dim, _COLUMNS):
                firsts = (0,) if self._bits == 4 else (0, HALF)
                rows = [[f.load(_EIGHT, f.at(start, first * self._dim + column), align=1)] for first in firsts]
                of_halves = [self._of_kinds(half) for half in self._in_halves(rows)]
                for kind in range(2):
                    for room, both in zip(rooms, sums, strict=True):
                        digits = f.load(_EIGHT, f.at(room.digits, kind * self._dim + column), align=32)
                        parts = [of_kinds[kind][0] for of_kinds in of_halves]
                        both[:] = [self._dot(one, part, digits) for one, part in zip(both, parts, strict=True)]
                if column % 64 == 0:
                    self._bring_near(codes, row, column, stride, range(len(rows)), HALF)
            for room, both in zip(rooms, sums, strict=True):
                for half, one in enumerate(both):
                    f.store(_EIGHT, one, f.at(f.at(room.products, f.multiply(row, 32)), 32 * HALF * half))

    def products(self, room: Rooms, number: int) -> str:
        """See `PackedProducts`."""
        f = self._f
        eights = []
        for first in (16 * number, 16 * number + 8):
            parts = [f.load(_EIGHT, f.at(room.products, 32 * (first + token)), align=32) for token in range(8)]
            # Not of neighbours: LLVM makes that VPHADDD, which is slower than all of this.
            fours = [self._sum_of_blocks(one, other) for one, other in zip(parts[:4], parts[4:], strict=True)]
            twos = [self._sum_of_halves(fours[at : at + 2], 1) for at in (0, 2)]
            eights.append(self._sum_of_halves(twos, 2))
        return f.chosen(_EIGHT, eights[0], eights[1], [*range(16)])

    def _sum_of_blocks(self, one: str, other: str) -> str:
        """The two blocks of `one` added up, and those of `other`."""
        f = self._f
        low, high = (f.chosen(_EIGHT, one, other, [*range(at, at + 4), *range(at + 8, at + 12)]) for at in (0, 4))
        return f.value(f"add {_EIGHT} {low}, {high}")

    def _sum_of_halves(self, two: list[str], size: int) -> str:
        """Both halves of each block added up, `size` elements of one vector and of the other in turns."""
        low, high = (self._in_blocks(_EIGHT, two, size, upper) for upper in (False, True))
        return self._f.value(f"add {_EIGHT} {low}, {high}")

    # -- values
    # ---------------------------------------------------------------------------------------------------------

    def _new_sums(self) -> list[list[str]]:
        both = [self._f.variable(_EIGHT) for _ in range(2)]
        return [both, both]

    def _everywhere(self, place: str) -> str:
        return splat(self._f, "i32", self._f.load("i32", place))

    def _of_kinds(self, codes: list[str]) -> list[list[str]]:
        f = self._f
        even = [f.value(f"and {_EIGHT} {one}, splat (i32 {0x00FF00FF})") for one in codes]
        words = [f.cast(_EIGHT, one, _WORDS) for one in codes]
        odd = [f.cast(_WORDS, f.value(f"lshr {_WORDS} {one}, splat (i16 8)"), _EIGHT) for one in words]
        return [even, odd]

    def _dot(self, sums: str, codes: str, digits: str) -> str:
        """Two codes of 16 bits times two whole numbers."""
        f = self._f
        arguments = ", ".join(f"{_WORDS} {f.cast(_EIGHT, one, _WORDS)}" for one in (codes, digits))
        return f.value(f"add {_EIGHT} {sums}, {f.value(f'call {_EIGHT} @llvm.x86.avx2.pmadd.wd({arguments})')}")

    def _whole(self, sums: list[list[str]]) -> Iterator[str]:
        f = self._f
        first, second = (f.load(_EIGHT, one) for one in sums[0])
        yield f.chosen(_EIGHT, first, second, [*range(16)])

    def in_order(self, sums: Sequence[str]) -> Iterator[str]:
        """See `PackedProducts`."""
        for two in (sums[:2], sums[2:]):  # 32 channels: four by four from each block of four vectors of 8
            for block in (0, 4):
                which = [8 * vector + block + lane for vector in range(4) for lane in range(4)]
                yield self._f.chosen(FLOATS, two[0], two[1], which)
