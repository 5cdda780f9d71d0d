"""Products of whole numbers with codes for AVX512 with VNNI, as LLVM IR: upper and lower bytes of numbers, four codes
and four bytes by one instruction, VPDPBUSD, exactly.

Four tokens' codes are brought together first, four channels of each for keys, and single ones for values; of 4 bits,
before they are parted. Then all heads at work share what came out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipo_ray.compiled.ir import FLOATS, INTS
from pipo_ray.compiled.packed_products import STEPS, PackedProducts, Rooms, code_rows

_BYTES = "<64 x i8>"
_COLUMNS = 64


class ByteProducts(PackedProducts):
    """Digits of the first kind are upper bytes, and of the second lower ones, both signed."""

    INTS = INTS
    BYTES = _BYTES
    COLUMNS = _COLUMNS
    QUERY_BYTES = 8
    PRODUCT_BYTES = 16
    DECLARATIONS = f"declare {INTS} @llvm.x86.avx512.vpdpbusd.512({INTS}, {INTS}, {INTS})"

    def digits(self, words: list[str]) -> tuple[list[str], list[str]]:
        """See `PackedProducts`."""
        f = self._f
        upper = [f.value(f"add {INTS} {one}, splat (i32 128)") for one in words]
        return (
            [self._bytes(upper[at : at + 4], 1) for at in range(0, len(upper), 4)],
            [self._bytes(words[at : at + 4], 0) for at in range(0, len(words), 4)],
        )

    def _bytes(self, words: list[str], which: int) -> str:
        """A byte of each 32-bit word of four vectors."""
        f = self._f
        one, two, three, four = (f.cast(INTS, word, _BYTES) for word in words)
        first, second = (
            f.chosen(_BYTES, left, right, [*range(which, 128, 4), *[-1] * 32])
            for left, right in ((one, two), (three, four))
        )
        return f.cast(_BYTES, f.chosen(_BYTES, first, second, [*range(32), *range(64, 96)]), INTS)

    # -- keys
    # -----------------------------------------------------------------------------------------------------------

    def store_query(self, room: str, digits: tuple[list[str], list[str]]) -> None:
        """Upper bytes and then lower ones: [2, dim / 64, 4], vectors of four channels four times."""
        f, chunks = self._f, self._dim // _COLUMNS
        for kind, vectors in enumerate(digits):
            for chunk, one in enumerate(vectors):
                for quarter in range(4):
                    which = [4 * block + quarter for block in range(4) for _ in range(4)]
                    place = f.at(room, 64 * (4 * (chunks * kind + chunk) + quarter))
                    f.store(INTS, f.chosen(INTS, one, "poison", which), place)

    def multiply_keys(self, codes: str, stride: str, rooms: list[Rooms]) -> None:
        """See `PackedProducts`. Four tokens are in a vector: [tokens / 4]."""
        f, chunks = self._f, self._dim // _COLUMNS
        with f.loop(STEPS) as step:
            tokens: list[list[str]] = [[], []]  # of both halves of the page: four channels of four tokens in a block
            for chunk in range(chunks):
                together = [self._four_by_four(rows) for rows in self._rows(codes, step, _COLUMNS * chunk)]
                for half, vectors in zip(tokens, self._in_halves(together), strict=True):
                    half += vectors
                self._bring_near(codes, step, _COLUMNS * chunk, stride, range(code_rows(self._bits) // STEPS))
            sums = [["zeroinitializer"] * 2 for _ in rooms]
            for kind in range(2):
                if kind:
                    sums = [[f.value(f"shl {INTS} {one}, splat (i32 8)") for one in both] for both in sums]
                for number, two in enumerate(zip(*tokens, strict=True)):
                    for room, both in zip(rooms, sums, strict=True):
                        digits = f.load(INTS, f.at(room.digits, 64 * (4 * chunks * kind + number)))
                        both[:] = [self._dot(one, codes_, digits) for one, codes_ in zip(both, two, strict=True)]
            for room, both in zip(rooms, sums, strict=True):
                for half_number, one in enumerate(both):
                    f.store(INTS, one, f.at(f.at(room.products, f.multiply(step, 64)), 64 * STEPS * half_number))

    def _four_by_four(self, rows: list[str]) -> list[str]:
        """Of each block of four vectors: the first words of all, then the second ones, and so on."""
        first, second = rows[:2], rows[2:]
        pairs = [[self._in_blocks(INTS, two, 1, upper) for two in (first, second)] for upper in (False, True)]
        return [self._in_blocks(INTS, pair, 2, upper) for pair in pairs for upper in (False, True)]

    def products(self, room: Rooms, number: int) -> str:
        """See `PackedProducts`."""
        f = self._f
        parts = [f.load(INTS, f.at(room.products, 64 * (4 * number + part))) for part in range(4)]
        halves = [
            self._sum_of(one, other, [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
            for one, other in (parts[:2], parts[2:])
        ]
        even, odd = (
            [4 * block + lane for block in blocks for lane in range(4)] for blocks in ((0, 2, 4, 6), (1, 3, 5, 7))
        )
        return self._sum_of(halves[0], halves[1], even, odd)

    def _sum_of(self, one: str, other: str, left: list[int], right: list[int]) -> str:
        """Elements of both plus others."""
        parts = [self._f.chosen(INTS, one, other, which) for which in (left, right)]
        return self._f.value(f"add {INTS} {parts[0]}, {parts[1]}")

    # -- values
    # ---------------------------------------------------------------------------------------------------------

    def _new_sums(self) -> list[list[str]]:
        return [[self._f.variable(INTS) for _ in range(2)] for _ in range(2)]

    def _everywhere(self, place: str) -> str:
        return self._f.everywhere(place, INTS)

    def _of_kinds(self, codes: list[str]) -> list[list[str]]:
        return [codes, codes]

    def _dot(self, sums: str, codes: str, digits: str) -> str:
        """Four unsigned bytes times four signed ones."""
        arguments = ", ".join(f"{INTS} {one}" for one in (sums, codes, digits))
        return self._f.value(f"call {INTS} @llvm.x86.avx512.vpdpbusd.512({arguments})")

    def _whole(self, sums: list[list[str]]) -> Iterator[str]:
        f = self._f
        for high, low in zip(*sums, strict=True):
            shifted = f.value(f"shl {INTS} {f.load(INTS, high)}, splat (i32 8)")
            yield f.value(f"add {INTS} {shifted}, {f.load(INTS, low)}")

    def in_order(self, sums: Sequence[str]) -> Iterator[str]:
        """See `PackedProducts`."""
        f = self._f
        for block in range(4):
            lanes = range(4 * block, 4 * block + 4)
            first, second = (
                f.chosen(FLOATS, left, right, [*lanes, *(16 + lane for lane in lanes), *[-1] * 8])
                for left, right in (sums[:2], sums[2:])
            )
            yield f.chosen(FLOATS, first, second, [*range(8), *range(16, 24)])
