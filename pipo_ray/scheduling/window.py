"""What of a sequence's KV is packed, and what lies in front of it at 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A sequence's last `tokens`, and up to a page of `page_tokens` more, are at 16 bits, those before them in packed
    pages. With no `tokens` all are alike, and nothing is packed later. `share`: what a token at 16 bits takes more than
    a packed one, as a share of that; or there are `places` for so many windows, which take nothing of other tokens'.
    """

    tokens: int = 0
    page_tokens: int = 1
    share: float = 0.0
    places: int | None = None

    def packed(self, num_tokens: int) -> int:
        """Of so many tokens, those that whoever comes behind them sees packed; all, where all are alike."""
        return max(0, num_tokens - self.tokens) // self.page_tokens * self.page_tokens

    def packed_of(self, num_tokens: int, capacity: int) -> int:
        """Of the first `num_tokens` of a sequence that never has more than `capacity`, those that are packed: with its
        last token none is, as nothing comes behind.
        """
        return self.packed(min(num_tokens, capacity - 1) if self.tokens else num_tokens)

    def budget(self, packed: int, wide: int) -> int:
        """Tokens of KV budget that so many packed ones, and so many at 16 bits, take."""
        return packed + wide + math.ceil(self.share * wide)


NO_WINDOW = Window()
"""All tokens alike."""


@dataclass(frozen=True)
class Room:
    """Of the KV budget: tokens, and places for windows where these have some of their own."""

    tokens: int = 0
    windows: int = 0

    def __add__(self, other: Room) -> Room:
        return Room(self.tokens + other.tokens, self.windows + other.windows)

    def __sub__(self, other: Room) -> Room:
        return Room(self.tokens - other.tokens, self.windows - other.windows)

    @property
    def lacks(self) -> bool:
        """Whether there is less than nothing of either."""
        return self.tokens < 0 or self.windows < 0
