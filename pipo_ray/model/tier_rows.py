"""How one layer's pages lie in the units of two tiers, and where a sequence's packed pages are on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipo_ray.model.packed_pages import PageRun
from pipo_ray.plan.kv_pages import PAGE_TOKENS, KVPlacement
from pipo_ray.plan.low_bit_pages import packed_pages


@dataclass(frozen=True)
class TierRows:
    """Rows of `row_bytes`, of which a unit has `per_unit`. A row is a token at 16 bits; where pages are packed, it is a
    unit, and `page_units` of them are a page.
    """

    row_bytes: int
    per_unit: int
    page_units: int
    packed: bool

    @staticmethod
    def of(placement: KVPlacement, layer: int) -> TierRows:
        """Of a layer."""
        units = placement.units[layer]
        if placement.bits is not None and placement.bits[layer] != 16:
            return TierRows(placement.unit_bytes, 1, units, packed=True)
        per_unit = PAGE_TOKENS // units
        return TierRows(placement.unit_bytes // per_unit, per_unit, units, packed=False)

    def rows(self, num_tokens: int, capacity: int, start: int, least: int) -> int:
        """Rows that a sequence of `num_tokens` tokens of its own has, of `capacity` that it can have, behind `start` of
        others; `least` of these tokens are packed however many there are.
        """
        if not self.packed:
            return num_tokens
        # The last token that there can be sees so many pages.
        pages = packed_pages(start + min(num_tokens, capacity - 1)) - start // PAGE_TOKENS
        return max(pages, min(least, num_tokens) // PAGE_TOKENS) * self.page_units


class TieredPages:
    """Packed pages, see `PackedPages`, of `page_bytes` in units of `memory`, uint8 [units, unit_bytes], on the GPU:
    `page_units` each, as `units` tells them in order, others in each sweep. Pages whose units are
    neighbours are where they are; others are brought together, or apart.
    """

    nbytes = 0
    """The tiers count them."""

    def __init__(self, memory: Tensor, units: Callable[[], Sequence[int]], page_units: int, page_bytes: int) -> None:
        self._memory, self._units, self._page_units, self._page_bytes = memory, units, page_units, page_bytes

    def places(self, first: int, stop: int) -> Iterator[Tensor]:
        """See `PackedPages`."""
        places = self._units()
        for count, units in self._runs(places, first, stop):
            if units is not None:
                yield self._in_place(units, count)
                first += count
                continue
            page = self._memory.new_empty(self._page_units, self._memory.shape[1])
            yield page.view(1, -1)[:, : self._page_bytes]
            for part, unit in zip(page, self._of_page(places, first), strict=True):
                self._memory[unit].copy_(part)
            first += count

    def parts(self, first: int, stop: int) -> Iterator[Sequence[Tensor]]:
        """See `PackedPages`."""
        places = self._units()
        for count, units in self._runs(places, first, stop):
            if units is not None:
                yield (self._in_place(units, count),)
            else:
                page = torch.cat([self._memory[unit] for unit in self._of_page(places, first)])
                yield (page[None, : self._page_bytes],)
            first += count

    def memories(self, stop: int) -> Sequence[tuple[Tensor, int]] | None:
        """See `PackedPages`: never, the GPU has no kernel for them."""
        return None

    def runs(self, stop: int) -> Sequence[PageRun] | None:
        """See `PackedPages`: they move."""
        return None

    def _runs(self, places: Sequence[int], first: int, stop: int) -> Iterator[tuple[int, int | None]]:
        """Pages `first` to before `stop`: so many from this unit on, or a single one in several places."""
        size = self._page_units
        while first < stop:
            units = self._of_page(places, first)
            if list(units) != list(range(units[0], units[0] + size)):
                yield 1, None
                first += 1
                continue
            count = 1
            while first + count < stop and list(self._of_page(places, first + count)) == [
                unit + count * size for unit in units
            ]:
                count += 1
            yield count, units[0]
            first += count

    def _of_page(self, places: Sequence[int], page: int) -> Sequence[int]:
        return places[page * self._page_units : (page + 1) * self._page_units]

    def _in_place(self, unit: int, count: int) -> Tensor:
        rows = self._memory[unit : unit + count * self._page_units]
        return rows.view(count, -1)[:, : self._page_bytes]
