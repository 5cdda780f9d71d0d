"""Every other causal language model that transformers has: it is right, or refused by name; nothing in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.probe import probe
from pipo_ray.model.tiny_config import tiny_config

OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {architecture.model_type for architecture in ARCHITECTURES})
TOLERANCE = 1e-4
MOST_PARAMETERS = 1 << 28


def num_parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model_type", OTHERS)
def test_right_or_refused(model_type: str, tmp_path: Path) -> None:
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            config = tiny_config(AutoConfig.for_model(model_type))
            if num_parameters(config) > MOST_PARAMETERS:
                with pytest.raises(UnsupportedModelError, match=model_type):
                    probe(config)
                return
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / "checkpoint")
            # What is loaded is the reference: some tensors are not saved, or not as they were.
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path / "checkpoint", dtype=torch.float32, attn_implementation="eager"
            ).eval()
            sequences = random_prompts(config.get_text_config().vocab_size, (24, 13))
            expected = [model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0] for tokens in sequences]
    except Exception as error:
        pytest.skip(f"transformers alone cannot: {type(error).__name__}: {str(error)[:150]}")
    try:
        packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
        with Pipeline(packed) as pipeline:
            followed = pipeline.follow(sequences, [18, 9])
    except UnsupportedModelError as error:
        pytest.skip(f"refused: {str(error)[-200:]}")
    for ours, logits in zip(followed, expected, strict=True):
        assert max(relative_errors(ours.logits, logits)) <= TOLERANCE, packed.facts.probe_reason
