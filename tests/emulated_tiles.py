"""The processor's matrix unit in plain LLVM IR, so that kernels for it (`pipo_ray/compiled/amx.py`) run anywhere.

Slow, and not bit by bit what the unit gives: it adds up in another order, does not take tiny numbers for zero, and does
not look at the tiles' configuration. What it shows is where kernels read and write, and what they multiply with what.

Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, the pseudocode of TILELOADD,
TILESTORED, TDPBF16PS, VPERMW and VCVTNEPS2BF16.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipo_ray.compiled import amx_inputs, amx_low_bit_products, amx_products
from pipo_ray.compiled.machine import MachineCode
from pipo_ray.compiled.support import amx_obstacle

_FRAME = "%emulated_tiles = alloca [8192 x i8], align 64"  # eight tiles of 16 rows of 64 bytes
_TILES = "ldtilecfg|tilerelease|tilezero|tileloadd64|tilestored64|tdpbf16ps"
_PERMUTE = "llvm.x86.avx512.permvar.hi.512"

_DEFINITIONS = """
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define internal void @emulated_ldtilecfg(ptr %tiles, ptr %shape) {
  ret void
}

define internal void @emulated_tilerelease(ptr %tiles) {
  ret void
}

define internal ptr @emulated_tile(ptr %tiles, i8 %number) {
  %wide = zext i8 %number to i64
  %offset = mul i64 %wide, 1024
  %place = getelementptr i8, ptr %tiles, i64 %offset
  ret ptr %place
}

define internal void @emulated_tilezero(ptr %tiles, i8 %number) {
  %place = call ptr @emulated_tile(ptr %tiles, i8 %number)
  call void @llvm.memset.p0.i64(ptr %place, i8 0, i64 1024, i1 false)
  ret void
}

define internal void @emulated_tileloadd64(ptr %tiles, i8 %number, ptr %from, i64 %stride) {
  %place = call ptr @emulated_tile(ptr %tiles, i8 %number)
  call void @copied_rows(ptr %place, i64 64, ptr %from, i64 %stride)
  ret void
}

define internal void @emulated_tilestored64(ptr %tiles, i8 %number, ptr %to, i64 %stride) {
  %place = call ptr @emulated_tile(ptr %tiles, i8 %number)
  call void @copied_rows(ptr %to, i64 %stride, ptr %place, i64 64)
  ret void
}

define internal void @copied_rows(ptr %to, i64 %to_stride, ptr %from, i64 %from_stride) {
entry:
  br label %row
row:
  %index = phi i64 [0, %entry], [%next, %row]
  %to_offset = mul i64 %index, %to_stride
  %from_offset = mul i64 %index, %from_stride
  %target = getelementptr i8, ptr %to, i64 %to_offset
  %source = getelementptr i8, ptr %from, i64 %from_offset
  call void @llvm.memcpy.p0.p0.i64(ptr %target, ptr %source, i64 64, i1 false)
  %next = add i64 %index, 1
  %more = icmp ult i64 %next, 16
  br i1 %more, label %row, label %end
end:
  ret void
}

; Sums [16, 16] plus the product of left bf16 [16, 32] with right, whose rows are two neighbours of 16 columns each.
define internal void @emulated_tdpbf16ps(ptr %tiles, i8 %sums_number, i8 %left_number, i8 %right_number) {
entry:
  %sums = call ptr @emulated_tile(ptr %tiles, i8 %sums_number)
  %left = call ptr @emulated_tile(ptr %tiles, i8 %left_number)
  %right = call ptr @emulated_tile(ptr %tiles, i8 %right_number)
  br label %row
row:
  %index = phi i64 [0, %entry], [%next, %row_end]
  %offset = mul i64 %index, 64
  %sums_row = getelementptr i8, ptr %sums, i64 %offset
  %left_row = getelementptr i8, ptr %left, i64 %offset
  %before = load <16 x float>, ptr %sums_row, align 64
  br label %pair
pair:
  %number = phi i64 [0, %row], [%number_next, %pair]
  %sum = phi <16 x float> [%before, %row], [%sum_both, %pair]
  %left_offset = mul i64 %number, 4
  %right_offset = mul i64 %number, 64
  %left_at = getelementptr i8, ptr %left_row, i64 %left_offset
  %right_at = getelementptr i8, ptr %right, i64 %right_offset
  %left_word = load i32, ptr %left_at, align 4
  %right_words = load <16 x i32>, ptr %right_at, align 64
  %left_one = insertelement <16 x i32> poison, i32 %left_word, i32 0
  %left_words = shufflevector <16 x i32> %left_one, <16 x i32> poison, <16 x i32> zeroinitializer
  %left_low = shl <16 x i32> %left_words, splat (i32 16)
  %left_high = and <16 x i32> %left_words, splat (i32 -65536)
  %right_low = shl <16 x i32> %right_words, splat (i32 16)
  %right_high = and <16 x i32> %right_words, splat (i32 -65536)
  %a = bitcast <16 x i32> %left_low to <16 x float>
  %b = bitcast <16 x i32> %right_low to <16 x float>
  %c = bitcast <16 x i32> %left_high to <16 x float>
  %d = bitcast <16 x i32> %right_high to <16 x float>
  %low = fmul <16 x float> %a, %b
  %high = fmul <16 x float> %c, %d
  %sum_low = fadd <16 x float> %sum, %low
  %sum_both = fadd <16 x float> %sum_low, %high
  %number_next = add i64 %number, 1
  %more_pairs = icmp ult i64 %number_next, 16
  br i1 %more_pairs, label %pair, label %row_end
row_end:
  store <16 x float> %sum_both, ptr %sums_row, align 64
  %next = add i64 %index, 1
  %more = icmp ult i64 %next, 16
  br i1 %more, label %row, label %end
end:
  ret void
}

