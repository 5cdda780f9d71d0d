"""The KV cache of one sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.model.kv_cache import RaggedCache, Segment, SequenceCache


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3))
def test_keys_and_values_come_back_in_order(chunks: list[int], spare: int) -> None:
    total = sum(chunks)
    keys = {layer: torch.randn(2, total, 4) for layer in (0, 1, 5)}
    values = {layer: torch.randn(2, total, 3) for layer in keys}
    cache = SequenceCache(capacity=total + spare)
    for chunk in chunks:
        columns = slice(cache.length, cache.length + chunk)
        for layer in keys:
            got = cache.append(layer, keys[layer][:, columns], values[layer][:, columns])
            assert torch.equal(got[0], keys[layer][:, : columns.stop])
            assert torch.equal(got[1], values[layer][:, : columns.stop])
            assert got[0].dtype == keys[layer].dtype
        cache.advance(chunk)
    assert cache.length == total
    assert cache.nbytes == 3 * 2 * (total + spare) * (4 + 3) * 4


def test_memory_is_what_was_written_and_goes_when_it_is_given_back() -> None:
    """A cache with room for a hundred times as much; the private memory of this process, in KiB."""

    def private() -> int:
        return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Private_Dirty"))

    keys = torch.zeros(1, 10_000, 100)  # 4 MB
    cache = SequenceCache(capacity=1_000_000)
    before = private()
    cache.append(0, keys, keys)
    cache.advance(10_000)
    assert 7_000 < private() - before < 12_000
    cache.resize(5_000, 5_000)
    assert 3_000 < private() - before < 8_000
    assert cache.nbytes == 2 * 5_000 * 400
    cache.drop()
    assert private() - before < 3_000


def test_the_same_step_again_overwrites() -> None:
    """A sweep that failed in the middle is run again."""
    cache = SequenceCache(capacity=3)
    for _ in range(2):
        keys, _ = cache.append(0, torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    assert keys.shape == (1, 2, 2)
    assert cache.length == 0


def test_more_than_its_capacity_is_refused() -> None:
    cache = SequenceCache(capacity=3)
    cache.append(0, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    cache.advance(2)
    with pytest.raises(ValueError, match="KV cache of 3 tokens cannot hold 4"):
        cache.append(0, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))


def test_a_row_knows_its_layer_and_advances_every_sequence() -> None:
    caches = [SequenceCache(capacity=9), SequenceCache(capacity=9)]
    row = RaggedCache((Segment(caches[0], 0, 2), Segment(caches[1], 2, 7)))
    keys, values = torch.zeros(1, 1, 7, 2), torch.ones(1, 1, 7, 2)
    assert row.update(keys, values, 4) == (keys, values)
    assert row.layer == 4
    assert row.get_seq_length() == 0
    row.advance()
    assert [cache.length for cache in caches] == [2, 5]
