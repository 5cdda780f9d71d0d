"""The KV pool: ranges, and a row that attends in one call."""

from __future__ import annotations

import itertools
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_SLUG
from exact_kernel import exact_kernel
from harness import CPU, Pipeline, pack_checkpoint, random_prompts

from pipo_ray.errors import ResourceError
from pipo_ray.model import attention
from pipo_ray.model.fused_rows import attend_row
from pipo_ray.model.kv_pool import KVPool, PooledCache


def _fill(pool: KVPool, cache: PooledCache, count: int, seed: float) -> None:
    pool.begin_sweep([(cache, count)])
    for layer in range(2):
        keys = torch.full((3, count, 4), seed + layer)
        cache.append(layer, keys, -keys)
    cache.advance(count)


def _holds(pool: KVPool, cache: PooledCache, seed: float) -> bool:
    for layer in range(2):
        keys, values = pool.layer(layer, torch.empty(3, 1, 4), torch.empty(3, 1, 4))
        mine = slice(cache.first, cache.first + cache.length)
        if not (bool((keys[mine] == seed + layer).all()) and bool((values[mine] == -seed - layer).all())):
            return False
    return True


@pytest.mark.parametrize("seed", range(5))
def test_sequences_come_and_go_and_keep_what_is_theirs(seed: int) -> None:
    """Often enough that free ranges lie apart and all must move."""
    chance = random.Random(seed)
    pool = KVPool(100, CPU)
    live: dict[PooledCache, float] = {}
    moved = False
    for step in range(200):
        capacity = chance.randint(1, 40)
        if sum(cache.capacity for cache in live) + capacity > 100:
            gone = chance.choice(list(live))
            gone.drop()
            del live[gone]
            continue
        before = {cache: cache.first for cache in live}
        cache = pool.open(capacity)
        moved |= any(cache.first != first for cache, first in before.items())
        live[cache] = float(step)
        _fill(pool, cache, chance.randint(1, capacity), float(step))
        ranges = sorted((c.first, c.first + c.capacity) for c in live)
        assert all(stop <= first for (_, stop), (first, _) in itertools.pairwise(ranges))
        assert ranges[-1][1] <= 100
        assert all(_holds(pool, c, mark) for c, mark in live.items())
    assert moved


def test_more_than_is_free_is_refused() -> None:
    pool = KVPool(10, CPU)
    pool.open(7)
    with pytest.raises(ResourceError, match="needs 4 tokens of KV cache, 3 of 10 are free"):
        pool.open(4)


def test_a_cache_holds_no_more_than_its_capacity() -> None:
    cache = KVPool(10, CPU).open(3)
    with pytest.raises(ValueError, match="3 tokens cannot hold 4"):
        cache.append(0, torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))


@pytest.mark.parametrize("slug", ["llama", "mistral"])
def test_text_of_a_row_that_attends_in_one_call(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_SLUG[slug].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (5, 17, 1, 40))
    with Pipeline(packed, slot_bytes=1 << 20, resident_pieces=None) as pipeline:
        wanted = pipeline.greedy(prompts, 6)
    calls: list[int] = []

    def kernel(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return exact_kernel(*arguments, **options)

    monkeypatch.setattr(attention, "attend_row", partial(attend_row, kernel=kernel))
    for at_once in (True, False):
        monkeypatch.setattr(attention, "can_attend", lambda *_, at_once=at_once: at_once)
        with Pipeline(packed, slot_bytes=1 << 20, kv_pool=sum(len(prompt) + 6 for prompt in prompts)) as pipeline:
            assert pipeline.greedy(prompts, 6) == wanted
            assert pipeline.greedy(prompts[2:3], 6) == wanted[2:3]
        assert bool(calls) == at_once
        calls.clear()
