"""The bundled model as other programs would have quantized it, through the command line and the real actors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from quant.foreign.gguf_writer import write_gguf
from quant.foreign.test_gguf import theirs
from quant.foreign.test_models import GPTQ, Truth, reference
from quant.foreign.writers import write_checkpoint
from transformers import AutoTokenizer

import pipo_ray.bundled
from pipo_ray import LLM, SamplingParams
from pipo_ray.cli.main import main
from pipo_ray.prepare import prepare_store

PROMPT = "It was a fine morning, and"
BUNDLED = Path(pipo_ray.bundled.__file__).parent


@pytest.mark.slow
def test_gptq_from_pack_to_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truth = Truth()
    folder = write_checkpoint(BUNDLED, tmp_path / "gptq", GPTQ, truth.gptq, dtype="float16")
    assert main(["pack", str(folder), str(tmp_path / "store")]) == 0
    line = "GPTQ int4, groups of 32: 48 matrices repacked (codes as they are; scales and zeros rounded to bf16"
    said = capfd.readouterr().err
    assert line in said
    assert "of the groups), 8 dequantized" in said
    run(tmp_path / "store", line, reference(BUNDLED, truth.values, tmp_path))


def test_a_gguf_file_to_text(tmp_path: Path) -> None:
    """Its own tokenizer included."""
    kinds = {"token_embd.weight": Kind.Q8_0, "output.weight": Kind.Q8_0}
    file = write_gguf(BUNDLED, tmp_path / "model.gguf", lambda name: kinds.get(name, Kind.Q4_0), tokenizer=True)
    tokens = run(file, "GGUF Q4_0, Q8_0: 56 matrices repacked (codes as they are; scales and zeros", theirs(file))
    assert not prepare_store(file).packed_now, "it is in the cache"
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    assert tokenizer.decode(tokens, skip_special_tokens=True).startswith(PROMPT)
    assert tokens[: len(tokenizer(PROMPT).input_ids)] == tokenizer(PROMPT).input_ids


def run(model: Path, line: str, original: torch.nn.Module) -> list[int]:
    """Text of the model, checked against the one that transformers has in float32; prompt and answer as ids."""
    with LLM(model, memory="3GiB", weight_memory="2500KiB", ray_address="local") as llm:
        assert any(said.startswith(line) for said in llm.describe())
        (output,) = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=16))
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        (logits,) = llm.score([{"prompt_token_ids": tokens}])
        assert llm.report()["bytes_streamed"] > 0
    with torch.inference_mode():
        expected = original(input_ids=torch.tensor([tokens])).logits[0].numpy()
    assert np.all(np.abs(logits - expected).max(-1) <= 0.03 * np.abs(expected).max(-1))
    for position in range(len(output.prompt_token_ids), len(tokens)):
        row = expected[position - 1]
        assert row.max() - row[tokens[position]] <= 0.03 * np.abs(row).max()
    return tokens
