"""Where keys and values lie within a KV page: the keys of all heads, then the values."""

from __future__ import annotations

import torch
from torch import Tensor

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.plan.disk_pages import PAGE_TOKENS


class PageLayout:
    """The layout of pages of `page_bytes` in `dtype`, per layer, as its first keys and values show it."""

    def __init__(self, page_bytes: int, dtype: torch.dtype) -> None:
        self._dtype, self._elements = dtype, page_bytes // dtype.itemsize
        self._shapes: dict[int, tuple[int, int, int]] = {}  # kv_heads, head_dim, value_head_dim

    def learn(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The layer caches `keys` [kv_heads, n, head_dim] and `values` [kv_heads, n, value_head_dim].

        Raises UnsupportedModelError for more bytes than a token of this model has by its facts.
        """
        shape = self._shapes[layer] = (keys.shape[0], keys.shape[2], values.shape[2])
        elements = PAGE_TOKENS * shape[0] * (shape[1] + shape[2])
        if elements > self._elements:
            raise UnsupportedModelError(
                f"layer {layer} caches {elements // PAGE_TOKENS} elements per token, its model's facts say "
                f"{self._elements // PAGE_TOKENS}"
            )

    def views(self, page: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [kv_heads, PAGE_TOKENS, head_dim] and values of a page, uint8 [page_bytes]."""
        return self.merged(page[None], layer)

    def merged(self, pages: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [kv_heads, tokens, head_dim] and values of pages, uint8 [number, page_bytes], those of one behind those
        of the other: copies, unless it is one.
        """
        heads, dim, value_dim = self._shapes[layer]
        middle = heads * PAGE_TOKENS * dim
        stop = middle + heads * PAGE_TOKENS * value_dim
        elements = pages.view(self._dtype)
        keys = elements[:, :middle].view(-1, heads, PAGE_TOKENS, dim).transpose(0, 1)
        values = elements[:, middle:stop].view(-1, heads, PAGE_TOKENS, value_dim).transpose(0, 1)
        return keys.reshape(heads, -1, dim), values.reshape(heads, -1, value_dim)
