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
    sweep that has attended to it.
    """

    owner: DiskCache
    layer: int
    index: int
    frame: int
    stored: int = -1
    at: PageState = PageState.OPEN
    read_in: int = -1


@dataclass
class LookAhead:
    """Pages that a sweep will need and that are not kept: those claimed, and those still to come."""

    claimed: dict[Page, None] = field(default_factory=dict)
    coming: Iterator[Page] = field(default_factory=lambda: iter(()))
    next: Page | None = None
