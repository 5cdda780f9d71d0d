"""What a sweep allocates besides weights and KV cache, and how much of it a sweep may therefore do."""

from __future__ import annotations

from typing import Literal

from pipo_ray.model.facts import RAGGED_ATTENTION, ModelFacts
from pipo_ray.model.kernel_profile import SCRATCH_BYTES
from pipo_ray.model.sampling_memory import sampling_bytes
from pipo_ray.session.memory import MIB

_WANTED_BATCH_TOKENS = 512
_LEAST_SEQUENCES, _MOST_SEQUENCES = 8, 256
_LEAST_LOGITS_BYTES = 32 * MIB
_TOKEN_MARGIN = 1.25
_LOOSE_SHARE = 0.2
_LOGITS_COPIES = 3
_SCORED_BYTES = 8 * MIB


Place = Literal["cpu", "gpu", "lean gpu"]
"""The last one: a GPU with 16-bit weights (or float32), its KV cache in the model's dtype and not on a drive."""


def activation_bytes(
    facts: ModelFacts,
    max_batch_tokens: int,
    logits_rows: int,
    itemsize: int,
    context_length: int,
    rows_at_once: int = 1,
    *,
    place: Place = "cpu",
) -> int:
    """An upper estimate of what a sweep of `max_batch_tokens` tokens allocates besides the KV cache, with `logits_rows`
    rows of logits (three copies in float32), of which `rows_at_once` may be sampled from at once, and with the chunk of
    16-bit weights that is multiplied in float32. `place` is where it computes.
    """
    per_token = bytes_per_token(facts, itemsize, place)
    logits = logits_rows * _LOGITS_COPIES * 4 * facts.vocab_size + sampling_bytes(facts.vocab_size, rows_at_once)
    scratch = SCRATCH_BYTES if itemsize < 4 else 0
    masks = _mask_bytes(facts, max_batch_tokens, context_length)
    return int(max_batch_tokens * per_token + logits + 64 * MIB + scratch) + masks


def loose_bytes(facts: ModelFacts, max_batch_tokens: int, itemsize: int, place: Place) -> int:
    """What a GPU's allocator is better given beside `activation_bytes`. Of a budget that is used to the last piece it
    finds no place in one part for a long prompt's largest tensors, and gives back and takes memory in every layer, for
    which the GPU must be idle: on an H200 a sweep of 16k tokens took 0.8 s instead of 0.5.
    """
    return int(_LOOSE_SHARE * max_batch_tokens * bytes_per_token(facts, itemsize, place))


def bytes_per_token(facts: ModelFacts, itemsize: int, place: Place) -> float:
    """What was measured, with a margin for what kernels take within themselves. Where nothing could be, the estimate by
    sizes that holds for most dense models; on the CPU no less than that, because the heap keeps some of what is freed:
    between layers so much, at most, of all tokens of a sweep (`model/heap.py`).
    """
    by_sizes = (8 * facts.hidden_size + 4 * facts.intermediate_size) * itemsize
    if facts.token_bytes is None:
        return by_sizes
    lean, most = facts.token_bytes
    if place == "cpu":
        return max(by_sizes, _TOKEN_MARGIN * most)
    return _TOKEN_MARGIN * (lean if place == "lean gpu" else most)


def _mask_bytes(facts: ModelFacts, new_tokens: int, context_length: int) -> int:
    """What transformers' own attention makes of [new tokens, keys], where ours cannot take its place: a mask as boolean
    and as numbers, and without a fused kernel the scores of every head, their softmax and a copy of it.
    """
    if facts.attention == RAGGED_ATTENTION:
        return 0  # blockwise, within the constant part
    pairs = new_tokens * (context_length if facts.chunked else new_tokens)
    return pairs * (1 + 4) if facts.attention == "sdpa" else pairs * (5 + 12 * facts.num_attention_heads)


def logits_rows(facts: ModelFacts, memory_bytes: int, num_sequences: int | None) -> int:
    """Rows of logits that a sweep may make: what a small share of the memory holds, within sensible bounds, and no more
    than for `num_sequences`, where it is known how many there will be. Where prompts cannot be split, one that is
    scored needs a row for each of its tokens.
    """
    share = max(_LEAST_LOGITS_BYTES, memory_bytes // 64)
    most = _MOST_SEQUENCES
    if num_sequences is not None and facts.chunked:
        most = min(most, num_sequences)
    return max(_LEAST_SEQUENCES, min(most, share // (_LOGITS_COPIES * 4 * facts.vocab_size)))


def scored_tokens(facts: ModelFacts, rows: int) -> int:
    """Tokens per sweep whose logits travel to a client: they pass through the object store, beside the slots."""
    return max(1, min(rows, _SCORED_BYTES // (4 * facts.vocab_size)))


def default_batch_tokens(facts: ModelFacts, rows: int, itemsize: int, context_length: int, memory_bytes: int) -> int:
    """Tokens in a sweep where nothing was asked for: 512; where prompts cannot be split, and so no sequence can be
    longer, as many as a quarter of `memory_bytes` holds, at most the context.
    """
    if facts.chunked:
        return _WANTED_BATCH_TOKENS
    low, high = min(_WANTED_BATCH_TOKENS, context_length), context_length
    while low < high:
        middle = (low + high + 1) // 2
        if activation_bytes(facts, middle, rows, itemsize, context_length) <= memory_bytes // 4:
            low = middle
        else:
            high = middle - 1
    return low
