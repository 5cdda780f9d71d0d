"""Attention of a whole ragged row in one call: torch's FlashAttention kernel for sequences of different lengths.

The operator is the one behind `torch.nn.attention.varlen`, which does not pass `seqused_k` on in every release.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipo_ray.model.cpu_linear import HALF_DTYPES

_MOST_HEAD_DIM = 256


@dataclass(frozen=True)
class RowLayout:
    """Where a row's sequences lie. All tensors are on the device: `places` int64 [tokens of the row], where in the pool
    their keys and values go; int32: `query_bounds` [sequences + 1], where each begins in the row; `key_firsts`
    [sequences + 1], where each begins in the pool; `key_lengths` [sequences].
    """

    places: torch.Tensor
    query_bounds: torch.Tensor
    key_firsts: torch.Tensor
    key_lengths: torch.Tensor
    most_queries: int
    most_keys: int
    num_sequences: int


def can_attend(query: torch.Tensor, values: torch.Tensor, softcap: float | None, sinks: torch.Tensor | None) -> bool:
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


def attend_row(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, row: RowLayout, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention of every sequence of the row to itself: `query` [tokens, heads, head_dim], `keys` and `values`
    [pool tokens, kv_heads, head_dim]. `window` w lets a token see itself and the w - 1 before it.

    Returns [tokens, heads, head_dim]. With fewer queries than keys the last ones are aligned.
    """
    if window is not None and window >= row.most_keys:
        window = None
    result: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_forward(
        query, keys, values, row.query_bounds, row.key_firsts, row.most_queries, row.most_keys,
        0.0, True, False, scale=scale,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
        seqused_k=row.key_lengths,
    )  # fmt: skip
    return result[0]
