"""Prompts and sampling parameters as a caller gives them: one, or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from pipo_ray.errors import InputError
from pipo_ray.model.text import encode_prompt
from pipo_ray.params import SamplingParams

Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """The prompts of one prompt or of several. Raises InputError for none."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed = list(prompts)
    if listed and isinstance(listed[0], (int, np.integer)):
        return [listed]
    if not listed:
        raise InputError("no prompt was given; give a string, a list of token ids, or several of them")
    return listed


def list_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams for each of `count` prompts. Raises InputError for another number of them."""
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InputError(
            f"{count} prompts but {len(params)} sampling parameters were given; give one, or one per prompt"
        )
    return list(params)


def name_prompt(number: int, count: int) -> str:
    """What an error calls prompt `number` (from 1) of `count`."""
    return "a prompt" if count == 1 else f"prompt {number} (of {count})"


def check_token_ids(prompt: Prompt, number: int, count: int, vocab_size: int) -> list[int] | None:
    """The ids of prompt `number` (from 1) of `count`, None for a text, which only a tokenizer can judge.

    Raises InputError for none, and for one that is not below `vocab_size`.
    """
    text = prompt.get("prompt_token_ids") is None if isinstance(prompt, Mapping) else isinstance(prompt, str)
    if text:
        return None
    try:
        return encode_prompt(None, prompt, vocab_size, None)
    except InputError as error:
        if count == 1:
            raise
        raise InputError(f"{name_prompt(number, count)}: {error}") from error
