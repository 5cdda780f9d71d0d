"""Attention of a ragged row to prefixes that its sequences share with others, in a GPU's KV pool.

A sequence's own keys and the parts of its prefix are ranges of the pool that lie apart, and a token sees all of a part.
So the row's causal attention is to own keys alone; to the parts it is a second call, without a mask, for which all
queries that see the same part are one sequence: its keys are read once for all of them. Two results make one by the
logarithms of their sums, in float32 (as in `kv_spans.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipo_ray.model.host_values import to_device

SLAB_ELEMENTS = 1 << 21
"""Rows of the query that are merged at a time have no more elements than this: with their result in 16 bits and both
in float32, 24 MiB, which is within the constant part of what a sweep is planned with.
"""


@dataclass(frozen=True)
class KeyRanges:
    """Which keys each sequence of a call sees, as the kernel takes it; tensors int32 on the device.

    Sequence i has the queries from `query_bounds[i]` to before `query_bounds[i + 1]`, at most `most_queries`, and the
    `key_lengths[i]` keys from `key_firsts[i]` of the pool on, at most `most_keys`. Bounds and firsts have one number
    more than there are sequences.
    """

    query_bounds: Tensor
    key_firsts: Tensor
    key_lengths: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, counts: Sequence[int], keys: Sequence[tuple[int, int]], pool: int, device: torch.device) -> KeyRanges:
        """Sequences with so many queries each, and so many `keys` (first, length) each of `pool` tokens."""
        lengths = [length for _, length in keys]
        bounds = [0, *itertools.accumulate(counts)]
        numbers = torch.tensor([*bounds, *(first for first, _ in keys), pool, *lengths], dtype=torch.int32)
        on_device = to_device(numbers, device)
        cut = len(counts) + 1
        return cls(on_device[:cut], on_device[cut : 2 * cut], on_device[2 * cut :], max(counts), max(lengths))

    @property
    def num_sequences(self) -> int:
        """Sequences of the call."""
        return self.key_lengths.shape[0]


class Kernel(Protocol):
    """Attention of several sequences in one call."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        ranges: KeyRanges,
        scale: float,
        *,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Of `query` [tokens, heads, head_dim] to `keys`, `values` [pool tokens, kv_heads, head_dim]; with `causal`
        the queries are the last of their keys' tokens, and with `window` each sees so many of them.

        Returns the mean [tokens, heads, head_dim] in the query's dtype and the logarithm of the sum [heads, tokens] in
        float32.
        """
        ...


@dataclass(frozen=True)
class Pass:
    """The first `num_rows` of a slab's rows attend to one part each."""

    num_rows: int
    ranges: KeyRanges


@dataclass(frozen=True)
class Slab:
    """Rows of the query that are merged together, as a slice where they are neighbours, else int64 on the device; those
    that see most parts come first.
    """

    rows: slice | Tensor
    passes: tuple[Pass, ...]


Cascade = tuple[Slab, ...]
_Parts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sharer:
    """A sequence that stands on others' tokens: its `num_rows` queries begin at `first_row` of the row, at position
    `start` of the sequence. `parts` (first token in the pool, how many) are the prefix, in order.
    """

    first_row: int
    num_rows: int
    start: int
    parts: _Parts

    def seen(self, window: int | None) -> _Parts | None:
        """What of its parts its queries see; None if they do not all see the same."""
        if window is None:
            return self.parts
        result = []
        at = 0
        for first, count in self.parts:
            # What the first query sees begins before what the last one does.
            before_first, before_last = (max(0, query - window + 1 - at) for query in (self.start, self._last))
            if before_first < count:
                if before_first != before_last:
                    return None
                result.append((first + before_first, count - before_first))
            at += count
        return tuple(result)

    @property
    def _last(self) -> int:
        return self.start + self.num_rows - 1