define internal <16 x bfloat> @rounded_to_bf16(<16 x float> %floats) {
  %bits = bitcast <16 x float> %floats to <16 x i32>
  %upper = lshr <16 x i32> %bits, splat (i32 16)
  %odd = and <16 x i32> %upper, splat (i32 1)
  %half = add <16 x i32> %odd, splat (i32 32767)
  %sum = add <16 x i32> %bits, %half
  %rounded = lshr <16 x i32> %sum, splat (i32 16)
  %no_number = fcmp uno <16 x float> %floats, %floats
  %quiet = or <16 x i32> %upper, splat (i32 64)
  %chosen = select <16 x i1> %no_number, <16 x i32> %quiet, <16 x i32> %rounded
  %words = trunc <16 x i32> %chosen to <16 x i16>
  %halves = bitcast <16 x i16> %words to <16 x bfloat>
  ret <16 x bfloat> %halves
}

define internal <32 x i16> @permuted_words(<32 x i16> %words, <32 x i16> %indices) {
entry:
  %table = alloca <32 x i16>, align 64
  %wanted = alloca <32 x i16>, align 64
  %found = alloca <32 x i16>, align 64
  store <32 x i16> %words, ptr %table, align 64
  store <32 x i16> %indices, ptr %wanted, align 64
  br label %word
word:
  %number = phi i64 [0, %entry], [%next, %word]
  %wanted_at = getelementptr i16, ptr %wanted, i64 %number
  %index = load i16, ptr %wanted_at, align 2
  %low = and i16 %index, 31
  %wide = zext i16 %low to i64
  %table_at = getelementptr i16, ptr %table, i64 %wide
  %one = load i16, ptr %table_at, align 2
  %found_at = getelementptr i16, ptr %found, i64 %number
  store i16 %one, ptr %found_at, align 2
  %next = add i64 %number, 1
  %more = icmp ult i64 %next, 32
  br i1 %more, label %word, label %end
end:
  %all = load <32 x i16>, ptr %found, align 64
  ret <32 x i16> %all
}
"""


class EmulatedCode(MachineCode):
    """A module for the matrix unit, compiled for this processor."""

    def __init__(self, source: str, folder: Path | None = None) -> None:
        super().__init__(emulated(source), folder)


def emulated(source: str) -> str:
    """The module with calls in place of what only processors with the unit have."""
    source = re.sub(rf"declare [^\n]*@llvm\.x86\.({_TILES})\([^\n]*\n", "", source)
    source = re.sub(rf"declare [^\n]*@{re.escape(_PERMUTE)}\([^\n]*(\n|$)", "\n", source)
    source = re.sub(
        rf"@llvm\.x86\.({_TILES})\((\))?",
        lambda call: f"@emulated_{call[1]}(ptr %emulated_tiles" + (")" if call[2] else ", "),
        source,
    )
    source = source.replace("entry:\n", f"entry:\n  {_FRAME}\n")
    source = re.sub(
        r"fptrunc <16 x float> (\S+) to <16 x bfloat>", r"call <16 x bfloat> @rounded_to_bf16(<16 x float> \1)", source
    )
    return source.replace(f"@{_PERMUTE}(", "@permuted_words(") + _DEFINITIONS


@contextlib.contextmanager
def matrix_unit() -> Iterator[None]:
    """The matrix unit's kernels that are made meanwhile are emulated where the processor has none."""
    with pytest.MonkeyPatch.context() as patch:
        if amx_obstacle() is not None:
            for module in (amx_inputs, amx_products, amx_low_bit_products):
                patch.setattr(module, "MachineCode", EmulatedCode)
        yield
