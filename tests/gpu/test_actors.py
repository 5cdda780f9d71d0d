"""The real actors with a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipo_ray import LLM, SamplingParams

pytestmark = pytest.mark.gpu

BUNDLED = Path(__file__).parents[2] / "pipo_ray" / "bundled"
PROMPTS = [list(range(5, stop)) for stop in (400, 205, 95)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def tokens(**options: Any) -> list[tuple[int, ...]]:
    with LLM(BUNDLED, device="cuda", max_model_len=1024, **options) as llm:
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


def behind_the_best(chosen: list[tuple[int, ...]], **options: Any) -> float:
    """How far, at most, a chosen token's logit on the processor is below that of the best one behind the same text."""
    with LLM(BUNDLED, device="cpu", max_model_len=1024, **options) as llm:
        scores = llm.score([[*prompt, *answer[:-1]] for prompt, answer in zip(PROMPTS, chosen, strict=True)])
    behind = 0.0
    for prompt, answer, logits in zip(PROMPTS, chosen, scores, strict=True):
        made = logits[len(prompt) - 1 :]
        assert len(made) == len(answer) == PARAMS.max_tokens
        behind = max(behind, float((made.max(1) - made[range(len(answer)), answer]).max()))
    return behind


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_tokens_are_the_processors_with_few_bits_of_kv_too(bits: int) -> None:
    """Or as good: logits of 16 and more are multiples of an eighth in bf16, and of these 72 choices six are between
    two that are a sixteenth apart or less.
    """
    precision = {} if bits == 16 else {"kv_precision": bits}
    assert behind_the_best(tokens(gpu_memory="2GiB", **precision), **precision) <= (0.25 if bits == 16 else 0.5)


@pytest.mark.parametrize("place", [{"kv_on_cpu": True}, {"kv_in_ram": True}, {"kv_on_disk": "64MiB"}], ids=str)
def test_few_bits_of_kv_in_every_place_give_the_processors_tokens(place: dict[str, Any]) -> None:
    """As above; so little of the GPU that pages do move."""
    assert behind_the_best(tokens(gpu_memory="1200MiB", kv_precision=4, **place), kv_precision=4) <= 0.5


@pytest.mark.parametrize(
    "place",
    [
        {"kv_on_cpu": True},
        {"kv_on_cpu": True, "kv_precision": 4},
        {"kv_in_ram": True},
        {"kv_in_ram": True, "kv_precision": 4},
        {"kv_on_disk": "64MiB"},
        {"kv_on_disk": "64MiB", "kv_precision": 4},
    ],
    ids=str,
)
def test_samples_share_their_prompt_in_ram_too(place: dict[str, Any]) -> None:
    """What two of three have in common with the first: whole pages at least."""
    params = SamplingParams(temperature=1.0, n=3, max_tokens=8, ignore_eos=True)
    with LLM(BUNDLED, device="cuda", max_model_len=1024, gpu_memory="1200MiB", **place) as llm:
        (output,) = llm.generate([PROMPTS[0]], params)
        scheduler: dict[str, Any] = next(one for one in llm.report()["stages"] if one["stage"] == "Scheduler")
    assert [len(one.token_ids) for one in output.outputs] == [8, 8, 8]
    assert scheduler["tokens_reused"] >= 2 * (256 if place == {"kv_on_disk": "64MiB"} else 384)
