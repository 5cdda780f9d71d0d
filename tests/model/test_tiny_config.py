"""Tiny configurations keep what matters to the probe, and shrink the rest."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pipo_ray.model.tiny_config import TINY_CONTEXT, tiny_config

# Two sizes of each: as it is by default (billions of parameters), and the already tiny one.
FULL_SIZE = sorted({architecture.model_type for architecture in ARCHITECTURES})


def check(config: PretrainedConfig) -> PretrainedConfig:
    before = config.to_dict()
    tiny = tiny_config(config)
    assert config.to_dict() == before
    model = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    with torch.inference_mode():
        logits = model(input_ids=torch.randint(2, 90, (1, TINY_CONTEXT - 1)), use_cache=False).logits
    assert logits.isfinite().all()
    assert tiny.model_type == config.model_type
    kinds = set(getattr(config, "layer_types", None) or ())
    assert set(getattr(tiny, "layer_types", None) or ()) == kinds
    assert tiny.num_hidden_layers <= 12
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads == 0 and heads // kv_heads <= 8:
        assert tiny.num_attention_heads // tiny.num_key_value_heads == heads // kv_heads
    return tiny


@pytest.mark.parametrize("model_type", FULL_SIZE)
def test_full_size(model_type: str) -> None:
    check(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.slug)
def test_already_tiny(architecture: object) -> None:
    check(architecture.config())  # type: ignore[attr-defined]


def test_longrope_keeps_its_kind() -> None:
    config = AutoConfig.for_model(
        "phi3",
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48,
            "long_factor": [float(i) for i in range(1, 49)],
            "original_max_position_embeddings": 4096,
        },
    )  # fmt: skip
    tiny = check(config)
    assert tiny.rope_parameters["rope_type"] == "longrope"
    assert tiny.rope_parameters["original_max_position_embeddings"] < 29  # the probe's long request crosses it
    assert len(tiny.rope_parameters["long_factor"]) == 8
    assert tiny.rope_parameters["long_factor"][-1] > tiny.rope_parameters["long_factor"][0]
