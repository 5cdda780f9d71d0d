"""Vectors of eight floats in LLVM IR, for processors with AVX2, FMA and F16C, and smaller numbers widened to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipo_ray.compiled.ir import Function, vector

Element = Literal["bfloat", "half", "i8"]
"""LLVM's names of bf16, float16 and int8."""

ELEMENT_BYTES: Mapping[Element, int] = {"bfloat": 2, "half": 2, "i8": 1}

LANES = 8
VECTOR = 4 * LANES  # bytes
EIGHT = "<8 x float>"

DECLARATIONS = f"""
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.usub.sat.i64(i64, i64)
declare float @llvm.vector.reduce.fadd.v8f32(float, {EIGHT})
declare {EIGHT} @llvm.fma.v8f32({EIGHT}, {EIGHT}, {EIGHT})
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def widened(f: Function, element: Element, place: str) -> str:
    """Eight numbers of type `element` at `place` as floats."""
    if element == "i8":
        words = f.value(f"sext <8 x i8> {f.load('<8 x i8>', place, align=1)} to <8 x i32>")
        return f.value(f"sitofp <8 x i32> {words} to {EIGHT}")
    if element == "half":
        return f.value(f"fpext <8 x half> {f.load('<8 x half>', place, align=2)} to {EIGHT}")
    words = f.value(f"zext <8 x i16> {f.load('<8 x i16>', place, align=2)} to <8 x i32>")
    return f.cast("<8 x i32>", f.value(f"shl <8 x i32> {words}, splat (i32 16)"), EIGHT)


def rounded_bits(f: Function, floats: str, lanes: int = LANES) -> str:
    """So many floats rounded to the nearest bf16, to even, as the upper halves of i32; what the lower ones have is no
    matter. What is no number stays so.
    """
    kind, ints = f"<{lanes} x float>", f"<{lanes} x i32>"
    bits = f.cast(kind, floats, ints)
    odd = f.value(f"and {ints} {f.value(f'lshr {ints} {bits}, splat (i32 16)')}, splat (i32 1)")
    raised = f.value(f"add {ints} {f.value(f'add {ints} {bits}, splat (i32 32767)')}, {odd}")
    # Raised, a number that is none could become 0; with this bit it is a quiet one, whatever is cut off.
    quiet = f.value(f"or {ints} {bits}, splat (i32 {1 << 22})")
    is_none = f.value(f"fcmp uno {kind} {floats}, {floats}")
    return f.value(f"select <{lanes} x i1> {is_none}, {ints} {quiet}, {ints} {raised}")


def rounded_halves(f: Function, floats: str, lanes: int = LANES) -> str:
    """The same as i16."""
    kind = f"<{lanes} x i32>"
    words = f.value(f"lshr {kind} {rounded_bits(f, floats, lanes)}, splat (i32 16)")
    return f.value(f"trunc {kind} {words} to <{lanes} x i16>")


def row_of(f: Function, number: str) -> str:
    """Where row `number` of a weight in panels begins, by the words `weight`, `stride`, `panel_rows` and `panel_bytes`
    of a context.
    """
    rows = f.field("panel_rows")
    panel, row = (f.value(f"{what} i64 {number}, {rows}") for what in ("udiv", "urem"))
    base = f.at(f.field("weight", "ptr"), f.multiply(panel, f.field("panel_bytes")))
    return f.at(base, f.multiply(row, f.field("stride")))


def everywhere(f: Function, place: str) -> str:
    """Eight times the float at `place`."""
    return splat(f, "float", f.load("float", place, align=4))


def splat(f: Function, element: str, value: str) -> str:
    """Eight times the same number."""
    kind = f"<8 x {element}>"
    first = f.value(f"insertelement {kind} poison, {element} {value}, i32 0")
    return f.value(f"shufflevector {kind} {first}, {kind} poison, <8 x i32> zeroinitializer")


def multiply_add(f: Function, left: str, right: str, sums: str) -> str:
    """`left` times `right` plus `sums`, rounded once."""
    return f.value(f"call {EIGHT} @llvm.fma.v8f32({EIGHT} {left}, {EIGHT} {right}, {EIGHT} {sums})")


def total(f: Function, floats: str) -> str:
    """The sum of eight floats: always in the same order."""
    return f.value(f"call reassoc float @llvm.vector.reduce.fadd.v8f32(float 0.0, {EIGHT} {floats})")


def transposed(f: Function, rows: list[str]) -> list[str]:
    """Eight vectors: the first has the first number of each of `rows`, and so on."""
    for distance in (1, 2, 4):
        # Lanes of the two whose numbers differ in this bit change places, as in a fast Fourier transform.
        low = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
        high = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
        following = list(rows)
        for number in range(LANES):
            if not number & distance:
                pair = rows[number], rows[number + distance]
                following[number], following[number + distance] = (shuffled(f, EIGHT, pair, one) for one in (low, high))
        rows = following
    return rows


def shuffled(f: Function, kind: str, pair: tuple[str, str], lanes: list[int]) -> str:
    """Those lanes of two vectors of type `kind`, those of the second from 8 on."""
    return f.value(f"shufflevector {kind} {pair[0]}, {kind} {pair[1]}, <8 x i32> {vector('i32', lanes)}")
