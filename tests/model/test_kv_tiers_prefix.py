"""Prefixes that several sequences read in one's pages, in two tiers: bit by bit as in one memory, and free of races,
whoever begins, goes on, ends and goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from harness import PackedModel, Pipeline, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_runs import alone_and_together, conversations, step
from prefix_twins import RowTwins, histories, play

from pipo_ray.messages import RequestSpec
from pipo_ray.model.kv_cache import SequenceCache
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.kv_tiers import KVTiers, TieredCache
from pipo_ray.params import SamplingParams
from pipo_ray.plan.kv_pages import PAGE_TOKENS, KVPlacement, page_bytes, pages_of, ram_units_for
from pipo_ray.scheduling.limits import Limits

LAYERS, HEADS, KV_HEADS, DIM = 5, 4, 2, 8
PAGE_BYTES = page_bytes(LAYERS * KV_HEADS * 2 * DIM * 4, LAYERS)


class Twins(RowTwins):
    """In two tiers, of which at most `most` pages of a layer are there, and in one memory."""

    def __init__(self, gpu_pages: int, most: int, seed: int, eager: float, window: int | None) -> None:
        device, self.most = FakeDevice(seed, eager), most
        placement = KVPlacement((1,) * LAYERS, PAGE_BYTES, gpu_pages, ram_units_for((1,) * LAYERS, most, gpu_pages))
        self.tiers = KVTiers(placement, torch.float32, device)
        super().__init__(self.tiers, LAYERS, (HEADS, KV_HEADS), DIM, device, AttentionRule(0.5, window), seed)

    def make(self, capacity: int, line: list[tuple[int, int]]) -> tuple[TieredCache, SequenceCache]:
        return self.tiers.open(capacity, self.caches(line, 0)), SequenceCache(capacity, prefix=self.caches(line, 1))

    def has_room(self, capacity: int, instead_of: int | None = None) -> bool:
        held = sum(mine.num_pages for name, (mine, _) in self.pairs.items() if name != instead_of)
        return held + pages_of(capacity) <= self.most

    def pages(self) -> tuple[int, int]:
        """That are free on the GPU, and in RAM."""
        return self.tiers._gpu_pool.num_free, self.tiers._ram_pool.num_free


@settings(max_examples=40, deadline=None)
@given(
    histories(PAGE_TOKENS, 200, [0]), st.integers(10, 44), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([None, None, 50]),
)  # fmt: skip
def test_sequences_that_begin_on_each_other(
    history: list[dict[str, Any]], gpu_pages: int, seed: int, eager: float, window: int | None
) -> None:
    """And nothing is left of them."""
    twins = Twins(gpu_pages, gpu_pages // 2, seed, eager, window)
    free = twins.pages()
    first = twins.open(150)
    assert first is not None
    twins.sweep([(first, 100)])
    play(twins, history, seed)
    assert twins.pages() == free


def test_a_prefix_comes_to_the_gpu_once_for_all_who_stand_on_it() -> None:
    """A page of each of five layers does not stay; four sequences stand on sixteen of them, and one row each is new."""
    twins = Twins(gpu_pages=44, most=22, seed=0, eager=1.0, window=None)
    first = twins.open(16 * PAGE_TOKENS)
    assert first is not None
    twins.sweep([(first, 16 * PAGE_TOKENS)])
    twins.resize(first, 16 * PAGE_TOKENS, 16 * PAGE_TOKENS)
    names = [twins.open(PAGE_TOKENS, first, 16 * PAGE_TOKENS) for _ in range(4)]
    batch = [(name, 1) for name in names if name is not None]
    twins.sweep(batch)
    before = twins.tiers.loaded_bytes
    saved = twins.tiers.saved_bytes
    twins.sweep(batch)
    row = PAGE_BYTES // PAGE_TOKENS
    assert len(batch) == 4
    assert 0 < twins.tiers.loaded_bytes - before <= LAYERS * row * (16 * PAGE_TOKENS + 4 * 2)
    assert twins.tiers.saved_bytes - saved == LAYERS * row * 4
    assert sum(cache.nbytes for cache, _ in twins.pairs.values()) == LAYERS * PAGE_BYTES * (16 + 4)


def test_pages_that_were_loaded_ahead_are_free_once_they_have_come() -> None:
    """A sequence is cut when its next sweep's first layers are on their way; another one takes their places."""
    twins = Twins(gpu_pages=8, most=4, seed=0, eager=0.0, window=None)
    first = twins.open(3 * PAGE_TOKENS)
    assert first is not None
    twins.sweep([(first, 3 * PAGE_TOKENS)])
    assert len(twins.pairs[first][0].runs[0].gpu) == 3
    twins.resize(first, PAGE_TOKENS, PAGE_TOKENS)
    assert not twins.pairs[first][0].runs[0].gpu
    assert twins.tiers._gpu_pool.num_free == 8
    other = twins.open(3 * PAGE_TOKENS)
    assert other is not None
    twins.sweep([(other, 3 * PAGE_TOKENS)])


