"""Runs whose processes see a failing drive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline.failing_drive import FailingDrive

from pipo_ray import LLM, SamplingParams

from .checkpoints import VOCAB_SIZE, prompts_of

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = prompts_of((3, 29, 11), VOCAB_SIZE)
BUDGET: dict[str, Any] = {"memory": "3GiB", "weight_memory": "450KiB", "ray_address": "local", "device": "cpu"}


def start(store: Path, failing: FailingDrive, **more: Any) -> LLM:
    """An LLM whose processes see the failing drive; this one does not."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in failing.environment.items():
            patch.setenv(name, value)
        return LLM(store, **BUDGET | more)


def tokens(llm: LLM) -> list[list[int]]:
    """Greedy continuations."""
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
