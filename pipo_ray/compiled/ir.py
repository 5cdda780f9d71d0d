"""Functions in LLVM's assembly language, written instruction by instruction. Imports neither torch nor llvmlite.

Reference: https://llvm.org/docs/LangRef.html. Variables live on the stack here; LLVM's passes put them in registers.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence

FLOATS = "<16 x float>"
HALVES = "<32 x bfloat>"
WORDS = "<32 x i16>"
INTS = "<16 x i32>"
MASK = "<32 x i1>"

DECLARATIONS = f"""
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.usub.sat.i64(i64, i64)
declare {WORDS} @llvm.usub.sat.v32i16({WORDS}, {WORDS})
declare float @llvm.vector.reduce.fadd.v16f32(float, {FLOATS})
declare {FLOATS} @llvm.fma.v16f32({FLOATS}, {FLOATS}, {FLOATS})
declare {WORDS} @llvm.masked.load.v32i16.p0(ptr, i32, <32 x i1>, {WORDS})
declare void @llvm.masked.store.v16i16.p0(<16 x i16>, ptr, i32, <16 x i1>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512({FLOATS}, {HALVES}, {HALVES})
"""


class Function:
    """`void name(ptr %context)`, whose context is an array of 64-bit words, one for each of `fields`."""

    KEPT_VECTORS = 16
    """Vectors of 16 floats that stay in registers, beside those at work."""

    def __init__(self, name: str, fields: Sequence[str]) -> None:
        self._name, self._fields = name, tuple(fields)
        self._stack: list[str] = []
        self._lines: list[str] = []
        self._count = 0

    def text(self) -> str:
        """The whole function."""
        body = "\n  ".join([*self._stack, "br label %begin"])
        lines = "\n".join(self._lines)
        return f"define void @{self._name}(ptr %context) {{\nentry:\n  {body}\nbegin:\n{lines}\n  ret void\n}}\n"

    # -- instructions
    # -----------------------------------------------------------------------------------------------------

    def value(self, instruction: str) -> str:
        """The name of what `instruction` computes."""
        name = f"%v{self._next()}"
        self._lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """An instruction without a result."""
        self._lines.append(f"  {instruction}")

    def variable(self, kind: str, value: str = "zeroinitializer") -> str:
        """A place on the stack, set to `value` whenever this point is passed."""
        name = f"%s{self._next()}"
        self._stack.append(f"{name} = alloca {kind}")
        self.store(kind, value, name)
        return name

    def room(self, num_bytes: int) -> str:
        """A place of so many bytes on the stack, whose contents are undefined; it begins on a cache line."""
        name = f"%s{self._next()}"
        self._stack.append(f"{name} = alloca [{num_bytes} x i8], align 64")
        return name

    def load(self, kind: str, place: str, align: int | None = None) -> str:
        """`align` is in bytes; without it that of the type."""
        return self.value(f"load {kind}, ptr {place}" + (f", align {align}" if align else ""))

    def store(self, kind: str, value: str, place: str, align: int | None = None) -> None:
        """See `load`."""
        self.do(f"store {kind} {value}, ptr {place}" + (f", align {align}" if align else ""))

    @contextlib.contextmanager
    def loop(self, count: str | int, step: int = 1) -> Iterator[str]:
        """For an i64 from 0 up to below `count`."""
        number = self._next()
        place = self.variable("i64", "0")
        self._label(f"head{number}")
        index = self.load("i64", place)
        self._branch(self.value(f"icmp ult i64 {index}, {count}"), f"body{number}", f"exit{number}")
        yield index
        self.store("i64", self.add(index, step), place)
        self.do(f"br label %head{number}")
        self._label(f"exit{number}", falls_through=False)

    @contextlib.contextmanager
    def tasks(self, counter: str, count: str) -> Iterator[str]:
        """For each i64 below `count` that no other thread has taken, by adding to the word at `counter`."""
        number = self._next()
        self._label(f"head{number}")
        index = self.value(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        self._branch(self.value(f"icmp ult i64 {index}, {count}"), f"body{number}", f"exit{number}")
        yield index
        self.do(f"br label %head{number}")
        self._label(f"exit{number}", falls_through=False)

    # -- addresses and whole numbers
    # --------------------------------------------------------------------------------------

    def field(self, name: str, kind: str = "i64") -> str:
        """The context's word of that name."""
        return self.load(kind, self.place_of(name))

    def place_of(self, name: str) -> str:
        """Where that word is."""
        return self.at("%context", 8 * self._fields.index(name))

    def at(self, address: str, num_bytes: str | int) -> str:
        """`address` plus bytes."""
        return self.value(f"getelementptr i8, ptr {address}, i64 {num_bytes}")

    def add(self, left: str, right: str | int) -> str:
        """i64."""
        return self.value(f"add i64 {left}, {right}")

    def multiply(self, left: str, right: str | int) -> str:
        """i64."""
        return self.value(f"mul i64 {left}, {right}")

    def least(self, left: str, right: str | int) -> str:
        """The smaller i64, both unsigned."""
        return self.value(f"call i64 @llvm.umin.i64(i64 {left}, i64 {right})")

    def without(self, left: str, right: str | int) -> str:
        """The i64 `left` minus `right`, 0 where that is larger; both unsigned."""
        return self.value(f"call i64 @llvm.usub.sat.i64(i64 {left}, i64 {right})")

    # -- vectors of 512 bits
    # ----------------------------------------------------------------------------------------------

    def cast(self, kind: str, value: str, to: str) -> str:
        """The same bits as another type."""
        return self.value(f"bitcast {kind} {value} to {to}")

    def everywhere(self, place: str, kind: str) -> str:
        """The 32 bits at `place`, an even address, 16 times, as a vector of type `kind`."""
        return self.cast(INTS, self.splat("i32", self.load("i32", place, align=2)), kind)

    def splat(self, element: str, value: str) -> str:
        """16 times the same number."""
        kind = f"<16 x {element}>"
        first = self.value(f"insertelement {kind} poison, {element} {value}, i32 0")
        return self.value(f"shufflevector {kind} {first}, {kind} poison, {INTS} zeroinitializer")

    def widened(self, place: str) -> str:
        """16 numbers in bf16 as floats."""
        return self._floats_of(self.load("<16 x i16>", place, align=2))

    def widened_one(self, place: str) -> str:
        """A number in bf16 as a float."""
        word = self.value(f"zext i16 {self.load('i16', place, align=2)} to i32")
        return self.cast("i32", self.value(f"shl i32 {word}, 16"), "float")

    def rounded(self, floats: str) -> str:
        """16 floats rounded to bf16, as floats."""
        halves = self.cast("<16 x bfloat>", self.value(f"fptrunc {FLOATS} {floats} to <16 x bfloat>"), "<16 x i16>")
        return self._floats_of(halves)

    def _floats_of(self, halves: str) -> str:
        """Of 16 numbers in bf16, as the bits that they are."""
        words = self.value(f"zext <16 x i16> {halves} to {INTS}")
        return self.cast(INTS, self.value(f"shl {INTS} {words}, splat (i32 16)"), FLOATS)

    def chosen(self, kind: str, left: str, right: str, which: Sequence[int]) -> str:
        """Elements of two vectors of type `kind`, those of `right` numbered behind those of `left`; -1: any."""
        mask = ", ".join("i32 poison" if one < 0 else f"i32 {one}" for one in which)
        return self.value(f"shufflevector {kind} {left}, {kind} {right}, <{len(which)} x i32> <{mask}>")

    def first_lanes(self, count: str) -> str:
        """A mask of the first `count` (i64, at most 32) of 32 lanes."""
        bits = self.value(f"trunc i64 {self.add(self.value(f'shl i64 1, {count}'), -1)} to i32")
        return self.cast("i32", bits, MASK)

    def load_first(self, place: str, count: str) -> str:
        """The first `count` (i64, below 32) numbers in bf16 at `place`, and zeros; no more is read."""
        arguments = f"ptr {place}, i32 2, {MASK} {self.first_lanes(count)}, {WORDS} zeroinitializer"
        return self.cast(WORDS, self.value(f"call {WORDS} @llvm.masked.load.v32i16.p0({arguments})"), HALVES)

    def halves_of(self, low: str, high: str, times: int) -> str:
        """In bf16 the numbers 2^`times` times smaller than those of the i32 vectors `low` and `high`, which bf16 has to
        hold exactly: each of `low` and then that of `high`.
        """
        floats = [self.cast(FLOATS, self.value(f"sitofp {INTS} {one} to {FLOATS}"), INTS) for one in (low, high)]
        lower = self.value(f"lshr {INTS} {floats[0]}, splat (i32 16)")
        words = self.cast(INTS, self.value(f"or {INTS} {lower}, {floats[1]}"), WORDS)
        # From the exponent; a zero stays one.
        arguments = f"{WORDS} {words}, {WORDS} splat (i16 {times << 7})"
        return self.cast(WORDS, self.value(f"call {WORDS} @llvm.usub.sat.v32i16({arguments})"), HALVES)

    def dot(self, sums: str, left: str, right: str) -> str:
        """`sums` plus the products of each two neighbours of two vectors in bf16; the sums are float32."""
        arguments = f"{FLOATS} {sums}, {HALVES} {left}, {HALVES} {right}"
        return self.value(f"call {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512({arguments})")

    def multiply_add(self, left: str, right: str, sums: str) -> str:
        """`left` times `right` plus `sums`, float32, rounded once."""
        return self.value(f"call {FLOATS} @llvm.fma.v16f32({FLOATS} {left}, {FLOATS} {right}, {FLOATS} {sums})")

    def total(self, floats: str) -> str:
        """The sum of 16 floats: always in the same order."""
        return self.value(f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {FLOATS} {floats})")

    def largest(self, vectors: Sequence[str]) -> str:
        """The largest floats of several vectors in each lane."""
        most, *others = vectors
        for other in others:
            more = self.value(f"fcmp ogt {FLOATS} {other}, {most}")
            most = self.value(f"select <16 x i1> {more}, {FLOATS} {other}, {FLOATS} {most}")
        return most

    def largest_lane(self, floats: str) -> str:
        """The largest of 16 floats, in all lanes."""
        for distance in (8, 4, 2, 1):
            mask = vector("i32", [lane ^ distance for lane in range(16)])
            moved = self.value(f"shufflevector {FLOATS} {floats}, {FLOATS} poison, {INTS} {mask}")
            floats = self.largest([floats, moved])
        return floats

    def store_rounded(self, floats: str, place: str, count: str) -> None:
        """The first `count` (i64, may be more than 16) of 16 floats, rounded to bf16."""
        halves = self.value(f"fptrunc {FLOATS} {floats} to <16 x bfloat>")
        wanted = self.splat("i32", self.value(f"trunc i64 {self.least(count, 16)} to i32"))
        numbers = vector("i32", range(16))
        mask = self.value(f"icmp ult {INTS} {numbers}, {wanted}")
        words = self.cast("<16 x bfloat>", halves, "<16 x i16>")
        self.do(f"call void @llvm.masked.store.v16i16.p0(<16 x i16> {words}, ptr {place}, i32 2, <16 x i1> {mask})")

    def prefetch(self, address: str, to_all: bool = False) -> None:
        """Bring a line near, into the second cache, or `to_all` of them."""
        self.do(f"call void @llvm.prefetch.p0(ptr {address}, i32 0, i32 {3 if to_all else 1}, i32 1)")

    # ------------------------------------------------------------------------------------------------------------------

    def _label(self, name: str, falls_through: bool = True) -> None:
        if falls_through:
            self.do(f"br label %{name}")
        self._lines.append(f"{name}:")

    def _branch(self, condition: str, yes: str, no: str) -> None:
        self.do(f"br i1 {condition}, label %{yes}, label %{no}")
        self._lines.append(f"{yes}:")

    def _next(self) -> int:
        self._count += 1
        return self._count


def vector(element: str, numbers: Sequence[int]) -> str:
    """A constant vector of whole numbers."""
    return "<" + ", ".join(f"{element} {number}" for number in numbers) + ">"


def float_bits(value: float) -> str:
    """The nearest float32, as LLVM writes a constant: in the bits of a double."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.pack('>d', single).hex().upper()}"


def float_word(value: float) -> int:
    """The nearest float32 as a word of a context."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def bf16_bits(value: float) -> int:
    """A number that bf16 holds exactly, as a word."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if bits & 0xFFFF:
        raise ValueError(f"{value} is no bf16 number")
    return int(bits >> 16)
