"""A page of the KV cache that may be on the drive, and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipo_ray.model.disk_cache import DiskCache


class PageState(Enum):
    """Where a page is, see the head of `kv_disk.py`."""

    OPEN = auto()
    KEPT = auto()
    SAVING = auto()
    STORED = auto()
    LOADING = auto()
    STAGED = auto()
    GONE = auto()


@dataclass(eq=False)
class Page:
    """A page of `owner`. `frame` and `stored` (its place in the file) are -1 where it has none; `read_in` is the last
    sweep that has attended to it, `reads` times.
    """

    owner: DiskCache
    layer: int
    index: int
    frame: int
    stored: int = -1
    at: PageState = PageState.OPEN
    read_in: int = -1
    reads: int = 0

    def reads_in(self, sweep: int) -> int:
        """How often that sweep has attended to it."""
        return self.reads if self.read_in == sweep else 0


@dataclass
class LookAhead:
    """Pages that a sweep will need and that are not kept: those claimed, and how often each is known to be needed; and
    those still to come, with the number of times that the sweep needs them before.
    """

    claimed: dict[Page, int] = field(default_factory=dict)
    coming: Iterator[tuple[Page, int]] = field(default_factory=lambda: iter(()))
    next: tuple[Page, int] | None = None

    def restart(self, coming: Iterator[tuple[Page, int]]) -> None:
        """Another sweep's order counts from here on; what is claimed stays so."""
        self.claimed = dict.fromkeys(self.claimed, 0)
        self.coming, self.next = coming, None

    def used(self, page: Page) -> bool:
        """The page has been used, or will not be. Whether it is claimed no more."""
        left = self.claimed.pop(page, 0) - 1
        if left > 0:
            self.claimed[page] = left
        return left <= 0
