"""Whether there are kernels for packed pages, and what is said if there are none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG
from harness import pack_checkpoint

from pipo_ray.model import packed_choice
from pipo_ray.model.packed_choice import rows_for

CUDA = torch.device("cuda", 0)


def test_without_what_the_kernels_need_a_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = pack_checkpoint(BY_SLUG["llama"].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32).facts
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(packed_choice, "keep_compiled_in", lambda folder: None)

    def reason(dtype: torch.dtype) -> object:
        return rows_for((4,), facts, dtype, CUDA, None)

    assert reason(torch.float32) == "the model is computed in float32"
    assert reason(torch.float16) == "the GPU has compute capability 7.5, and Triton's bf16 needs 8.0"
    capability = (9, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reason(torch.bfloat16) == "triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def fails(*arguments: object) -> None:
        raise ArithmeticError("attention to packed pages of 4 bits is off by 9.0%\nmore")

    monkeypatch.setattr(packed_choice, "_checked_rows", fails)
    assert reason(torch.bfloat16) == (
        "Triton's kernels do not work here (ArithmeticError: attention to packed pages of 4 bits is off by 9.0%)"
    )
