"""Triton kernels for int8 panels (see `quant/panels.py`). Importing this needs triton.

Codes lie row by row, the rows' scales behind them. A program's rows are all in one panel.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import triton
import triton.language as tl

from pipo_ray.triton_kernels.int4 import bias_of

_UNSPECIALIZED = ("num_inputs", "panel_rows", "num_parts")


@triton.jit
def codes_at(memory, row, columns, panel_bytes, panel_rows):
    """Where the codes of a row begin."""
    panel, inner = row // panel_rows, row % panel_rows
    return (memory + panel.to(tl.int64) * panel_bytes + inner.to(tl.int64) * columns).to(tl.pointer_type(tl.int8))


@triton.jit
def scales_of(memory, row, rows, columns, panel_bytes, panel_rows):
    """Scales of `rows` rows from `row` on, float32."""
    panel, inner = row // panel_rows, row % panel_rows
    behind_codes = panel.to(tl.int64) * panel_bytes + panel_rows.to(tl.int64) * columns
    return tl.load((memory + behind_codes).to(tl.pointer_type(tl.bfloat16)) + inner + rows).to(tl.float32)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def int8_vector(
    inputs, memory, output, bias, output_stride, num_inputs, num_rows, columns, panel_bytes, panel_rows,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """At most INPUTS (1, 2 or 4) rows of bf16 inputs [num_inputs, columns], exact products in float32, ROWS rows in a
    program: bf16 `output` [num_inputs, num_rows], with `output_stride` and `bias` as in `int4_vector`.
    """
    first = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    codes = codes_at(memory, first, columns, panel_bytes, panel_rows)
    # A place for each row, though it is the same: so every thread loads what it needs itself.
    same = tl.zeros([ROWS, 1], dtype=tl.int32)
    sum0 = tl.zeros([ROWS, STEP], dtype=tl.float32)
    if INPUTS > 1:
        sum1 = tl.zeros([ROWS, STEP], dtype=tl.float32)
        second = inputs + tl.minimum(1, num_inputs - 1) * columns
    if INPUTS > 2:
        sum2 = tl.zeros([ROWS, STEP], dtype=tl.float32)
        sum3 = tl.zeros([ROWS, STEP], dtype=tl.float32)
        third = inputs + tl.minimum(2, num_inputs - 1) * columns
        fourth = inputs + tl.minimum(3, num_inputs - 1) * columns
    for start in range(0, columns, STEP):
        column = start + tl.arange(0, STEP)
        inside = (column < columns)[None, :]
        taken = tl.load(codes + rows[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
        places = same + column[None, :]
        sum0 += taken * tl.load(inputs + places, mask=inside, other=0.0).to(tl.float32)
        if INPUTS > 1:
            sum1 += taken * tl.load(second + places, mask=inside, other=0.0).to(tl.float32)
        if INPUTS > 2:
            sum2 += taken * tl.load(third + places, mask=inside, other=0.0).to(tl.float32)
            sum3 += taken * tl.load(fourth + places, mask=inside, other=0.0).to(tl.float32)
    scales = scales_of(memory, first, rows, columns, panel_bytes, panel_rows)
    added = bias_of(bias, first + rows, num_rows)
    place = output + first + rows
    mask = first + rows < num_rows
    tl.store(place, (tl.sum(sum0, axis=1) * scales + added).to(tl.bfloat16), mask=mask)
    if INPUTS > 1:  # noqa: SIM102 - sum1 is there only where this holds when it is compiled
        if num_inputs > 1:
            tl.store(place + output_stride, (tl.sum(sum1, axis=1) * scales + added).to(tl.bfloat16), mask=mask)
    if INPUTS > 2:
        if num_inputs > 2:
            tl.store(place + 2 * output_stride, (tl.sum(sum2, axis=1) * scales + added).to(tl.bfloat16), mask=mask)
        if num_inputs > 3:
            tl.store(place + 3 * output_stride, (tl.sum(sum3, axis=1) * scales + added).to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def int8_tiles(
    inputs, memory, output, bias, partials, arrivals,
    output_stride, num_inputs, num_rows, columns, panel_bytes, panel_rows, part_columns, num_parts,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """As `int4_tiles`; bf16 holds every code exactly. A program has ROWS rows of the weight and INPUTS of inputs."""
    block, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inner = tl.arange(0, ROWS)
    codes = codes_at(memory, block * ROWS, columns, panel_bytes, panel_rows)
    index = tile * INPUTS + tl.arange(0, INPUTS)
    first = part * part_columns
    last = tl.minimum(first + part_columns, columns)
    sums = tl.zeros([INPUTS, ROWS], dtype=tl.float32)
    for start in range(first, last, STEP):
        column = start + tl.arange(0, STEP)
        inside = column < last
        places = inputs + index[:, None] * columns + column[None, :]
        x = tl.load(places, mask=(index < num_inputs)[:, None] & inside[None, :], other=0.0)
        taken = tl.load(codes + inner[None, :] * columns + column[:, None], mask=inside[:, None], other=0)
        sums = tl.dot(x.to(DOT), taken.to(tl.float32).to(DOT), sums)
    sums *= scales_of(memory, block * ROWS, inner, columns, panel_bytes, panel_rows)[None, :]
    rows = block * ROWS + inner
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
            total = tl.zeros([INPUTS, ROWS], dtype=tl.float32)
            for other in range(num_parts):
                total += tl.load(partials + other * part_size + places, mask=mask, other=0.0, cache_modifier=".cg")
            total += bias_of(bias, rows, num_rows)[None, :]
            tl.store(results, total.to(tl.bfloat16), mask=mask)
            tl.store(arrival, 0)


@triton.jit(do_not_specialize=("first_row", "panel_rows"))
def int8_unpack(
    memory, matrix, first_row, columns, panel_bytes, panel_rows, ROWS: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """The rows from `first_row` on as the bf16 `matrix` [rows, columns]; a program unpacks ROWS rows, STEP columns."""
    inner = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    codes = codes_at(memory, first_row + inner, columns, panel_bytes, panel_rows)
    scales = scales_of(memory, first_row + inner, rows, columns, panel_bytes, panel_rows)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    inside = (column < columns)[None, :]
    taken = tl.load(codes + rows[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
    places = matrix + (inner + rows).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(places, (taken * scales[:, None]).to(tl.bfloat16), mask=inside)
