"""Tokens that come alone attend together, by Triton's kernels in its interpreter: as each would by itself, and all
caches are the same after it. Needs triton, which torch's CPU build has not.
"""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401

from pipo_ray.model.attention import ragged_attention, ragged_row
from pipo_ray.model.kv_cache import RaggedCache, Segment
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.packed_rows import PackedRows
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.triton_kernels.packed_kernels import PackedKernels

BITS = (4, 16, 8)
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 32, 16
CPU = torch.device("cpu")


class Twins:
    """Sequences twice: with a store that has rows, and with one that has none. Each layer of a sweep has random
    queries, keys and values; the second layer with bits sees `window` tokens.
    """

    def __init__(self, window: int | None) -> None:
        self.kernels = PackedKernels(CPU)
        self.stores = LowBitStore(BITS, rows=PackedRows(BITS, self.kernels)), LowBitStore(BITS)
        self.pairs: dict[str, tuple[LowBitCache, LowBitCache]] = {}
        self.window, self.generator = window, torch.Generator().manual_seed(0)
        self.sinks = torch.randn(HEADS, generator=self.generator)
        self.calls: list[int] = []

    def open(self, name: str, capacity: int, behind: tuple[str, int, int] | None = None) -> None:
        """A sequence; `behind` is another, how many of its tokens in whole pages, and how many behind these."""
        pair = []
        for number, store in enumerate(self.stores):
            source = None if behind is None else self.pairs[behind[0]][number]
            cache = store.open(capacity, () if source is None or behind is None else [(source, behind[1])])
            if source is not None and behind is not None:
                cache.begin_with(source, behind[2])
            pair.append(cache)
        self.pairs[name] = pair[0], pair[1]

    def sweep(self, **counts: int) -> None:
        tokens = sum(counts.values())
        rows = [self._row(counts, number) for number in (0, 1)]
        for layer in range(len(BITS)):
            query, keys, values = (
                torch.randn(tokens, heads, dim, generator=self.generator).half().transpose(0, 1)[None]
                for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
            )
            results = []
            for row in rows:
                row.update(keys, values, layer)
                with ragged_row(row), torch.inference_mode():
                    results.append(
                        ragged_attention(
                            torch.nn.Identity(), query, keys, values, scaling=0.3,
                            sliding_window=self.window if layer == 2 else None, softcap=5.0 if layer == 2 else None,
                            s_aux=self.sinks if layer == 0 else None,
                        )[0]
                    )  # fmt: skip
            torch.testing.assert_close(*results, rtol=2.0**-9, atol=2e-3)
        for row in rows:
            row.advance()
        for pair in self.pairs.values():
            self._check_same(*pair)

    def _row(self, counts: dict[str, int], number: int) -> RaggedCache:
        segments, at = [], 0
        for name, count in counts.items():
            segments.append(Segment(self.pairs[name][number], at, at + count))
            at += count
        return RaggedCache(tuple(segments), self.stores[number])

    @staticmethod
    def _check_same(ours: LowBitCache, theirs: LowBitCache) -> None:
        assert ours._layers.keys() == theirs._layers.keys()
        for layer, memory in ours._layers.items():
            other = theirs._layers[layer]
            assert (memory.begin, memory.num_held) == (other.begin, other.num_held)
            used = sum(memory.layout.parts)
            packed = memory.begin // PAGE_TOKENS
            for mine, its in zip(*(list(one.pages.parts(0, packed)) for one in (memory, other)), strict=True):
                for pages, wanted in zip(mine, its, strict=True):
                    assert torch.equal(pages[:, :used], wanted[:, :used])
            for window, wanted in zip(memory.window, other.window, strict=True):
                assert torch.equal(window[:, : memory.num_held], wanted[:, : other.num_held])


@pytest.mark.parametrize("window", [None, 150])
def test_rows_are_what_each_sequence_is_by_itself(window: int | None) -> None:
    """Two whose pages leave windows in different sweeps, one that begins, one on another's pages, beside a prompt."""
    twins = Twins(window)
    twins.open("long", 300)
    twins.open("short", 202)
    twins.sweep(long=253, short=189)
    twins.open("new", 4)
    for _ in range(3):
        twins.sweep(short=1, long=1, new=1)
    twins.open("other", 194, ("long", 2 * PAGE_TOKENS, 256 - 2 * PAGE_TOKENS))
    twins.sweep(other=1, short=1, long=1)
    twins.sweep(long=1, other=5, short=1)
    twins.sweep(other=1, long=2)
    twins.sweep(other=56, short=1)
    for _ in range(2):  # packs a page of its own behind those of the other, and sees it
        twins.sweep(other=1)


def test_a_layer_is_one_launch_and_numbers_are_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(
        "pipo_ray.model.packed_rows.to_device", lambda tensor, device: sent.append(tensor.dtype.itemsize) or tensor
    )
    twins = Twins(None)
    launches: list[str] = []
    attend, pack = twins.kernels.attend, twins.kernels.pack
    monkeypatch.setattr(twins.kernels, "attend", lambda *a: launches.append("attend") or attend(*a))
    monkeypatch.setattr(twins.kernels, "pack", lambda *a: launches.append("pack") or pack(*a))
    for name in ("a", "b", "c"):
        twins.open(name, 300)
    twins.sweep(a=190, b=190, c=20)
    assert (launches, sent) == ([], [])
    twins.sweep(a=1, b=1, c=1)
    assert (launches, sent) == (["attend"] * 2, [8, 4, 8])
    twins.sweep(a=1, b=1, c=1)
    assert (launches[2:], sent[3:]) == (["attend", "pack"] * 2, [4])


def test_who_hands_out_its_window_comes_first() -> None:
    """A token that goes on behind the one that comes in the same sweep."""
    twins = Twins(None)
    twins.open("first", 300)
    twins.sweep(first=140)
    twins.open("second", 200, ("first", 0, 141))
    twins.sweep(first=1, second=1)
    twins.sweep(first=1, second=1)
