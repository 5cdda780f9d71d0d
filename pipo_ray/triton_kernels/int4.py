"""Triton kernels for int4 panels (see `quant/panels.py`). Importing this needs triton.

A program takes the rows of one block of a panel's code order: HALF bytes for each column, of which byte j has the row
j x STRIDE in its low half and the row OFFSET further in its high half. So all it reads of codes lies in one range of
addresses. It takes a part of the columns; where there are several parts, each writes its sums, and the program that
comes last adds them, in their order: the result does not depend on which was last. The number of columns is a multiple
of GROUP; `part_columns` one of what the loop takes at once.

A code is a float32 number as it is: its bits, in a word that is zero otherwise, stand for code x 2^-149 (a denormal,
which a GPU multiplies as fast as any other number, and exactly). What is multiplied with it is a power of two larger.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import triton
import triton.language as tl

TO_64, FROM_64 = tl.constexpr(2.0**64), tl.constexpr(2.0**-64)
TO_81, TO_85, TO_126 = tl.constexpr(2.0**81), tl.constexpr(2.0**85), tl.constexpr(2.0**126)
TO_19, TO_23 = tl.constexpr(2.0**19), tl.constexpr(2.0**23)
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
def offsets_of(pairs, SYMMETRIC: tl.constexpr):
    """What a code 0 stands for, by the scale and the zero in a word's halves."""
    offsets = -8.0 * scales_of(pairs)
    if not SYMMETRIC:
        offsets += zeros_of(pairs)
    return offsets


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
    tl.store(output + index * output_stride + rows, total.to(tl.bfloat16), mask=rows < num_rows)


@triton.jit
def bias_of(bias, rows, num_rows):
    """What is added to the products with `rows`, float32; zero without a bias."""
    if bias is None:
        added = tl.zeros_like(rows).to(tl.float32)
    else:
        added = tl.load(bias + rows, mask=rows < num_rows, other=0.0).to(tl.float32)
    return added


