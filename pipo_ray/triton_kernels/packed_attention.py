"""Triton kernel for attention to packed pages of a low-bit KV cache (`quant/kv_rounding.py`) as they lie. Importing
this needs triton.

Several sequences have one new token each. A *part* is some pages of one sequence, or 64 tokens of its window; a program
takes a part for one head of keys and all query heads that share it, and leaves its weighted sum of values, the sum of
weights and the largest score. The program that comes last of a sequence's head makes one of these, in their order
("Flash-Decoding", https://pytorch.org/blog/flash-decoding/): so which was last does not show in the result.

A page's scales and zeros are applied to what there is less of. Of keys to the query: of q * (zero + scale * code) there
is (q * scale) * code for each token, and a number for the page. Of values to the weights. So codes are multiplied as
they are, and as whole numbers about 0 they are exact in 16 bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import triton
import triton.language as tl

SEQUENCE_NUMBERS = tl.constexpr(8)
PART_NUMBERS = tl.constexpr(4)
PAGE = tl.constexpr(64)
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
def centred(codes, MIDDLE: tl.constexpr, DOT: tl.constexpr):
    """Codes less MIDDLE, exactly."""
    return (codes.to(tl.float32) - MIDDLE).to(DOT)


@triton.jit
def scores_of(query, codes, base, tokens, first_visible, softcap, MIDDLE: tl.constexpr, SOFTCAP: tl.constexpr,
              DOT: tl.constexpr):  # fmt: skip
    """Of `query` [rows, channels], with scales in it, and codes [tokens, channels]: as powers of 2."""
    scores = tl.dot(query, tl.trans(centred(codes, MIDDLE, DOT))) + base[:, None]
    if SOFTCAP:
        scores = capped(scores, softcap) * LOG2_E
    return tl.where((tokens >= first_visible)[None, :], scores, float("-inf"))


@triton.jit
def middles_of(scales, zeros, tokens, MIDDLE: tl.constexpr):
    """Scales of values [tokens], and what their code MIDDLE stands for."""
    scale = tl.load(scales + tokens).to(tl.float32)
    return scale, tl.load(zeros + tokens).to(tl.float32) + MIDDLE * scale


@triton.jit
def values_of(codes, scales, zeros, places, inside, DOT: tl.constexpr):
    """What codes [tokens, channels] stand for, where a token has a scale for each group of channels."""
    scale = tl.load(scales + places, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zeros + places, mask=inside, other=0.0).to(tl.float32)
    return (zero + scale * codes.to(tl.float32)).to(DOT)


@triton.jit
def attend_pages(
    query, pages, head, first, count, first_visible, softcap,
    BITS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SHARING: tl.constexpr,
    VALUE_GROUPS: tl.constexpr, PAGE_BYTES: tl.constexpr, VALUE_CODES: tl.constexpr, KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_ZEROS: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Of a scaled float32 `query` [rows, channels] to `count` pages from number `first` on: the weighted sum of values,
    the sum of weights, and the largest score.
    """
    LINES: tl.constexpr = PAGE * BITS // 8
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
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
        scaled = query * key_scale[None, :]
        base = tl.sum(query * key_zero[None, :] + scaled * MIDDLE, axis=1)
        scaled = scaled.to(DOT)
        tokens = (first + page) * PAGE + lines
        if BITS == 8:
            low = scores_of(scaled, codes, base, tokens, first_visible, softcap, MIDDLE, SOFTCAP, DOT)
            most = tl.maximum(largest, tl.max(low, axis=1))
        else:
            low = scores_of(scaled, codes & 15, base, tokens, first_visible, softcap, MIDDLE, SOFTCAP, DOT)
            high = scores_of(scaled, codes >> 4, base, tokens + LINES, first_visible, softcap, MIDDLE, SOFTCAP, DOT)
            most = tl.maximum(largest, tl.max(tl.maximum(low, high), axis=1))
            high = tl.exp2(high - most[:, None])
        low = tl.exp2(low - most[:, None])
        share = tl.exp2(largest - most)[:, None]
        largest = most
        found = tl.load(memory + value_codes, mask=in_value, other=0)
        scales = (memory + VALUE_SCALES).to(tl.pointer_type(tl.float16)) + of_values
        zeros = (memory + VALUE_ZEROS).to(tl.pointer_type(tl.float16)) + of_values
        weights = weights * share + low
        total = total * share
        if VALUE_GROUPS == 1:
            scale, middle = middles_of(scales, zeros, lines, MIDDLE)
            offsets = offsets * share + low * middle[None, :]
            low = low * scale[None, :]
            if BITS == 8:
                total = tl.dot(low.to(DOT), centred(found, MIDDLE, DOT), total)
            else:
                weights += high
                scale, middle = middles_of(scales, zeros, lines + LINES, MIDDLE)
                offsets += high * middle[None, :]
                high = high * scale[None, :]
                total = tl.dot(low.to(DOT), centred(found & 15, MIDDLE, DOT), total)
                total = tl.dot(high.to(DOT), centred(found >> 4, MIDDLE, DOT), total)
        else:
            places = lines[:, None] * VALUE_GROUPS + (value_channels // (VALUE_DIM // VALUE_GROUPS))[None, :]
            if BITS == 8:
                total = tl.dot(low.to(DOT), values_of(found, scales, zeros, places, in_value, DOT), total)
            else:
                weights += high
                total = tl.dot(low.to(DOT), values_of(found & 15, scales, zeros, places, in_value, DOT), total)
                places += LINES * VALUE_GROUPS
                total = tl.dot(high.to(DOT), values_of(found >> 4, scales, zeros, places, in_value, DOT), total)
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
def merged_parts(partials, sums, first, count, head, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                 VALUES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """What `count` parts from number `first` on have left, PARTS at a time, as one: see `attend_pages`."""
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, VALUES)
    parts = tl.arange(0, PARTS)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for start in range(0, count, PARTS):
        inside = (start + parts < count)[:, None] & (rows < GROUP)[None, :]
        at = ((first + start + parts) * HEADS + head)[:, None] * ROWS + rows[None, :]
        most = tl.load(sums + 2 * at + 1, mask=inside, other=float("-inf"), cache_modifier=".cg")
        largest = tl.maximum(largest, tl.max(most, axis=0))
    largest = tl.where(rows < GROUP, largest, 0.0)
    weight = tl.zeros([ROWS], dtype=tl.float32)
    total = tl.zeros([ROWS, VALUES], dtype=tl.float32)
    for start in range(0, count, PARTS):
        inside = (start + parts < count)[:, None] & (rows < GROUP)[None, :]
        at = ((first + start + parts) * HEADS + head)[:, None] * ROWS + rows[None, :]
        most = tl.load(sums + 2 * at + 1, mask=inside, other=float("-inf"), cache_modifier=".cg")
        share = tl.exp2(most - largest[None, :])
        weight += tl.sum(share * tl.load(sums + 2 * at, mask=inside, other=0.0, cache_modifier=".cg"), axis=0)
        places = partials + at.to(tl.int64)[:, :, None] * VALUES + channels[None, None, :]
        found = tl.load(places, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        total += tl.sum(found * share[:, :, None], axis=0)
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
):  # fmt: skip
    """Append a token to the window of each of `num_sequences` sequences, and let it attend to what it sees.

    `query`, `keys`, `values` [heads, tokens, dim] and `output` [tokens, heads, dim] are a row of tokens, in which every
    sequence has one. int64 `addresses`: of each sequence where its window's keys are, its values, and where its own
    pages would be if they began with page 0; then of every run of pages the same. int32 `work`: of each sequence the
    token's number in the row, pages that it sees packed, tokens in the window with it, room there, the first token that
    it sees, its first part and how many; then of each part the sequence, the run, and its first page and how many; or
    -1, and a number of 64 tokens of the window. A part has a token that is seen.

    `partials` is scratch: float32, for each part and head MERGED_ROWS x (VALUES + 2). `arrivals` has a zero for each
    sequence and head, and has it at the end.
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
        scores = tl.dot(asked.to(DOT), tl.trans(window_keys.to(DOT))) * factor
        if SOFTCAP:
            scores = capped(scores, softcap) * LOG2_E
        visible = (inside < size) & (packed * PAGE + inside >= first_visible)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        scores = tl.exp2(scores - largest[:, None])
        weight = tl.sum(scores, axis=1)
        window = pointer_at(addresses, 3 * sequence + 1, keys.dtype.element_ty)
        new = values + token * value_token + head * value_head
        window_values = in_window(new, window, first * PAGE, size - 1, head, room, VALUE_DIM, VALUES)
        total = tl.dot(scores.to(DOT), window_values.to(DOT))
    result = output + token * (HEADS * GROUP * VALUE_DIM)
    if all_parts == 1:
        write_result(result, sinks, total, weight, largest, head, rows, GROUP, VALUE_DIM, VALUES, SINKS)
    else:
        sums = partials + num_parts.to(tl.int64) * (HEADS * MERGED_ROWS * VALUES)
        at = (part * HEADS + head) * MERGED_ROWS + rows
        places = partials + at.to(tl.int64)[:, None] * VALUES + tl.arange(0, VALUES)[None, :]
        tl.store(places, total, mask=(rows < GROUP)[:, None])
        tl.store(sums + 2 * at, weight, mask=rows < GROUP)
        tl.store(sums + 2 * at + 1, largest, mask=rows < GROUP)
        tl.debug_barrier()  # all threads' numbers are written before this program counts as arrived
        arrival = arrivals + sequence * HEADS + head
        if tl.atomic_add(arrival, 1, sem="acq_rel") == all_parts - 1:
            all_total, all_weight, most = merged_parts(
                partials, sums, first_part, all_parts, head, HEADS, GROUP, MERGED_ROWS, VALUES, MERGED_PARTS
            )
            merged_rows = tl.arange(0, MERGED_ROWS)
            write_result(result, sinks, all_total, all_weight, most, head, merged_rows, GROUP, VALUE_DIM, VALUES, SINKS)
            tl.store(arrival, 0)
