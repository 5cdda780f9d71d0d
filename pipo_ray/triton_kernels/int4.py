"""Triton kernels for int4 panels (see `quant/panels.py`). Importing this needs triton.

A block of a panel's code order has HALF bytes for each column, of which byte j has the row j x STRIDE in its low half
and the row OFFSET further in its high half. The number of columns is a multiple of GROUP.

**Codes times inputs, by tensor cores.** A code is a bf16 number without computing anything: as the lowest bits of
0x4300 it is 128 + code. Tensor cores multiply those, exactly, and what they add up over a group of columns is scaled in
float32: no weight is ever rounded. A 32-bit word has the codes of eight rows in a column, so 16 words, as many rows as
a tensor core takes, in the columns of a group are eight matrices, which differ in how far the words are shifted. What a
tensor core wants in a register, two columns of a row, is made of two words by three instructions. The 128 and the 8 in
front of a code's zero are taken off again by the sums of inputs: what float32 rounds of a result is some 2^-24 of those
times 136 scales, 2^-19 of what weights of a usual spread sum up to.

A program takes a part of the columns; where there are several parts, each writes its sums, and the program that comes
last adds them, in their order: the result does not depend on which was last.

**Unpacking**: a code is a float32 number, too: its bits, in a word that is zero otherwise, stand for code x 2^-149 (a
denormal, which a GPU multiplies as fast as any other number, and exactly). What is multiplied with it is a power of two
larger.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import triton
import triton.language as tl

WORDS = tl.constexpr(16)
"""32-bit words of a column that a program multiplies: as many as a tensor core takes rows."""

PROGRAM_ROWS = 8 * WORDS.value
"""Rows of the weight that they are."""


def _pair(shift: int) -> tl.constexpr:
    """PTX that makes, of the codes `shift` bits up in two words, two numbers of bf16 in a word."""
    halves = "0x5410" if shift < 16 else "0x7632"  # of both words the low, or the high ones
    down = f"shr.b32 pair, pair, {shift % 16}; " if shift % 16 else ""
    both = f"prmt.b32 pair, $1, $2, {halves}; {down}lop3.b32 $0, pair, 0x000f000f, 0x43004300, 0xea;"
    return tl.constexpr(f"{{ .reg .b32 pair; {both} }}")


_PAIR0, _PAIR1, _PAIR2, _PAIR3, _PAIR4, _PAIR5, _PAIR6, _PAIR7 = (_pair(4 * place) for place in range(8))
BIAS = tl.constexpr(128 + 8)  # what is too much in a code that is multiplied

TO_126, TO_19, TO_23 = tl.constexpr(2.0**126), tl.constexpr(2.0**19), tl.constexpr(2.0**23)
_UNSPECIALIZED = ("num_inputs", "panel_blocks", "num_parts")


@triton.jit
def values_of(codes):
    """Of bytes: the code in their low half times 2^-149, and that in their high one times 2^-145, as float32."""
    words = codes.to(tl.uint32)
    return (words & 15).to(tl.float32, bitcast=True), (words & 240).to(tl.float32, bitcast=True)


@triton.jit
def scales_of(pairs):
    """The bf16 in the low half of a word, as float32."""
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def zeros_of(pairs):
    """The bf16 in the high half of a word, as float32."""
    return ((pairs >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def codes_at(memory, block, columns, panel_bytes, panel_blocks, HALF: tl.constexpr):
    """Where a block's codes begin."""
    panel, inner = block // panel_blocks, block % panel_blocks
    return memory + panel.to(tl.int64) * panel_bytes + inner.to(tl.int64) * (columns * HALF)


@triton.jit
def scales_at(memory, block, columns, panel_bytes, panel_blocks, HALF: tl.constexpr):
    """Where the scales and zeros of a block's rows in the first group begin, in words of both."""
    panel, inner = block // panel_blocks, block % panel_blocks
    behind_codes = panel.to(tl.int64) * panel_bytes + panel_blocks.to(tl.int64) * (columns * HALF)
    return (memory + behind_codes).to(tl.pointer_type(tl.uint32)) + inner * (2 * HALF)


