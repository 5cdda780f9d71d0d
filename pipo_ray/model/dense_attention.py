"""Attention of one sequence to keys and values that lie in one piece."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipo_ray.model.kv_spans import MAX_SCORES, AttentionRule, half_on_cpu


def attend(query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
    """Causal attention of one sequence: `query` [heads, n, head_dim] are its last n tokens, `keys` and `values`
    [kv_heads, length, head_dim] all of them.

    Returns [heads, n, value_head_dim] in the query's dtype.
    """
    new, length, window = query.shape[1], keys.shape[1], rule.sliding_window
    if window is not None and length - new - window + 1 > 0:
        first = length - new - window + 1
        keys, values, length = keys[:, first:], values[:, first:], length - first
    fused = rule.is_plain
    at_once = max(1, MAX_SCORES // length)
    if new > at_once and not (fused and new == length and window is None):  # that one needs no mask
        parts = []
        for start in range(0, new, at_once):
            stop = min(start + at_once, new)
            seen = length - new + stop
            parts.append(attend(query[:, start:stop], keys[:, :seen], values[:, :seen], rule))
        return torch.cat(parts, dim=1)
    if fused:
        return _attend_fused(query, keys, values, rule.scale, window)
    groups = query.shape[0] // keys.shape[0]
    largest = new
    if half_on_cpu(query):  # keys and values are widened, and are to be no larger than the scores
        largest = max(new, keys.shape[-1] // groups, values.shape[-1] // groups)
    heads_at_once = max(1, MAX_SCORES // (largest * length))
    parts = []
    for start in range(0, keys.shape[0], max(1, heads_at_once // groups)):
        kv = slice(start, start + max(1, heads_at_once // groups))
        q = slice(kv.start * groups, kv.stop * groups)
        sinks = None if rule.sinks is None else rule.sinks.reshape(-1)[q]
        parts.append(_attend_plain(query[q], keys[kv], values[kv], replace(rule, sinks=sinks)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_fused(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    if query.shape[1] == 1 and (half_on_cpu(query) or (query.device.type == "cpu" and len(query) > len(keys))):
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


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """A single token on the CPU. Heads that share keys become queries of one head, and those keys are read once: of
    32,768 tokens of Llama-3-8B's heads 40 ms instead of 140 in float32.

    In 16 bits torch is ten times slower for one query per head than for several: a head of its own asks twice.
    """
    heads, kv_heads = query.shape[0], keys.shape[0]
    grouped = query.reshape(1, kv_heads, heads // kv_heads, -1)
    if heads == kv_heads and half_on_cpu(query):
        grouped = grouped.expand(-1, -1, 2, -1)
    attended = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
    return attended[0, :, : heads // kv_heads].reshape(heads, 1, -1)


def _attend_plain(query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
    heads, new, dim = query.shape
    kv_heads, length = keys.shape[0], keys.shape[1]
    dtype = query.dtype
    if half_on_cpu(query):  # batched products in 16 bits are five times slower than widening all of it
        query, keys, values = query.float(), keys.float(), values.float()
    grouped = query.reshape(kv_heads, heads // kv_heads * new, dim)
    scores = (grouped @ keys.transpose(1, 2)).view(heads, new, length) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if new > 1:
        scores = scores.masked_fill(
            ~_visible(new, length, rule.sliding_window, query.device), torch.finfo(scores.dtype).min
        )
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.to(scores.dtype).view(heads, 1, 1).expand(heads, new, 1)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1)[..., :length].to(query.dtype)
    return (weights.reshape(kv_heads, heads // kv_heads * new, length) @ values).view(heads, new, -1).to(dtype)


def _visible(new: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [new, length]: which keys each of the last `new` tokens may see."""
    queries = torch.arange(length - new, length, device=device)[:, None]
    positions = torch.arange(length, device=device)[None, :]
    visible = positions <= queries
    if window is not None:
        visible &= positions > queries - window
    return visible
