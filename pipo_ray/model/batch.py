"""What a sweep computes: some tokens of each of some sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WantedLogits = Literal["none", "last", "all"]
PrefixUse = Literal["share", "copy", "take", "window"]


@dataclass(frozen=True)
class PrefixPart:
    """The first `num_tokens` of those tokens that `sequence` itself keeps, as part of another sequence's prefix: read
    where they are ("share"), copied, or taken with the cache that they are in, of which nothing else is left.

    Of a "window" they are those behind all parts before, which `sequence` has at 16 bits, or comes to have so in the
    same sweep: copied.
    """

    sequence: str
    num_tokens: int
    use: PrefixUse = "share"


@dataclass(frozen=True)
class KeptPoint:
    """A cache named `name` that has `prefix`, the last part of which is a "window", for others to begin on."""

    name: str
    prefix: tuple[PrefixPart, ...]


@dataclass(frozen=True)
class SweepEntry:
    """One sequence's share of a sweep: `token_ids` are its tokens at positions `start`, `start + 1`, ...

    `capacity` is the most tokens whose KV the sequence can ever have. A sequence begins with an empty cache behind its
    `prefix`, whose tokens come before `start`: shared parts first. `logits` says whether none, only the last token's,
    or every token's logits are wanted. `keep` are caches that come to be with it.
    """

    sequence: str
    token_ids: tuple[int, ...]
    start: int
    capacity: int
    logits: WantedLogits = "last"
    prefix: tuple[PrefixPart, ...] = ()
    keep: tuple[KeptPoint, ...] = ()

    @property
    def begins(self) -> bool:
        """Whether the sequence begins with it."""
        return self.start == sum(part.num_tokens for part in self.prefix)

    @property
    def shared(self) -> tuple[PrefixPart, ...]:
        """Of the prefix, what stays in others' caches."""
        return tuple(part for part in self.prefix if part.use == "share")

    @property
    def own_capacity(self) -> int:
        """The most tokens that its own cache can have."""
        return self.capacity - sum(part.num_tokens for part in self.shared)
