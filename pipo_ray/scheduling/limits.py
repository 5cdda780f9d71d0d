"""What bounds the sweeps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.budget import RunPlan
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import WINDOW_TOKENS
from pipo_ray.scheduling.prefixes import Sharing
from pipo_ray.scheduling.sequences import Sequence
from pipo_ray.scheduling.window import NO_WINDOW, Room, Window


@dataclass(frozen=True)
class Limits:
    """`kv_tokens`: tokens of KV cache that the budget holds. `max_batch_tokens`: tokens per sweep. `chunked`: prompts
    may be split.

    `rebuild_length`: once a sequence is longer, its cache is rebuilt (RoPE that changes with the length); None: never.
    `max_sequences`: sequences that run at the same time, because each may want a row of logits in the same sweep.
    `max_scored_tokens`: tokens per sweep whose logits go to a client. `state_tokens`: what a sequence takes besides its
    tokens (a recurrent state, or a window at 16 bits in front of a low-bit KV cache), in tokens of KV cache; one that
    never has more than `window` at 16 bits takes what that says. `page_tokens`: a sequence takes KV cache in pages of
    so many tokens. `sharing`: how sequences use KV that is there already; with `copies` they may copy it, too.
    """

    kv_tokens: int
    max_batch_tokens: int
    chunked: bool = True
    rebuild_length: int | None = None
    max_sequences: int = 256
    max_scored_tokens: int = 1 << 30
    state_tokens: int = 0
    page_tokens: int = 1
    sharing: Sharing = "none"
    window: Window = NO_WINDOW
    copies: bool = True

    def reserved(self, sequence: Sequence) -> int:
        """Tokens of KV cache that are kept for `sequence`: whole pages for all it can become, less what it shares, its
        state, and what it is to leave at 16 bits for others.
        """
        own = sequence.capacity - sequence.shared
        short = sequence.capacity <= self.short_tokens
        state = math.ceil(self.window.share * sequence.capacity) if short else self.state_tokens
        return -(-own // self.page_tokens) * self.page_tokens + state + sequence.to_keep

    def free(self, sequences: Iterable[Sequence]) -> Room:
        """What is left of the KV budget beside what these have reserved: a window each, and those of their points."""
        sequences = list(sequences)
        tokens = self.kv_tokens - sum(self.reserved(sequence) for sequence in sequences)
        if self.window.places is None:
            return Room(tokens)
        return Room(tokens, self.window.places - sum(1 + sequence.points for sequence in sequences))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the KV cache holds alone."""
        short = min(self.short_tokens, int(self.kv_tokens / (1 + self.window.share)))
        return max(short, self.kv_tokens - self.state_tokens)

    @property
    def short_tokens(self) -> int:
        """A sequence of at most so many tokens has no packed page."""
        return self.window.tokens + self.window.page_tokens if self.window.tokens else 0


def limits_of(plan: RunPlan, facts: ModelFacts, *, prefix_cache: bool) -> Limits:
    """The limits of a run; with `prefix_cache` sequences share what they can."""
    sharing = _sharing(plan, facts) if prefix_cache else "none"
    return Limits(
        kv_tokens=plan.kv_tokens,
        max_batch_tokens=plan.max_batch_tokens,
        chunked=facts.chunked,
        rebuild_length=facts.rebuild_length,
        max_sequences=plan.max_sequences,
        max_scored_tokens=plan.max_scored_tokens,
        state_tokens=plan.state_tokens,
        page_tokens=plan.kv_page_tokens,
        sharing=sharing,
        window=_window(plan, sharing),
        copies=plan.kv is None and plan.kv_disk is None,  # where pages move, only some are there at a time
    )


def _window(plan: RunPlan, sharing: Sharing) -> Window:
    """Where windows are not tokens of the KV cache, they have places of their own."""
    low = plan.low_bit_kv
    if low is None:
        return NO_WINDOW
    if plan.state_tokens:
        return Window(WINDOW_TOKENS, PAGE_TOKENS, low.short_share)
    places = plan.kv.max_sequences if plan.kv is not None else None
    if plan.kv_disk is not None:
        places = plan.kv_disk.num_windows
    return Window(WINDOW_TOKENS, PAGE_TOKENS, places=places) if sharing == "shared" else NO_WINDOW


def _sharing(plan: RunPlan, facts: ModelFacts) -> Sharing:
    """A sequence can begin in the middle where a prompt may be split, and its cache is ours. Where pages move, and
    layers of few bits and of 16 are mixed, they belong to one sequence each.
    """
    if not (facts.ragged and facts.chunked) or facts.rebuild_length is not None:
        return "none"
    low = plan.low_bit_kv
    if low is not None and 16 in low.bits and (plan.kv_disk is not None or plan.kv is not None):
        return "none"
    return "shared"
