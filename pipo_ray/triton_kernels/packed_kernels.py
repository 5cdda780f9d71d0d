"""Attention to packed pages on a CUDA device, and packing and unpacking them. Importing this needs triton."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipo_ray.model.cpu_linear import HALF_DTYPES
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.attention_parts import AttentionWork
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout
from pipo_ray.triton_kernels.packed_attention import PART_NUMBERS, SEQUENCE_NUMBERS, attend_packed
from pipo_ray.triton_kernels.page_packing import pack_leaving, unpack

_MOST_DIM = 256
_MOST_GROUP = 64
_MERGED_ELEMENTS = 8192
"""Numbers of parts that a program merges at a time: 64 for each of its threads."""

_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True)
class Tuning:
    """How the attention kernel is cut: programs for each multiprocessor, as several must wait for memory at the same
    time, each of so many warps, with pages that are loaded `stages` - 1 steps ahead.
    """

    programs: int = 8
    warps: int = 4
    stages: int = 2


class PackedKernels:
    """Kernels for packed pages on `device`. One caller at a time, on torch's current stream. On the CPU only under
    Triton's interpreter.
    """

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        self.tuning = tuning or Tuning()
        self._device = device
        self._interpreted = device.type != "cuda"
        processors = (
            _INTERPRETED_PROCESSORS
            if self._interpreted
            else torch.cuda.get_device_properties(device).multi_processor_count
        )
        self.num_programs = processors * self.tuning.programs
        """Programs of an attention that keep the device busy."""
        self._launches: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._partials = self._memory(0, torch.float32)
        self._arrivals = self._memory(0, torch.int32)

    def takes(self, layout: PageLayout, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether `attend` is for these, [heads, tokens, dim] each."""
        group, rest = divmod(query.shape[0], layout.heads)
        return (
            rest == 0
            and group <= _MOST_GROUP
            and layout.bits in (4, 8)
            and max(layout.key_dim, layout.value_dim) <= _MOST_DIM
            and layout.key_dim % 16 == layout.value_dim % 16 == 0
            and query.dtype in HALF_DTYPES
            and all(x.dtype == query.dtype and x.device == self._device and x.stride(2) == 1 for x in (keys, values))
            and query.device == self._device
            and query.stride(2) == 1
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, rule: AttentionRule, layout: PageLayout,
        addresses: Tensor, numbers: Tensor, work: AttentionWork,
    ) -> None:  # fmt: skip
        """Append tokens to windows and attend, see `attend_packed`: `query`, `keys`, `values` [heads, tokens, dim] and
        the contiguous `output` [tokens, heads, value_dim] are the row's; `numbers`, int32, are those of `work`.
        """
        heads = layout.heads
        group = query.shape[0] // heads
        merged_rows, values_at_once = triton.next_power_of_2(group), _channels(layout.value_dim)
        partials = self._partials
        if (size := work.num_parts * heads * merged_rows * (values_at_once + 2)) > partials.numel():
            partials = self._partials = self._memory(size, torch.float32)
        if (size := work.num_sequences * heads) > self._arrivals.numel():
            self._arrivals = self._memory(size, torch.int32)
        softcap, sinks = rule.softcap, rule.sinks
        key = layout, group, softcap is None, sinks is None, query.dtype
        if (constants := self._launches.get(key)) is None:
            constants = self._launches[key] = (
                heads, group, *_layout_constants(layout), softcap is not None, sinks is not None, max(16, merged_rows),
                _channels(layout.key_dim), values_at_once, merged_rows,
                max(1, _MERGED_ELEMENTS // (merged_rows * values_at_once)), self.tuning.stages,
                tl.float32 if self._interpreted else _TRITON_TYPES[query.dtype],
            )  # fmt: skip
        attend_packed[(work.num_parts, heads)](
            query, keys, values, output, query if sinks is None else sinks, addresses, numbers, partials,
            self._arrivals, query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0),
            values.stride(1), work.num_sequences, work.num_parts, rule.scale, 1.0 if softcap is None else softcap,
            *constants, num_warps=self.tuning.warps, num_stages=self.tuning.stages,
        )  # fmt: skip

    def pack(
        self, layout: PageLayout, dtype: torch.dtype, addresses: Tensor, numbers: Tensor, work: AttentionWork
    ) -> None:
        """Pack the pages that leave windows of `dtype`, see `pack_leaving`, after `attend` with the same numbers."""
        first = work.num_sequences * SEQUENCE_NUMBERS.value + work.num_parts * PART_NUMBERS.value
        sharing, groups = layout.heads_per_group, layout.value_groups
        pack_leaving[(work.num_leaving, layout.heads // sharing, 1 + groups)](
            addresses, numbers, work.num_sequences, first, *_layout_constants(layout),
            _channels(sharing * layout.key_dim),
            _channels(sharing * layout.value_dim // groups), _TRITON_TYPES[dtype], num_warps=4,
        )  # fmt: skip

    def unpack(self, pages: Tensor, layout: PageLayout, keys: Tensor, values: Tensor) -> None:
        """As `kv_rounding.unpack_pages`, of contiguous `pages` [pages, page_bytes] to 16 bits."""
        unpack[(len(pages), layout.heads)](
            pages, keys, values, keys.stride(0), values.stride(0), *_layout_constants(layout),
            _channels(layout.key_dim), _channels(layout.value_dim), num_warps=4,
        )  # fmt: skip

    def _memory(self, size: int, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # written to in and out of inference mode
            return torch.zeros(max(1 << 12, size), dtype=dtype, device=self._device)


def _layout_constants(layout: PageLayout) -> tuple[int, ...]:
    """Bits, sizes, what shares scales, bytes of a page, and where its parts behind the first one begin."""
    _, *begins = itertools.accumulate((0, *layout.parts[:-1]))
    return (
        layout.bits, layout.key_dim, layout.value_dim, layout.heads_per_group, layout.value_groups, layout.page_bytes,
        *begins,
    )  # fmt: skip


def _channels(dim: int) -> int:
    """A program's channels are a power of two, and no fewer than a product on tensor cores has."""
    channels: int = max(16, triton.next_power_of_2(dim))
    return channels


assert PAGE_TOKENS == 64, "the kernels' page"
