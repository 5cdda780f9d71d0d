"""A weight in a foreign format: what every format answers, and how its numbers become ours.

What is exact, and what is not, in the order of preference:

- **Repacked.** int4 codes in groups that 32 divides (a group of 256, or a whole row, becomes several of ours with the
  same scale), and int8 codes with one scale per row and no zero points. Codes are kept. A panel has its scales and
  zeros in bf16, so those of float16 or float32 are rounded once, by 2^-8 relative at most. Without zero points every
  value is then within 2^-8 of itself, as it would be if the weight were dequantized to bf16. With them it is within
  2^-8 (|q - 8| s + |z|), at most a 16th of a step of the codes, in the mean 0.005 of a step: as with dequantizing to
  bf16, and little beside the codes' own 0.29 (`test_panels_are_as_near_as_bf16`).
- **Dequantized**, computed in float32 and rounded once to the run's dtype: everything else. 2 and 3 bits, groups that
  32 does not divide, columns in another order than their groups (act-order), int8 in groups or with zero points, FP8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from pipo_ray.errors import CheckpointError
from pipo_ray.quant.formats import GROUPS, LowBitFormat
from pipo_ray.quant.rounding import Rounded


class Survey(NamedTuple):
    """Of a weight's scales and zeros: how many groups it has, and in how many both are the same in bf16."""

    groups: int
    exact: int

    def __add__(self, other: object) -> Survey:
        assert isinstance(other, Survey)
        return Survey(self.groups + other.groups, self.exact + other.exact)


class EncodedRows(Protocol):
    """Some rows of a weight as they were read. Decoding them is left to the thread that wants them."""

    def values(self) -> torch.Tensor:
        """float32 [rows, columns]."""

    def rounded(self, low_bit: LowBitFormat) -> Rounded:
        """The codes themselves, in a format that holds them."""


@dataclass(frozen=True)
class ForeignWeight(ABC):
    """A weight, called `name` as it would be if it were not quantized, from `file`. `shape` is the plain weight's; its
    rows are those of the matrix [product of all but the last, last]. `low_bit` is the coarsest format of ours that
    holds its codes, or None.
    """

    name: str
    shape: tuple[int, ...]
    file: Path
    low_bit: LowBitFormat | None

    @property
    def is_quantized(self) -> bool:
        """Whether it is more than plain numbers under another name."""
        return True

    @abstractmethod
    def rows(self, start: int, stop: int) -> EncodedRows:
        """Read rows `start` to `stop`."""

    @abstractmethod
    def survey(self) -> Survey:
        """Look at all scales before anything is packed.

        Raises CheckpointError for one that is zero or not finite.
        """

    def fits(self, wanted: LowBitFormat) -> bool:
        """Whether the codes are exact in `wanted`, too: groups that divide ours, no zeros where it has none."""
        own = self.low_bit
        if own is None or own.bits != wanted.bits:
            return False
        if own.bits == 8:
            return True
        return own.group % wanted.group == 0 and (own.symmetric or not wanted.symmetric)

    def check_scales(self, scales: torch.Tensor, what: str) -> None:
        """Raise CheckpointError for a scale of 0, infinity or NaN. `what` is its tensor's name."""
        good = scales.float()
        good = good.isfinite() & (good != 0)
        if not bool(good.all()):
            value = float(scales.float()[~good].flatten()[0])
            raise CheckpointError(
                f"tensor {what!r} in {self.file} holds the scale {value:g} ({int((~good).sum())} of {good.numel()} "
                "are zero or not finite); the checkpoint is damaged: download it again"
            )


class Codes(NamedTuple):
    """`codes` [rows, columns], uint8 for unsigned ones and int8 for int8; `scales` float32 [rows, groups] and
    `zero_points`, the code that stands for 0, float32 likewise or None for the middle one: 8 of 4 bits, 0 of int8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


@dataclass(frozen=True)
class IntegerRows:
    """Rows of integer codes: a value is (code - zero point) scale. `group_of` is each column's group if they are not in
    order. `decode` unpacks what was read.
    """

    decode: Callable[[], Codes]
    middle: int
    group_of: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """float32 [rows, columns], exact for scales of 16 bits."""
        codes, scales, zero_points = self.decode()
        numbers = codes.float()
        if self.group_of is not None:
            offsets = self.middle if zero_points is None else zero_points[:, self.group_of]
            return (numbers - offsets) * scales[:, self.group_of]
        grouped = numbers.view(len(numbers), scales.shape[1], -1)
        grouped -= self.middle if zero_points is None else zero_points.unsqueeze(2)
        return grouped.mul_(scales.unsqueeze(2)).view(numbers.shape)

    def rounded(self, low_bit: LowBitFormat) -> Rounded:
        """As in `EncodedRows`."""
        codes, scales, zero_points = self.decode()
        if low_bit.bits == 8:
            codes = codes if codes.dtype == torch.int8 else (codes.short() - self.middle).to(torch.int8)
            return Rounded(codes, scales.bfloat16(), torch.zeros_like(scales, dtype=torch.bfloat16))
        repeats = codes.shape[1] // low_bit.group // scales.shape[1]
        ours, zeros = bf16_of(scales, zero_points)
        return Rounded(codes, ours.repeat_interleave(repeats, 1), zeros.repeat_interleave(repeats, 1))


def bf16_of(scales: torch.Tensor, zero_points: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of int4, as a panel has them: (q - zero point) s = (q - 8) s + z."""
    ours = scales.bfloat16()
    if zero_points is None:
        return ours, torch.zeros_like(ours)
    return ours, ((8 - zero_points) * scales).bfloat16()


def count_exact(scales: torch.Tensor, zero_points: torch.Tensor | None) -> Survey:
    """How many groups of int4 keep scale and zero."""
    ours, zeros = bf16_of(scales, zero_points)
    same = ours.float() == scales
    if zero_points is not None:
        same &= zeros.float() == (8 - zero_points) * scales
    return Survey(same.numel(), int(same.sum()))


def holding(bits: int, columns: int, group: int, symmetric: bool) -> LowBitFormat | None:
    """The coarsest format of ours that holds codes of `bits` bits in groups of `group` columns."""
    if bits == 8:
        return LowBitFormat(8, 0, True) if group == columns and symmetric else None
    if bits != 4:
        return None
    ours = next((ours for ours in reversed(GROUPS) if group % ours == 0), None)
    return None if ours is None else LowBitFormat(4, ours, symmetric)


def group_columns(name: str, columns: int, group: int) -> int:
    """The columns of a group; -1 is all of them. Raises CheckpointError for a size that does not divide."""
    if group == -1:
        return columns
    if columns % group:
        raise CheckpointError(
            f"weight {name!r} has {columns} columns, which groups of {group} do not divide; use the config.json that "
            "belongs to these weights"
        )
    return group


def group_order(found: torch.Tensor, columns: int, groups: int, what: str) -> torch.Tensor | None:
    """Each column's group, int64 [columns], if they are not in order; None if they are, or -1 for all of them.

    Raises CheckpointError for a group that there is not. `what` is the tensor's name.
    """
    order = found.long()
    if bool((order == -1).all()) or torch.equal(order, torch.arange(columns) // (columns // groups)):
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(
            f"tensor {what!r} puts a column into group {int(order.max())}, there are {groups} from 0 on; the "
            "checkpoint is damaged: download it again"
        )
    return order