@triton.jit
def store_row(
    output, output_stride, bias, partials, low, high, index, part, block, num_inputs, num_rows, num_parts,
    HALF: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Write an input's products with a block's rows, or with a part of their columns."""
    if index < num_inputs:
        rows = block * (2 * HALF) + tl.arange(0, HALF) * STRIDE
        if num_parts == 1:
            results = output + index * output_stride + rows
            low += bias_of(bias, rows, num_rows)
            high += bias_of(bias, rows + OFFSET, num_rows)
            tl.store(results, low.to(tl.bfloat16), mask=rows < num_rows)
            tl.store(results + OFFSET, high.to(tl.bfloat16), mask=rows + OFFSET < num_rows)
        else:
            sums = partials + (part * num_inputs + index) * num_rows + rows
            tl.store(sums, low, mask=rows < num_rows)
            tl.store(sums + OFFSET, high, mask=rows + OFFSET < num_rows)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def int4_vector(
    inputs, memory, output, bias, partials, arrivals,
    output_stride, num_inputs, num_rows, columns, panel_bytes, panel_blocks, part_columns, num_parts,
    GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    INPUTS: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """At most INPUTS (1, 2 or 4) rows of bf16 inputs [num_inputs, columns], exact products in float32, one program for
    each block and part: bf16 `output` [num_inputs, num_rows], whose rows begin `output_stride` elements apart. `bias`,
    bf16 [num_rows] or None, is added before what is stored is rounded.

    A thread has RUN consecutive columns of one group: it adds up codes times inputs before it multiplies with the
    scale. The loop takes LANES x RUN columns, loaded STAGES - 1 steps ahead; GROUP is a multiple of RUN. `partials` has
    float32 [num_parts, num_inputs, num_rows], `arrivals` a zero for each block, which is zero again at the end.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    codes = codes_at(memory, block, columns, panel_bytes, panel_blocks, HALF)
    scales = scales_at(memory, block, columns, panel_bytes, panel_blocks, HALF)
    panel_rows = panel_blocks * (2 * HALF)
    bytes_ = tl.arange(0, HALF)
    first = part * part_columns
    last = tl.minimum(first + part_columns, columns)
    low0 = tl.zeros([LANES, HALF], dtype=tl.float32)
    high0 = tl.zeros([LANES, HALF], dtype=tl.float32)
    if INPUTS > 1:
        low1 = tl.zeros([LANES, HALF], dtype=tl.float32)
        high1 = tl.zeros([LANES, HALF], dtype=tl.float32)
        second = inputs + tl.minimum(1, num_inputs - 1) * columns
    if INPUTS > 2:
        low2 = tl.zeros([LANES, HALF], dtype=tl.float32)
        high2 = tl.zeros([LANES, HALF], dtype=tl.float32)
        low3 = tl.zeros([LANES, HALF], dtype=tl.float32)
        high3 = tl.zeros([LANES, HALF], dtype=tl.float32)
        third = inputs + tl.minimum(2, num_inputs - 1) * columns
        fourth = inputs + tl.minimum(3, num_inputs - 1) * columns
    for start in tl.range(first, last, LANES * RUN, num_stages=STAGES):
        column = start + tl.arange(0, LANES) * RUN
        inside = column < last
        group = column // GROUP
        pairs = scales + group[:, None] * panel_rows + (bytes_ * STRIDE)[None, :]
        low_pairs = tl.load(pairs, mask=inside[:, None], other=0)
        high_pairs = tl.load(pairs + OFFSET, mask=inside[:, None], other=0)
        low_sum0 = tl.zeros([LANES, HALF], dtype=tl.float32)
        high_sum0 = tl.zeros([LANES, HALF], dtype=tl.float32)
        sum0 = tl.zeros([LANES], dtype=tl.float32)
        if INPUTS > 1:
            low_sum1, high_sum1, sum1 = low_sum0, high_sum0, sum0
        if INPUTS > 2:
            low_sum2, high_sum2, sum2 = low_sum0, high_sum0, sum0
            low_sum3, high_sum3, sum3 = low_sum0, high_sum0, sum0
        for step in tl.static_range(RUN):
            taken = tl.load(codes + (column + step)[:, None] * HALF + bytes_[None, :], mask=inside[:, None], other=0)
            low, high = values_of(taken)
            x0 = tl.load(inputs + column + step, mask=inside, other=0.0).to(tl.float32) * TO_64
            low_sum0 += low * x0[:, None]
            high_sum0 += high * x0[:, None]
            sum0 += x0
            if INPUTS > 1:
                x1 = tl.load(second + column + step, mask=inside, other=0.0).to(tl.float32) * TO_64
                low_sum1 += low * x1[:, None]
                high_sum1 += high * x1[:, None]
                sum1 += x1
            if INPUTS > 2:
                x2 = tl.load(third + column + step, mask=inside, other=0.0).to(tl.float32) * TO_64
                low_sum2 += low * x2[:, None]
                high_sum2 += high * x2[:, None]
                sum2 += x2
                x3 = tl.load(fourth + column + step, mask=inside, other=0.0).to(tl.float32) * TO_64
                low_sum3 += low * x3[:, None]
                high_sum3 += high * x3[:, None]
                sum3 += x3
        low_scale, high_scale = scales_of(low_pairs) * TO_85, scales_of(high_pairs) * TO_81
        low_offset, high_offset = offsets_of(low_pairs, SYMMETRIC), offsets_of(high_pairs, SYMMETRIC)
        low0 += low_sum0 * low_scale + low_offset * (sum0 * FROM_64)[:, None]
        high0 += high_sum0 * high_scale + high_offset * (sum0 * FROM_64)[:, None]
        if INPUTS > 1:
            low1 += low_sum1 * low_scale + low_offset * (sum1 * FROM_64)[:, None]
            high1 += high_sum1 * high_scale + high_offset * (sum1 * FROM_64)[:, None]
        if INPUTS > 2:
            low2 += low_sum2 * low_scale + low_offset * (sum2 * FROM_64)[:, None]
            high2 += high_sum2 * high_scale + high_offset * (sum2 * FROM_64)[:, None]
            low3 += low_sum3 * low_scale + low_offset * (sum3 * FROM_64)[:, None]
            high3 += high_sum3 * high_scale + high_offset * (sum3 * FROM_64)[:, None]
    store_row(output, output_stride, bias, partials, tl.sum(low0, axis=0), tl.sum(high0, axis=0), 0, part, block,
              num_inputs, num_rows, num_parts, HALF, STRIDE, OFFSET)  # fmt: skip
    if INPUTS > 1:
        store_row(output, output_stride, bias, partials, tl.sum(low1, axis=0), tl.sum(high1, axis=0), 1, part, block,
                  num_inputs, num_rows, num_parts, HALF, STRIDE, OFFSET)  # fmt: skip
    if INPUTS > 2:
        store_row(output, output_stride, bias, partials, tl.sum(low2, axis=0), tl.sum(high2, axis=0), 2, part, block,
                  num_inputs, num_rows, num_parts, HALF, STRIDE, OFFSET)  # fmt: skip
        store_row(output, output_stride, bias, partials, tl.sum(low3, axis=0), tl.sum(high3, axis=0), 3, part, block,
                  num_inputs, num_rows, num_parts, HALF, STRIDE, OFFSET)  # fmt: skip
    if num_parts > 1:
        tl.debug_barrier()  # all threads' sums are written before this program counts as arrived
        if tl.atomic_add(arrivals + block, 1, sem="acq_rel") == num_parts - 1:
            for index in range(num_inputs):
                add_parts(
                    partials,
                    output,
                    output_stride,
                    bias,
                    index,
                    block,
                    num_inputs,
                    num_rows,
                    num_parts,
                    2 * HALF,
                    PARTS,
                )
            tl.store(arrivals + block, 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def int4_tiles(
    inputs, memory, output, bias, partials, arrivals,
    output_stride, num_inputs, num_rows, columns, panel_bytes, panel_blocks, part_columns, num_parts,
    GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr, OFFSET: tl.constexpr,
    INPUTS: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """As `int4_vector`, for any number of inputs: weights rounded to bf16, products by tensor cores, INPUTS rows of
    inputs and a part in a program. GROUP is a multiple of STEP. DOT is bf16, but for the interpreter, which multiplies
    float32 only. `arrivals` has a zero for each block and INPUTS rows.
    """
    block, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    codes = codes_at(memory, block, columns, panel_bytes, panel_blocks, HALF)
    scales = scales_at(memory, block, columns, panel_bytes, panel_blocks, HALF)
    panel_rows = panel_blocks * (2 * HALF)
    bytes_ = tl.arange(0, HALF)
    index = tile * INPUTS + tl.arange(0, INPUTS)
    steps = tl.arange(0, STEP)
    first = part * part_columns
    last = tl.minimum(first + part_columns, columns)
    sums = tl.zeros([INPUTS, 2 * HALF], dtype=tl.float32)
    for start in range(first, last, STEP):
        column = start + steps
        x = tl.load(inputs + index[:, None] * columns + column[None, :], mask=(index < num_inputs)[:, None], other=0.0)
        taken = tl.load(codes + column[:, None] * HALF + bytes_[None, :])
        pairs = scales + (start // GROUP) * panel_rows + bytes_ * STRIDE
        low_pairs, high_pairs = tl.load(pairs), tl.load(pairs + OFFSET)
        low, high = values_of(taken)
        low = (low * TO_126 * TO_23 - 8.0) * scales_of(low_pairs)[None, :]
        high = (high * TO_126 * TO_19 - 8.0) * scales_of(high_pairs)[None, :]
        if not SYMMETRIC:
            low += zeros_of(low_pairs)[None, :]
            high += zeros_of(high_pairs)[None, :]
        weights = tl.join(low.to(tl.bfloat16), high.to(tl.bfloat16)).reshape(STEP, 2 * HALF)
        sums = tl.dot(x.to(DOT), weights.to(DOT), sums)
    joined = tl.arange(0, 2 * HALF)
    rows = block * (2 * HALF) + (joined // 2) * STRIDE + (joined % 2) * OFFSET
    mask = (index < num_inputs)[:, None] & (rows < num_rows)[None, :]
    results = output + index.to(tl.int64)[:, None] * output_stride + rows[None, :]
    if num_parts == 1:
        sums += bias_of(bias, rows, num_rows)[None, :]
        tl.store(results, sums.to(tl.bfloat16), mask=mask)
    else:
        places = index.to(tl.int64)[:, None] * num_rows + rows[None, :]
        part_size = num_inputs.to(tl.int64) * num_rows
        tl.store(partials + part * part_size + places, sums, mask=mask)
        tl.debug_barrier()
        arrival = arrivals + tile * tl.num_programs(0) + block
        if tl.atomic_add(arrival, 1, sem="acq_rel") == num_parts - 1:
            total = tl.zeros([INPUTS, 2 * HALF], dtype=tl.float32)
            for other in range(num_parts):
                total += tl.load(partials + other * part_size + places, mask=mask, other=0.0, cache_modifier=".cg")
            total += bias_of(bias, rows, num_rows)[None, :]
            tl.store(results, total.to(tl.bfloat16), mask=mask)
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
