"""What lies between the products of a decoder layer, for one row in bf16, as LLVM IR: RMS norm, rotary embedding, the
gate of an MLP, and sums.

The roundings are those of the same operations in torch one after the other, each of which rounds to bf16; sums of
squares are added up in another order. Lengths are multiples of 16.
"""

from __future__ import annotations

from pipo_ray.compiled.instruction_sets import FUNCTIONS
from pipo_ray.compiled.ir import DECLARATIONS, FLOATS, INTS, Function, float_bits
from pipo_ray.compiled.support import InstructionSet

NORM, NORM_FIELDS = "norm", ("input", "weight", "output", "rows", "size", "epsilon")
"""`output` = `weight` times each of `rows` rows of `size` numbers over the root of its mean square plus `epsilon`
(float32), as transformers' LlamaRMSNorm has it.
"""
ADD, ADD_FIELDS = "add", ("left", "right", "output", "size")
TURN, TURN_FIELDS = "turn", ("row", "cosine", "sine", "heads", "half")
"""Rotary embedding of `heads` of 2 x `half` numbers in place, with halves for pairs (`rotate_half`)."""
GATE, GATE_FIELDS = "gate", ("gate", "up", "output", "size")
"""`output` = silu(`gate`) times `up`."""

_LOG2_E = float_bits(1.4426950408889634)
_LEAST = float_bits(-126.0)
_SHIFT = float_bits(1.5 * 2**23)
"""Plus a number of less than 2^22: rounded, and its lowest bits are the whole number's."""
_EXP2 = (0.0013333558, 0.0096181291, 0.0555041087, 0.2402265070, 0.6931471806, 1.0)
"""2^x between -0.5 and 0.5, highest power first: Taylor's series, off by 2e-6 at most."""

MORE_DECLARATIONS = f"""
declare float @llvm.sqrt.f32(float)
declare {FLOATS} @llvm.fabs.v16f32({FLOATS})
"""


def module(instructions: InstructionSet = "avx512") -> str:
    """All of them."""
    kind = FUNCTIONS[instructions]
    return "\n".join([DECLARATIONS, MORE_DECLARATIONS, *(make(kind) for make in (_norm, _add, _turn, _gate))])


def _norm(kind: type[Function]) -> str:
    f = kind(NORM, NORM_FIELDS)
    size = f.field("size")
    epsilon = f.value(f"bitcast i32 {f.load('i32', f.place_of('epsilon'))} to float")
    with f.loop(f.field("rows")) as row:
        offset = f.multiply(f.multiply(row, size), 2)
        source, target = f.at(f.field("input", "ptr"), offset), f.at(f.field("output", "ptr"), offset)
        squares = f.variable(FLOATS)
        with f.loop(size, 16) as at:
            x = f.widened(f.at(source, f.multiply(at, 2)))
            f.store(FLOATS, f.multiply_add(x, x, f.load(FLOATS, squares)), squares)
        total = f.total(f.load(FLOATS, squares))
        mean = f.value(f"fdiv float {total}, {f.value(f'uitofp i64 {size} to float')}")
        root = f.value(f"call float @llvm.sqrt.f32(float {f.value(f'fadd float {mean}, {epsilon}')})")
        scale = f.splat("float", f.value(f"fdiv float 1.0, {root}"))
        with f.loop(size, 16) as at:
            place = f.multiply(at, 2)
            scaled = f.rounded(f.value(f"fmul {FLOATS} {f.widened(f.at(source, place))}, {scale}"))
            weight = f.widened(f.at(f.field("weight", "ptr"), place))
            f.store_rounded(f.value(f"fmul {FLOATS} {weight}, {scaled}"), f.at(target, place), "16")
    return f.text()


def _add(kind: type[Function]) -> str:
    f = kind(ADD, ADD_FIELDS)
    with f.loop(f.field("size"), 16) as at:
        place = f.multiply(at, 2)
        left, right = (f.widened(f.at(f.field(name, "ptr"), place)) for name in ("left", "right"))
        f.store_rounded(f.value(f"fadd {FLOATS} {left}, {right}"), f.at(f.field("output", "ptr"), place), "16")
    return f.text()


def _turn(kind: type[Function]) -> str:
    f = kind(TURN, TURN_FIELDS)
    half, cosine, sine = f.field("half"), f.field("cosine", "ptr"), f.field("sine", "ptr")
    behind = f.multiply(half, 2)
    with f.loop(f.field("heads")) as head:
        first = f.at(f.field("row", "ptr"), f.multiply(f.multiply(head, half), 4))
        with f.loop(half, 16) as at:
            place = f.multiply(at, 2)
            other = f.add(place, behind)
            x, y = f.widened(f.at(first, place)), f.widened(f.at(first, other))
            minus_y = f.value(f"fneg {FLOATS} {y}")
            for where, straight, turned in ((place, x, minus_y), (other, y, x)):
                one = f.rounded(f.value(f"fmul {FLOATS} {straight}, {f.widened(f.at(cosine, where))}"))
                two = f.rounded(f.value(f"fmul {FLOATS} {turned}, {f.widened(f.at(sine, where))}"))
                f.store_rounded(f.value(f"fadd {FLOATS} {one}, {two}"), f.at(first, where), "16")
    return f.text()


def _gate(kind: type[Function]) -> str:
    f = kind(GATE, GATE_FIELDS)
    with f.loop(f.field("size"), 16) as at:
        place = f.multiply(at, 2)
        x = f.widened(f.at(f.field("gate", "ptr"), place))
        size = f.value(f"call {FLOATS} @llvm.fabs.v16f32({FLOATS} {x})")
        small = exponential(f, f.value(f"fneg {FLOATS} {size}"))
        negative = f.value(f"fcmp olt {FLOATS} {x}, zeroinitializer")
        above = f.value(f"select <16 x i1> {negative}, {FLOATS} {small}, {FLOATS} splat (float 1.0)")
        below = f.value(f"fadd {FLOATS} {small}, splat (float 1.0)")
        sigmoid = f.value(f"fdiv {FLOATS} {above}, {below}")
        silu = f.rounded(f.value(f"fmul {FLOATS} {x}, {sigmoid}"))
        up = f.widened(f.at(f.field("up", "ptr"), place))
        f.store_rounded(f.value(f"fmul {FLOATS} {silu}, {up}"), f.at(f.field("output", "ptr"), place), "16")
    return f.text()


def exponential(f: Function, x: str) -> str:
    """e^x of numbers of at most 0; 1e-38 where it would be less."""
    y = f.value(f"fmul {FLOATS} {x}, splat (float {_LOG2_E})")
    low = f.value(f"fcmp olt {FLOATS} {y}, splat (float {_LEAST})")  # false for what is no number, which stays so
    y = f.value(f"select <16 x i1> {low}, {FLOATS} splat (float {_LEAST}), {FLOATS} {y}")
    # Not by a conversion: LLVM makes it number by number.
    shifted = f.value(f"fadd {FLOATS} {y}, splat (float {_SHIFT})")
    whole = f.value(f"fsub {FLOATS} {shifted}, splat (float {_SHIFT})")
    rest = f.value(f"fsub {FLOATS} {y}, {whole}")
    result = f"splat (float {float_bits(_EXP2[0])})"
    for factor in _EXP2[1:]:
        result = f.multiply_add(result, rest, f"splat (float {float_bits(factor)})")
    power = f.value(f"add {INTS} {f.cast(FLOATS, shifted, INTS)}, splat (i32 127)")
    power = f.value(f"shl {INTS} {power}, splat (i32 23)")
    return f.value(f"fmul {FLOATS} {result}, {f.cast(INTS, power, FLOATS)}")
