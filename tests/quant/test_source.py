from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import pipo_ray.quant.source as source_module
from pipo_ray.compiled.quantizer import CompiledRounding
from pipo_ray.errors import CheckpointError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import Panels, divide
from pipo_ray.quant.rounding import round_to_nearest, values_of
from pipo_ray.quant.source import QuantizedSource


class OneTensor:
    """A source of a single float32 weight; remembers the most rows that were asked for at once."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.most_rows = weight, 0

    def require(self, blocks: Sequence[BlockSpec]) -> None: ...

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor:
        assert (spec.dtype, spec.shape, spec.panels) == ("F32", tuple(self.weight.shape), None)
        self.most_rows = max(self.most_rows, row_stop - row_start)
        return self.weight[row_start:row_stop].clone()

    def read_bf16(self, spec: TensorSpec, row_start: int, row_stop: int) -> None: ...

    def bf16_key(self, spec: TensorSpec) -> None: ...

    def reads_apart(self, spec: TensorSpec) -> bool:
        return True


def spec_of(weight: torch.Tensor, name: str) -> TensorSpec:
    panels = divide(*weight.shape, LowBitFormat.parse(name), "avx512", 40_000)
    return TensorSpec("w", panels.shape, "U8", None, "rows", panels)


@pytest.mark.parametrize("name", ["int4", "int4-g128-sym", "int8"])
@pytest.mark.parametrize("chunk_elements", [1, 100_000])
def test_panels_hold_the_rounded_weight(name: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_CHUNK_ELEMENTS", chunk_elements)
    weight = torch.randn(900, 128)
    spec = spec_of(weight, name)
    assert spec.panels is not None
    assert spec.panels.num_panels > 2
    with QuantizedSource(plain := OneTensor(weight), num_threads=3) as source:
        stored = torch.cat([source.read(spec, 0, 1), source.read(spec, 1, spec.shape[0])])
    assert tuple(stored.shape) == spec.shape
    if chunk_elements == 1:
        assert plain.most_rows == 64
    low_bit = spec.panels.low_bit
    rows = torch.cat([values_of(read_rows(views_of(p, spec.panels), spec.panels), low_bit) for p in stored])[:900]
    assert torch.equal(rows, values_of(round_to_nearest(weight, low_bit), low_bit))


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int8"])
def test_infinity_is_refused(name: str) -> None:
    weight = torch.randn(300, 128)
    weight[170, 3] = -torch.inf
    spec = spec_of(weight, name)
    with (
        QuantizedSource(OneTensor(weight), num_threads=2) as source,
        pytest.raises(CheckpointError, match="'w' holds an infinite value"),
    ):
        source.read(spec, 0, spec.shape[0])


class Bf16Tensor(OneTensor):
    """A source whose weight lies in the checkpoint as bf16."""

    def read_bf16(self, spec: TensorSpec, row_start: int, row_stop: int) -> np.ndarray:  # type: ignore[override,type-arg]
        rows: np.ndarray = self.weight[row_start:row_stop].bfloat16().view(torch.uint8).numpy().reshape(-1)  # type: ignore[type-arg]
        return rows.copy()


@pytest.mark.parametrize("name", ["int4", "int4-g128-sym", "int8"])
def test_the_compiled_kernel_makes_the_same_panels(name: str) -> None:
    pytest.importorskip("llvmlite")
    weight = torch.randn(1000, 128).bfloat16().float()  # the last 40 rows fill no block of the layout
    spec = spec_of(weight, name)
    with (
        QuantizedSource(OneTensor(weight), 2) as plain,
        QuantizedSource(compiled := Bf16Tensor(weight), 2, None, CompiledRounding()) as source,
    ):
        assert torch.equal(source.read(spec, 0, spec.shape[0]), plain.read(spec, 0, spec.shape[0]))
    assert compiled.most_rows == (0 if name == "int8" else 40)


class SomeAhead:
    """Panels that are there already: `content` by number. `left` are those that nobody has taken."""

    def __init__(self, content: dict[int, np.ndarray]) -> None:  # type: ignore[type-arg]
        self.left = dict(content)

    def take(self, name: str, panels: Panels, number: int) -> np.ndarray | None:  # type: ignore[type-arg]
        assert name == "w"
        return self.left.pop(number, None)


class AheadTensor(Bf16Tensor):
    """The checkpoint knows the weight by its name."""

    def bf16_key(self, spec: TensorSpec) -> str:  # type: ignore[override]
        return spec.name


def test_what_is_there_already_is_taken_whether_one_panel_is_read_or_several() -> None:
    pytest.importorskip("llvmlite")
    weight = torch.randn(1500, 128).bfloat16().float()
    spec = spec_of(weight, "int8")
    assert spec.panels is not None
    count, marks = spec.panels.num_panels, (0, 2, 3)
    assert count > 4
    ahead = SomeAhead({number: np.full(spec.panels.panel_bytes, number, np.uint8) for number in marks})
    with (
        QuantizedSource(AheadTensor(weight), 2, None, CompiledRounding(), ahead) as source,  # type: ignore[arg-type]
        QuantizedSource(OneTensor(weight), 2) as plain,
    ):
        wanted = plain.read(spec, 0, count)
        for number in marks:
            wanted[number] = number
        assert torch.equal(torch.cat([source.read(spec, 0, 1), source.read(spec, 1, count)]), wanted)
    assert not ahead.left


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_compiled_kernel_refuses_infinity(name: str) -> None:
    pytest.importorskip("llvmlite")
    weight = torch.randn(300, 128)
    weight[170, 3] = torch.inf
    spec = spec_of(weight, name)
    with (
        QuantizedSource(Bf16Tensor(weight), 2, None, CompiledRounding()) as source,
        pytest.raises(CheckpointError, match="'w' holds an infinite value"),
    ):
        source.read(spec, 0, spec.shape[0])


def test_other_tensors_pass_through() -> None:
    weight = torch.randn(30, 8)
    with QuantizedSource(OneTensor(weight)) as source:
        plain = replace(spec_of(torch.zeros(64, 64), "int4"), shape=(30, 8), dtype="F32", panels=None)
        assert torch.equal(source.read(plain, 3, 9), weight[3:9])
