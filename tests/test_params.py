"""Sampling parameters: vLLM's defaults, and one clear line for every bad value."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from pipo_ray.errors import InputError
from pipo_ray.params import SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "name, value",
    [
        *(("n", value) for value in (0, -1, 1.5, "2", None, True)),
        *(("temperature", value) for value in (-0.1, NAN, INF, "hot", None, True)),
        *(("top_p", value) for value in (0, 0.0, 1.01, -1, NAN, "1", None)),
        *(("top_k", value) for value in (-2, 1.5, "3", None, False)),
        *(("min_p", value) for value in (-0.1, 1.1, NAN, None)),
        *(("repetition_penalty", value) for value in (0, -1.0, INF, NAN, None)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, NAN, None)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, NAN, None)),
        *(("seed", value) for value in (1.5, "a", 2**64, -(2**63) - 1, True)),
        *(("stop", value) for value in ("", ["a", ""], [1], 7, {"a": 1})),
        *(("stop_token_ids", value) for value in ([-1], ["a"], 7, "12", [True], [1.0])),
        *(("ignore_eos", value) for value in (1, "yes", None)),
        *(("max_tokens", value) for value in (0, -1, 1.5, "9")),
        *(("min_tokens", value) for value in (-1, 17, 0.5, None)),
        *(("logprobs", value) for value in (-1, 1.0, "5", True)),
        *(("skip_special_tokens", value) for value in (0, None)),
        *(("include_stop_str_in_output", value) for value in (0, None)),
        *(("logit_bias", value) for value in ([1], {-1: 0.0}, {"1": 0.0}, {1: 101}, {1: NAN}, {1: "x"}, {1: True})),
    ],
)
def test_bad_value(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^sampling parameter {name}=.*: give .") as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(value, (list, dict)) or f"{name}={value!r}: " in message


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(stop=["x" * 10_000, ""])
    assert len(str(caught.value)) < 300


def test_greedy_has_one_sample() -> None:
    with pytest.raises(InputError, match="n=2: give 1 where temperature is 0"):
        SamplingParams(n=2, temperature=0)
    assert SamplingParams(n=2, temperature=0.5).n == 2


def test_min_tokens_are_at_most_max_tokens() -> None:
    with pytest.raises(InputError, match="min_tokens=5: give at most max_tokens, which is 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=5, max_tokens=None).min_tokens == 5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(n=3, top_k=-1, top_p=1, min_p=1, seed=-(2**63), logprobs=0, presence_penalty=-2, min_tokens=16),
        SamplingParams(
            temperature=0, stop="a", stop_token_ids=[0], logit_bias={3: -100}, max_tokens=None, seed=2**64 - 1
        ),
    ],
)
def test_round_trip(params: SamplingParams) -> None:
    pickled = pickle.dumps(params)
    assert len(pickled) < 1000
    assert pickle.loads(pickled) == params
    assert hash(pickle.loads(pickled)) == hash(params)


def test_values_are_normalized() -> None:
    bias = {5: 1}
    params = SamplingParams(temperature=1, stop=["a", "b"], stop_token_ids=[1, 2], seed=-1, logit_bias=bias)
    bias[5] = 1000
    assert isinstance(params.temperature, float)
    assert params.stop == params.stop_strings == ("a", "b")
    assert params.stop_token_ids == (1, 2)
    assert params.seed is None
    assert params.logit_bias == {5: 1.0}
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams().stop_strings == ()


def test_numpy_numbers() -> None:
    import numpy as np

    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=[np.int32(7)])
    assert (type(params.temperature), type(params.top_k)) == (float, int)
    assert params.stop_token_ids == (7,)


@pytest.mark.parametrize("temperature, greedy", [(0, True), (1e-6, True), (1e-5, False), (1.0, False)])
def test_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_ids_beyond_the_vocabulary() -> None:
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1}).check_vocab_size(10)
    for params in (SamplingParams(stop_token_ids=[10]), SamplingParams(logit_bias={10: 1})):
        with pytest.raises(InputError, match="=10: give token ids from 0 to 9"):
            params.check_vocab_size(10)


def test_import_is_light() -> None:
    code = "import sys, pipo_ray.params, pipo_ray.outputs; sys.exit('numpy' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
