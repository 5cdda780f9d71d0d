"""How often the host waits for the device in a sweep."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from harness import Pipeline, pack_checkpoint, random_prompts

from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.sampling import SequenceSampling, sample_tokens
from pipo_ray.params import SamplingParams

pytestmark = pytest.mark.gpu


def test_a_sweep_and_its_tokens_wait_once(tmp_path: Path) -> None:
    """Prompts and decoding, weights that stream and weights that stay, tokens sampled in different ways."""
    architecture = next(one for one in ARCHITECTURES if one.slug == "llama")
    architecture.save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.bfloat16)
    prompts = random_prompts(packed.facts.vocab_size, (5, 23, 11))
    params = [SamplingParams(temperature=0.0), SamplingParams(top_p=0.9), SamplingParams(presence_penalty=0.5)]
    states = [
        SequenceSampling(one, 3, prompt, [], eos_token_ids=()) for one, prompt in zip(params, prompts, strict=True)
    ]
    device = torch.device("cuda", 0)
    with Pipeline(packed, device=device, gpu_resident_pieces=2, kv_pool=200) as pipeline:

        def sweep(step: int) -> None:
            entries = [
                SweepEntry(
                    str(number), tuple(prompt) if step == 0 else (7,), 0 if step == 0 else len(prompt) + step - 1, 60
                )
                for number, prompt in enumerate(prompts)
            ]
            logits = [part for part in pipeline.runner.run(entries) if part is not None]
            sample_tokens(torch.cat(logits), states)

        for step in range(3):
            sweep(step)
        torch.cuda.synchronize()
        for step in (3, 4):
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    sweep(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
            assert len(found) == 1, found
