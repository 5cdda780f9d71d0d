"""Checkpoints in foreign formats, written by their public descriptions, and by the libraries that own them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Quantized(NamedTuple):
    """Codes [rows, columns] (unsigned), scales [rows, groups], zero points [rows, groups]."""

    codes: torch.Tensor
    scales: torch.Tensor
    points: torch.Tensor

    def values(self, group_of: torch.Tensor | None = None) -> torch.Tensor:
        """The true values, float64."""
        if group_of is None:
            group_of = torch.arange(self.codes.shape[1]) // (self.codes.shape[1] // self.scales.shape[1])
        return (self.codes.double() - self.points.double()[:, group_of]) * self.scales.double()[:, group_of]


def quantize(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, dtype: torch.dtype = torch.float16
) -> Quantized:
    """Round to nearest with unsigned codes; a group of -1 is a whole row."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, columns if group == -1 else group)
    top = (1 << bits) - 1
    if symmetric:
        scales = groups.abs().amax(2).mul_(2 / top).to(dtype)
        points = torch.full_like(scales, 1 << bits - 1, dtype=torch.float32)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((high - low) / top).to(dtype)
        points = (-low / scales.float()).round().clamp(0, top)
    codes = (groups / scales.float().unsqueeze(2) + points.unsqueeze(2)).round().clamp(0, top)
    return Quantized(codes.view(rows, columns).to(torch.uint8), scales, points.to(torch.uint8))


def dense_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, columns * bits / 32], by arithmetic on Python's integers."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        rows.append(number.to_bytes(-(-len(row) * bits // 32) * 4, "little"))
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(rows), -1)


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8]: nibble i of a word has column AWQ_ORDER[i] of eight."""
    return dense_words(codes.view(len(codes), -1, 8)[:, :, list(AWQ_ORDER)].reshape(len(codes), -1), 4)


def less_one(points: torch.Tensor, bits: int) -> torch.Tensor:
    """As `dense_words`, of points less one: subtracted from whole words, but with 3 bits from each point, modulo 8."""
    if bits == 3:
        return dense_words((points.int() - 1) % 8, 3)
    ones = sum(1 << place for place in range(0, 32, bits))
    words = [
        [(word - ones + (1 << 31)) % (1 << 32) - (1 << 31) for word in row]
        for row in dense_words(points, bits).tolist()
    ]
    return torch.tensor(words, dtype=torch.int32)


def gptq_parts(
    found: Quantized, bits: int, group_of: torch.Tensor | None = None, layout: str = "gptq"
) -> dict[str, torch.Tensor]:
    columns = found.codes.shape[1]
    in_order = torch.arange(columns) // (columns // found.scales.shape[1])
    return {
        "qweight": dense_words(found.codes, bits).T.contiguous(),
        "qzeros": (less_one if layout == "gptq" else dense_words)(found.points.T, bits),
        "scales": found.scales.T.contiguous(),
        "g_idx": (in_order if group_of is None else group_of).int(),
    }


def awq_parts(found: Quantized) -> dict[str, torch.Tensor]:
    return {
        "qweight": awq_words(found.codes.T.contiguous()),
        "qzeros": awq_words(found.points.T.contiguous()),
        "scales": found.scales.T.contiguous(),
    }


def write_checkpoint(
    source: Path,
    folder: Path,
    settings: dict[str, Any],
    parts: Callable[[str, torch.Tensor], dict[str, torch.Tensor] | None],
    **config: Any,
) -> Path:
    """Copy the checkpoint `source`, with what `parts` makes of a module's weight in its place; `parts` gets the
    module's name and the weight, and gives the new tensors' last names, or None to keep it.
    """
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".py"):
            shutil.copy(path, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        made = parts(module, tensor) if leaf == "weight" and tensor.dim() == 2 else None
        if made is None:
            tensors[name] = tensor
        else:
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": settings}))
    return folder


def is_linear(module: str) -> bool:
    return module.endswith("_proj")
