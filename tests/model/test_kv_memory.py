"""Where the layers of one sequence lie: how many mappings, how much memory, and what becomes of it."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.model.kv_cache import SequenceCache
from pipo_ray.model.kv_memory import MAPPING_BYTES, SequenceMemory

MIB = 1 << 20


def resident() -> int:
    """Bytes of memory that this process alone has written to."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


def filled(num_layers: int, capacity: int, length: int) -> SequenceCache:
    """Layers of 16 heads of 128 bf16 numbers, 8 KiB for a token, which hold their own number."""
    cache = SequenceCache(capacity)
    for layer in range(num_layers):
        keys, values = (torch.tensor(x, dtype=torch.bfloat16).expand(16, length, 128) for x in (layer, -layer))
        cache.append(layer, keys, values)
    cache.advance(length)
    return cache


def require_own_numbers(cache: SequenceCache) -> None:
    """Head by head, each of which is one piece: of others torch makes copies, which would be counted."""
    for layer in cache.layers:
        span = cache.span(layer, cache.length)
        assert all(head.min() == head.max() == layer for head in span.keys)
        assert all(head.min() == head.max() == -layer for head in span.values)


@pytest.mark.parametrize(
    ("capacity", "num_mappings"),
    [(47, 2), (1100, 48), (2048, 48), (1, 0)],  # a layer of 1.3 MB; of 31.5 MB, 59 MB; and 28 KB of the allocator's
)
def test_a_sequence_is_a_few_mappings(capacity: int, num_mappings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT-30B's shape. What no token was written to takes no memory."""
    sizes: list[int] = []

    class Counted(mmap.mmap):
        def __new__(cls, fileno: int, length: int, **options: int) -> Counted:
            sizes.append(length)
            return super().__new__(cls, fileno, length, **options)

    monkeypatch.setattr(mmap, "mmap", Counted)
    like = torch.empty((), dtype=torch.bfloat16).expand(56, 1, 128)
    before = resident()
    cache = SequenceCache(capacity)
    pairs = [cache.memory_for(layer, like, like) for layer in range(48)]
    assert len(sizes) == num_mappings
    assert resident() - before < 4 * MIB
    layer_bytes = 2 * 56 * capacity * 128 * 2
    assert all(size <= max(MAPPING_BYTES, layer_bytes + 2 * mmap.PAGESIZE) for size in sizes)
    assert all(memory.shape == (56, capacity, 128) for pair in pairs for memory in pair)
    assert cache.nbytes == 48 * layer_bytes


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=8))
def test_layers_of_any_shape_lie_apart(shapes: list[tuple[int, int, int]]) -> None:
    """And what others hold stays when some layers are given back."""
    memory, capacity = SequenceMemory(), 100
    pairs = []
    for layer, (heads, dim, value_dim) in enumerate(shapes):
        like = torch.empty(heads, 0, dim), torch.empty(heads, 0, value_dim, dtype=torch.bfloat16)
        pairs.append(memory.pair(layer, *like, capacity))
        for tensor in pairs[-1]:
            tensor.fill_(layer)
    for layer in range(0, len(shapes), 2):
        memory.give_back(layer)
    for layer, (pair, (heads, dim, value_dim)) in enumerate(zip(pairs, shapes, strict=True)):
        assert [tensor.shape for tensor in pair] == [(heads, capacity, dim), (heads, capacity, value_dim)]
        assert [tensor.dtype for tensor in pair] == [torch.float32, torch.bfloat16]
        if layer % 2:
            assert all(bool((tensor == layer).all()) for tensor in pair)


def test_only_what_is_written_takes_memory_and_dropping_gives_it_back() -> None:
    before = resident()
    cache = filled(8, capacity=1000, length=250)  # of each head 250 KiB in a row: 16 MB written, 66 reserved
    assert 15 * MIB < resident() - before < 24 * MIB
    require_own_numbers(cache)
    cache.drop()
    assert resident() - before < 4 * MIB
    assert cache.nbytes == 0


def test_a_view_keeps_what_it_shows_when_the_cache_is_dropped() -> None:
    cache = filled(8, capacity=250, length=250)
    span = cache.span(3, 250)
    cache.drop()
    filled(8, capacity=250, length=250)  # another one, which would be given the same addresses
    assert bool((span.keys == 3).all())


@pytest.mark.parametrize("capacity", [999, 1500])
def test_a_layer_that_has_moved_is_given_back_before_the_next_one_moves(
    capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(6, capacity=1000, length=1000)  # 8 MB a layer: four in a mapping
    before, most = resident(), 0
    pair = SequenceMemory.pair

    def observed(
        self: SequenceMemory, layer: int, keys: torch.Tensor, values: torch.Tensor, room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal most
        most = max(most, resident())
        return pair(self, layer, keys, values, room)

    monkeypatch.setattr(SequenceMemory, "pair", observed)
    cache.resize(capacity, 900)
    assert most - before < 4 * MIB
    assert resident() - before < 4 * MIB
    assert cache.length == 900
    require_own_numbers(cache)
    cache.drop()
    assert before - resident() > 40 * MIB
