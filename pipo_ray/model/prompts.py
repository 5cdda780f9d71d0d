"""Prompts to token ids, with the store's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipo_ray.errors import InputError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.text import check_stop_strings, encode_prompt, render_chat
from pipo_ray.model.tokenizer import shared_tokenizer
from pipo_ray.params import SamplingParams
from pipo_ray.prompts import name_prompt


class PromptEncoder:
    """Tokenizer and limits of the model in `store`."""

    def __init__(self, store: str, facts: ModelFacts) -> None:
        self.tokenizer = shared_tokenizer(store)
        self._facts = facts

    def encode(self, prompts: Sequence[Any]) -> list[tuple[list[int], str | None]]:
        """Token ids and text (None where ids were given) of each prompt: a string, a list of ids, or {"prompt": ...} /
        {"prompt_token_ids": ...}.
        """
        result = []
        for number, prompt in enumerate(prompts, start=1):
            special = not isinstance(prompt, Mapping) or bool(prompt.get("add_special_tokens", True))
            try:
                ids = encode_prompt(self.tokenizer, prompt, self._facts.vocab_size, None, add_special_tokens=special)
            except InputError as error:
                if len(prompts) == 1:
                    raise
                raise InputError(f"{name_prompt(number, len(prompts))}: {error}") from error
            text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, Mapping) else None
            result.append((ids, text))
        return result

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation in the checkpoint's chat template, ready for an answer."""
        return render_chat(self.tokenizer, messages)

    def check_params(self, params: Sequence[SamplingParams]) -> None:
        """Raise InputError for stop strings without a tokenizer."""
        for one in params:
            check_stop_strings(self.tokenizer, one)
