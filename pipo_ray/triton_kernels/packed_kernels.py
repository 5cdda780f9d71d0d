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
from pipo_ray.triton_kernels.launch import Launch
from pipo_ray.triton_kernels.packed_attention import MERGED, PART_NUMBERS, SEQUENCE_NUMBERS, attend_packed
from pipo_ray.triton_kernels.page_packing import pack_leaving, unpack

_MOST_DIM = 256
_MOST_GROUP = 64
_MERGED_ELEMENTS = 8192
"""Numbers of parts that a program merges at a time: 64 for each of its threads."""
_FEW_ELEMENTS = 4 * 128
"""Of a program's sum of values, for which `Tuning.registers` suffice: compiled for sm_90 nothing is spilt."""
_MOST_LAUNCHES = 256
"""Kept at a time: they have the numbers of parts in them, which change with every page."""

_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True)
class Tuning:
    """How the attention kernel is cut: about so many programs for each multiprocessor, each of so many warps, with
    pages that are loaded `stages` - 1 steps ahead. A product has at least `rows` rows; with fewer than 16 a thread has
    fewer numbers to do. A thread has at most `registers`, where there are that few channels: with 128 four programs run
    beside each other, which wait for memory at the same time.
    """

    programs: int = 8
    warps: int = 4
    stages: int = 2
    rows: int = 4
    registers: int | None = 128


class PackedKernels:
    """Kernels for packed pages on `device`. One caller at a time, on torch's current stream. On the CPU only under
    Triton's interpreter.
    """

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        self._device = device
        self._interpreted = device.type != "cuda"
        self._processors = (
            _INTERPRETED_PROCESSORS
            if self._interpreted
            else torch.cuda.get_device_properties(device).multi_processor_count
        )
        self.tune(tuning or Tuning())
        self._partials = self._memory(0, torch.float32)
        self._arrivals = self._memory(0, torch.int32)

    def tune(self, tuning: Tuning) -> None:
        """Cut the attention kernel like this from now on."""
        self._tuning = tuning
        self.num_programs = self._processors * tuning.programs
        """Programs of an attention that keep the device busy."""
        self._launches: dict[tuple[Any, ...], Launch] = {}

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
        if (size := (work.num_sequences + work.num_parts) * heads) > self._arrivals.numel():
            self._arrivals = self._memory(size, torch.int32)
        softcap, sinks = rule.softcap, rule.sinks
        strides = *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2]
        counts = work.num_sequences, work.num_parts
        key = layout, group, query.dtype, strides, counts, rule.scale, softcap, sinks is None
        launch = self._launches.get(key)
        if launch is None:
            tuning, widest = self._tuning, max(_channels(layout.key_dim), values_at_once)
            numbers_of_all = (
                *strides, *counts, rule.scale, 1.0 if softcap is None else softcap,
                heads, group, *_layout_constants(layout), softcap is not None, sinks is not None,
                max(tuning.rows, merged_rows), _channels(layout.key_dim), values_at_once, merged_rows,
                max(1, min(MERGED.value, _MERGED_ELEMENTS // (merged_rows * values_at_once))), tuning.stages,
                *((tl.float32, tl.float32) if self._interpreted else (tl.float16, _TRITON_TYPES[query.dtype])),
            )  # fmt: skip
            options = {"num_warps": tuning.warps, "num_stages": tuning.stages}
            if tuning.registers is not None and widest * merged_rows <= _FEW_ELEMENTS:
                options["maxnreg"] = tuning.registers
            launch = self._launch(key, attend_packed, (work.num_parts, heads), numbers_of_all, options)
        launch(
            query, keys, values, output, query if sinks is None else sinks, addresses, numbers, partials, self._arrivals
        )

    def pack(
        self, layout: PageLayout, dtype: torch.dtype, addresses: Tensor, numbers: Tensor, work: AttentionWork
    ) -> None:
        """Pack the pages that leave windows of `dtype`, see `pack_leaving`, after `attend` with the same numbers."""
        first = work.num_sequences * SEQUENCE_NUMBERS.value + work.num_parts * PART_NUMBERS.value
        sharing, groups = layout.heads_per_group, layout.value_groups
        key = layout, dtype, work.num_sequences, work.num_leaving, first
        launch = self._launches.get(key)
        if launch is None:
            numbers_of_all = (
                work.num_sequences, first, *_layout_constants(layout), _channels(sharing * layout.key_dim),
                _channels(sharing * layout.value_dim // groups), _TRITON_TYPES[dtype],
            )  # fmt: skip
            grid = work.num_leaving, layout.heads // sharing, 1 + groups
            launch = self._launch(key, pack_leaving, grid, numbers_of_all, {"num_warps": 4})
        launch(addresses, numbers)

    def unpack(self, pages: Tensor, layout: PageLayout, keys: Tensor, values: Tensor) -> None:
        """As `kv_rounding.unpack_pages`, of contiguous `pages` [pages, page_bytes] to 16 bits."""
        unpack[(len(pages), layout.heads)](
            pages, keys, values, keys.stride(0), values.stride(0), *_layout_constants(layout),
            _channels(layout.key_dim), _channels(layout.value_dim), num_warps=4,
        )  # fmt: skip

    def _launch(
        self, key: tuple[Any, ...], kernel: triton.JITFunction, grid: tuple[int, ...], numbers: tuple[Any, ...],
        options: dict[str, int],
    ) -> Launch:  # fmt: skip
        """One that is kept for the next layers and sweeps with the same numbers."""
        if len(self._launches) == _MOST_LAUNCHES:
            self._launches.clear()
        launch = self._launches[key] = Launch(kernel, grid, numbers, **options)
        return launch

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
