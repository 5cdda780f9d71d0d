"""Integers of a few bits out of 32-bit words."""

from __future__ import annotations

import torch


def packed_words(count: int, bits: int) -> int:
    """The 32-bit words that `count` integers of `bits` bits take, without gaps."""
    return -(-count * bits // 32)


def unpack_rows(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The first `columns` integers of each row of `words`, int32 [rows, n]: uint8 [rows, columns], unsigned.

    They lie without gaps from the lowest bit of the first word on, so one of 3 bits may begin in a word and end in the
    next. Words are little-endian in memory, as safetensors has them.
    """
    # `contiguous` leaves the odd strides of a single column, which `view` refuses.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return data[:, :columns]
    if bits == 4:
        return torch.stack((data & 15, data >> 4), 2).view(len(data), -1)[:, :columns]
    first = torch.arange(columns) * bits
    low, shift = data[:, first // 8].int(), (first % 8).int()
    high = data[:, ((first + bits - 1) // 8)].int()  # the same byte again where it ends there
    return ((low | high << 8) >> shift & (1 << bits) - 1).to(torch.uint8)
