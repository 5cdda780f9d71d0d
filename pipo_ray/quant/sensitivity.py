"""What each format of each weight costs: measured per block, divided over its weights. Imports no torch.

Measuring every weight in every format would take a pass over the model for each. Two things save most of them, both
checked on the bundled model weight by weight (`benchmarks/mixed_precision.py --check`):

- KL divergence grows with the square of a small error, so another format's follows from how much less it changes the
  products on the calibration text. Each block is measured in one format, the coarsest.
- Within a block it is divided by the relative change of each weight's product, |X (W' - W)^T|^2 / |X W^T|^2. (The
  change itself says nothing about one weight beside another: products have different sizes.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipo_ray.json_file import write_json
from pipo_ray.model.blocks import BlockSpec
from pipo_ray.quant.assign import refusal
from pipo_ray.quant.formats import SIXTEEN_BITS, LowBitFormat
from pipo_ray.quant.knapsack import Item, Option
from pipo_ray.quant.panels import PANEL_BYTES, divide
from pipo_ray.quant.patterns import rules_for
from pipo_ray.quant.policy import PolicyModel, Precision
from pipo_ray.quant.target import LeastRounding
from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.layout import BLOCK_ALIGNMENT

if TYPE_CHECKING:
    from pipo_ray.quant.calibration_text import CalibrationText
    from pipo_ray.quant.target import Target
    from pipo_ray.store.checkpoint import Checkpoint

FORMATS = ("int4-g128", "int4-g64", "int4-g32", "int8")
"""What a weight may become, the coarsest first, or stay at 16 bits. Those without zeros take as much and are worse."""

_VERSION = 1
"""To be raised where what is measured, or how a choice is made, changes."""


@dataclass(frozen=True)
class Candidate:
    """A weight that can be quantized (a fused expert tensor as a whole): the block that it is measured with, and its
    bytes in each format that it can have, the coarsest first, 16 bits last.
    """

    name: str
    block: str
    sizes: Mapping[str, int]

    @property
    def coarsest(self) -> str:
        """The first format."""
        return next(iter(self.sizes))


@dataclass(frozen=True)
class Candidates:
    """Of a model: the weights that can be quantized, the names of matrices that cannot, and the bytes of what is
    streamed beside the candidates, with what pads the blocks.
    """

    weights: tuple[Candidate, ...]
    others: tuple[str, ...]
    fixed_bytes: int

    @property
    def blocks(self) -> dict[str, tuple[Candidate, ...]]:
        """Those measured together, by block."""
        result: dict[str, tuple[Candidate, ...]] = {}
        for one in self.weights:
            result[one.block] = (*result.get(one.block, ()), one)
        return result


def find_candidates(
    blocks: Sequence[BlockSpec],
    looked_up: Collection[str],
    layout: str,
    *,
    linear_experts: bool,
    panel_bytes: int = PANEL_BYTES,
) -> Candidates:
    """Of a model's `blocks` in bfloat16; the other arguments are those of `assign`."""
    sizes: dict[str, dict[str, int]] = {}
    homes: dict[str, str] = {}
    others: list[str] = []
    fixed = BLOCK_ALIGNMENT * len(blocks)
    for block in blocks:
        for tensor in block.tensors:
            plain = num_bytes(tensor.dtype, tensor.shape)
            formats = [
                low_bit
                for low_bit in map(LowBitFormat.parse, FORMATS)
                if refusal(tensor, low_bit, looked_up, linear_experts) is None
            ]
            if not formats:
                fixed += plain if block.kind != "embedding" else 0
                if len(tensor.shape) == 2:
                    others.append(tensor.name)
                continue
            homes[tensor.name] = f"layers.{block.layer}.experts" if tensor.expert is not None else block.name
            mine = sizes.setdefault(tensor.name, {})
            for low_bit in formats:
                panels = divide(tensor.shape[0], tensor.shape[1], low_bit, layout, panel_bytes)
                mine[low_bit.name] = mine.get(low_bit.name, 0) + math.prod(panels.shape)
            mine[SIXTEEN_BITS] = mine.get(SIXTEEN_BITS, 0) + plain
    weights = tuple(Candidate(name, homes[name], sizes[name]) for name in sizes)
    return Candidates(weights, tuple(dict.fromkeys(others)), fixed)


