"""Triton kernels that pack pages of a low-bit KV cache, and unpack them. Importing this needs triton.

Packing is `kv_rounding.pack_pages` in one pass, operation by operation, so that the bytes are the same: division that
rounds as IEEE says, a sum with 1.5 * 2^23 that rounds to a whole number, halves to even.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import triton
import triton.language as tl

from pipo_ray.triton_kernels.packed_attention import PAGE, SEQUENCE_NUMBERS, pointer_at

LARGEST, LEAST_SCALE = tl.constexpr(65504.0), tl.constexpr(2.0**-15)
TO_WHOLE, SPACING = tl.constexpr(12582912.0), tl.constexpr(2.0**-10)
EXPONENT = tl.constexpr(0x7F800000)


@triton.jit
def clamped(numbers):
    """As float32, within what float16 holds."""
    return tl.minimum(tl.maximum(numbers.to(tl.float32), -LARGEST), LARGEST)


@triton.jit
def rounding_of(least, most, BITS: tl.constexpr):
    """Scale and zero, float32 numbers that float16 holds, for numbers from `least` to `most`; see `round_along`."""
    zero = least.to(tl.float16).to(tl.float32)
    zero = tl.where(zero == 0.0, 0.0, zero)  # there is no -0.0
    size = tl.maximum(tl.abs(zero), LEAST_SCALE)
    spacing = (size.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True) * SPACING
    levels = tl.full(least.shape, (1 << BITS) - 1, tl.float32)
    scale = tl.div_rn(most - zero, levels).to(tl.float16).to(tl.float32)
    return tl.maximum(tl.maximum(scale, spacing), LEAST_SCALE), zero


@triton.jit
def codes_of(numbers, scale, zero, BITS: tl.constexpr):
    """Codes, int32, of float32 `numbers`; `scale` and `zero` have their shape."""
    whole = (tl.div_rn(numbers - zero, scale) + TO_WHOLE) - TO_WHOLE
    return tl.minimum(tl.maximum(whole, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def write_codes(low, high, place, inside, DIM: tl.constexpr, BITS: tl.constexpr):
    """Codes of the first and of the second half of a page's tokens to `place` [32, channels], 32 rows of DIM."""
    if BITS == 4:
        tl.store(place, (low | (high << 4)).to(tl.uint8), mask=inside)
    else:
        tl.store(place, low.to(tl.uint8), mask=inside)
        tl.store(place + 32 * DIM, high.to(tl.uint8), mask=inside)


@triton.jit
def token_codes(numbers, inside, scales, zeros, places, BITS: tl.constexpr):
    """Codes of values [tokens, channels], each token's with a scale and a zero of its own, which are written, too."""
    least = tl.min(tl.where(inside, numbers, float("inf")), axis=1)
    most = tl.max(tl.where(inside, numbers, float("-inf")), axis=1)
    scale, zero = rounding_of(least, most, BITS)
    tl.store(scales.to(tl.pointer_type(tl.float16)) + places, scale.to(tl.float16))
    tl.store(zeros.to(tl.pointer_type(tl.float16)) + places, zero.to(tl.float16))
    scale, zero = tl.broadcast_to(scale[:, None], numbers.shape), tl.broadcast_to(zero[:, None], numbers.shape)
    return codes_of(numbers, scale, zero, BITS)


@triton.jit
def move_on(places, inside, half, size, DIM: tl.constexpr):
    """Tokens 64 to before `size`, at most 128, of a window whose first 32 are at `places`: 64 to the front."""
    for start in tl.static_range(PAGE, 3 * PAGE, 32):
        rest = inside & (start + half < size)[:, None]
        moved = tl.load(places + start * DIM, mask=rest)
        tl.debug_barrier()  # what is written over has been read by all threads
        tl.store(places + (start - PAGE) * DIM, moved, mask=rest)