class RowPrefixes:
    """The prefixes of a row's sequences, in a pool of `pool` tokens. What a layer asks for is made when the first one
    does.
    """

    def __init__(self, sharers: Sequence[Sharer], pool: int, device: torch.device) -> None:
        self._sharers, self._pool, self._device = sharers, pool, device
        self._length = max(sharer.start + sharer.num_rows for sharer in sharers)
        self._seen: dict[int | None, list[_Parts] | None] = {}
        self._cascades: dict[tuple[int | None, int], Cascade | None] = {}

    def seen(self, window: int | None) -> list[_Parts] | None:
        """What of its prefix each sequence sees; None where one's queries do not all see the same."""
        window = self._effective(window)
        if window not in self._seen:
            parts = [sharer.seen(window) for sharer in self._sharers]
            self._seen[window] = None if None in parts else [one for one in parts if one is not None]
        return self._seen[window]

    def cascade(self, window: int | None, row_elements: int) -> Cascade | None:
        """The calls that they need, for rows of the query of so many elements; None if there is nothing to see."""
        key = self._effective(window), row_elements
        if key not in self._cascades:
            self._cascades[key] = self._make(window, max(1, SLAB_ELEMENTS // row_elements)) or None
        return self._cascades[key]

    def _effective(self, window: int | None) -> int | None:
        return None if window is None or window >= self._length else window

    def _make(self, window: int | None, most_rows: int) -> Cascade:
        seen = self.seen(window)
        assert seen is not None
        rows = [
            (row, parts)
            for sharer, parts in zip(self._sharers, seen, strict=True)
            for row in range(sharer.first_row, sharer.first_row + sharer.num_rows)
            if parts
        ]
        # Most parts first, so that those who have a further one are the first rows; then who sees the same together.
        rows.sort(key=lambda row: (-len(row[1]), row[1]))
        return tuple(self._slab(rows[at : at + most_rows]) for at in range(0, len(rows), most_rows))

    def _slab(self, rows: list[tuple[int, _Parts]]) -> Slab:
        passes = []
        for rank in range(len(rows[0][1])):
            parts = [parts[rank] for _, parts in rows if len(parts) > rank]
            groups = [(part, len(list(group))) for part, group in itertools.groupby(parts)]
            ranges = KeyRanges.of(
                [count for _, count in groups], [part for part, _ in groups], self._pool, self._device
            )
            passes.append(Pass(len(parts), ranges))
        numbers = [row for row, _ in rows]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return Slab(slice(numbers[0], numbers[0] + len(numbers)), tuple(passes))
        return Slab(to_device(torch.tensor(numbers), self._device), tuple(passes))


def attend_prefixes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cascade: Cascade,
    scale: float,
    kernel: Kernel,
    mean: Tensor,
    log_sum: Tensor,
) -> None:
    """Let `query` attend to prefixes as well: `mean` [tokens, heads, head_dim] is its attention to own keys, and gets
    what it is to all; `log_sum` [heads, tokens] is the logarithm of own weights' sum.
    """
    assert log_sum.shape == (query.shape[1], query.shape[0])
    for slab in cascade:
        if isinstance(slab.rows, slice):
            asked, before, merged = query[slab.rows], log_sum[:, slab.rows], mean[slab.rows].float()
        else:
            asked, before = query.index_select(0, slab.rows), log_sum.index_select(1, slab.rows)
            merged = mean.index_select(0, slab.rows).float()
        for rank, part in enumerate(slab.passes):
            rows = slice(part.num_rows)
            found, found_sum = kernel(asked[rows], keys, values, part.ranges, scale, causal=False, window=None)
            share = torch.sigmoid_(found_sum - before[:, rows])
            merged[rows].lerp_(found.float(), share.t()[..., None])
            if rank + 1 < len(slab.passes):
                before = torch.logaddexp(before[:, rows], found_sum)
        if isinstance(slab.rows, slice):
            mean[slab.rows] = merged
        else:
            mean.index_copy_(0, slab.rows, merged.to(mean.dtype))
