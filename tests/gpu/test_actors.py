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


def tokens(device: str, **options: Any) -> list[tuple[int, ...]]:
    with LLM(BUNDLED, device=device, max_model_len=1024, **options) as llm:
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_tokens_are_the_processors_with_few_bits_of_kv_too(bits: int) -> None:
    """Rounding may turn a choice between two tokens that are as good, and all behind it: of each prompt most agree."""
    precision = {} if bits == 16 else {"kv_precision": bits}
    pairs = zip(tokens("cuda", gpu_memory="2GiB", **precision), tokens("cpu", **precision), strict=True)
    same = [sum(one == other for one, other in zip(ours, theirs, strict=True)) for ours, theirs in pairs]
    assert sum(same) >= 0.8 * len(PROMPTS) * 24, same


@pytest.mark.parametrize("place", [{"kv_on_cpu": True}, {"kv_in_ram": True}, {"kv_on_disk": "64MiB"}], ids=str)
def test_few_bits_of_kv_in_every_place_give_the_processors_tokens(place: dict[str, Any]) -> None:
    """As above; so little of the GPU that pages do move."""
    pairs = zip(
        tokens("cuda", gpu_memory="1200MiB", kv_precision=4, **place), tokens("cpu", kv_precision=4), strict=True
    )
    same = [sum(one == other for one, other in zip(ours, theirs, strict=True)) for ours, theirs in pairs]
    assert sum(same) >= 0.8 * len(PROMPTS) * 24, same


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
