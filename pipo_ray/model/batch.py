"""What a sweep computes: some tokens of each of some sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WantedLogits = Literal["none", "last", "all"]


@dataclass(frozen=True)
class SweepEntry:
    """One sequence's share of a sweep: `token_ids` are its tokens at positions `start`, `start + 1`, ...

    `capacity` is the most tokens the sequence can ever have; a sequence with `start` 0 begins with an empty cache.
    `logits` says whether none, only the last token's, or every token's logits are wanted.
    """

    sequence: str
    token_ids: tuple[int, ...]
    start: int
    capacity: int
    logits: WantedLogits = "last"
