"""Prompts as a caller gives them, judged without a tokenizer."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import InputError
from pipo_ray.prompts import check_token_ids, list_params, list_prompts


@pytest.mark.parametrize(
    "given, listed",
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_one_or_several(given: Any, listed: list[Any]) -> None:
    assert list_prompts(given) == listed


def test_a_text_is_not_judged_and_ids_are() -> None:
    for text in ("a", {"prompt": "a"}, {"prompt": "a", "prompt_token_ids": None}):
        assert check_token_ids(text, 1, 1, 10) is None
    for ids in ([1, 9], {"prompt_token_ids": [1, 9]}):
        assert check_token_ids(ids, 1, 1, 10) == [1, 9]
    with pytest.raises(InputError, match=r"^prompt token 1 is 10: the model's token ids go from 0 to 9"):
        check_token_ids([1, 10], 1, 1, 10)
    with pytest.raises(InputError, match=r"^prompt 2 \(of 3\): the prompt is empty"):
        check_token_ids([], 2, 3, 10)


def test_another_number_of_params_is_refused() -> None:
    with pytest.raises(InputError, match="3 prompts but 2 sampling parameters"):
        list_params([SamplingParams(), SamplingParams()], 3)


@pytest.mark.parametrize("method", ["generate", "stream", "chat", "stream_chat"])
def test_the_second_parameter_has_vllms_name(method: str) -> None:
    assert list(inspect.signature(getattr(LLM, method)).parameters)[2] == "sampling_params"
