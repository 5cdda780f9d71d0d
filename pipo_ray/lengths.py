"""How long a request may be: by the context, by the activations that are planned, by the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from pipo_ray.errors import InputError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.params import SamplingParams
from pipo_ray.plan.budget import RunPlan
from pipo_ray.scheduling.limits import Limits


@dataclass(frozen=True)
class Lengths:
    """`wanted` is the user's bound on prompt plus answer in tokens, if there is one."""

    facts: ModelFacts
    plan: RunPlan
    limits: Limits
    wanted: int | None

    @property
    def longest(self) -> int:
        """Prompt plus answer, in tokens, at most; the KV cache may hold less."""
        context = self.facts.context_length
        return min(context, self.wanted or context, self.plan.max_length or context)

    def most_new_tokens(self, which: str, prompt: int, params: SamplingParams, score: bool) -> int:
        """Tokens that the answer to a prompt of `prompt` tokens may have. Raises InputError if there is no room, which
        names the prompt as `which`.
        """
        room = self.longest - prompt
        if room < (0 if score else 1):
            raise InputError(
                f"{which} of {prompt} tokens leaves no room for an answer: {self._what_bounds()}; shorten the "
                f"prompt to at most {self.longest - 1} tokens{self._how_to_lengthen()}"
            )
        if score and not self.facts.chunked and prompt > self.plan.max_scored_tokens:
            raise InputError(
                f"{which} of {prompt} tokens cannot be scored: this architecture computes a prompt as a whole, and the "
                f"memory budget holds the logits of {self.plan.max_scored_tokens} tokens; shorten it"
            )
        most = 1 if score else room if params.max_tokens is None else min(params.max_tokens, room)
        budget = self.limits.longest
        if params.max_tokens is None:
            most = min(most, max(1, budget - prompt))
        if prompt + most > budget:
            raise InputError(
                f"{which} of {prompt} tokens and {most} new ones need {prompt + most} tokens of KV cache, the memory "
                f"budget holds {budget}; raise --memory, lower --weight-memory, or ask for fewer tokens"
            )
        return most

    def _what_bounds(self) -> str:
        if self.longest == self.plan.max_length:
            return f"this architecture computes a sequence as a whole, and a sweep holds {self.longest} tokens of " + (
                "activations"
            )
        return f"the context is {self.longest} tokens"

    def _how_to_lengthen(self) -> str:
        if self.longest == self.facts.context_length:
            return ""
        return ", or raise " + ("--max-batch-tokens" if self.longest == self.plan.max_length else "--max-model-len")
