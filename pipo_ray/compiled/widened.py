"""Vectors of eight floats in LLVM IR, for processors with AVX2, FMA and F16C, and 16-bit numbers widened to them."""

from __future__ import annotations

from typing import Literal

from pipo_ray.compiled.ir import Function

Half = Literal["bfloat", "half"]
"""LLVM's names of bf16 and float16."""

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


def widened(f: Function, half: Half, place: str) -> str:
    """Eight numbers of type `half` at `place` as floats."""
    if half == "half":
        return f.value(f"fpext <8 x half> {f.load('<8 x half>', place, align=2)} to {EIGHT}")
    words = f.value(f"zext <8 x i16> {f.load('<8 x i16>', place, align=2)} to <8 x i32>")
    return f.cast("<8 x i32>", f.value(f"shl <8 x i32> {words}, splat (i32 16)"), EIGHT)


def everywhere(f: Function, place: str) -> str:
    """Eight times the float at `place`."""
    first = f.value(f"insertelement {EIGHT} poison, float {f.load('float', place, align=4)}, i32 0")
    return f.value(f"shufflevector {EIGHT} {first}, {EIGHT} poison, <8 x i32> zeroinitializer")


def multiply_add(f: Function, left: str, right: str, sums: str) -> str:
    """`left` times `right` plus `sums`, rounded once."""
    return f.value(f"call {EIGHT} @llvm.fma.v8f32({EIGHT} {left}, {EIGHT} {right}, {EIGHT} {sums})")


def total(f: Function, floats: str) -> str:
    """The sum of eight floats: always in the same order."""
    return f.value(f"call reassoc float @llvm.vector.reduce.fadd.v8f32(float 0.0, {EIGHT} {floats})")
