"""Attention over a sequence's keys and values that lie in several places, or have to be unpacked first.

A *span* is a consecutive part of one sequence's KV in one layer and hands itself out in chunks. Attention to each chunk
is computed apart, with the logarithm of the sum of its exponentials; two such parts make one by their weights
("Self-attention does not need O(n^2) memory", arXiv 2112.05682). So scratch is bounded by a chunk, whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipo_ray.model.cpu_linear import HALF_DTYPES
from pipo_ray.model.fused_rows import can_attend

CHUNK_TOKENS = 4096
"""The most tokens in a chunk. In float32, keys and values of 8 heads of 128: 32 MiB."""

MAX_SCORES = 1 << 22
"""Scores and masks are made for at most this many elements at a time, so that a long prompt's [heads, tokens, keys]
never exists as a whole; several copies of it in float32 stay within what a sweep's activations are planned with.
"""


@dataclass(frozen=True)
class AttentionRule:
    """How a layer attends, as transformers' attention modules say it.

    Scores are multiplied by `scale`; `sliding_window` w lets a token see itself and the w - 1 before it; `softcap` c
    replaces a score s by c*tanh(s/c); `sinks` [heads] are scores of a key without a value.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a score is the scaled product and nothing else."""
        return self.softcap is None and self.sinks is None

    def first_visible(self, length: int) -> int:
        """The first of `length` tokens that the last one sees."""
        return 0 if self.sliding_window is None else max(0, length - self.sliding_window)


class Span(Protocol):
    """A consecutive part of one sequence's keys and values in one layer."""

    @property
    def num_tokens(self) -> int:
        """Tokens in it."""
        ...

    def chunks(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of its tokens from number `first` on, in order, in parts [kv_heads, n, head_dim] of at most
        CHUNK_TOKENS tokens in the query's dtype or in float32. A part is valid until the next one is asked for.
        """
        ...


@dataclass(frozen=True)
class DenseSpan:
    """A span over tensors that there are: `keys`, `values` [kv_heads, num_tokens, head_dim], any views."""

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        """See `Span`."""
        return self.keys.shape[1]

    def chunks(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Span`. Views."""
        for start in range(first, self.num_tokens, CHUNK_TOKENS):
            stop = min(start + CHUNK_TOKENS, self.num_tokens)
            yield self.keys[:, start:stop], self.values[:, start:stop]


def attend_spans(query: Tensor, spans: Sequence[Span], rule: AttentionRule) -> Tensor:
    """Causal attention of one sequence: `query` [heads, n, head_dim] are the last n tokens of all `spans` together.

    What no token may see is not asked of its span. Returns [heads, n, value_head_dim] in the query's dtype.
    """
    length = sum(span.num_tokens for span in spans)
    attention = OnlineAttention(query, length, rule)
    at, first_seen = 0, attention.first_seen()
    for span in spans:
        stop = at + span.num_tokens
        if stop > first_seen:
            first = max(at, first_seen)
            for keys, values in span.chunks(first - at):
                attention.add(first, keys, values)
                first += keys.shape[1]
        at = stop
    return attention.result()


def half_on_cpu(tensor: Tensor) -> bool:
    """Whether it is in 16 bits in the CPU's memory, where some of torch's ways are far slower than others."""
    return tensor.device.type == "cpu" and tensor.dtype in HALF_DTYPES


_Visible = Literal["all", "causal", "some"]


class OnlineAttention:
    """Attention of `query` [heads, n, head_dim], the last n tokens of `length`, to the chunks that were added so far:
    the weighted mean of their values, and the logarithm of the weights' sum, to which sinks belong from the start.
    """

    def __init__(self, query: Tensor, length: int, rule: AttentionRule) -> None:
        heads, new, _ = query.shape
        self._query, self._rule = query, rule
        self._first_query = length - new
        self._window = length if rule.sliding_window is None else rule.sliding_window
        self._mean: Tensor | None = None
        if rule.sinks is None:
            self._log_sum = query.new_full((heads, new), -torch.inf, dtype=torch.float32)
        else:
            self._log_sum = rule.sinks.reshape(heads, 1).float().repeat(1, new)

    def first_seen(self, row: int = 0) -> int:
        """The first token of the sequence that this row of the query, and those behind it, may see."""
        return max(0, self._first_query + row - self._window + 1)

    def result(self) -> Tensor:
        """[heads, n, value_head_dim] in the query's dtype; every token has seen itself."""
        assert self._mean is not None
        return self._mean.to(self._query.dtype)

    def add(self, first: int, keys: Tensor, values: Tensor, rows: tuple[int, int] | None = None) -> None:
        """A chunk [kv_heads, tokens, head_dim] of tokens `first`, `first + 1`, ... of the sequence; with `rows` for the
        query's rows from the first to before the second of them.
        """
        if self._mean is None:
            self._mean = values.new_zeros(*self._query.shape[:2], values.shape[2], dtype=torch.float32)
        fused = _can_fuse(self._query, keys, values, self._rule)
        if not fused and half_on_cpu(keys):  # batched products in 16 bits are five times slower than widening all of it
            keys, values = keys.float(), values.float()
        for start, stop, visible in self._parts(first, keys.shape[1], *(rows or (0, self._query.shape[1]))):
            at_once = stop - start
            # The kernel for CUDA takes no mask.
            in_kernel = fused and (visible != "some" or not keys.is_cuda)
            if not in_kernel or visible == "some":
                at_once = max(1, MAX_SCORES // (keys.shape[1] * (1 if in_kernel else self._query.shape[0])))
            for row in range(start, stop, at_once):
                part = slice(row, min(row + at_once, stop))
                no_mask = visible == "all" or (in_kernel and visible == "causal")
                mask = None if no_mask else self._mask(part, first, keys)
                query = self._query[:, part].to(keys.dtype)
                if in_kernel:
                    mean, log_sum = _attend_fused(query, keys, values, self._rule.scale, visible, mask)
                else:
                    mean, log_sum = _attend_plain(query, keys, values, self._rule, mask)
                self._merge(part, mean, log_sum)

    def _parts(self, first: int, count: int, start: int, stop: int) -> Iterator[tuple[int, int, _Visible]]:
        """Ranges of the query's rows from `start` to before `stop` that see any of `count` tokens from `first` on, and
        which of them: each row all, a row per token and those behind them what is not after it, or something else. A
        single row that sees all beside others that do not is no part of its own.
        """
        window = self._window
        start = max(start, first - self._first_query)
        stop = min(stop, first + count + window - 1 - self._first_query)
        last = first + count - 1
        all_start = min(max(start, last - self._first_query), stop)
        all_stop = min(max(start, first + window - self._first_query), stop)
        if start == first - self._first_query and all_stop == stop and stop - start > 1:
            yield start, stop, "causal"
        elif all_stop - all_start > 1 or (all_start, all_stop) == (start, stop):
            for begin, end, visible in ((start, all_start, "some"), (all_start, all_stop, "all"),
                                        (all_stop, stop, "some")):  # fmt: skip
                if begin < end:
                    yield begin, end, visible  # type: ignore[misc]
        elif start < stop:
            yield start, stop, "some"

    def _mask(self, rows: slice, first: int, keys: Tensor) -> Tensor:
        """Boolean [rows, tokens of the chunk]: what each row may not see."""
        rows_at = torch.arange(rows.start, rows.stop, device=keys.device)[:, None] + self._first_query
        keys_at = torch.arange(first, first + keys.shape[1], device=keys.device)[None]
        return (keys_at > rows_at) | (keys_at <= rows_at - self._window)

    def _merge(self, rows: slice, mean: Tensor, log_sum: Tensor) -> None:
        assert self._mean is not None
        before = self._log_sum[:, rows]
        together = torch.logaddexp(before, log_sum)
        self._mean[:, rows] *= (before - together).exp_()[..., None]
        self._mean[:, rows] += mean * (log_sum - together).exp_()[..., None]
        self._log_sum[:, rows] = together


def _can_fuse(query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> bool:
    """Whether torch's fused kernel for the device does it: scores as they are, heads of one size; on CUDA in 16 bits.
    Sinks are no matter of a chunk's.
    """
    if any(tensor.stride(-1) != 1 for tensor in (query, keys, values)):
        return False
    if query.device.type != "cpu":
        return keys.dtype == query.dtype and can_attend(query, values, rule.softcap, None)
    return rule.softcap is None and query.shape[-1] == values.shape[-1]


def _attend_fused(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: _Visible, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean [heads, rows, dim] and float32 logarithm of the sum [heads, rows]."""
    heads, rows, dim = query.shape
    kv_heads = keys.shape[0]
    alone = False
    if visible == "all":  # heads that share keys become queries of one head, and those keys are read once
        query = query.reshape(kv_heads, heads // kv_heads * rows, dim)
        # In 16 bits torch is ten times slower for one query per head than for several.
        alone = query.shape[1] == 1 and half_on_cpu(query)
        if alone:
            query = query.expand(-1, 2, -1)
    if query.is_cuda:
        mean, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query[None], keys[None], values[None], 0.0, visible == "causal", False, scale=scale
        )
        return mean[0].reshape(heads, rows, dim), log_sum[0].reshape(heads, rows)
    bias = None if mask is None else torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(mask, -torch.inf)
    mean, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[None], keys[None], values[None], 0.0, visible == "causal", attn_mask=bias, scale=scale
    )
    mean, log_sum = mean[0], log_sum[0]
    if alone:
        mean, log_sum = mean[:, :1], log_sum[:, :1]
    return mean.reshape(heads, rows, dim), log_sum.reshape(heads, rows)


def _attend_plain(
    query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `_attend_fused`, by products and a softmax."""
    heads, rows, dim = query.shape
    kv_heads, count, _ = keys.shape
    grouped = query.reshape(kv_heads, heads // kv_heads * rows, dim)
    scores = (grouped @ keys.transpose(1, 2)).view(heads, rows, count).float() * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores.masked_fill_(mask, -torch.inf)
    log_sum = torch.logsumexp(scores, dim=-1)
    weights = scores.sub_(log_sum[..., None]).exp_().to(values.dtype)
    mean = weights.view(kv_heads, -1, count) @ values
    return mean.view(heads, rows, -1), log_sum
