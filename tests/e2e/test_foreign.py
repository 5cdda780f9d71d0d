"""The bundled model as other programs would have quantized it, through the command line and the real actors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quant.foreign.test_models import GPTQ, Truth, reference
from quant.foreign.writers import write_checkpoint

import pipo_ray.bundled
from pipo_ray import LLM, SamplingParams
from pipo_ray.cli.main import main

BUNDLED = Path(pipo_ray.bundled.__file__).parent


def test_gptq_from_pack_to_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truth = Truth()
    folder = write_checkpoint(BUNDLED, tmp_path / "gptq", GPTQ, truth.gptq, dtype="float16")
    assert main(["pack", str(folder), str(tmp_path / "store")]) == 0
    line = "GPTQ int4, groups of 32: 48 matrices repacked as they are, 8 dequantized"
    assert line in capfd.readouterr().err
    with LLM(tmp_path / "store", memory="3GiB", weight_memory="2500KiB", ray_address="local") as llm:
        assert any(said.startswith(line) for said in llm.describe())
        (output,) = llm.generate(["It was a fine morning, and"], SamplingParams(temperature=0.0, max_tokens=16))
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        (logits,) = llm.score([{"prompt_token_ids": tokens}])
        assert llm.report()["bytes_streamed"] > 0
    with torch.inference_mode():
        model = reference(BUNDLED, truth.values, tmp_path)
        expected = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    assert np.all(np.abs(logits - expected).max(-1) <= 0.03 * np.abs(expected).max(-1))
    for position in range(len(output.prompt_token_ids), len(tokens)):
        row = expected[position - 1]
        assert row.max() - row[tokens[position]] <= 0.03 * np.abs(row).max()