@triton.jit
def pack_keys(
    window, memory, group, room, size,
    BITS: tl.constexpr, DIM: tl.constexpr, SHARING: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_ZEROS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Keys of SHARING heads: each channel has a scale over all tokens."""
    half = tl.arange(0, 32)
    channels = tl.arange(0, CHANNELS)
    head, channel = group * SHARING + channels // DIM, channels % DIM
    exists = channels < SHARING * DIM
    inside = (half >= 0)[:, None] & exists[None, :]
    places = (window + (head * room).to(tl.int64) * DIM + channel)[None, :] + half[:, None] * DIM
    low = clamped(tl.load(places, mask=inside, other=0.0))
    high = clamped(tl.load(places + 32 * DIM, mask=inside, other=0.0))
    scale, zero = rounding_of(tl.min(tl.minimum(low, high), axis=0), tl.max(tl.maximum(low, high), axis=0), BITS)
    of_channels = head * DIM + channel
    tl.store((memory + KEY_SCALES).to(tl.pointer_type(tl.float16)) + of_channels, scale.to(tl.float16), mask=exists)
    tl.store((memory + KEY_ZEROS).to(tl.pointer_type(tl.float16)) + of_channels, zero.to(tl.float16), mask=exists)
    scale, zero = tl.broadcast_to(scale[None, :], low.shape), tl.broadcast_to(zero[None, :], low.shape)
    codes = memory + (head * (8 * BITS * DIM) + channel)[None, :] + half[:, None] * DIM
    write_codes(codes_of(low, scale, zero, BITS), codes_of(high, scale, zero, BITS), codes, inside, DIM, BITS)
    move_on(places, inside, half, size, DIM)


@triton.jit
def pack_values(
    window, memory, group, of_channels, room, size,
    BITS: tl.constexpr, DIM: tl.constexpr, SHARING: tl.constexpr, GROUPS: tl.constexpr, VALUE_CODES: tl.constexpr,
    VALUE_SCALES: tl.constexpr, VALUE_ZEROS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Group `of_channels` of GROUPS of the channels of SHARING heads' values: each token has a scale over all."""
    WIDTH: tl.constexpr = DIM // GROUPS
    half = tl.arange(0, 32)
    channels = tl.arange(0, CHANNELS)
    head, channel = group * SHARING + channels // WIDTH, of_channels * WIDTH + channels % WIDTH
    inside = (half >= 0)[:, None] & (channels < SHARING * WIDTH)[None, :]
    places = (window + (head * room).to(tl.int64) * DIM + channel)[None, :] + half[:, None] * DIM
    low = clamped(tl.load(places, mask=inside, other=0.0))
    high = clamped(tl.load(places + 32 * DIM, mask=inside, other=0.0))
    scales, zeros = memory + VALUE_SCALES, memory + VALUE_ZEROS
    of_tokens = (group * PAGE + half) * GROUPS + of_channels
    low_codes = token_codes(low, inside, scales, zeros, of_tokens, BITS)
    high_codes = token_codes(high, inside, scales, zeros, of_tokens + 32 * GROUPS, BITS)
    codes = memory + VALUE_CODES + (head * (8 * BITS * DIM) + channel)[None, :] + half[:, None] * DIM
    write_codes(low_codes, high_codes, codes, inside, DIM, BITS)
    move_on(places, inside, half, size, DIM)


@triton.jit(do_not_specialize=("num_sequences", "first_leaving"))
def pack_leaving(
    addresses, work, num_sequences, first_leaving,
    BITS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SHARING: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, PAGE_BYTES: tl.constexpr, VALUE_CODES: tl.constexpr, KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_ZEROS: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Pack the first page of the windows of some sequences, whose numbers are in `work` from `first_leaving` on, and
    move on what is behind it, up to 128 tokens. `addresses` and `work` are those of `attend_packed`, whose call has
    appended the token.

    A program has one of these sequences, SHARING heads, and their keys or one group of channels of their values, which
    KEYS and VALUES are at least in number. KIND is the type of what a window has.
    """
    sequence = tl.load(work + first_leaving + tl.program_id(0))
    group, part = tl.program_id(1), tl.program_id(2)
    facts = work + sequence * SEQUENCE_NUMBERS
    page, size, room = tl.load(facts + 1), tl.load(facts + 2), tl.load(facts + 3)
    memory = pointer_at(addresses, 3 * sequence + 2, tl.uint8) + page.to(tl.int64) * PAGE_BYTES
    if part == 0:
        pack_keys(
            pointer_at(addresses, 3 * sequence, KIND), memory, group, room, size,
            BITS, KEY_DIM, SHARING, KEY_SCALES, KEY_ZEROS, KEYS,
        )  # fmt: skip
    else:
        pack_values(
            pointer_at(addresses, 3 * sequence + 1, KIND), memory, group, part - 1, room, size,
            BITS, VALUE_DIM, SHARING, VALUE_GROUPS, VALUE_CODES, VALUE_SCALES, VALUE_ZEROS, VALUES,
        )  # fmt: skip


@triton.jit(do_not_specialize=("key_head", "value_head"))
def unpack(
    pages, keys, values, key_head, value_head,
    BITS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SHARING: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, PAGE_BYTES: tl.constexpr, VALUE_CODES: tl.constexpr, KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_ZEROS: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What neighbouring `pages` stand for, to `keys`, `values` [heads, tokens, dim], which are `key_head` and
    `value_head` elements apart from head to head. A program unpacks a page of one head.
    """
    page, head = tl.program_id(0), tl.program_id(1)
    memory = tl.multiple_of(pages + page.to(tl.int64) * PAGE_BYTES, 16)
    LINES: tl.constexpr = PAGE * BITS // 8
    lines = tl.arange(0, LINES)
    channels = tl.arange(0, KEYS)
    scales = (memory + KEY_SCALES).to(tl.pointer_type(tl.float16)) + head * KEY_DIM + channels
    zeros = (memory + KEY_ZEROS).to(tl.pointer_type(tl.float16)) + head * KEY_DIM + channels
    scale = tl.load(scales, mask=channels < KEY_DIM, other=0.0).to(tl.float32)[None, :]
    zero = tl.load(zeros, mask=channels < KEY_DIM, other=0.0).to(tl.float32)[None, :]
    inside = (lines >= 0)[:, None] & (channels < KEY_DIM)[None, :]
    of_lines = lines[:, None] * KEY_DIM + channels[None, :]
    codes = tl.load(memory + head * (LINES * KEY_DIM) + of_lines, mask=inside, other=0)
    places = keys + head.to(tl.int64) * key_head + page.to(tl.int64) * (PAGE * KEY_DIM) + of_lines
    if BITS == 8:
        tl.store(places, (zero + scale * codes.to(tl.float32)).to(keys.dtype.element_ty), mask=inside)
    else:
        low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
        tl.store(places, (zero + scale * low).to(keys.dtype.element_ty), mask=inside)
        tl.store(places + LINES * KEY_DIM, (zero + scale * high).to(keys.dtype.element_ty), mask=inside)
    value_channels = tl.arange(0, VALUES)
    value_inside = (lines >= 0)[:, None] & (value_channels < VALUE_DIM)[None, :]
    value_lines = lines[:, None] * VALUE_DIM + value_channels[None, :]
    found = tl.load(memory + VALUE_CODES + head * (LINES * VALUE_DIM) + value_lines, mask=value_inside, other=0)
    value_places = values + head.to(tl.int64) * value_head + page.to(tl.int64) * (PAGE * VALUE_DIM) + value_lines
    groups = (value_channels // (VALUE_DIM // VALUE_GROUPS))[None, :]
    of_tokens = ((head // SHARING) * PAGE + lines)[:, None] * VALUE_GROUPS + groups
    value_scales = (memory + VALUE_SCALES).to(tl.pointer_type(tl.float16)) + of_tokens
    value_zeros = (memory + VALUE_ZEROS).to(tl.pointer_type(tl.float16)) + of_tokens
    value_scale = tl.load(value_scales, mask=value_inside, other=0.0).to(tl.float32)
    value_zero = tl.load(value_zeros, mask=value_inside, other=0.0).to(tl.float32)
    if BITS == 8:
        wide = value_zero + value_scale * found.to(tl.float32)
        tl.store(value_places, wide.to(values.dtype.element_ty), mask=value_inside)
    else:
        wide = value_zero + value_scale * (found & 15).to(tl.float32)
        tl.store(value_places, wide.to(values.dtype.element_ty), mask=value_inside)
        value_scale = tl.load(value_scales + LINES * VALUE_GROUPS, mask=value_inside, other=0.0).to(tl.float32)
        value_zero = tl.load(value_zeros + LINES * VALUE_GROUPS, mask=value_inside, other=0.0).to(tl.float32)
        wide = value_zero + value_scale * (found >> 4).to(tl.float32)
        tl.store(value_places + LINES * VALUE_DIM, wide.to(values.dtype.element_ty), mask=value_inside)
