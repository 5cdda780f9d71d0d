"""Rows of inputs as the kernels in `int4_words.py` take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WordInputs:
    """Of n rows in groups of `group` columns: int16 [n, columns], or as `spread` has them; what one stands for, and the
    sum of the rounded inputs, float32 [n, columns / group]; and eight times the sum of the words, int32 [n, columns /
    group].
    """

    group: int
    words: torch.Tensor
    steps: torch.Tensor
    sums: torch.Tensor
    middles: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Words, steps, sums and middles."""
        return self.words, self.steps, self.sums, self.middles
