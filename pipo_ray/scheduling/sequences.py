"""The scheduler's state: sequences that wait, run, or have ended. No Ray, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipo_ray.messages import SequenceSpec
from pipo_ray.params import SamplingParams


@dataclass
class Sequence:
    """One sample of a request on its way through the sweeps.

    `cached` is the number of tokens whose keys and values the compute worker holds; `capacity` the most tokens that it
    can have. Its first step is at position `begins`: the KV of the tokens before is there already, that of `shared`
    of them in other sequences' caches. `to_keep`: tokens of KV budget for what it is to leave at 16 bits, on its way,
    for others to begin on, `points` of them. `chosen_ahead`: 1 where the newest token is still being chosen, by a sweep
    that runs. `scored`: positions whose logits the client has. `losses`: how often a drive has lost KV of it.
    """

    name: str
    request_id: str
    client: str
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int
    score: bool = False
    generated: list[int] = field(default_factory=list)
    cached: int = 0
    begins: int = 0
    shared: int = 0
    to_keep: int = 0
    points: int = 0
    chosen_ahead: int = 0
    scored: int = 0
    losses: int = 0

    @property
    def length(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt) + len(self.generated) + self.chosen_ahead

    @property
    def capacity(self) -> int:
        """The most tokens that it can have."""
        return len(self.prompt) + self.max_tokens

    @property
    def most_cached(self) -> int:
        """The most tokens whose KV it can have: the last one of an answer is chosen, and not computed."""
        return len(self.prompt) + max(0, self.max_tokens - 1)

    @property
    def decoding(self) -> bool:
        """Whether all but the newest token are cached: the next step is one token."""
        return self.cached > 0 and self.length - self.cached == 1

    def forget_prefix(self) -> None:
        """It begins at its first token, and leaves nothing on its way."""
        self.begins = self.shared = self.to_keep = self.points = 0

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids at positions start:stop."""
        prompt = len(self.prompt)
        if start >= prompt:
            return tuple(self.generated[start - prompt : stop - prompt])
        return self.prompt[start:stop] + tuple(self.generated[: max(0, stop - prompt)])

    def spec(self) -> SequenceSpec:
        """What the compute worker needs to go on with it."""
        return SequenceSpec(self.prompt, tuple(self.generated), self.params, self.seed, self.index, self.max_tokens)
