"""Blocks: the units of placement, and the tensors in them in the order of use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipo_ray.quant.panels import Panels

BlockKind = Literal["embedding", "attention", "mlp", "expert", "layer", "rest", "head"]
Cut = Literal["none", "rows"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the module graph, or one expert's slice of a fused expert tensor.

    `name` is the name in the module graph's state dict. With `expert` set, the tensor is `graph_tensor[expert]` and
    `shape` is the slice's (without the expert dimension). `dtype` is the safetensors name ("BF16", "F16", "F32", "I64",
    ...) it is stored in. `cut` says whether a part of the rows (dim 0) may be used alone ("rows") or the tensor is only
    usable whole ("none"). `first_row` is None for all of it; else this is a part, whose `shape[0]` rows begin there.
    `panels` says that it is stored with few bits, and how: `shape` and `dtype` are those of what is stored then.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    expert: int | None = None
    cut: Cut = "none"
    panels: Panels | None = None
    first_row: int | None = field(default=None, repr=False)


@dataclass(frozen=True)
class BlockSpec:
    """A block: unit of placement. `tensors` are in the order in which a sweep uses them; `layer` is None outside the
    decoder layers.
    """

    name: str
    kind: BlockKind
    layer: int | None
    tensors: tuple[TensorSpec, ...]
