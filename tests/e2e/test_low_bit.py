"""The bundled model with low-bit weights, through the real actors and a budget that makes it stream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import pipo_ray.bundled
from pipo_ray import LLM, SamplingParams
from pipo_ray.cli.main import main
from pipo_ray.plan.transfer import Mode
from pipo_ray.prepare import prepare_store
from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.rounding import values_of

from .checkpoints import packed

BUNDLED = Path(pipo_ray.bundled.__file__).parent
PROMPT = "It was a fine morning, and Mrs. Bennet"


def reference(store: Path, manifest) -> torch.nn.Module:  # type: ignore[no-untyped-def]
    """transformers' model in float32 with the weights that the store's panels stand for."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    state = model.state_dict()
    for block in manifest.blocks:
        with safe_open(store / block.file, "pt") as file:
            for tensor in block.tensors:
                if (panels := tensor.panels) is not None:
                    rows = [read_rows(views_of(panel, panels), panels) for panel in file.get_tensor(tensor.key)]
                    weight = torch.cat([values_of(part, panels.low_bit) for part in rows])
                    state[tensor.name].copy_(weight[: panels.rows])
    return model


@pytest.mark.both_modes
@pytest.mark.parametrize(
    "precision, weight_memory", [("int4", "1500KiB"), pytest.param("int8", "2500KiB", marks=pytest.mark.slow)]
)
def test_text_and_logits_are_those_of_the_rounded_weights(precision: str, weight_memory: str, mode: Mode) -> None:
    prepared = prepare_store(packed(BUNDLED, precision=precision))
    model = reference(prepared.folder, prepared.manifest)
    with LLM(
        BUNDLED, precision=precision, memory="3GiB", weight_memory=weight_memory, ray_address="local", mode=mode
    ) as llm:
        assert any(line.startswith("precision: 57 in int") for line in llm.describe())
        (output,) = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True))
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        (logits,) = llm.score([{"prompt_token_ids": tokens}])
        report = llm.report()
    assert report["bytes_streamed"] > 20 * report["streamed_bytes_per_sweep"] > 0
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    scale = np.abs(expected).max(-1)
    assert np.all(np.abs(logits - expected).max(-1) <= 0.03 * scale)
    # Each token of the text is the reference's best, or so near it that bf16 cannot tell them apart.
    first = len(output.prompt_token_ids)
    for position in range(first, len(tokens)):
        row = expected[position - 1]
        assert row.max() - row[tokens[position]] <= 0.03 * scale[position - 1]


def test_quality_is_measured_against_the_original(capfd: pytest.CaptureFixture[str]) -> None:
    packed(BUNDLED)
    packed(BUNDLED, precision="int4")
    arguments = ["--precision", "int4", "--tokens", "200", "--memory", "3GiB", "--ray-address", "local", "--json"]
    assert main(["quality", str(BUNDLED), *arguments]) == 0
    original, four = json.loads(capfd.readouterr().out)
    assert [row["precision"] for row in (original, four)] == ["16bit", "int4"]
    assert original["kl_divergence"] == 0 < four["kl_divergence"] < 0.5
    assert original["same_token"] == 1 > four["same_token"] > 0.5
    assert original["bytes"] > 2 * four["bytes"]
    assert 5 < original["perplexity"] < 80
    assert {row["tokens"] for row in (original, four)} == {200}


@pytest.mark.slow
def test_a_mix_of_the_same_size_loses_less(capfd: pytest.CaptureFixture[str]) -> None:
    uniform = prepare_store(BUNDLED, precision="int4-g32").manifest
    size = sum(block.nbytes for block in uniform.blocks if block.kind != "embedding")
    arguments = ["--precision", "int4-g32,auto", "--max-size", str(size), "--memory", "3GiB", "--json"]
    assert main(["quality", str(BUNDLED), *arguments, "--ray-address", "local"]) == 0
    _, uniform_row, mixed = json.loads(capfd.readouterr().out)
    assert mixed["bytes"] <= uniform_row["bytes"] == size
    assert mixed["kl_divergence"] < 0.9 * uniform_row["kl_divergence"]
