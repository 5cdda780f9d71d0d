"""Attention over a ragged row: every sequence attends to itself alone.

Registered with transformers under the name `pipo_ragged`, with a mask entry that makes no mask: what a token may see
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

from pipo_ray.model.kv_cache import RaggedCache

RAGGED_ATTENTION = "pipo_ragged"

# Scores are made for at most this many elements at a time, so that a long prompt's [heads, tokens, keys] never exists
# as a whole.
_MAX_SCORES = 1 << 24

_current: ContextVar[RaggedCache] = ContextVar("ragged_cache")


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

    Returns [1, tokens, heads, value_head_dim].
    """
    cache = _current.get()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
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
    if softcap is None and sinks is None:
        return _attend_fused(query, keys, values, scale, sliding_window)
    heads_at_once = max(1, _MAX_SCORES // (new * length))
    groups = query.shape[0] // keys.shape[0]
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
    new, length = query.shape[1], keys.shape[1]
    windowed = window is not None and length > window
    mask = None
    causal = False
    if new > 1:
        if length == new and not windowed:
            causal = True
        else:
            mask = _visible(new, length, window, query.device)
    return F.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=causal, scale=scale,
        enable_gqa=query.shape[0] != keys.shape[0],
    )[0]  # fmt: skip


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
    grouped = query.reshape(kv_heads, heads // kv_heads * new, dim)
    scores = (grouped @ keys.transpose(1, 2)).view(heads, new, length) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if new > 1:
        scores = scores.masked_fill(~_visible(new, length, window, query.device), torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(heads, 1, 1).expand(heads, new, 1)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1)[..., :length].to(query.dtype)
    return (weights.reshape(kv_heads, heads // kv_heads * new, length) @ values).view(heads, new, -1)


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
