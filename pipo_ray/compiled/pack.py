"""Packing of pages by the kernel in `page_packing.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pipo_ray.compiled import page_packing
from pipo_ray.compiled.attend import Call
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.support import InstructionSet, row_instructions
from pipo_ray.plan.low_bit_pages import PageLayout


@dataclass(frozen=True)
class LeavingPage:
    """The first tokens of the `length` in `window`, keys and values [kv_heads, capacity, dim] in bf16, which become the
    `page`, uint8 [page_bytes]; the others move up.
    """

    page: Tensor
    window: tuple[Tensor, Tensor]
    length: int


class CompiledPacking:
    """Packs pages of heads of which `packed_attention.takes` says that there is a function. Compiled for each layout
    when it is first used; `folder` is where machine code is kept (see `MachineCode`). `instructions` are those of this
    processor unless it is told others that it has, too.
    """

    def __init__(self, folder: Path | None = None, instructions: InstructionSet | None = None) -> None:
        self._folder = folder
        self._instructions = instructions or row_instructions()
        self._codes: dict[PageLayout, tuple[MachineCode, int]] = {}

    def each(self, layout: PageLayout, pages: Sequence[LeavingPage]) -> Call:
        """A call for `CompiledAttention.run` or `deferred`. The tensors have to stay until it is over."""
        found = self._codes.get(layout)
        if found is None:
            code = MachineCode(page_packing.module(layout, self._instructions), self._folder)
            found = self._codes[layout] = code, code.address(page_packing.EACH)
        words: list[int] = []
        for one in pages:
            keys, values = one.window
            words += (
                keys.data_ptr(), values.data_ptr(), one.page.data_ptr(), 0, layout.heads // layout.heads_per_group,
                one.length, 2 * keys.stride(0), 2 * values.stride(0),
            )  # fmt: skip
        contexts = context_of(words)
        nbytes = sum(2 * tensor.shape[0] * one.length * tensor.shape[2] for one in pages for tensor in one.window)
        return Call(found[1], context_of([ctypes.addressof(contexts), len(pages)]), nbytes, contexts)
