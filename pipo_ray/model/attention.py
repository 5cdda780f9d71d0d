"""Attention over a ragged row: every sequence attends to itself alone; or over the row of a single sequence.

Registered with transformers under the name RAGGED_ATTENTION, with a mask entry that makes no mask: what a token may see
follows from the segments, and how a sequence attends is its cache's affair. Grouped heads, sliding windows, soft-capped
scores (Gemma 2) and attention sinks (gpt-oss) are arguments that transformers' attention modules pass in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from pipo_ray.model.dense_attention import attend
from pipo_ray.model.facts import RAGGED_ATTENTION
from pipo_ray.model.fused_rows import attend_row, can_attend
from pipo_ray.model.kv_cache import RaggedCache
from pipo_ray.model.kv_spans import AttentionRule

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of the row of the running sweep: (query, key, value) as in `ragged_attention` -> [1, tokens, heads, head_dim]."""
Around = Callable[..., torch.Tensor]
"""(attention, the row's cache, query, key, value) -> what is to be taken for the attention's output."""

_current: ContextVar[RaggedCache | None] = ContextVar("ragged_cache", default=None)
_around: ContextVar[Around | None] = ContextVar("around_attention", default=None)


@contextmanager
def ragged_row(cache: RaggedCache) -> Iterator[None]:
    """Within this context the attention function splits rows by `cache.segments`."""
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def around_attention(around: Around) -> Iterator[None]:
    """Within this context a ragged row's attention is left to `around`, which is given it."""
    token = _around.set(around)
    try:
        yield
    finally:
        _around.reset(token)


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
    rule = AttentionRule(scale, sliding_window, softcap, s_aux)
    if cache is None:
        return attend(query[0], key[0], value[0], rule).transpose(0, 1)[None], None
    around = _around.get()
    if around is None:
        return _attend(rule, query, key, value), None
    return around(partial(_attend, rule), cache, query, key, value), None


def _attend(rule: AttentionRule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of the row that runs."""
    cache = _current.get()
    assert cache is not None
    cache.rule = rule
    if cache.host is not None:
        return cache.host.attend_row(cache.segments, cache.layer, query[0], key[0], value[0], rule)[None]
    row, window = cache.fused_row, rule.sliding_window
    if row is not None and can_attend(query, value, rule.softcap, rule.sinks) and row.sees_whole_ranges(window):
        keys, values = cache.append_row(key, value)
        return attend_row(query[0].transpose(0, 1), keys, values, row, rule.scale, window)[None]
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    cache.begin_layer()
    rows = cache.packed_rows
    segments, alone = (
        (cache.segments, ()) if rows is None else rows.part(cache.segments, cache.layer, query[0], key[0], value[0])
    )
    for segment in segments:
        columns = slice(segment.start, segment.stop)
        attended = segment.cache.attend(
            cache.layer, query[0, :, columns], key[0, :, columns], value[0, :, columns], rule
        )
        output[0, columns] = attended.transpose(0, 1)
    if rows is not None and alone:  # behind those on whose tokens they may stand
        rows.attend(alone, cache.layer, query[0], key[0], value[0], rule, output[0])
    cache.end_layer()
    return output


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(RAGGED_ATTENTION, ragged_attention)
AttentionMaskInterface.register(RAGGED_ATTENTION, _no_mask)
