"""Functions over rows in bf16 for either instruction set, AVX512 with bf16 or AVX2.

Vectors have 16 numbers for both: of each operation on floats LLVM makes one instruction or two. Only what AVX512 has
instructions for and AVX2 has not is written otherwise: rounding to bf16, storing it, and, by who needs them, products
of bf16 and of a packed page's codes.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipo_ray.compiled.ir import FLOATS, HALVES, INTS, Function
from pipo_ray.compiled.support import InstructionSet
from pipo_ray.compiled.widened import rounded_bits, rounded_halves

_HALF_INTS = "<16 x i16>"


class Avx2Function(Function):
    """A `Function` for processors that have no instructions for bf16; without `dot`. Numbers that are subnormal count,
    too, which those instructions take for zero.
    """

    KEPT_VECTORS = 4

    def dot(self, sums: str, left: str, right: str) -> str:
        """Raises NotImplementedError: LLVM would end the process."""
        raise NotImplementedError("AVX2 multiplies no numbers in bf16")

    def rounded(self, floats: str) -> str:
        """See `Function`."""
        bits = self.value(f"and {INTS} {rounded_bits(self, floats, 16)}, splat (i32 -65536)")
        return self.cast(INTS, bits, FLOATS)

    def store_rounded(self, floats: str, place: str, count: str) -> None:
        """See `Function`; `count` has to be "16": single 16-bit numbers cannot be left out."""
        if count != "16":
            raise ValueError(f"AVX2 stores 16 numbers in bf16 and not {count}")
        self.store(_HALF_INTS, rounded_halves(self, floats, 16), place, align=2)

    def even_and_odd(self, halves: str) -> tuple[str, str]:
        """Of 32 numbers in bf16 those with even places, and the others, as floats."""
        words = self.cast(HALVES, halves, INTS)
        even = self.value(f"shl {INTS} {words}, splat (i32 16)")
        odd = self.value(f"and {INTS} {words}, splat (i32 -65536)")
        return self.cast(INTS, even, FLOATS), self.cast(INTS, odd, FLOATS)


FUNCTIONS: Mapping[InstructionSet, type[Function]] = {"avx512": Function, "avx2": Avx2Function}
