"""The KV cache of one sequence whose pages are in RAM and on the drive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pipo_ray.errors import DriveError
from pipo_ray.model.kv_page import Page
from pipo_ray.model.kv_spans import AttentionRule

if TYPE_CHECKING:
    from pipo_ray.model.kv_disk import KVDisk


class DiskCache:
    """The KV cache of one sequence of at most `capacity` tokens, `length` of which are there in every layer. `lost` is
    why it cannot be used any more.
    """

    start = 0
    """Tokens in other sequences' caches."""

    def __init__(self, store: KVDisk, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.layers: dict[int, list[Page]] = {}
        self.lost: DriveError | None = None
        self._store = store

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, rule: AttentionRule) -> Tensor:
        """See `SequenceCache.attend`."""
        return self._store.attend(self, layer, query, keys, values, rule)

    def advance(self, num_tokens: int) -> None:
        """The sweep that appended `num_tokens` tokens to every layer is complete."""
        self.length += num_tokens

    def drop(self) -> None:
        """Give the pages back."""
        self._store.drop(self)

    @property
    def nbytes(self) -> int:
        """Bytes of its pages in RAM."""
        pages = (page for layer in self.layers.values() for page in layer)
        return sum(page.frame >= 0 for page in pages) * self._store.placement.page_bytes
