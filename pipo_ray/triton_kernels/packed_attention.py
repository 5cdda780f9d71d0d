"""Triton kernel for attention to packed pages of a low-bit KV cache (`quant/kv_rounding.py`) as they lie. Importing
this needs triton.

Several sequences have one new token each. A *part* is some pages of one sequence, or 64 tokens of its window; a program
takes a part for one head of keys and all query heads that share it, and leaves its weighted sum of values, the sum of
weights and the exponent that they are relative to. Of 16 neighbouring parts of a sequence the program that comes last
makes one, and that which comes last of these makes the result, always in their order ("Flash-Decoding",
https://pytorch.org/blog/flash-decoding/): so which was last does not show in the result.

A page's scales and zeros are applied to what there is less of. Of keys to the query: of q * (zero + scale * code) there
is (q * scale) * code for each token, and a number for the page. Of values to the weights. So codes are multiplied as
they are, and as whole numbers they are exact in float16.

What is rounded, to float16 whatever the model's type is: q * scale, and a token's weight times its values' scale. The
zeros and the sum of weights get the weight that the rounded number stands for, so that a token's weight is off by a
part in 2^11, and not what its codes are relative to what its zero is.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import triton
import triton.language as tl

SEQUENCE_NUMBERS = tl.constexpr(8)
PART_NUMBERS = tl.constexpr(4)
PAGE = tl.constexpr(64)
MERGED = tl.constexpr(16)
LARGEST, LEAST_NORMAL = tl.constexpr(65504.0), tl.constexpr(2.0**-14)
LOG2_E = tl.constexpr(1.4426950408889634)
_UNSPECIALIZED = ("num_sequences", "num_parts", "scale", "softcap")


@triton.jit
def pointer_at(addresses, index, KIND: tl.constexpr):
    """The address that is number `index` of `addresses`, a multiple of 16, as a pointer to KIND."""
    return tl.multiple_of(tl.load(addresses + index).to(tl.pointer_type(KIND)), 16)


@triton.jit
def capped(scores, cap):
    """cap * tanh(scores / cap)."""
    return cap - 2.0 * cap / (tl.exp2(scores * (2.0 * LOG2_E / cap)) + 1.0)


@triton.jit
def centred(codes, PART: tl.constexpr, MIDDLE: tl.constexpr, DOT: tl.constexpr):
    """Of bytes the code that PART of their bits is (255 all, 15 or 240 one half), less MIDDLE, exactly. The bits of
    1024 and the code are put together as a float16 number: a conversion takes 8 times as long.
    """
    words = codes.to(tl.uint16)
    if PART != 255:
        words = words & PART
    numbers = (words | 0x6400).to(tl.float16, bitcast=True)
    numbers = numbers * 0.0625 - (64.0 + MIDDLE) if PART == 240 else numbers - (1024.0 + MIDDLE)
    return numbers.to(DOT)


@triton.jit
def scores_of(products, base, tokens, first_visible, softcap, SOFTCAP: tl.constexpr):
    """Products with codes and the page's `base` as scores [rows, tokens], powers of 2."""
    scores = products + base[:, None]
    if SOFTCAP:
        scores = capped(scores, softcap) * LOG2_E
    return tl.where((tokens >= first_visible)[None, :], scores, float("-inf"))


@triton.jit
def clamped(numbers, DOT: tl.constexpr):
    """As DOT, within what float16 holds."""
    return tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST).to(DOT)


@triton.jit
def weights_of(weights, DOT: tl.constexpr):
    """Weights of at most 2 as DOT, and what they count for: that, or exactly what they are where float16 has few bits
    left. These weigh next to nothing in a product with codes.
    """
    few = weights.to(DOT)
    return few, tl.where(weights < LEAST_NORMAL, weights, few.to(tl.float32))


