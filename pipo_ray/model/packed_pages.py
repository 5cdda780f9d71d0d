"""Where one layer's packed pages of one sequence lie: the seam between a low-bit KV cache and what holds its pages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipo_ray.model.host_link import HostLink
from pipo_ray.plan.low_bit_pages import VISITING_BYTES


class PageRun(NamedTuple):
    """Neighbouring pages up to before number `stop`: were page 0 one of them, its address would be `address`."""

    address: int
    stop: int


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

    def memories(self, stop: int) -> Sequence[tuple[Tensor, int]] | None:
        """Where the pages before `stop` lie, where they stay in memory: of each of these [n, page_bytes] so many of its
        first, in order, the last of them where the next pages will be. A memory is another one when it has moved. None
        elsewhere.
        """
        ...

    def runs(self, stop: int) -> Sequence[PageRun] | None:
        """Where pages before `stop` lie, page_bytes from one to the next in a run; the last run goes on with new pages.
        None where they do not all lie there until a page is added.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Bytes reserved that no other cache counts."""
        ...


class MemoryPages:
    """Pages in memory of their own, `memory` [most pages, page_bytes]."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    def places(self, first: int, stop: int) -> Iterator[Tensor]:
        """See `PackedPages`."""
        yield self.memory[first:stop]

    def parts(self, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """See `PackedPages`."""
        if first < stop:
            yield (self.memory[first:stop],)

    def memories(self, stop: int) -> Sequence[tuple[Tensor, int]] | None:
        """See `PackedPages`."""
        return ((self.memory, stop),)

    def runs(self, stop: int) -> Sequence[PageRun] | None:
        """See `PackedPages`."""
        return (PageRun(self.memory.data_ptr(), stop),)

    @property
    def nbytes(self) -> int:
        """See `PackedPages`."""
        return self.memory.nbytes


class VisitingPages:
    """Pages whose home is in RAM, for attention on `device`: some at a time are copied there, and what is packed there
    goes home.
    """

    def __init__(self, home: PackedPages, link: HostLink, device: torch.device) -> None:
        self._home, self._link, self._device = home, link, device

    def places(self, first: int, stop: int) -> Iterator[Tensor]:
        """See `PackedPages`."""
        for place in self._home.places(first, stop):
            there = torch.empty(place.shape, dtype=torch.uint8, device=self._device)
            yield there
            self._link.fetch([there[None]], [place[None]])

    def parts(self, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """See `PackedPages`."""
        for pages in itertools.chain.from_iterable(self._home.parts(first, stop)):
            for part in pages.split(max(1, VISITING_BYTES // pages.shape[1])):
                there = torch.empty(part.shape, dtype=torch.uint8, device=self._device)
                self._link.send(part[None], there[None])
                yield (there,)

    def memories(self, stop: int) -> Sequence[tuple[Tensor, int]] | None:
        """See `PackedPages`."""
        return None

    def runs(self, stop: int) -> Sequence[PageRun] | None:
        """See `PackedPages`."""
        return None

    @property
    def nbytes(self) -> int:
        """See `PackedPages`."""
        return 0


class Owner(Protocol):
    """A sequence's cache with packed pages that others read, too."""

    def own_pages(self, layer: int) -> Tensor:
        """Those of a layer that are its own, [pages, page_bytes], as they lie now."""
        ...


class LinePages:
    """Pages that begin in other caches' memory: of each in `line` its own first so many, and behind them `memory`."""

    def __init__(self, layer: int, line: Sequence[tuple[Owner, int]], memory: Tensor) -> None:
        self._layer, self._line, self.memory = layer, line, memory
        self._before = sum(count for _, count in line)

    def places(self, first: int, stop: int) -> Iterator[Tensor]:
        """See `PackedPages`."""
        yield self.memory[first - self._before : stop - self._before]

    def parts(self, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """See `PackedPages`."""
        pages, at = [], 0
        for memory, count in self.memories(stop):
            if first < at + count:
                pages.append(memory[max(0, first - at) : count])
            at += count
        if pages:
            yield pages

    def memories(self, stop: int) -> Sequence[tuple[Tensor, int]]:
        """See `PackedPages`."""
        found, at = [], 0
        for owner, count in self._line:
            found.append((owner.own_pages(self._layer), max(0, min(count, stop - at))))
            at += count
        return [*found, (self.memory, max(0, stop - at))]

    def runs(self, stop: int) -> Sequence[PageRun] | None:
        """See `PackedPages`."""
        runs, begin, page_bytes = [], 0, self.memory.shape[1]
        for owner, count in self._line:
            address = owner.own_pages(self._layer).data_ptr() - begin * page_bytes
            begin += count
            runs.append(PageRun(address, begin))
        return [*runs, PageRun(self.memory.data_ptr() - begin * page_bytes, max(begin, stop))]

    @property
    def nbytes(self) -> int:
        """See `PackedPages`."""
        return self.memory.nbytes
