"""Where one layer's packed pages of one sequence lie: the seam between a low-bit KV cache and what holds its pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor


class PackedPages(Protocol):
    """Pages 0, 1, ... of a layer, each uint8 [page_bytes]. They are written once, in order, and not changed."""

    def places(self, first: int, stop: int) -> Iterator[Tensor]:
        """Memory [n, page_bytes] for the new pages `first` to before `stop`, in order. Each is to be written before the
        next is asked for, and nothing else is asked of any page before all are.
        """
        ...

    def parts(self, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """Pages `first` to before `stop`, in order. Each part is tensors [n, page_bytes], one or more pages in all, and
        valid until the next is asked for; how pages are parted says nothing.
        """
        ...

    def whole(self, stop: int) -> Tensor | None:
        """Pages before `stop` as one tensor [stop, page_bytes], where they are neighbours in memory; None elsewhere."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes reserved that no other cache counts."""
        ...


class MemoryPages:
    """Pages in memory of their own, `memory` [most pages, page_bytes]."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def places(self, first: int, stop: int) -> Iterator[Tensor]:
        """See `PackedPages`."""
        yield self._memory[first:stop]

    def parts(self, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """See `PackedPages`."""
        if first < stop:
            yield (self._memory[first:stop],)

    def whole(self, stop: int) -> Tensor | None:
        """See `PackedPages`."""
        return self._memory[:stop]

    @property
    def nbytes(self) -> int:
        """See `PackedPages`."""
        return self._memory.nbytes