@triton.jit
def scales_of(scales, zeros, tokens, MIDDLE: tl.constexpr):
    """Of values' tokens: the scale as an exponent of 2 and a number from 1 to 2; one over it; and what the code MIDDLE
    stands for, in scales.
    """
    scale = tl.load(scales + tokens).to(tl.float32)
    bits = scale.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    inverse = 1.0 / scale
    return exponent, mantissa, inverse, tl.load(zeros + tokens).to(tl.float32) * inverse + MIDDLE


@triton.jit
def values_of(codes, scales, zeros, places, inside, DOT: tl.constexpr):
    """What codes [tokens, channels] stand for, where a token has a scale for each group of channels."""
    scale = tl.load(scales + places, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zeros + places, mask=inside, other=0.0).to(tl.float32)
    return clamped(zero + scale * codes.to(tl.float32), DOT)


@triton.jit
def attend_pages(
    query, pages, head, first, count, first_visible, softcap,
    BITS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SHARING: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, PAGE_BYTES: tl.constexpr, VALUE_CODES: tl.constexpr, KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_ZEROS: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Of a scaled float32 `query` [rows, channels] to `count` pages from number `first` on: the weighted sum of values,
    the sum of weights, and the exponent of 2 that they are relative to.
    """
    LINES: tl.constexpr = PAGE * BITS // 8
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    LOW: tl.constexpr = 255 if BITS == 8 else 15  # bits of the code of a token in the first half of the page
    lines = tl.arange(0, LINES)
    channels = tl.arange(0, KEYS)
    value_channels = tl.arange(0, VALUES)
    in_key = channels < KEY_DIM
    in_value = (value_channels < VALUE_DIM)[None, :]
    key_codes = head * (LINES * KEY_DIM) + lines[:, None] * KEY_DIM + channels[None, :]
    value_codes = VALUE_CODES + head * (LINES * VALUE_DIM) + lines[:, None] * VALUE_DIM + value_channels[None, :]
    of_values = (head // SHARING) * (PAGE * VALUE_GROUPS)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weights = tl.zeros([ROWS, LINES], dtype=tl.float32)
    offsets = tl.zeros([ROWS, LINES], dtype=tl.float32)
    total = tl.zeros([ROWS, VALUES], dtype=tl.float32)
    pages += first.to(tl.int64) * PAGE_BYTES
    for page in tl.range(0, count, num_stages=STAGES):
        memory = pages + page * PAGE_BYTES
        key_scales = (memory + KEY_SCALES).to(tl.pointer_type(tl.float16)) + head * KEY_DIM + channels
        key_zeros = (memory + KEY_ZEROS).to(tl.pointer_type(tl.float16)) + head * KEY_DIM + channels
        key_scale = tl.load(key_scales, mask=in_key, other=0.0).to(tl.float32)
        key_zero = tl.load(key_zeros, mask=in_key, other=0.0).to(tl.float32)
        codes = tl.load(memory + key_codes, mask=in_key[None, :], other=0)
        scaled = clamped(query * key_scale[None, :], DOT)
        base = tl.sum(query * (key_zero + MIDDLE * key_scale)[None, :], axis=1)
        tokens = (first + page) * PAGE + lines
        low = tl.dot(scaled, tl.trans(centred(codes, LOW, MIDDLE, DOT)))
        low = scores_of(low, base, tokens, first_visible, softcap, SOFTCAP)
        if BITS == 4:
            high = tl.dot(scaled, tl.trans(centred(codes, 240, MIDDLE, DOT)))
            high = scores_of(high, base, tokens + LINES, first_visible, softcap, SOFTCAP)
        found = tl.load(memory + value_codes, mask=in_value, other=0)
        scales = (memory + VALUE_SCALES).to(tl.pointer_type(tl.float16)) + of_values
        zeros = (memory + VALUE_ZEROS).to(tl.pointer_type(tl.float16)) + of_values
        if VALUE_GROUPS == 1:  # weights times scales are what is relative to the exponent
            exponent, mantissa, inverse, middle = scales_of(scales, zeros, lines, MIDDLE)
            low += exponent[None, :]
            if BITS == 4:
                exponent, high_mantissa, high_inverse, high_middle = scales_of(scales, zeros, lines + LINES, MIDDLE)
                high += exponent[None, :]
        most = tl.maximum(largest, tl.max(low, axis=1))
        if BITS == 4:
            most = tl.maximum(most, tl.max(high, axis=1))
            high = tl.exp2(high - most[:, None])
        low = tl.exp2(low - most[:, None])
        share = tl.exp2(largest - most)[:, None]
        largest = most
        weights = weights * share
        if VALUE_GROUPS == 1:
            few, low = weights_of(low * mantissa[None, :], DOT)
            weights += low * inverse[None, :]
            offsets = offsets * share + low * middle[None, :]
            added = tl.dot(few, centred(found, LOW, MIDDLE, DOT))
            if BITS == 4:
                few, high = weights_of(high * high_mantissa[None, :], DOT)
                weights += high * high_inverse[None, :]
                offsets += high * high_middle[None, :]
                added = tl.dot(few, centred(found, 240, MIDDLE, DOT), added)
        else:
            places = lines[:, None] * VALUE_GROUPS + (value_channels // (VALUE_DIM // VALUE_GROUPS))[None, :]
            few, low = weights_of(low, DOT)
            weights += low
            codes = found if BITS == 8 else found & 15
            added = tl.dot(few, values_of(codes, scales, zeros, places, in_value, DOT))
            if BITS == 4:
                few, high = weights_of(high, DOT)
                weights += high
                places += LINES * VALUE_GROUPS
                added = tl.dot(few, values_of(found >> 4, scales, zeros, places, in_value, DOT), added)
        # Tensor cores cut off what a sum does not hold; over many pages that would add up.
        total = total * share + added
    return total + tl.sum(offsets, axis=1)[:, None], tl.sum(weights, axis=1), largest


@triton.jit
def in_window(new, window, first, newest, head, room, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """64 tokens from number `first` of a head's window on, [64, channels]. The `newest` is at `new`; written, too."""
    channels = tl.arange(0, CHANNELS)
    inside = first + tl.arange(0, PAGE)
    window += (head * room).to(tl.int64) * DIM + channels
    found = tl.load(
        window[None, :] + inside[:, None] * DIM, mask=(inside < newest)[:, None] & (channels < DIM)[None, :], other=0.0
    )
    added = tl.load(new + channels, mask=channels < DIM, other=0.0)
    tl.store(window + newest * DIM, added, mask=(channels < DIM) & (newest < first + PAGE) & (newest >= first))
    return tl.where((inside == newest)[:, None], added[None, :], found)


@triton.jit
def write_result(output, sinks, total, weight, largest, head, rows, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
                 VALUES: tl.constexpr, SINKS: tl.constexpr):  # fmt: skip
    """A token's attention in the heads `head` * GROUP and on: sums of values and weights, whose largest score it is."""
    heads = head * GROUP + rows
    if SINKS:
        sink = tl.load(sinks + heads, mask=rows < GROUP, other=0.0).to(tl.float32) * LOG2_E
        most = tl.maximum(largest, sink)
        share = tl.exp2(largest - most)
        weight = weight * share + tl.exp2(sink - most)
        total = total * share[:, None]
    channels = tl.arange(0, VALUES)
    mask = (rows < GROUP)[:, None] & (channels < VALUE_DIM)[None, :]
    places = output + heads[:, None] * VALUE_DIM + channels[None, :]
    tl.store(places, (total / weight[:, None]).to(output.dtype.element_ty), mask=mask)


@triton.jit
def write_part(partials, sums, part, head, total, weight, largest, HEADS: tl.constexpr, GROUP: tl.constexpr,
               ROWS: tl.constexpr, MERGED_ROWS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Leave what a part has come to, [ROWS] and [ROWS, VALUES], of which GROUP rows count."""
    rows = tl.arange(0, ROWS)
    at = (part * HEADS + head) * MERGED_ROWS + rows
    places = partials + at.to(tl.int64)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
    tl.store(places, total, mask=(rows < GROUP)[:, None])
    tl.store(sums + 2 * at, weight, mask=rows < GROUP)
    tl.store(sums + 2 * at + 1, largest, mask=rows < GROUP)


@triton.jit
def merged_parts(partials, sums, first, step, count, head, HEADS: tl.constexpr, GROUP: tl.constexpr,
                 ROWS: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """What `count` parts, every `step`-th from number `first` on, have left, PARTS at a time, as one: see
    `attend_pages`.
    """
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, VALUES)
    parts = tl.arange(0, PARTS)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    total = tl.zeros([ROWS, VALUES], dtype=tl.float32)
    for start in range(0, count, PARTS):
        inside = (start + parts < count)[:, None] & (rows < GROUP)[None, :]
        at = ((first + step * (start + parts)) * HEADS + head)[:, None] * ROWS + rows[None, :]
        # What other multiprocessors have written is not in this one's cache.
        exponents = tl.load(sums + 2 * at + 1, mask=inside, other=float("-inf"), cache_modifier=".cg")
        found = tl.load(sums + 2 * at, mask=inside, other=0.0, cache_modifier=".cg")
        places = partials + at.to(tl.int64)[:, :, None] * VALUES + channels[None, None, :]
        totals = tl.load(places, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        most = tl.where(rows < GROUP, tl.maximum(largest, tl.max(exponents, axis=0)), 0.0)
        share = tl.exp2(exponents - most[None, :])
        before = tl.exp2(largest - most)
        largest = most
        weight = weight * before + tl.sum(found * share, axis=0)
        total = total * before[:, None] + tl.sum(totals * share[:, :, None], axis=0)
    return total, weight, largest


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attend_packed(
    query, keys, values, output, sinks, addresses, work, partials, arrivals,
    query_head, query_token, key_head, key_token, value_head, value_token,
    num_sequences, num_parts, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    SHARING: tl.constexpr, VALUE_GROUPS: tl.constexpr, PAGE_BYTES: tl.constexpr, VALUE_CODES: tl.constexpr,
    KEY_SCALES: tl.constexpr, KEY_ZEROS: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_ZEROS: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    MERGED_ROWS: tl.constexpr, MERGED_PARTS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
    WINDOW_DOT: tl.constexpr,
):  # fmt: skip
    """Append a token to the window of each of `num_sequences` sequences, and let it attend to what it sees.

    `query`, `keys`, `values` [heads, tokens, dim] and `output` [tokens, heads, dim] are a row of tokens, in which every
    sequence has one. int64 `addresses`: of each sequence where its window's keys are, its values, and where its own
    pages would be if they began with page 0; then of every run of pages the same. int32 `work`: of each sequence the
    token's number in the row, pages that it sees packed, tokens in the window with it, room there, the first token that
    it sees, its first part and how many; then of each part the sequence, the run, and its first page and how many; or
    -1, and a number of 64 tokens of the window. A part has a token that is seen.

    `partials` is scratch: float32, for each part and head MERGED_ROWS x (VALUES + 2). `arrivals` has a zero for each
    sequence or part, and head, and has it at the end.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    numbers = work + num_sequences * SEQUENCE_NUMBERS + part * PART_NUMBERS
    sequence, run, first, count = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    facts = work + sequence * SEQUENCE_NUMBERS
    token, packed, size, room = tl.load(facts).to(tl.int64), tl.load(facts + 1), tl.load(facts + 2), tl.load(facts + 3)
    first_visible, first_part, all_parts = tl.load(facts + 4), tl.load(facts + 5), tl.load(facts + 6)
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, KEYS)
    asked = tl.load(
        query + token * query_token + (head * GROUP + rows)[:, None] * query_head + channels[None, :],
        mask=(rows < GROUP)[:, None] & (channels < KEY_DIM)[None, :], other=0.0,
    )  # fmt: skip
    factor = scale if SOFTCAP else scale * LOG2_E
    if run >= 0:
        pages = pointer_at(addresses, 3 * num_sequences + run, tl.uint8)
        total, weight, largest = attend_pages(
            asked.to(tl.float32) * factor, pages, head, first, count, first_visible, softcap,
            BITS, KEY_DIM, VALUE_DIM, SHARING, VALUE_GROUPS, PAGE_BYTES, VALUE_CODES, KEY_SCALES, KEY_ZEROS,
            VALUE_SCALES, VALUE_ZEROS, SOFTCAP, ROWS, KEYS, VALUES, STAGES, DOT,
        )  # fmt: skip
    else:
        inside = first * PAGE + tl.arange(0, PAGE)
        window = pointer_at(addresses, 3 * sequence, keys.dtype.element_ty)
        new = keys + token * key_token + head * key_head
        window_keys = in_window(new, window, first * PAGE, size - 1, head, room, KEY_DIM, KEYS)
        scores = tl.dot(asked.to(WINDOW_DOT), tl.trans(window_keys.to(WINDOW_DOT))) * factor
        if SOFTCAP:
            scores = capped(scores, softcap) * LOG2_E
        visible = (inside < size) & (packed * PAGE + inside >= first_visible)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        scores = tl.exp2(scores - largest[:, None]).to(WINDOW_DOT)
        weight = tl.sum(scores.to(tl.float32), axis=1)
        window = pointer_at(addresses, 3 * sequence + 1, keys.dtype.element_ty)
        new = values + token * value_token + head * value_head
        window_values = in_window(new, window, first * PAGE, size - 1, head, room, VALUE_DIM, VALUES)
        total = tl.dot(scores, window_values.to(WINDOW_DOT))
    result = output + token * (HEADS * GROUP * VALUE_DIM)
    if all_parts == 1:
        write_result(result, sinks, total, weight, largest, head, rows, GROUP, VALUE_DIM, VALUES, SINKS)
    else:
        sums = partials + num_parts.to(tl.int64) * (HEADS * MERGED_ROWS * VALUES)
        write_part(partials, sums, part, head, total, weight, largest, HEADS, GROUP, ROWS, MERGED_ROWS, VALUES)
        tl.debug_barrier()  # all threads' numbers are written before this program counts as arrived
        first = part - (part - first_part) % MERGED
        count = tl.minimum(MERGED, first_part + all_parts - first)
        arrival = arrivals + (num_sequences + first) * HEADS + head
        if tl.atomic_add(arrival, 1, sem="acq_rel") == count - 1:
            tl.store(arrival, 0)
            merged_rows = tl.arange(0, MERGED_ROWS)
            some_total, some_weight, some_most = merged_parts(
                partials, sums, first, 1, count, head, HEADS, GROUP, MERGED_ROWS, VALUES, MERGED_PARTS
            )
            if all_parts <= MERGED:
                write_result(
                    result, sinks, some_total, some_weight, some_most, head, merged_rows, GROUP, VALUE_DIM, VALUES,
                    SINKS,
                )  # fmt: skip
            else:
                tl.debug_barrier()  # all threads have read what is written over
                write_part(
                    partials, sums, first, head, some_total, some_weight, some_most, HEADS, GROUP, MERGED_ROWS,
                    MERGED_ROWS, VALUES,
                )  # fmt: skip
                tl.debug_barrier()
                arrival = arrivals + sequence * HEADS + head
                groups = tl.cdiv(all_parts, MERGED)
                if tl.atomic_add(arrival, 1, sem="acq_rel") == groups - 1:
                    tl.store(arrival, 0)
                    all_total, all_weight, all_most = merged_parts(
                        partials, sums, first_part, MERGED, groups, head, HEADS, GROUP, MERGED_ROWS, VALUES,
                        MERGED_PARTS,
                    )  # fmt: skip
                    write_result(
                        result, sinks, all_total, all_weight, all_most, head, merged_rows, GROUP, VALUE_DIM, VALUES,
                        SINKS,
                    )  # fmt: skip
