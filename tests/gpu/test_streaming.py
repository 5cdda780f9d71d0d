"""The real actors with a model the GPU doesn't hold: pieces come from RAM or the drive while kernels run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.plan.budget import RunPlan

pytestmark = pytest.mark.gpu

PROMPTS = [[3 + (7 * at + first) % 250 for at in range(length)] for first, length in ((0, 300), (1, 40), (2, 5))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
LAYERS = 6
LEAST_BYTES = LAYERS * 4 * (4 * 2048**2 + 3 * 2048 * 5504)
"""Of the layers' weights in float32, 1.2 GB: as much as the GPU budget, most of which is CUDA's own."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(
        "LlamaConfig", hidden_size=2048, intermediate_size=5504, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, initializer_range=0.022, max_position_embeddings=1024,
    )  # fmt: skip


def tokens(checkpoint: Path, **options: Any) -> tuple[list[tuple[int, ...]], RunPlan, int]:
    """The answers, what was planned for them, and the bytes read from the drive."""
    with LLM(checkpoint, device="cuda", max_model_len=1024, max_kv_tokens=1024, kv_on_cpu=False, **options) as llm:
        answers = [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]
        stages: list[dict[str, Any]] = llm.report()["stages"]
        return answers, llm._plan, sum(stage.get("bytes_read", 0) for stage in stages)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[tuple[int, ...]]:
    """Nothing streams."""
    answers, plan, _ = tokens(checkpoint, gpu_memory="6GiB")
    assert plan.copied_bytes_per_sweep == 0
    return answers


@pytest.mark.parametrize("mode", ["performance", "memory-saver"])
@pytest.mark.parametrize("memory", [None, "2400MiB"], ids=["from-ram", "from-drive"])
def test_streamed_weights_give_the_same_tokens(
    checkpoint: Path, wanted: list[tuple[int, ...]], memory: str | None, mode: str
) -> None:
    answers, plan, bytes_read = tokens(checkpoint, gpu_memory="1200MiB", memory=memory, mode=mode)
    assert plan.copied_bytes_per_sweep > LEAST_BYTES / 2
    if memory is None:
        assert plan.streamed_bytes_per_sweep == 0
        assert bytes_read < 1.2 * plan.model_bytes
    else:
        assert plan.streamed_bytes_per_sweep > LEAST_BYTES / 4
        assert bytes_read > 8 * plan.streamed_bytes_per_sweep
    assert answers == wanted
