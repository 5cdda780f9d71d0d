"""Attention of one token by the kernels in `attention.py` and `packed_attention.py`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipo_ray.compiled import attention, packed_attention
from pipo_ray.compiled.crew import CALLED_AT, add_on_threads, deferred_on_threads, run_on_threads
from pipo_ray.compiled.ir import float_word
from pipo_ray.compiled.machine import MachineCode, context_of, run_here
from pipo_ray.compiled.steps import Steps
from pipo_ray.compiled.support import InstructionSet, row_instructions
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout

_BYTES_ON_THREADS = 1 << 20  # of keys and values: with fewer the other threads are better off bringing weights near


@dataclass(frozen=True)
class Call:
    """The address of a function and its context; bytes of keys and values it reads, and what has to live with it: where
    pages lie in several places, tables of these, each with its sequence's number and the pages in all places but the
    last.
    """

    function: int
    context: Any
    nbytes: int
    owns: Any = None
    tables: tuple[tuple[int, Any, int], ...] = ()

    def repeat(self, lengths: Sequence[int]) -> None:
        """Of a call that `each` made, for spans from the first token on, and that is over: have it do the same with
        spans up to these lengths.
        """
        self._contexts(len(attention.FIELDS))[:, _LENGTH] = lengths

    def repeat_packed(self, lengths: Sequence[int], num_pages: Sequence[int]) -> None:
        """The same of one that `each_packed` made, with windows of these lengths behind so many pages."""
        contexts = self._contexts(len(packed_attention.FIELDS))
        contexts[:, _LENGTH] = lengths
        contexts[:, _NUM_PAGES] = num_pages
        for number, table, before in self.tables:
            table[-1] = num_pages[number] - before

    def _contexts(self, num_fields: int) -> Any:
        """Of each sequence a row, whose heads are all to be done again."""
        contexts = np.frombuffer(self.owns, np.int64).reshape(-1, num_fields)
        contexts[:, _NEXT] = 0
        return contexts


@dataclass(frozen=True)
class PackedTokens:
    """What a token attends to: from number `first` on of all that are in `pages`, uint8 [n, page_bytes] each, in order,
    and behind them the first `length` of the keys and values in `window`, [kv_heads, capacity, dim] each, whose last is
    its own.
    """

    pages: tuple[Tensor, ...]
    window: tuple[Tensor, Tensor]
    length: int
    first: int = 0


class CompiledAttention:
    """Appends a token's keys and values to those of its sequence, and lets it attend to all. One caller at a time.

    Compiled for each shape of heads when it is first used; `folder` is where machine code is kept (see `MachineCode`).
    `instructions` are those of this processor unless it is told others that it has, too.
    """

    def __init__(self, folder: Path | None = None, instructions: InstructionSet | None = None) -> None:
        self._folder = folder
        self._instructions = instructions or row_instructions()
        self._codes: dict[tuple[int, int], tuple[MachineCode, int, int]] = {}
        self._packed_codes: dict[tuple[int, int, int], tuple[MachineCode, int, int]] = {}
        self._context = context_of([0] * len(attention.FIELDS))
        self._packed_context = context_of([0] * len(packed_attention.FIELDS))

    def takes(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether these are for the kernel: `query` [heads, 1, dim], `keys` and `values` [kv_heads, 1, dim] in bf16 on
        the CPU.
        """
        tensors = query, keys, values
        here = query.device.type == "cpu" and all(tensor.stride(2) == 1 for tensor in tensors)
        return query.shape[1] == 1 and here and self.takes_heads(*tensors)

    def takes_heads(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """The same of these heads, wherever they are, in which order, and however many tokens there are."""
        dim = query.shape[2]
        return (
            query.dtype is keys.dtype is values.dtype is torch.bfloat16
            and keys.shape[2] == values.shape[2] == dim <= attention.MOST_DIM
            and dim % 64 == 0
        )

    def attend(
        self, query: Tensor, new: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor], first: int, length: int,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Attention of `query` to the tokens `first` to before `length` of keys and values in `memory`, [kv_heads,
        capacity, dim] each, whose last becomes `new`. Returns [heads, 1, dim]. `takes` says which tensors may come.
        """
        heads, kv_heads, dim = query.shape[0], memory[0].shape[0], query.shape[2]
        output = query.new_empty(heads, 1, dim)
        one, _ = self._functions(dim, heads // kv_heads)
        self._context[:] = _words(query, new, memory, output.data_ptr(), 0, first, length, scale)
        self.run(Call(one, self._context, 4 * kv_heads * dim * (length - first)))
        return output

    def attend_packed(
        self, query: Tensor, new: tuple[Tensor, Tensor], memory: PackedTokens, layout: PageLayout, scale: float
    ) -> Tensor:
        """Attention of `query` to the tokens in `memory`, whose last becomes `new`. Returns [heads, 1, dim]. `takes`
        and `packed_attention.takes` say what may come.
        """
        heads, dim = query.shape[0], query.shape[2]
        output = query.new_empty(heads, 1, dim)
        one, _ = self._packed_functions(layout, heads)
        words, nbytes, table = _packed_words(query, new, memory, layout, output.data_ptr(), 0, scale)
        self._packed_context[:] = words
        self.run(Call(one, self._packed_context, nbytes, table))
        return output

    def attend_parts(
        self, query: Tensor, new: tuple[Tensor, Tensor], parts: Iterable[Sequence[Tensor]],
        window: tuple[Tensor, Tensor], length: int, unseen: int, layout: PageLayout, scale: float,
    ) -> Tensor:  # fmt: skip
        """The same, to the last bit, where pages come in `parts`, each of which is tensors [n, page_bytes] that are
        there until the next is asked for; of all their tokens those behind the first `unseen`. `window` and `length`
        are as in `PackedTokens`.
        """
        heads, dim = query.shape[0], query.shape[2]
        output = query.new_empty(heads, 1, dim)
        state = torch.empty(heads * packed_attention.state_bytes(layout), dtype=torch.uint8)
        one, _ = self._packed_functions(layout, heads)
        page_bytes, *_ = places = packed_attention.places(layout)
        first = _words(query, new, window, output.data_ptr(), 0, 0, length, scale)
        goes_on = 0
        for part in parts:
            runs = context_of([word for pages in part for word in (pages.data_ptr(), len(pages))])
            self._packed_context[:] = (
                *first, 0, 0, unseen, *places, ctypes.addressof(runs), len(part), state.data_ptr(), goes_on, 1
            )  # fmt: skip
            self.run(Call(one, self._packed_context, sum(len(pages) for pages in part) * page_bytes))
            goes_on, unseen = 1, 0
        ahead = min(unseen, length - 1)
        last = _words(query, new, window, output.data_ptr(), 0, ahead, length, scale)
        self._packed_context[:] = (*last, 0, 0, 0, *places, 0, 0, state.data_ptr(), goes_on, 0)
        self.run(Call(one, self._packed_context, 4 * layout.heads * dim * (length - ahead)))
        return output

    def each_packed(
        self, query: Tensor, new: tuple[Tensor, Tensor], memories: Sequence[PackedTokens], layout: PageLayout,
        scale: float, output: Tensor,
    ) -> Call:  # fmt: skip
        """The same for tokens of different sequences, number i with `memories[i]`; otherwise as `each`."""
        heads, dim = query.shape[0], query.shape[2]
        _, each = self._packed_functions(layout, heads)
        words: list[int] = []
        tables: list[tuple[int, Any, int]] = []
        nbytes = 0
        for number, memory in enumerate(memories):
            row = output.data_ptr() + 2 * dim * heads * number
            more, read, table = _packed_words(query, new, memory, layout, row, number, scale)
            words += more
            nbytes += read
            if table is not None:
                tables.append((number, table, sum(map(len, memory.pages[:-1]))))
        contexts = context_of(words)
        return Call(each, context_of([ctypes.addressof(contexts), len(memories)]), nbytes, contexts, tuple(tables))

    def each(
        self, query: Tensor, new: tuple[Tensor, Tensor], memories: Sequence[tuple[Tensor, Tensor]],
        spans: Sequence[tuple[int, int]], scale: float, output: Tensor,
    ) -> Call:  # fmt: skip
        """The same for tokens of different sequences, number i of `query` [heads, n, dim] and of `new`, with
        `memories[i]` and (first, length) `spans[i]`, into `output` [n, heads, dim], contiguous: for `run`, or
        `deferred`. The tensors have to stay until it is over.
        """
        heads, kv_heads, dim = query.shape[0], new[0].shape[0], query.shape[2]
        _, each = self._functions(dim, heads // kv_heads)
        words: list[int] = []
        for number, (memory, (first, length)) in enumerate(zip(memories, spans, strict=True)):
            row = output.data_ptr() + 2 * dim * heads * number
            words += _words(query, new, memory, row, number, first, length, scale)
        contexts = context_of(words)
        tokens = sum(length - first for first, length in spans)
        context = context_of([ctypes.addressof(contexts), len(spans)])
        return Call(each, context, 4 * kv_heads * dim * tokens, contexts)

    def add(
        self, steps: Steps, query: Tensor, new: tuple[Tensor, Tensor], output: Tensor, scale: float
    ) -> Callable[[tuple[Tensor, Tensor], int, int], None]:
        """A step that does what `attend` does, for `query` [heads, 1, dim] and the `new` keys and values [kv_heads, 1,
        dim] that are in these tensors then, into `output` [heads, 1, dim]. What is returned is told `memory`, `first`
        and `length` before.
        """
        heads, kv_heads, dim = query.shape[0], new[0].shape[0], query.shape[2]
        one, _ = self._functions(dim, heads // kv_heads)
        context = context_of(_words(query, new, new, output.data_ptr(), 0, 0, 0, scale))
        words, others = add_on_threads(steps, one, context, _NEXT, self._folder, query, *new, output)

        def point(memory: tuple[Tensor, Tensor], first: int, length: int) -> None:
            keys, values = memory
            offset, bytes_each = 2 * dim * first, 2 * keys.stride(0)
            context[_KEYS] = keys.data_ptr() + offset
            context[_VALUES] = values.data_ptr() + offset
            context[_LENGTH] = length - first
            context[_KEYS_STRIDE] = context[_VALUES_STRIDE] = bytes_each
            words[CALLED_AT] = others if 4 * kv_heads * dim * (length - first) >= _BYTES_ON_THREADS else 0

        return point

    def run(self, call: Call) -> None:
        """Do it here, with other threads where it is worth it."""
        address = ctypes.addressof(call.context)
        if call.nbytes < _BYTES_ON_THREADS:
            run_here(call.function, address)
        else:
            run_on_threads(call.function, address, None, self._folder)

    def deferred(self, call: Call) -> Call:
        """What does the same when it is called, by whichever thread: one at a time, and none of `run` meanwhile."""
        threads = None
        if call.nbytes >= _BYTES_ON_THREADS:
            threads = deferred_on_threads(call.function, ctypes.addressof(call.context), self._folder)
        return call if threads is None else Call(*threads, call.nbytes, call)

    def _functions(self, dim: int, group: int) -> tuple[int, int]:
        """For one sequence, and for several."""
        found = self._codes.get((dim, group))
        if found is None:
            code = MachineCode(attention.module(dim, group, self._instructions), self._folder)
            found = code, code.address(attention.NAME), code.address(attention.EACH)
            self._codes[dim, group] = found
        return found[1:]

    def _packed_functions(self, layout: PageLayout, heads: int) -> tuple[int, int]:
        """The same for packed pages."""
        at_once = attention.heads_at_once(heads // layout.heads)
        key = layout.key_dim, layout.bits, at_once
        found = self._packed_codes.get(key)
        if found is None:
            code = MachineCode(packed_attention.module(layout, at_once, self._instructions), self._folder)
            found = code, code.address(packed_attention.NAME), code.address(packed_attention.EACH)
            self._packed_codes[key] = found
        return found[1:]


_NEXT, _KEYS, _VALUES, _LENGTH, _KEYS_STRIDE, _VALUES_STRIDE = map(
    attention.FIELDS.index, ("next", "keys", "values", "length", "keys_stride", "values_stride")
)
_NUM_PAGES = packed_attention.FIELDS.index("num_pages")
_IN_ONE_CALL = (0, 0, 0)  # from `state` on


def _words(
    query: Tensor, new: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor], output: int, column: int, first: int,
    length: int, scale: float,
) -> tuple[int, ...]:  # fmt: skip
    """The kernel's context for number `column` of query and new keys and values."""
    keys, values = memory
    heads, kv_heads, dim = query.shape[0], keys.shape[0], query.shape[2]
    places = (tensor.data_ptr() + 2 * column * tensor.stride(1) for tensor in (query, *new))
    offset = 2 * dim * first
    return (
        *places, keys.data_ptr() + offset, values.data_ptr() + offset, output, 0, kv_heads, heads // kv_heads,
        length - first, float_word(scale), 2 * query.stride(0), 2 * new[0].stride(0),
        2 * new[1].stride(0), 2 * keys.stride(0), 2 * values.stride(0),
    )  # fmt: skip


def _packed_words(
    query: Tensor, new: tuple[Tensor, Tensor], memory: PackedTokens, layout: PageLayout, output: int, column: int,
    scale: float,
) -> tuple[tuple[int, ...], int, Any]:  # fmt: skip
    """The packed kernel's context in the same way, the bytes that it reads, and the table of the places that its pages
    lie in, which has to live with it; None: they lie in one.
    """
    page_bytes, *_ = places = packed_attention.places(layout)
    packed = sum(map(len, memory.pages)) * PAGE_TOKENS
    whole, unseen = divmod(min(memory.first, packed), PAGE_TOKENS)
    ahead = max(0, memory.first - packed)
    runs: list[tuple[int, int]] = []
    count = -whole
    for number, pages in enumerate(memory.pages, 1):
        hidden = min(max(0, -count), len(pages))
        count += len(pages)
        if hidden < len(pages) or number == len(memory.pages):
            # Of a tensor without elements torch tells no address; a call that is repeated may find some there.
            start = pages.untyped_storage().data_ptr() + int(pages.storage_offset())
            runs.append((start + hidden * page_bytes, len(pages) - hidden))
    table = context_of([word for run in runs for word in run]) if len(runs) > 1 else None
    in_places = (0, 0) if table is None else (ctypes.addressof(table), len(runs))
    words = (
        *_words(query, new, memory.window, output, column, ahead, memory.length, scale), *runs[-1], unseen, *places,
        *in_places, *_IN_ONE_CALL,
    )  # fmt: skip
    return words, count * page_bytes + 4 * layout.heads * layout.key_dim * (memory.length - ahead), table
