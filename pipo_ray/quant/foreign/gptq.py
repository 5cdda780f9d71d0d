"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and optimum write them.

Of a weight [rows, columns] with `bits` bits and groups of g columns:

    qweight  int32 [columns * bits / 32, rows]           codes of a column of words from the lowest bit on, without gaps
    qzeros   int32 [columns / g, rows * bits / 32]       zero points, packed along the rows
    scales   float16 [columns / g, rows]
    g_idx    int32 [columns]                             each column's group; in order unless `desc_act`

A value is (code - zero point) scale. `checkpoint_format` "gptq" stores zero points less one, "gptq_v2" as they are.
Source: `pack` and `dequantize_weight` of GPTQModel's TorchLinear (gptqmodel/nn_modules/qlinear) and, for the one less,
`convert_gptq_v1_to_v2_format_module` (gptqmodel/utils/model.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from pipo_ray.errors import CheckpointError
from pipo_ray.quant.foreign.bits import packed_words, unpack_rows
from pipo_ray.quant.foreign.detect import SourceFormat, whole_number
from pipo_ray.quant.foreign.reading import FLOATS, TensorFiles
from pipo_ray.quant.foreign.weight import (
    Codes,
    ForeignWeight,
    IntegerRows,
    Survey,
    count_exact,
    group_columns,
    group_order,
    holding,
)

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
"""How the names end of the tensors that a weight is made of."""
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""By bits, a word with the number 1 in each place."""


def find_weights(files: TensorFiles, source: SourceFormat) -> dict[str, ForeignWeight]:
    """The quantized weights by plain name. Raises CheckpointError for one whose parts do not fit together."""
    bits = whole_number(source.settings, "bits")
    less_one = source.settings.get("checkpoint_format", "gptq") == "gptq"
    return {
        f"{key[: -len('.qweight')]}.weight": _weight(
            files, key[: -len(".qweight")], bits, whole_number(source.settings, "group_size", -1), less_one
        )
        for key in files.checkpoint.tensors
        if key.endswith(".qweight")
    }


def _weight(files: TensorFiles, module: str, bits: int, group: int, less_one: bool) -> ForeignWeight:
    name = f"{module}.weight"
    words, rows = files.matrix(name, f"{module}.qweight", ("I32",))
    columns = words * 32 // bits
    group = group_columns(name, columns, group)
    groups = columns // group
    if packed_words(columns, bits) != words or rows * bits % 32:
        raise CheckpointError(
            f"weight {name!r}: {words} x {rows} words of {bits} bits are no whole matrix; check config.json"
        )
    files.header(name, f"{module}.qzeros", ("I32",), (groups, packed_words(rows, bits)))
    files.header(name, f"{module}.scales", FLOATS, (groups, rows))
    order = None
    if f"{module}.g_idx" in files.checkpoint.tensors:
        files.header(name, f"{module}.g_idx", ("I32",), (columns,))
        order = group_order(files.whole(f"{module}.g_idx"), columns, groups, f"{module}.g_idx")
    weight = _GptqWeight(
        name, (rows, columns), files.checkpoint.files[f"{module}.qweight"], None, files, module, bits, less_one, order
    )
    if order is None and bits in (4, 8) and holding(bits, columns, group, True) is not None:
        return replace(weight, low_bit=holding(bits, columns, group, weight.is_symmetric()))
    return weight


@dataclass(frozen=True)
class _GptqWeight(ForeignWeight):
    files: TensorFiles
    module: str
    bits: int
    less_one: bool
    order: torch.Tensor | None

    def rows(self, start: int, stop: int) -> IntegerRows:
        per_word = 32 // self.bits if 32 % self.bits == 0 else 32
        # Words of the zero points, whole, that hold those of the rows; 3 bits come in three words for 32 rows.
        first, last = start // per_word, -(-stop // per_word)
        words = per_word * self.bits // 32
        codes = self.files.columns(f"{self.module}.qweight", start, stop)
        zeros = self.files.columns(f"{self.module}.qzeros", first * words, last * words)
        scales = self.files.columns(f"{self.module}.scales", start, stop)
        cut = slice(start - first * per_word, stop - first * per_word)
        return IntegerRows(partial(self._decode, codes, zeros, scales, cut), 1 << self.bits - 1, self.order)

    def _decode(self, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, cut: slice) -> Codes:
        unpacked = unpack_rows(codes.T, self.bits, self.shape[1])
        symmetric = self.low_bit is not None and self.low_bit.symmetric
        points = None if symmetric else self._zero_points(zeros)[:, cut].T.float()
        return Codes(unpacked, scales.T.float(), points)

    def _zero_points(self, words: torch.Tensor) -> torch.Tensor:
        """uint8 [groups, rows] of int32 [groups, words]. 0 less one takes a 1 from the next point of its word, as
        GPTQModel subtracts in whole words: added there it is given back. With 3 bits each point is for itself.
        """
        by_word = self.less_one and self.bits in _ONES
        if by_word:
            words = words + _ONES[self.bits]  # without the carry out of the last point
        points = unpack_rows(words, self.bits, words.shape[1] * 32 // self.bits)
        return points + 1 & (1 << self.bits) - 1 if self.less_one and not by_word else points

    def is_symmetric(self) -> bool:
        """Whether all zero points are the middle of the codes, whatever config.json says of `sym`."""
        points = self._zero_points(self.files.whole(f"{self.module}.qzeros"))
        return bool((points == 1 << self.bits - 1).all())

    def survey(self) -> Survey:
        scales = self.files.whole(f"{self.module}.scales").float()
        self.check_scales(scales, f"{self.module}.scales")
        if self.low_bit is None:
            return Survey(0, 0)
        if self.low_bit.symmetric:
            return count_exact(scales, None)
        return count_exact(scales, self._zero_points(self.files.whole(f"{self.module}.qzeros")).float())
