"""Attention over a ragged row: every sequence attends to itself alone; or over the row of a single sequence.

Registered with transformers under the name RAGGED_ATTENTION, with a mask entry that makes no mask: what a token may see
follows from the segments. Grouped heads, sliding windows, soft-capped scores (Gemma 2) and attention sinks (gpt-oss)
are arguments that transformers' attention modules pass in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from pipo_ray.model.cpu_linear import HALF_DTYPES
from pipo_ray.model.facts import RAGGED_ATTENTION
from pipo_ray.model.fused_rows import attend_row, can_attend
from pipo_ray.model.kv_cache import RaggedCache

# Scores and masks are made for at most this many elements at a time, so that a long prompt's [heads, tokens, keys]
# never exists as a whole; several copies of it in float32 stay within what a sweep's activations are planned with.
_MAX_SCORES = 1 << 22

_current: ContextVar[RaggedCache | None] = ContextVar("ragged_cache", default=None)


@contextmanager
def ragged_row(cache: RaggedCache) -> Iterator[None]:
    """Within this context the attention function splits rows by `cache.segments`."""
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer. `query` [1, heads, tokens, head_dim], `key` and `value` [1, kv_heads, tokens, head_dim].

    Outside `ragged_row` the row is one sequence's, which keeps its cache itself: `key` and `value` are all of it, and
    `query` its last tokens. Returns [1, tokens, heads, value_head_dim].
    """
    cache = _current.get()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if cache is None:
        return attend(query[0], key[0], value[0], scale, sliding_window, softcap, s_aux).transpose(0, 1)[None], None
    if (row := cache.fused_row) is not None and can_attend(query, value, softcap, s_aux):
        keys, values = cache.append_row(key, value)
        return attend_row(query[0].transpose(0, 1), keys, values, row, scale, sliding_window)[None], None
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    cache.begin_layer()
    for segment in cache.segments:
        columns = slice(segment.start, segment.stop)
        keys, values = segment.cache.append(cache.layer, key[0, :, columns], value[0, :, columns])
        attended = attend(query[0, :, columns], keys, values, scale, sliding_window, softcap, s_aux)
        output[0, columns] = attended.transpose(0, 1)
    cache.end_layer()
    return output, None


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of one sequence: `query` [heads, n, head_dim] are its last n tokens, `keys` and `values`
    [kv_heads, length, head_dim] all of them.

    `sliding_window` w lets a token see itself and the w - 1 before it; `softcap` c replaces a score s by c*tanh(s/c);
    `sinks` [heads] are scores of a key without a value. Returns [heads, n, value_head_dim] in the query's dtype.
    """
    new, length = query.shape[1], keys.shape[1]
    if sliding_window is not None and length - new - sliding_window + 1 > 0:
        first = length - new - sliding_window + 1
        keys, values, length = keys[:, first:], values[:, first:], length - first
    fused = softcap is None and sinks is None
    at_once = max(1, _MAX_SCORES // length)
    if new > at_once and not (fused and new == length and sliding_window is None):  # that one needs no mask
        parts = []
        for start in range(0, new, at_once):
            stop = min(start + at_once, new)
            seen = length - new + stop
            parts.append(
                attend(query[:, start:stop], keys[:, :seen], values[:, :seen], scale, sliding_window, softcap, sinks)
            )
        return torch.cat(parts, dim=1)
    if fused:
        return _attend_fused(query, keys, values, scale, sliding_window)
    groups = query.shape[0] // keys.shape[0]
    largest = new
    if _half_on_cpu(query):  # keys and values are widened, and are to be no larger than the scores
        largest = max(new, keys.shape[-1] // groups, values.shape[-1] // groups)
    heads_at_once = max(1, _MAX_SCORES // (largest * length))
    parts = []
    for start in range(0, keys.shape[0], max(1, heads_at_once // groups)):
        kv = slice(start, start + max(1, heads_at_once // groups))
        q = slice(kv.start * groups, kv.stop * groups)
        sink = None if sinks is None else sinks.reshape(-1)[q]
        parts.append(_attend_plain(query[q], keys[kv], values[kv], scale, sliding_window, softcap, sink))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    if query.shape[1] == 1 and _half_on_cpu(query):
        return _attend_one(query, keys, values, scale)
    new, length = query.shape[1], keys.shape[1]
    windowed = window is not None and length > window
    mask = None
    causal = new > 1 and length == new and not windowed
    if new > 1 and not causal:
        mask = _visible(new, length, window, query.device)
    return F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=causal, scale=scale,
        enable_gqa=query.shape[0] != keys.shape[0],
    )[0]  # fmt: skip


def _attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """A single token in 16 bits on the CPU, where torch is ten times slower for one query per head than for several.

    Heads that share keys become queries of one head; a head of its own asks twice.
    """
    heads, kv_heads = query.shape[0], keys.shape[0]
    grouped = query.reshape(1, kv_heads, heads // kv_heads, -1)
    if heads == kv_heads:
        grouped = grouped.expand(-1, -1, 2, -1)
    attended = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
    return attended[0, :, : heads // kv_heads].reshape(heads, 1, -1)


def _half_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in HALF_DTYPES


def _attend_plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    heads, new, dim = query.shape
    kv_heads, length = keys.shape[0], keys.shape[1]
    dtype = query.dtype
    if _half_on_cpu(query):  # batched products in 16 bits are five times slower than widening all of it
        query, keys, values = query.float(), keys.float(), values.float()
    grouped = query.reshape(kv_heads, heads // kv_heads * new, dim)
    scores = (grouped @ keys.transpose(1, 2)).view(heads, new, length) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if new > 1:
        scores = scores.masked_fill(~_visible(new, length, window, query.device), torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(heads, 1, 1).expand(heads, new, 1)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1)[..., :length].to(query.dtype)
    return (weights.reshape(kv_heads, heads // kv_heads * new, length) @ values).view(heads, new, -1).to(dtype)


def _visible(new: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Boolean [new, length]: which keys each of the last `new` tokens may see."""
    queries = torch.arange(length - new, length, device=device)[:, None]
    positions = torch.arange(length, device=device)[None, :]
    visible = positions <= queries
    if window is not None:
        visible &= positions > queries - window
    return visible


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(RAGGED_ATTENTION, ragged_attention)
AttentionMaskInterface.register(RAGGED_ATTENTION, _no_mask)
