"""Greedy generation with a transformers model, token by token: what the Accelerate and the AirLLM runner share."""

from __future__ import annotations

from typing import Any

import torch
from protocol import Generate, OnToken


class _Tokens:
    """A streamer of `model.generate`: hears of each token, the prompt's first of all."""

    def __init__(self, on_token: OnToken) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token(0, int(value.flatten()[-1]))
        self._prompt_seen = True

    def end(self) -> None:
        """The last token was there."""


def greedy(model: Any) -> Generate:
    """`model.generate`, one prompt per request."""

    def generate(prompts: list[list[int]], tokens: int, on_token: OnToken) -> None:
        (prompt,) = prompts
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                min_new_tokens=tokens, max_new_tokens=tokens, streamer=_Tokens(on_token), pad_token_id=0,
            )  # fmt: skip

    return generate
