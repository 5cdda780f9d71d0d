"""Low-bit caches twice: in RAM beside a device, which here is the CPU, and where they are computed."""

from __future__ import annotations

import torch
from harness import CPU
from packed_pages import joined

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.pack import CompiledPacking
from pipo_ray.compiled.support import instruction_set
from pipo_ray.model.kv_cache import Segment
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import packed_pages
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of

BITS = (8, 4, 16)
COMPILED = CompiledAttention() if instruction_set() else None
PACKING = CompiledPacking() if instruction_set() else None


class Twins:
    """Sequences twice: with their caches in RAM beside a device, and where they are computed. Each layer of a sweep
    has random queries, keys and values, and each result of the one must be that of the other.
    """

    def __init__(
        self, dtype: torch.dtype, compiled: CompiledAttention | None, rule: AttentionRule,
        packing: CompiledPacking | None,
    ) -> None:  # fmt: skip
        self.generator, self.dtype, self.rule = torch.Generator().manual_seed(0), dtype, rule
        self.host = HostKV(CPU, compiled, low_bit=LowBitStore(BITS, compiled), packing=packing)
        self.here = LowBitStore(BITS, compiled)
        self.pairs: dict[int, tuple[LowBitCache, LowBitCache]] = {}
        self.lines: dict[int, list[tuple[int, int]]] = {}

    def open(self, name: int, capacity: int, behind: int | None = None, tokens: int = 0) -> None:
        """A sequence of `capacity` tokens, the first `tokens` of which are those of sequence `behind`: it reads the
        pages that they see, and copies what is behind these.
        """
        assert self.host.low_bit is not None
        first = packed_pages(tokens) * PAGE_TOKENS
        line = [] if behind is None else self.line(behind, first)
        stores = self.host.low_bit, self.here
        mine, theirs = (
            store.open(capacity - first, [(self.pairs[one][which], count) for one, count in line])
            for which, store in enumerate(stores)
        )
        self.pairs[name], self.lines[name] = (mine, theirs), line
        if behind is not None:
            for cache, other in zip((mine, theirs), self.pairs[behind], strict=True):
                cache.begin_with(other, tokens - first)

    def line(self, name: int, tokens: int) -> list[tuple[int, int]]:
        """The sequences in which the first tokens of one are, and how many of each."""
        found, at = [], 0
        for one, count in [*self.lines[name], (name, tokens)]:
            if (count := min(count, tokens - at)) > 0:
                found.append((one, count))
                at += count
        return found

    def drop(self, name: int) -> None:
        for cache in self.pairs.pop(name):
            cache.drop()

    def tensors(self, tokens: int) -> list[torch.Tensor]:
        """In the order in which a projection gives them: token by token."""
        made = [torch.randn(tokens, heads, 64, generator=self.generator) for heads in (8, 2, 2)]
        return [one.to(self.dtype).transpose(0, 1) for one in made]

    def sweep(self, batch: list[tuple[int, int]]) -> None:
        tokens = sum(count for _, count in batch)
        for layer in range(len(BITS)):
            query, keys, values = self.tensors(tokens)
            segments, expected, at = [], [], 0
            for name, count in batch:
                mine, theirs = self.pairs[name]
                part = slice(at, at + count)
                segments.append(Segment(mine, at, at + count))
                attended = theirs.attend(layer, query[:, part], keys[:, part], values[:, part], self.rule)
                expected.append(attended.transpose(0, 1))
                at += count
            got = self.host.attend_row(segments, layer, query, keys, values, self.rule)
            assert torch.equal(got, torch.cat(expected))
        for name, count in batch:
            for cache in self.pairs[name]:
                cache.advance(count)

    def check_pages(self) -> None:
        """All of a sequence's pages and its window are byte-identical, and rounded to themselves again."""
        for mine, theirs in self.pairs.values():
            assert mine.nbytes == theirs.nbytes
            for number, layer in mine._layers.items():
                other = theirs._layers[number]
                layer.settle()
                count = layer.begin // PAGE_TOKENS
                assert layer.begin == other.begin
                pages = joined(layer.pages, count)
                assert torch.equal(pages, joined(other.pages, count))
                for one, two in zip(layer.window, other.window, strict=True):
                    assert torch.equal(one[:, : layer.num_held], two[:, : layer.num_held])
                if not count:
                    continue
                layout = layer.layout
                both = [torch.empty(layout.heads, 64 * count, dim) for dim in (layout.key_dim, layout.value_dim)]
                unpack_pages(views_of(pages, layout), layout, *both, torch.empty(both[0].numel(), dtype=torch.uint8))
                again = torch.zeros_like(pages)
                pack_pages(*both, views_of(again, layout), layout)
                assert torch.equal(again[:, : sum(layout.parts)], pages[:, : sum(layout.parts)])