@dataclass
class Sensitivity:
    """What was measured on `tokens` tokens: `errors`, of each weight in each format the relative change of its product
    (squares, see above); `divergences`, of each block the KL divergence of the model's output in nats per token with
    all its weights in their coarsest formats.
    """

    tokens: int
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    divergences: dict[str, float] = field(default_factory=dict)

    def items(self, candidates: Candidates) -> list[Item]:
        """For the knapsack: every weight's bytes and loss in each format."""
        result = []
        for block, weights in candidates.blocks.items():
            whole = sum(self.errors[one.name][one.coarsest] for one in weights)
            scale = self.divergences[block] / whole if whole else 0.0
            for one in weights:
                losses = {name: scale * self.errors[one.name].get(name, 0.0) for name in one.sizes}
                result.append(Item(one.name, tuple(Option(name, one.sizes[name], losses[name]) for name in one.sizes)))
        return result

    @classmethod
    def load(cls, file: Path, tokens: int) -> Sensitivity:
        """What is in `file`, which may be only a part; nothing where there is none, or another kind of file."""
        try:
            raw: Any = json.loads(file.read_text(encoding="utf-8"))
            errors = {name: {k: float(v) for k, v in some.items()} for name, some in raw["errors"].items()}
            divergences = {name: float(value) for name, value in raw["divergences"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(tokens)
        return cls(tokens, errors, divergences) if raw.get("tokens") == tokens else cls(tokens)

    def save(self, file: Path) -> None:
        """Raises OSError."""
        write_json(file, {"tokens": self.tokens, "errors": self.errors, "divergences": self.divergences})


@dataclass(frozen=True)
class Measured:
    """What a choice for `model` rests on: `items` for `choose`, the names of matrices that cannot be quantized, and the
    bytes that are streamed beside the items.
    """

    items: tuple[Item, ...]
    others: tuple[str, ...]
    fixed_bytes: int
    model: PolicyModel

    def policy(self, formats: Mapping[str, str]) -> Precision:
        """A policy that gives each item by its name the format in `formats`."""
        return Precision(rules_for(formats, self.others), self.model)

    def least_rounding(self) -> LeastRounding | None:
        """The weight and format that alone lose least; None if nothing can be rounded."""
        options = [(one, option) for one in self.items for option in one.options if option.format != SIXTEEN_BITS]
        if not options:
            return None
        one, option = min(options, key=lambda pair: pair[1].loss)
        return LeastRounding(one.name, option.format, option.loss)

    def to_json(self) -> dict[str, Any]:
        """For the parent process."""
        return {
            "items": [[one.name, [[o.format, o.nbytes, o.loss] for o in one.options]] for one in self.items],
            "others": self.others, "fixed_bytes": self.fixed_bytes, "model": self.model.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, raw: Any) -> Measured:
        """What `to_json` gave."""
        items = tuple(Item(name, tuple(Option(*option) for option in options)) for name, options in raw["items"])
        return cls(items, tuple(raw["others"]), int(raw["fixed_bytes"]), PolicyModel.from_json(raw["model"]))


def measurement_key(checkpoint: Checkpoint, text: CalibrationText) -> str:
    """Hex that changes with the checkpoint, the text and the formats: of what was measured."""
    return _key([_VERSION, checkpoint.fingerprint(), text.checksum, FORMATS])


def choice_key(checkpoint: Checkpoint, text: CalibrationText, target: Target) -> str:
    """The same of what was chosen for a target."""
    return _key([measurement_key(checkpoint, text), target.to_json()])


def _key(parts: list[Any]) -> str:
    import xxhash

    return xxhash.xxh3_128(json.dumps(parts).encode()).hexdigest()