@triton.jit
def add_parts(
    partials, output, output_stride, bias, index, block, num_inputs, num_rows, num_parts,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write one row of the output: the sum of what the parts of a block have written."""
    rows = block * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS)
    places = (parts * num_inputs + index)[:, None] * num_rows + rows[None, :]
    mask = (parts < num_parts)[:, None] & (rows < num_rows)[None, :]
    total = tl.sum(tl.load(partials + places, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    total += bias_of(bias, rows, num_rows)
    begin = tl.cast(index, tl.int64) * output_stride
    tl.store(output + begin + rows, total.to(tl.bfloat16), mask=rows < num_rows)


@triton.jit
def bias_of(bias, rows, num_rows):
    """What is added to the products with `rows`, float32; zero without a bias."""
    if bias is None:
        added = tl.zeros_like(rows).to(tl.float32)
    else:
        added = tl.load(bias + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    return added


@triton.jit
def _codes(words, PLACE: tl.constexpr, PAIR: tl.constexpr, DOT: tl.constexpr):
    """Of each word the code PLACE x 4 bits up, and 128 more."""
    if tl.bfloat16 == DOT:
        codes = tl.inline_asm_elementwise(PAIR, "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        codes = (((words >> (4 * PLACE)) & 15) + 128).to(DOT)
    return codes


@triton.jit
def _added(
    total, words, x, x_sums, pairs, PLACE: tl.constexpr, PAIR: tl.constexpr, SYMMETRIC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`total`, float32 [WORDS, INPUTS], and a group's products with the rows whose scales are at `pairs`."""
    found = tl.dot(_codes(words, PLACE, PAIR, DOT), x)
    pair = tl.load(pairs)
    scale = scales_of(pair)
    offset = scale * -BIAS
    if not SYMMETRIC:
        offset += zeros_of(pair)
    return total + found * scale[:, None] + x_sums * offset[:, None]


@triton.jit
def _store(
    output, output_stride, bias, partials, total, rows, index, part, num_inputs, num_rows, num_parts,
):  # fmt: skip
    """Write the products `total` of inputs `index` with `rows`, or with a part of their columns."""
    mask = (rows < num_rows)[:, None] & (index < num_inputs)[None, :]
    if num_parts == 1:
        total += bias_of(bias, rows, num_rows)[:, None]
        tl.store(output + index.to(tl.int64)[None, :] * output_stride + rows[:, None], total.to(tl.bfloat16), mask=mask)
    else:
        tl.store(partials + (part * num_inputs + index)[None, :] * num_rows + rows[:, None], total, mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def int4_codes(
    inputs, memory, output, bias, partials, arrivals,
    output_stride, num_inputs, num_rows, columns, panel_bytes, panel_blocks, part_columns, num_parts,
    GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    INPUTS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Any number of rows of bf16 inputs [num_inputs, columns] in, bf16 `output` [num_inputs, num_rows] out, whose rows
    begin `output_stride` elements apart. `bias`, bf16 [num_rows] or None, is added before what is stored is rounded.

    A program, which is one warp, takes INPUTS (8 or 16) of the inputs and PROGRAM_ROWS rows of the weight, a group of
    columns at a time, loaded STAGES - 1 groups ahead; `part_columns` is a multiple of GROUP. `partials` has float32
    [num_parts, num_inputs, num_rows], `arrivals` a zero for each program of a part, which is zero again at the end. DOT
    is bf16, but for the interpreter, which multiplies float32 only.
    """
    HALF_WORDS: tl.constexpr = HALF // 4
    # Programs of the same rows and columns follow each other: all but the first find them in the cache.
    tile, program, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    word = tl.arange(0, WORDS)
    inner_word = word % HALF_WORDS
    wanted = program * (WORDS // HALF_WORDS) + word // HALF_WORDS
    # Rows behind the last one are computed from the last block, and not stored.
    block = tl.minimum(wanted, tl.cdiv(num_rows, 2 * HALF) - 1)
    codes = codes_at(memory, block, columns, panel_bytes, panel_blocks, HALF)
    codes = codes.to(tl.pointer_type(tl.uint32)) + inner_word
    scales = scales_at(memory, block, columns, panel_bytes, panel_blocks, HALF) + inner_word * (4 * STRIDE)
    panel_rows = panel_blocks * (2 * HALF)
    index, steps = tile * INPUTS + tl.arange(0, INPUTS), tl.arange(0, GROUP)
    begins = inputs + index.to(tl.int64) * columns
    first = part * part_columns
    last = tl.minimum(first + part_columns, columns)
    ones = tl.full([WORDS, GROUP], 1.0, DOT)
    total0 = tl.zeros([WORDS, INPUTS], dtype=tl.float32)
    total1, total2, total3 = total0, total0, total0
    total4, total5, total6, total7 = total0, total0, total0, total0
    for start in tl.range(first, last, GROUP, num_stages=STAGES):
        column = start + steps
        words = tl.load(codes[:, None] + column[None, :] * HALF_WORDS)
        x = tl.load(begins[None, :] + column[:, None], mask=(index < num_inputs)[None, :], other=0.0).to(DOT)
        x_sums = tl.dot(ones, x)
        pairs = scales + (start // GROUP) * panel_rows
        total0 = _added(total0, words, x, x_sums, pairs, 0, _PAIR0, SYMMETRIC, DOT)
        total1 = _added(total1, words, x, x_sums, pairs + OFFSET, 1, _PAIR1, SYMMETRIC, DOT)
        pairs += STRIDE
        total2 = _added(total2, words, x, x_sums, pairs, 2, _PAIR2, SYMMETRIC, DOT)
        total3 = _added(total3, words, x, x_sums, pairs + OFFSET, 3, _PAIR3, SYMMETRIC, DOT)
        pairs += STRIDE
        total4 = _added(total4, words, x, x_sums, pairs, 4, _PAIR4, SYMMETRIC, DOT)
        total5 = _added(total5, words, x, x_sums, pairs + OFFSET, 5, _PAIR5, SYMMETRIC, DOT)
        pairs += STRIDE
        total6 = _added(total6, words, x, x_sums, pairs, 6, _PAIR6, SYMMETRIC, DOT)
        total7 = _added(total7, words, x, x_sums, pairs + OFFSET, 7, _PAIR7, SYMMETRIC, DOT)
    rows = wanted * (2 * HALF) + inner_word * (4 * STRIDE)
    _store(output, output_stride, bias, partials, total0, rows, index, part, num_inputs, num_rows, num_parts)
    _store(output, output_stride, bias, partials, total1, rows + OFFSET, index, part, num_inputs, num_rows, num_parts)
    rows += STRIDE
    _store(output, output_stride, bias, partials, total2, rows, index, part, num_inputs, num_rows, num_parts)
    _store(output, output_stride, bias, partials, total3, rows + OFFSET, index, part, num_inputs, num_rows, num_parts)
    rows += STRIDE
    _store(output, output_stride, bias, partials, total4, rows, index, part, num_inputs, num_rows, num_parts)
    _store(output, output_stride, bias, partials, total5, rows + OFFSET, index, part, num_inputs, num_rows, num_parts)
    rows += STRIDE
    _store(output, output_stride, bias, partials, total6, rows, index, part, num_inputs, num_rows, num_parts)
    _store(output, output_stride, bias, partials, total7, rows + OFFSET, index, part, num_inputs, num_rows, num_parts)
    if num_parts > 1:
        tl.debug_barrier()  # all threads' sums are written before this program counts as arrived
        arrival = arrivals + program * tl.num_programs(0) + tile
        if tl.atomic_add(arrival, 1, sem="acq_rel") == num_parts - 1:
            for one in range(tile * INPUTS, tl.minimum(tile * INPUTS + INPUTS, num_inputs)):
                add_parts(
                    partials, output, output_stride, bias, one, program, num_inputs, num_rows, num_parts, 8 * WORDS,
                    PARTS,
                )  # fmt: skip
            tl.store(arrival, 0)


@triton.jit(do_not_specialize=("first_block", "panel_blocks"))
def int4_unpack(
    memory, matrix, first_block, columns, panel_bytes, panel_blocks, matrix_rows,
    GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """The blocks from `first_block` on as the bf16 `matrix` [columns, matrix_rows]; a program unpacks STEP columns of a
    block.
    """
    inner = tl.program_id(0)
    block = first_block + inner
    codes = codes_at(memory, block, columns, panel_bytes, panel_blocks, HALF)
    scales = scales_at(memory, block, columns, panel_bytes, panel_blocks, HALF)
    panel_rows = panel_blocks * (2 * HALF)
    bytes_ = tl.arange(0, HALF)
    start = tl.program_id(1) * STEP
    column = start + tl.arange(0, STEP)
    inside = (column < columns)[:, None]
    taken = tl.load(codes + column[:, None] * HALF + bytes_[None, :], mask=inside, other=0)
    low, high = values_of(taken)
    if GROUP % STEP == 0:
        pairs = (scales + (start // GROUP) * panel_rows + bytes_ * STRIDE)[None, :]
        low_pairs, high_pairs = tl.load(pairs), tl.load(pairs + OFFSET)
    else:
        pairs = scales + (column // GROUP)[:, None] * panel_rows + (bytes_ * STRIDE)[None, :]
        low_pairs, high_pairs = tl.load(pairs, mask=inside, other=0), tl.load(pairs + OFFSET, mask=inside, other=0)
    low = (low * TO_126 * TO_23 - 8.0) * scales_of(low_pairs)
    high = (high * TO_126 * TO_19 - 8.0) * scales_of(high_pairs)
    if not SYMMETRIC:
        low += zeros_of(low_pairs)
        high += zeros_of(high_pairs)
    places = matrix + column.to(tl.int64)[:, None] * matrix_rows + (inner * (2 * HALF) + bytes_ * STRIDE)[None, :]
    tl.store(places, low.to(tl.bfloat16), mask=inside)
    tl.store(places + OFFSET, high.to(tl.bfloat16), mask=inside)
