"""Matrices that GPTQModel quantized and wrote, against the values that its own kernel reads out of them.

`benchmarks/foreign_checkpoints.py --save` made the file: of random checkpoints one matrix each, its tensors and
`quantization_config` as they are there, and `values`, float16 [rows, columns].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quant.foreign.test_integers import check_bound
from safetensors import safe_open
from safetensors.torch import save_file

from pipo_ray.quant.foreign.checkpoint import open_foreign
from pipo_ray.store.checkpoint import Checkpoint

FILE = Path(__file__).with_name("gptqmodel.safetensors")
LOW_BIT = {
    "gptq-int4-g32": "int4-g32",
    "gptq-int4-g128-v2": "int4-g128",
    "gptq-int4-g64-sym": "int4-g64-sym",
    "gptq-int4-g32-act": None,
    "gptq-int4-g64-sym-act-v2": None,
    "gptq-int8-g32": None,
    "gptq-int8-row-sym": "int8",
    "gptq-int8-g32-act-v2": None,
    "gptq-int3-g32": None,
    "gptq-int2-g32": None,
    "awq-int4-g32": "int4-g32",
    "awq-int4-g128-sym": "int4-g128-sym",
}


def saved(case: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(FILE, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        assert set(settings) == set(LOW_BIT)
        parts = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{case}.")}  # noqa: SIM118
    return settings[case], {key.removeprefix(f"{case}."): part for key, part in parts.items()}


@pytest.mark.parametrize("case", LOW_BIT)
def test_its_values_are_read(case: str, tmp_path: Path) -> None:
    settings, parts = saved(case)
    values = parts.pop("values")
    save_file({f"up.{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    found = open_foreign(Checkpoint.open(tmp_path))
    assert found is not None
    up = found.weights["up.weight"]
    assert up.shape == values.shape
    assert (up.low_bit and up.low_bit.name) == LOW_BIT[case]
    for start, stop in ((0, len(values)), (3, 21)):
        rows = up.rows(start, stop)
        assert torch.equal(rows.values().half(), values[start:stop])
        if up.low_bit is not None:
            check_bound(rows.rounded(up.low_bit), rows.values().double(), up.low_bit)


def test_zero_points_of_nought_are_among_them() -> None:
    """Stored as version 1 does, less one."""
    settings, parts = saved("gptq-int4-g32")
    assert settings["checkpoint_format"] == "gptq"
    groups = parts["values"].view(len(parts["values"]), -1, 32)
    # Only a zero point of 0 has values from 0 to 15 scales up.
    assert int((groups.amax(2) >= 14.5 * parts["scales"].T).sum()) > 8
    assert int((groups.amin(2) <= -14.5 * parts["scales"].T).sum()) > 8
