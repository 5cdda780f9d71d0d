"""Models made of sizes alone, and plans for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.model.facts import ModelFacts, UnitFacts
from pipo_ray.plan.budget import RunPlan, plan_run
from pipo_ray.plan.pieces import Piece, cut_pieces
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import divide
from pipo_ray.store.layout import plan_files
from pipo_ray.store.manifest import FORMAT_VERSION, Manifest, StoredBlock

GIB = 1 << 30


@cache
def model(layers: int, width: int, vocabulary: int) -> tuple[Manifest, ModelFacts]:
    """One matrix and one vector per layer, an embedding, a head."""
    blocks = [BlockSpec("embedding", "embedding", None, (TensorSpec("embed", (vocabulary, width), "F32"),))]
    units = [UnitFacts("embed", ("embed",), "lookup")]
    for layer in range(layers):
        matrix, vector = f"{layer}.matrix", f"{layer}.vector"
        specs = (
            TensorSpec(vector, (width,), "F32"),
            TensorSpec(matrix, (4 * width, width), "F32", cut="rows"),
        )
        blocks.append(BlockSpec(f"layer{layer}", "mlp", layer, specs))
        units += [UnitFacts(matrix, (matrix,), "plain"), UnitFacts(vector, (vector,), "plain")]
    blocks.append(BlockSpec("rest", "rest", None, (TensorSpec("norm", (width,), "F32"),)))
    blocks.append(BlockSpec("head", "head", None, (TensorSpec("head", (vocabulary, width), "F32", cut="rows"),)))
    units += [UnitFacts("norm", ("norm",), "plain"), UnitFacts("head", ("head",), "plain")]
    return _described(blocks, units, layers=layers, vocabulary=vocabulary, width=width)


def _described(
    blocks: list[BlockSpec], units: list[UnitFacts], *, layers: int, vocabulary: int, width: int
) -> tuple[Manifest, ModelFacts]:
    stored = tuple(block for file in plan_files(blocks) for block in file.blocks)
    total = sum(block.nbytes for block in stored)
    manifest = Manifest(FORMAT_VERSION, "", "", "", "float32", {}, stored, total, "", {})
    events = tuple((unit, enters) for unit in range(len(units)) for enters in (True, False))
    facts = ModelFacts("", "", tuple(units), events, True, True, "", None, 8 * width, 512, vocabulary, width, 4 * width,
                       layers, 1, "pipo_ragged", 0, ())  # fmt: skip
    return manifest, facts


def low_bit_model(layers: int, rows: int, columns: int, name: str, panel_bytes: int) -> tuple[Manifest, ModelFacts]:
    """A matrix in the format `name` in every layer, and nothing else."""
    panels = divide(rows, columns, LowBitFormat.parse(name), "avx512", panel_bytes)
    blocks, units = [], []
    for layer in range(layers):
        matrix = f"{layer}.matrix"
        spec = TensorSpec(matrix, panels.shape, "U8", cut="rows", panels=panels)
        blocks.append(BlockSpec(f"layer{layer}", "mlp", layer, (spec,)))
        units.append(UnitFacts(matrix, (matrix,), "plain"))
    return _described(blocks, units, layers=layers, vocabulary=32, width=columns)


def plan(one: tuple[Manifest, ModelFacts], **options: Any) -> RunPlan:
    return plan_run(*one, **{"memory_bytes": 100 * GIB, **options})


class CutOnce:
    """`cut_pieces`, which takes nearly all the time of planning one small model hundreds of times."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], tuple[Sequence[StoredBlock], tuple[Piece, ...]]] = {}

    def __call__(self, blocks: Sequence[StoredBlock], slot_bytes: int) -> tuple[Piece, ...]:
        key = id(blocks), slot_bytes
        if key not in self._found:
            self._found[key] = blocks, cut_pieces(blocks, slot_bytes)  # with the blocks: so no others get their id
        return self._found[key][1]
