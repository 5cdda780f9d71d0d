"""Attention of a whole ragged row in one call: torch's FlashAttention kernel for sequences of different lengths; and in
a second one to the prefixes that its sequences share with others (`cascade.py`).

The operator is the one behind `torch.nn.attention.varlen`, which does not pass `seqused_k` on in every release.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipo_ray.model.cascade import Cascade, Kernel, KeyRanges, RowPrefixes, attend_prefixes
from pipo_ray.model.cpu_linear import HALF_DTYPES

_MOST_HEAD_DIM = 256


@dataclass(frozen=True)
class RowLayout:
    """Where a row's sequences lie: `own` are the keys of each sequence's own cache, in the order of the row. `places`,
    int64 [tokens of the row] on the device, is where in the pool the row's keys and values go. `prefixes` is None
    where nobody stands on another's cache.
    """

    places: Tensor
    own: KeyRanges
    prefixes: RowPrefixes | None = None

    @property
    def is_single_token(self) -> bool:
        """Whether it is one token of one sequence."""
        return self.own.num_sequences == self.own.most_queries == 1

    def sees_whole_ranges(self, window: int | None) -> bool:
        """Whether all tokens of a sequence see the same of its prefix, which is what the kernel can be asked for."""
        return self.prefixes is None or self.prefixes.seen(window) is not None

    def cascade(self, window: int | None, query: Tensor) -> Cascade | None:
        """How the row's `query` [tokens, heads, head_dim] attends to prefixes, if any of them is within `window`."""
        return None if self.prefixes is None else self.prefixes.cascade(window, query.shape[1] * query.shape[2])


def can_attend(query: Tensor, values: Tensor, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether the kernel does this attention: 16 bits on CUDA (from Ampere on), heads of one size, plain scores."""
    dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in HALF_DTYPES
        and softcap is None
        and sinks is None
        and dim == values.shape[-1] <= _MOST_HEAD_DIM
        and dim % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, ranges: KeyRanges, scale: float, *, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """See `cascade.Kernel`."""
    result: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        query, keys, values, ranges.query_bounds, ranges.key_firsts, ranges.most_queries, ranges.most_keys,
        0.0, causal, False, scale=scale,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
        seqused_k=ranges.key_lengths,
    )  # fmt: skip
    return result[0], result[1]


def attend_row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    row: RowLayout,
    scale: float,
    window: int | None,
    kernel: Kernel = flash_attention,
) -> Tensor:
    """Causal attention of every sequence of the row to itself and its prefix: `query` [tokens, heads, head_dim], `keys`
    and `values` [pool tokens, kv_heads, head_dim]. `window` w lets a token see itself and the w - 1 before it, and
    `row.sees_whole_ranges(window)` must hold.

    Returns [tokens, heads, head_dim]. With fewer queries than keys the last ones are aligned.
    """
    reaches_all = window is None or window >= row.own.most_keys
    mean, log_sum = kernel(query, keys, values, row.own, scale, causal=True, window=None if reaches_all else window)
    if (cascade := row.cascade(window, query)) is not None:
        attend_prefixes(query, keys, values, cascade, scale, kernel, mean, log_sum)
    return mean
