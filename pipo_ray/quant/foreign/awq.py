"""AWQ checkpoints in the "gemm" layout, as AutoAWQ and llm-compressor's exporters write them.

Of a weight [rows, columns] with groups of g columns:

    qweight  int32 [columns, rows / 8]        codes; the word's nibbles hold its rows in the order 0 2 4 6 1 3 5 7
    qzeros   int32 [columns / g, rows / 8]    zero points, packed alike
    scales   float16 [columns / g, rows]

A value is (code - zero point) scale. Source: `WQLinear_GEMM.from_linear` in AutoAWQ (awq/modules/linear/gemm.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from pipo_ray.quant.foreign.detect import SourceFormat, whole_number
from pipo_ray.quant.foreign.reading import FLOATS, TensorFiles
from pipo_ray.quant.foreign.weight import (
    Codes,
    ForeignWeight,
    IntegerRows,
    Survey,
    count_exact,
    group_columns,
    holding,
)

PARTS = (".qweight", ".qzeros", ".scales")
"""How the names end of the tensors that a weight is made of."""
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row, of a word's eight, that is in each of its nibbles."""


def find_weights(files: TensorFiles, source: SourceFormat) -> dict[str, ForeignWeight]:
    """The quantized weights by plain name. Raises CheckpointError for one whose parts do not fit together."""
    settings = source.settings
    group = whole_number(settings, "group_size" if "group_size" in settings else "q_group_size", 128)
    modules = [key.removesuffix(".qweight") for key in files.checkpoint.tensors if key.endswith(".qweight")]
    return {f"{module}.weight": _weight(files, module, group) for module in modules}


def _weight(files: TensorFiles, module: str, group: int) -> ForeignWeight:
    name, key = f"{module}.weight", f"{module}.qweight"
    columns, words = files.matrix(name, key, ("I32",))
    rows = 8 * words
    group = group_columns(name, columns, group)
    files.header(name, f"{module}.qzeros", ("I32",), (columns // group, rows // 8))
    files.header(name, f"{module}.scales", FLOATS, (columns // group, rows))
    weight = _AwqWeight(name, (rows, columns), files.checkpoint.files[key], None, files, module)
    if holding(4, columns, group, True) is None:
        return weight
    return replace(weight, low_bit=holding(4, columns, group, bool((weight.zero_points() == 8).all())))


@dataclass(frozen=True)
class _AwqWeight(ForeignWeight):
    files: TensorFiles
    module: str

    def rows(self, start: int, stop: int) -> IntegerRows:
        first, last = start // 8, -(-stop // 8)
        codes = self.files.columns(f"{self.module}.qweight", first, last)
        zeros = self.files.columns(f"{self.module}.qzeros", first, last)
        scales = self.files.columns(f"{self.module}.scales", start, stop)
        return IntegerRows(partial(self._decode, codes, zeros, scales, slice(start - 8 * first, stop - 8 * first)), 8)

    def _decode(self, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, cut: slice) -> Codes:
        symmetric = self.low_bit is not None and self.low_bit.symmetric
        points = None if symmetric else _unpack(zeros)[cut].float()
        return Codes(_unpack(codes)[cut], scales.T.float(), points)

    def zero_points(self) -> torch.Tensor:
        """All of them, uint8 [rows, groups]."""
        return _unpack(self.files.whole(f"{self.module}.qzeros"))

    def survey(self) -> Survey:
        scales = self.files.whole(f"{self.module}.scales").float()
        self.check_scales(scales, f"{self.module}.scales")
        if self.low_bit is None:
            return Survey(0, 0)
        return count_exact(scales, None if self.low_bit.symmetric else self.zero_points().T.float())


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """uint8 [8 m, n] of int32 [n, m]: the rows of the weight, in their own order."""
    turned = words.T.contiguous()
    rows = torch.empty(len(turned), 8, len(words), dtype=torch.uint8)
    for place, row in enumerate(NIBBLES):
        rows[:, row] = turned >> 4 * place & 15
    return rows.view(-1, len(words))
