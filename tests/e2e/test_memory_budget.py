"""What the program takes stays within --memory in the cases that take most beside weights and KV cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipo_ray import LLM, SamplingParams
from pipo_ray.errors import InputError
from pipo_ray.plan.transfer import Mode

MIB = 1 << 20
GREEDY = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)


@pytest.fixture(scope="module")
def times_smaller() -> int:
    """What streams is a vocabulary as large as large models have."""
    return 16


def within_budget(llm: LLM) -> bool:
    report = llm.report()
    peak, budget = report["peak_memory_bytes"], report["memory_budget_bytes"]
    print(f"peak {peak / MIB:.0f} MiB of {budget / MIB:.0f} MiB")
    return bool(peak <= budget)


def test_many_requests_with_a_large_vocabulary(mode: Mode, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("LlamaConfig", vocab_size=262144)
    with LLM(folder, memory="1.45GiB", weight_memory="20MiB", ray_address="local", mode=mode) as llm:
        outputs = llm.generate([[number + 3] for number in range(64)], GREEDY)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [2] * 64
        (logits,) = llm.score([list(range(3, 20))])
        assert logits.shape == (17, 262144)
        assert within_budget(llm)


@pytest.mark.slow
def test_a_long_prompt_that_cannot_be_split(tiny_checkpoint: Callable[..., Path]) -> None:
    longrope = {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    folder = tiny_checkpoint(
        "Phi3Config", num_attention_heads=8, num_key_value_heads=8, head_dim=8,
        max_position_embeddings=65536, original_max_position_embeddings=32, rope_parameters=longrope,
    )  # fmt: skip
    with LLM(folder, memory="1.5GiB", ray_address="local") as llm:
        assert not llm._facts.chunked
        length = min(5000, llm.max_model_len - 2)
        (output,) = llm.generate([[5 + number % 200 for number in range(length)]], GREEDY)
        assert len(output.outputs[0].token_ids) == 2
        assert within_budget(llm)
    with (
        LLM(folder, memory="1.5GiB", max_batch_tokens=100, ray_address="local") as llm,
        pytest.raises(InputError, match=r"a sweep holds 100 tokens of activations; .* raise --max-batch-tokens"),
    ):
        llm.generate([[5] * 200], GREEDY)
