"""Results keep vLLM's names and survive the ways in which they travel."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from pipo_ray.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

OUTPUT = RequestOutput(
    request_id="7",
    prompt="Hello",
    prompt_token_ids=[1, 2],
    outputs=[
        CompletionOutput(
            index=0,
            text=" you",
            token_ids=[3],
            cumulative_logprob=-0.5,
            logprobs=[{3: Logprob(-0.5, 1, " you"), 4: Logprob(-1.5, 2)}],
            finish_reason="stop",
            stop_reason=3,
        )
    ],
    finished=True,
    metrics=RequestMetrics(num_prompt_tokens=2, num_generated_tokens=1, ttft_s=0.1, tokens_per_s=None, sweeps=1),
)


def test_read_as_vllm_users_do() -> None:
    completion = OUTPUT.outputs[0]
    assert (completion.text, completion.token_ids, completion.finish_reason) == (" you", [3], "stop")
    assert completion.logprobs is not None
    assert completion.logprobs[0][3].logprob == completion.cumulative_logprob
    assert completion.finished()
    assert not CompletionOutput(index=0, text="", token_ids=[]).finished()


def test_travels() -> None:
    assert pickle.loads(pickle.dumps(OUTPUT)) == OUTPUT
    assert json.loads(json.dumps(dataclasses.asdict(OUTPUT)))["metrics"]["num_prompt_tokens"] == 2


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OUTPUT.finished = False  # type: ignore[misc]
