"""The books of a tier of KV pages: which are free, and how pages become copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipo_ray.errors import ResourceError

_FREE, _TAKEN = b"\1", b"\0"


class PagePool:
    """Pages 0 ... `num_pages` - 1. The free list is a byte per page: so a run of neighbours is found by a search for
    bytes, and runs are what makes copies large and attention read in place.
    """

    def __init__(self, name: str, num_pages: int) -> None:
        self._name, self._pages = name, bytearray(_FREE * num_pages)
        self.num_free = num_pages

    def take(self, count: int, *, from_end: bool = False) -> list[int]:
        """`count` pages, neighbours if there are so many in a row, otherwise as few runs as first fit finds. What is
        short-lived comes `from_end`, so that it leaves no holes between what stays.

        Raises ResourceError if there are not enough.
        """
        if count > self.num_free:
            raise ResourceError(
                f"{count} KV pages are needed in {self._name}, {self.num_free} of {len(self._pages)} are free; lower "
                "the number of requests or their length"
            )
        taken: list[int] = []
        run = count
        while len(taken) < count:
            run = min(run, count - len(taken))
            find = self._pages.rfind if from_end else self._pages.find
            first = find(_FREE * run)
            if first < 0:
                run = max(1, run // 2)
                continue
            self._pages[first : first + run] = _TAKEN * run
            taken.extend(range(first, first + run))
        self.num_free -= count
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """`pages` are free again. Raises ValueError for one that was not taken."""
        for page in pages:
            if self._pages[page]:
                raise ValueError(f"KV page {page} of {self._name} is given back, but it is free")
            self._pages[page] = 1
        self.num_free += len(pages)


def spans(page_tokens: int, start: int, stop: int, *tables: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Tokens start:stop of a sequence as (number of rows, first row in each tier), for the page tables `tables` of the
    tiers: as few as there are runs of pages that are neighbours in every tier.
    """
    while start < stop:
        first, last = start // page_tokens, (stop - 1) // page_tokens
        if not all(_neighbours(table, first, last) for table in tables):
            last = first
        while (last + 1) * page_tokens < stop and all(table[last + 1] == table[last] + 1 for table in tables):
            last += 1
        end = min(stop, (last + 1) * page_tokens)
        yield (end - start, *(table[first] * page_tokens + start % page_tokens for table in tables))
        start = end


def _neighbours(table: Sequence[int], first: int, last: int) -> bool:
    # The usual case, and compared in C: a long sequence has hundreds of pages, in every layer of every sweep.
    return table[first : last + 1] == list(range(table[first], table[first] + last + 1 - first))
