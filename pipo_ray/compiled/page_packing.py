"""Rounding a page of keys and values in bf16 to 8 or 4 bits, as LLVM IR.

What `quant/kv_rounding.py` does in some twenty passes over memory is one here, by the same operations in float32 and
float16, each rounded by itself: the bytes are the same. The window that the page leaves moves up behind it. A number
that is none makes its scale and zero none, as there.

For AVX512F, or for AVX2 and F16C, as `packed_attention.py` is, for whose pages it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pipo_ray.compiled import attention
from pipo_ray.compiled.instruction_sets import FUNCTIONS
from pipo_ray.compiled.ir import FLOATS, INTS, float_bits, vector
from pipo_ray.compiled.support import InstructionSet
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout

FIELDS = ("keys", "values", "page", "next", "groups", "length", "keys_stride", "values_stride")
"""The context, 64-bit words: addresses of the window's keys and values, bf16 [heads, length, dim], and of the page;
`next` counts groups of heads taken by threads, of which there are `groups`; tokens in the window; bytes from one head
to the next.
"""

NAME = "pack_page"
EACH = "pack_each_page"
"""As in `attention.py`."""

_LANES = 16
_HALF = PAGE_TOKENS // 2
_LARGEST, _LEAST_SCALE = 65504.0, 2.0**-15
_EXPONENT = 0x7F800000
_MANTISSA = 2.0**-10

_DECLARATIONS = f"""
declare {FLOATS} @llvm.maximum.v16f32({FLOATS}, {FLOATS})
declare {FLOATS} @llvm.minimum.v16f32({FLOATS}, {FLOATS})
declare {FLOATS} @llvm.fabs.v16f32({FLOATS})
declare {FLOATS} @llvm.roundeven.v16f32({FLOATS})
declare void @llvm.memmove.p0.p0.i64(ptr, ptr, i64, i1)
"""


def module(layout: PageLayout, instructions: InstructionSet = "avx512") -> str:
    """The functions for such pages; `packed_attention.takes` says of which there are any."""
    return "\n".join([_DECLARATIONS, _Code(layout, instructions).text(), attention.each(EACH, NAME, len(FIELDS))])


class _Code:
    """Writes the function."""

    def __init__(self, layout: PageLayout, instructions: InstructionSet) -> None:
        self._layout, self._dim = layout, layout.key_dim
        self._levels = float((1 << layout.bits) - 1)
        self._rows = PAGE_TOKENS * layout.bits // 8
        self._f = FUNCTIONS[instructions](NAME, FIELDS)

    def text(self) -> str:
        """The function."""
        f, layout, dim = self._f, self._layout, self._dim
        sharing = layout.heads_per_group
        starts = [f.at(f.field("page", "ptr"), at) for at in (0, *itertools.accumulate(layout.parts[:-1]))]
        key_codes, value_codes, key_scales, key_zeros, value_scales, value_zeros = starts
        sizes = 4 * PAGE_TOKENS * layout.value_groups
        rooms = f.room(sizes), f.room(sizes)
        with f.tasks(f.place_of("next"), f.field("groups")) as group:
            heads = [f.add(f.multiply(group, sharing), number) for number in range(sharing)]
            keys, values = (
                [f.at(f.field(name, "ptr"), f.multiply(head, f.field(f"{name}_stride"))) for head in heads]
                for name in ("keys", "values")
            )
            for head, place in zip(heads, keys, strict=True):
                of_head = f.multiply(head, 2 * dim)
                codes = f.at(key_codes, f.multiply(head, self._rows * dim))
                self._keys(place, codes, f.at(key_scales, of_head), f.at(key_zeros, of_head))
            of_group = f.multiply(group, 2 * PAGE_TOKENS * layout.value_groups)
            self._scales_of_values(values, rooms, f.at(value_scales, of_group), f.at(value_zeros, of_group))
            for head, place in zip(heads, values, strict=True):
                self._codes_of_values(place, f.at(value_codes, f.multiply(head, self._rows * dim)), rooms)
            page_bytes = 2 * dim * PAGE_TOKENS
            behind = f.multiply(f.add(f.field("length"), -PAGE_TOKENS), 2 * dim)
            for place in (*keys, *values):
                rest = f.at(place, page_bytes)
                f.do(f"call void @llvm.memmove.p0.p0.i64(ptr {place}, ptr {rest}, i64 {behind}, i1 false)")
        return f.text()

    def _keys(self, keys: str, codes: str, scales: str, zeros: str) -> None:
        """A head's: each channel has a scale over all tokens."""
        f, dim = self._f, self._dim
        with f.loop(dim, _LANES) as column:
            of_column = f.multiply(column, 2)
            place = f.at(keys, of_column)
            low, high = f.variable(FLOATS), f.variable(FLOATS)
            for variable in (low, high):
                f.store(FLOATS, self._number(place), variable)
            with f.loop(PAGE_TOKENS) as token:
                number = self._number(f.at(place, f.multiply(token, 2 * dim)))
                f.store(FLOATS, self._least(f.load(FLOATS, low), number), low)
                f.store(FLOATS, self._most(f.load(FLOATS, high), number), high)
            scale, zero = self._scale_and_zero(f.load(FLOATS, low), f.load(FLOATS, high))
            for number, start in ((scale, scales), (zero, zeros)):
                f.store("<16 x half>", self._half(number), f.at(start, of_column), align=2)
            with f.loop(self._rows) as row:
                self._write_row(place, f.at(codes, column), row, lambda _: (scale, zero))

    def _scales_of_values(self, values: Sequence[str], rooms: tuple[str, str], scales: str, zeros: str) -> None:
        """Of heads that share them: each token has one for each of its groups of channels."""
        f, groups = self._f, self._layout.value_groups
        width = self._dim // groups
        with f.loop(PAGE_TOKENS) as token:
            for group in range(groups):
                numbers = [
                    self._number(f.at(f.at(place, f.multiply(token, 2 * self._dim)), 2 * column))
                    for place in values
                    for column in range(group * width, (group + 1) * width, _LANES)
                ]
                low = high = numbers[0]
                for number in numbers[1:]:
                    low, high = self._least(low, number), self._most(high, number)
                for distance in (8, 4, 2, 1):
                    low, high = (
                        self._least(low, self._moved(low, distance)),
                        self._most(high, self._moved(high, distance)),
                    )
                both = self._scale_and_zero(low, high)
                at = f.add(f.multiply(token, groups), group)
                for number, room, start in zip(both, rooms, (scales, zeros), strict=True):
                    first = f.value(f"extractelement {FLOATS} {number}, i32 0")
                    f.store("float", first, f.at(room, f.multiply(at, 4)))
                    half = f.value(f"extractelement <16 x half> {self._half(number)}, i32 0")
                    f.store("half", half, f.at(start, f.multiply(at, 2)), align=2)

    def _codes_of_values(self, values: str, codes: str, rooms: tuple[str, str]) -> None:
        """A head's, with the scales and zeros in `rooms`."""
        f, groups = self._f, self._layout.value_groups
        width = self._dim // groups
        with f.loop(self._rows) as row:
            for column in range(0, self._dim, _LANES):

                def found(token: str, group: int = column // width) -> tuple[str, str]:
                    at = f.multiply(f.add(f.multiply(token, groups), group), 4)
                    scale, zero = (f.everywhere(f.at(room, at), FLOATS) for room in rooms)
                    return scale, zero

                self._write_row(f.at(values, 2 * column), f.at(codes, column), row, found)

    def _write_row(self, place: str, codes: str, row: str, scales: object) -> None:
        """16 codes of a row: of 4 bits those of a token, and of the one half a page behind it."""
        f, dim = self._f, self._dim
        assert callable(scales)
        tokens = [row] if self._layout.bits == 8 else [row, f.add(row, _HALF)]
        parts = []
        for token in tokens:
            scale, zero = scales(token)
            number = self._number(f.at(place, f.multiply(token, 2 * dim)))
            over = f.value(f"fdiv {FLOATS} {f.value(f'fsub {FLOATS} {number}, {zero}')}, {scale}")
            whole = f.value(f"call {FLOATS} @llvm.roundeven.v16f32({FLOATS} {over})")
            whole = f.largest(["zeroinitializer", whole])  # what is no number becomes 0
            most = f"splat (float {float_bits(self._levels)})"
            less = f.value(f"fcmp olt {FLOATS} {whole}, {most}")
            whole = f.value(f"select <16 x i1> {less}, {FLOATS} {whole}, {FLOATS} {most}")
            parts.append(f.value(f"fptosi {FLOATS} {whole} to {INTS}"))
        if len(parts) == 2:
            upper = f.value(f"shl {INTS} {parts[1]}, splat (i32 4)")
            parts = [f.value(f"or {INTS} {parts[0]}, {upper}")]
        f.store(
            "<16 x i8>", f.value(f"trunc {INTS} {parts[0]} to <16 x i8>"), f.at(codes, f.multiply(row, dim)), align=1
        )

    # -- numbers
    # ----------------------------------------------------------------------------------------------------------

    def _number(self, place: str) -> str:
        """16 numbers in bf16 as floats within what float16 holds."""
        most, least = (f"splat (float {float_bits(sign * _LARGEST)})" for sign in (1, -1))
        return self._least(self._most(self._f.widened(place), least), most)

    def _scale_and_zero(self, low: str, high: str) -> tuple[str, str]:
        """See `kv_rounding.round_along`, as floats."""
        f = self._f
        zero = f.value(f"fadd {FLOATS} {self._in_half(low)}, zeroinitializer")  # there is no -0.0
        least = f"splat (float {float_bits(_LEAST_SCALE)})"
        size = self._most(f.value(f"call {FLOATS} @llvm.fabs.v16f32({FLOATS} {zero})"), least)
        exponent = f.value(f"and {INTS} {f.cast(FLOATS, size, INTS)}, splat (i32 {_EXPONENT})")
        spacing = f.value(f"fmul {FLOATS} {f.cast(INTS, exponent, FLOATS)}, splat (float {float_bits(_MANTISSA)})")
        width = f.value(f"fsub {FLOATS} {high}, {zero}")
        scale = self._in_half(f.value(f"fdiv {FLOATS} {width}, splat (float {float_bits(self._levels)})"))
        return self._most(self._most(scale, spacing), least), zero

    def _half(self, floats: str) -> str:
        return self._f.value(f"fptrunc {FLOATS} {floats} to <16 x half>")

    def _in_half(self, floats: str) -> str:
        """Rounded to float16."""
        return self._f.value(f"fpext <16 x half> {self._half(floats)} to {FLOATS}")

    def _moved(self, floats: str, distance: int) -> str:
        mask = vector("i32", [lane ^ distance for lane in range(_LANES)])
        return self._f.value(f"shufflevector {FLOATS} {floats}, {FLOATS} poison, {INTS} {mask}")

    def _most(self, one: str, other: str) -> str:
        return self._f.value(f"call {FLOATS} @llvm.maximum.v16f32({FLOATS} {one}, {FLOATS} {other})")

    def _least(self, one: str, other: str) -> str:
        return self._f.value(f"call {FLOATS} @llvm.minimum.v16f32({FLOATS} {one}, {FLOATS} {other})")
