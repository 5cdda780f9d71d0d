"""Other architectures through the real actors, one run after the other in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import InputError
from pipo_ray.plan.transfer import Mode

from .checkpoints import make_checkpoint, packed, prompts_of, reference_greedy, reference_logits, vocab_size
from .footprint import Footprint, wait_until_gone

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.mark.parametrize(("slug", "weight_memory"), [
    ("qwen3-next", "500KiB"), pytest.param("mixtral", "800KiB", marks=pytest.mark.slow)
])  # fmt: skip
def test_other_architectures_without_a_tokenizer(slug: str, weight_memory: str, mode: Mode, tmp_path: Path) -> None:
    """One that may not share a row, with experts and a state instead of a cache, and a mixture of experts that may."""
    folder = make_checkpoint(tmp_path / slug, slug)
    packed(folder)
    prompts = prompts_of((2, 17, 9), vocab_size(folder))
    with LLM(folder, memory="3GiB", weight_memory=weight_memory, ray_address="local", mode=mode) as llm:
        footprint = Footprint(llm._session.path, 0)
        outputs = llm.generate([prompts[0], {"prompt_token_ids": prompts[1]}, prompts[2]], GREEDY)
        report = llm.report()
        scores = llm.score(prompts)
        with pytest.raises(InputError, match="tokenizer"):
            llm.generate("a text")
        with pytest.raises(InputError, match="tokenizer"):
            llm.generate([prompts[0]], replace(GREEDY, stop="a"))
        again = llm.generate(prompts, GREEDY)
    wait_until_gone(footprint, 1.0)
    expected = [reference_greedy(folder, prompt, NUM_TOKENS) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert [output.outputs[0].token_ids for output in again] == expected
    assert {output.outputs[0].text for output in outputs} == {""}
    assert report["streamed_bytes_per_sweep"] > report["model_bytes"] / 3
    for prompt, logits in zip(prompts, scores, strict=True):
        wanted = reference_logits(folder, prompt)
        assert (np.abs(logits - wanted).max(-1) / np.abs(wanted).max(-1)).max() <= 1e-4
