"""The pipeline on a CUDA device: `make test-gpu`. Larger models and the budget: benchmarks/gpu_correctness.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.gpu
_CHOSEN = [
    architecture for architecture in ARCHITECTURES if architecture.slug in ("llama", "gemma2", "gpt-oss", "qwen3-next")
]


@pytest.mark.parametrize("architecture", _CHOSEN, ids=lambda architecture: architecture.slug)
@pytest.mark.parametrize("gpu_resident_pieces", [0, 3])
def test_logits_are_transformers_own(architecture: Architecture, gpu_resident_pieces: int, tmp_path: Path) -> None:
    architecture.save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", attn_implementation="eager").eval()
    prompts = random_prompts(packed.facts.vocab_size, (5, 23, 11))
    device = torch.device("cuda", 0)
    with Pipeline(packed, device=device, gpu_resident_pieces=gpu_resident_pieces) as pipeline:
        followed = pipeline.follow(prompts, [3, 20, 8])
    for tokens, ours in zip(prompts, followed, strict=True):
        with torch.inference_mode():
            wanted = reference(torch.tensor([tokens]), use_cache=False).logits[0]
        assert max(relative_errors(ours.logits.cpu(), wanted)) <= 1e-4


def test_a_failed_sweep_is_begun_anew(tmp_path: Path) -> None:
    _CHOSEN[0].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (5, 9))
    with Pipeline(packed, device=torch.device("cuda", 0), gpu_resident_pieces=2) as pipeline:
        undisturbed = pipeline.greedy(prompts, 6)
        layer = pipeline.model.model.layers[1].mlp
        handle = layer.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            pipeline.greedy(prompts, 2)
        handle.remove()
        assert pipeline.greedy(prompts, 6) == undisturbed


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")
