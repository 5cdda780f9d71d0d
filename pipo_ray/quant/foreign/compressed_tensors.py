"""compressed-tensors checkpoints, as llm-compressor writes them.

Of a weight [rows, columns]; which modules are quantized and how stands in `config_groups`, but the tensors say it, too:

    weight_packed      int32 [rows, columns * bits / 32]      codes plus 8 (128), from the lowest bit on
    weight_shape       int64 [2]
    weight             int8 or float8_e4m3 [rows, columns]    in place of the two, where it is not packed
    weight_scale       [rows, groups], [rows, 1], [1], or of a block structure [rows / m, columns / n]
    weight_zero_point  int8 like the scales; int32 [rows * bits / 32, groups] where it is packed
    weight_g_idx       int32 [columns]                        each column's group, if they are not in order

A value is (code - zero point) scale. Source: compressed_tensors/compressors and quantization/lifecycle/forward.py of
compressed-tensors 0.20, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from pipo_ray.errors import CheckpointError, UnsupportedModelError
from pipo_ray.quant.foreign.bits import packed_words, unpack_rows
from pipo_ray.quant.foreign.detect import SourceFormat
from pipo_ray.quant.foreign.fp8 import fp8_weight
from pipo_ray.quant.foreign.reading import FLOATS, TensorFiles
from pipo_ray.quant.foreign.weight import Codes, ForeignWeight, IntegerRows, Survey, count_exact, group_order, holding

PARTS = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".input_scale",
    ".input_zero_point", ".output_scale", ".output_zero_point",
)  # fmt: skip
"""How the names end of the tensors that a weight is made of, or that belong to activations."""


def find_weights(files: TensorFiles, source: SourceFormat) -> dict[str, ForeignWeight]:
    """The quantized weights by plain name.

    Raises CheckpointError for one whose parts do not fit together, UnsupportedModelError for a bit width that cannot
    be read.
    """
    schemes = [scheme["weights"] for scheme in source.settings["config_groups"].values() if scheme.get("weights")]
    packed = {int(weights.get("num_bits", 8)) for weights in schemes if weights.get("type", "int") == "int"}
    found: dict[str, ForeignWeight] = {}
    for key, header in files.checkpoint.tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight_packed":
            found[f"{module}.weight"] = _packed_weight(files, module, packed)
        elif leaf == "weight" and header.dtype == "I8":
            found[key] = _plain_weight(files, module)
        elif leaf == "weight" and header.dtype == "F8_E4M3":
            found[key] = fp8_weight(files, key, f"{module}.weight_scale", _block_of(schemes))
    return found


def _block_of(schemes: list[Mapping[str, object]]) -> tuple[int, int] | None:
    """The block structure that FP8 weights share; without one a scale is for a row or for all."""
    for weights in schemes:
        structure = weights.get("block_structure")
        if weights.get("type") == "float" and isinstance(structure, list) and len(structure) == 2:
            return int(structure[0]), int(structure[1])
    return None


def _packed_weight(files: TensorFiles, module: str, widths: set[int]) -> ForeignWeight:
    name = f"{module}.weight"
    files.header(name, f"{module}.weight_shape", ("I64", "I32"), (2,))
    rows, columns = (int(size) for size in files.whole(f"{module}.weight_shape"))
    key = f"{module}.weight_packed"
    words = files.header(name, key, ("I32",)).shape
    bits = next((bits for bits in sorted(widths) if words == (rows, packed_words(columns, bits))), None)
    if bits not in (4, 8):
        raise CheckpointError(
            f"tensor {key!r} in {files.checkpoint.files[key]} has shape {list(words)}, which is no packing of "
            f"[{rows}, {columns}] with {' or '.join(map(str, sorted(widths)))} bits; download the checkpoint again"
        )
    return _with_format(
        _CompressedWeight(name, (rows, columns), files.checkpoint.files[key], None, files, module, bits, True)
    )


def _plain_weight(files: TensorFiles, module: str) -> ForeignWeight:
    key = f"{module}.weight"
    shape = files.checkpoint.tensors[key].shape
    if len(shape) != 2:
        raise UnsupportedModelError(f"tensor {key!r} has shape {list(shape)}: only matrices of int8 can be read")
    return _with_format(_CompressedWeight(key, shape, files.checkpoint.files[key], None, files, module, 8, False))


def _with_format(weight: _CompressedWeight) -> ForeignWeight:
    files, (rows, columns) = weight.files, weight.shape
    shape = files.header(weight.name, weight.key("scale"), FLOATS).shape
    if shape in ((), (1,)):
        shape = (1, 1)
    if len(shape) != 2 or shape[0] not in (1, rows) or not shape[1] or columns % shape[1]:
        raise CheckpointError(
            f"tensor {weight.key('scale')!r} in {weight.file} has shape {list(shape)}, which is no scale per row or "
            f"group of a weight [{rows}, {columns}]; use the config.json that belongs to these weights"
        )
    if weight.has("zero_point"):
        wanted = (packed_words(rows, weight.bits), shape[1]) if weight.packed else None
        files.header(weight.name, weight.key("zero_point"), ("I32",) if weight.packed else ("I8", "I32", "I64"), wanted)
    if weight.has("g_idx"):
        files.header(weight.name, weight.key("g_idx"), ("I32",), (columns,))
        order = group_order(files.whole(weight.key("g_idx")), columns, shape[1], weight.key("g_idx"))
        if order is not None:
            return replace(weight, order=order)
    points = weight.zero_points(0, rows)
    symmetric = points is None or bool((points == weight.middle).all())
    return replace(weight, low_bit=holding(weight.bits, columns, columns // shape[1], symmetric))


@dataclass(frozen=True)
class _CompressedWeight(ForeignWeight):
    files: TensorFiles
    module: str
    bits: int
    packed: bool
    order: torch.Tensor | None = None

    def key(self, part: str) -> str:
        return f"{self.module}.weight_{part}"

    def has(self, part: str) -> bool:
        return self.key(part) in self.files.checkpoint.tensors

    @property
    def middle(self) -> int:
        """The code that stands for 0 where there are no zero points. Packed codes are unsigned."""
        return 1 << self.bits - 1 if self.packed else 0

    def rows(self, start: int, stop: int) -> IntegerRows:
        if self.packed:
            codes = self.files.rows(self.key("packed"), start, stop)
        else:
            codes = self.files.rows(self.name, start, stop)
        symmetric = self.low_bit is not None and self.low_bit.symmetric
        points = None if symmetric else self.zero_points(start, stop)
        scales = self.scales(start, stop)
        return IntegerRows(partial(self._decode, codes, scales, points), self.middle, self.order)

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor, points: torch.Tensor | None) -> Codes:
        return Codes(unpack_rows(codes, self.bits, self.shape[1]) if self.packed else codes, scales, points)

    def scales(self, start: int, stop: int) -> torch.Tensor:
        """Of rows `start` to `stop`: float32 [rows, groups]."""
        return self._per_row(self.key("scale"), start, stop).float()

    def _per_row(self, key: str, start: int, stop: int) -> torch.Tensor:
        shape = self.files.checkpoint.tensors[key].shape
        if len(shape) == 2 and shape[0] != 1:
            return self.files.rows(key, start, stop)
        return self.files.whole(key).view(1, -1).expand(stop - start, -1)

    def zero_points(self, start: int, stop: int) -> torch.Tensor | None:
        """float32 [rows, groups], in the codes' own numbers, or None."""
        if not self.has("zero_point"):
            return None
        if not self.packed:
            return self._per_row(self.key("zero_point"), start, stop).float()
        per_word = 32 // self.bits
        first = start // per_word
        words = self.files.rows(self.key("zero_point"), first, -(-stop // per_word))
        points = unpack_rows(words.T, self.bits, len(words) * per_word).T
        return points[start - first * per_word : stop - first * per_word].float()

    def survey(self) -> Survey:
        scales = self.files.whole(self.key("scale")).float()
        self.check_scales(scales, self.key("scale"))
        if self.low_bit is None:
            return Survey(0, 0)
        points = None if self.low_bit.symmetric else self.zero_points(0, self.shape[0])
        return count_exact(self.scales(0, self.shape[0]), points)