def test_pages_that_stay_on_the_gpu_are_free_once_nothing_computes_with_them() -> None:
    """Of a sequence that is cut behind its last sweep; another one's pages come to their places."""
    twins = Twins(gpu_pages=16, most=8, seed=0, eager=0.0, window=None)
    one, other = twins.open(2 * PAGE_TOKENS), twins.open(2 * PAGE_TOKENS)
    assert one is not None
    assert other is not None
    twins.sweep([(one, 125), (other, 123)])
    assert any(run.gpu and not run.ram for run in twins.pairs[one][0].runs.values())
    twins.resize(one, PAGE_TOKENS, PAGE_TOKENS)
    twins.sweep([(other, 1)])
    twins.sweep([(other, 1)])


def test_a_cache_that_is_taken_takes_the_pages_in_ram_that_it_lacks() -> None:
    twins = Twins(gpu_pages=8, most=4, seed=0, eager=0.0, window=None)
    one = twins.open(150)
    assert one is not None
    twins.sweep([(one, 140)])
    twins.resize(one, 140, 140)
    twins.resize(one, 4 * PAGE_TOKENS, 130)
    for count in (70, 1, 1):
        twins.sweep([(one, count)])
    assert [len(run.ram) for run in twins.pairs[one][0].runs.values()] == [4] * LAYERS
    twins.drop(one)
    assert twins.pages() == (8, 4 * LAYERS)


@contextmanager
def in_two_tiers(packed_llama: PackedModel, most: int) -> Iterator[Pipeline]:
    """Room for `most` pages of a layer, which do not all stay on the GPU if there are so many."""
    units = (1,) * packed_llama.facts.num_layers
    gpu = 2 * most
    ram = ram_units_for(units, most, gpu)
    with Pipeline(packed_llama, slot_bytes=1 << 20, ops=FakeDevice(), kv_pages=(gpu, ram)) as pipeline:
        yield pipeline


@pytest.mark.parametrize(("most", "seed"), [pytest.param(14, 3, marks=pytest.mark.slow), (40, 4)])
def test_greedy_tokens_never_change(packed_llama: PackedModel, most: int, seed: int) -> None:
    """Conversations through the scheduler; in little room what has ended is given up for those that wait."""
    turns = conversations(packed_llama.facts.vocab_size, seed, system_tokens=150)
    limits = Limits(most * PAGE_TOKENS, 64, page_tokens=PAGE_TOKENS, copies=False)
    with in_two_tiers(packed_llama, most) as pipeline:
        alone, together = alone_and_together(pipeline, limits, turns)
        assert pipeline.kv_tiers is not None
        assert (pipeline.kv_tiers.loaded_bytes > 0) == (most < 20)
        pipeline.runner.drop_all()
        assert pipeline.runner.cache_bytes == 0
    assert together.computed < (0.8 if most < 20 else 0.6) * alone.computed
    assert "share" in together.uses <= {"share", "take"}


def test_a_chat_goes_on_with_its_cache(packed_llama: PackedModel) -> None:
    """Turn by turn, whatever of a page it has too much: others could share whole pages alone."""
    (tokens,) = random_prompts(packed_llama.facts.vocab_size, (400,))
    params = SamplingParams(max_tokens=6)
    turns = [[RequestSpec(str(stop), tuple(tokens[:stop]), params, 0, 6)] for stop in (100, 150, 180, 300, 400)]
    limits = Limits(8 * PAGE_TOKENS, 64, page_tokens=PAGE_TOKENS, copies=False)
    with in_two_tiers(packed_llama, 8) as pipeline:
        _, together = alone_and_together(pipeline, limits, turns)
        assert pipeline.kv_tiers is not None
        assert pipeline.kv_tiers.loaded_bytes > 0
    assert together.uses == {"take"}
    # Of each turn what is behind the last whole page before it, and the answer but for its last token.
    assert together.computed == sum(stop - common // 64 * 64 + 5 for stop, common in
                                    ((100, 0), (150, 100), (180, 150), (300, 180), (400, 300)))  # fmt: skip


def test_a_sweep_that_failed_leaves_what_others_stand_on(
    packed_llama: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a layer in the middle: what is computed behind it then is as if it had not been."""
    tokens, more = random_prompts(packed_llama.facts.vocab_size, (200, 60))
    b = step("b", tokens[:128] + more, 128, 188, (("a", 128, "share"),))
    with in_two_tiers(packed_llama, 20) as pipeline:
        runner, tiers = pipeline.runner, pipeline.kv_tiers
        assert tiers is not None
        runner.run([step("a", tokens, 0, 150)])
        before = runner.cache_bytes
        (wanted,) = runner.run([b])
        runner.drop(["b"])
        append = KVTiers.append

        def failing(one: KVTiers, cache: TieredCache, layer: int, *rest: Any) -> Any:
            if layer == 1:
                raise RuntimeError("a kernel failed")
            return append(one, cache, layer, *rest)

        monkeypatch.setattr(KVTiers, "append", failing)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            runner.run([b])
        monkeypatch.undo()
        assert runner.cache_bytes == before
        (got,) = runner.run([b])
        assert got is not None
        assert wanted is not None
        assert torch.equal(got, wanted)
