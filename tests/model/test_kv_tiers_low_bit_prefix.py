"""Prefixes in packed pages between GPU and RAM: bit by bit as in the cache that lies where it is computed, and free of
races, whoever begins, goes on, ends and goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from harness import PackedModel, Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pages import joined
from packed_twins import DIM, HISTORIES, KV_HEADS, PackedTwins, play
from prefix_runs import alone_and_together, conversations

from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.kv_tiers import KVTiers, TieredCache
from pipo_ray.plan.kv_budget import tier_units
from pipo_ray.plan.kv_pages import PAGE_TOKENS, KVPlacement, ram_units_for
from pipo_ray.plan.low_bit_pages import WINDOW_TOKENS, LowBitKV, PageLayout
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.window import Window


def placement_of(bits: tuple[int, ...], pages: int) -> KVPlacement:
    """With so many pages per layer at most, all of which pass through the GPU two layers at a time. A unit is a page of
    the fewest bits.
    """
    nbytes = {few: PageLayout(KV_HEADS, DIM, DIM, few).page_bytes for few in bits}
    unit = -(-min(nbytes.values()) // 1024) * 1024
    units = tuple(-(-nbytes[few] // unit) for few in bits)
    gpu_units = pages * 2 * max(units)
    return KVPlacement(units, unit, gpu_units, ram_units_for(units, pages, gpu_units), bits)


def check_pages(twins: PackedTwins, tiers: KVTiers) -> None:
    """Every page, where it is at home, and every window, is byte-identical."""
    assert twins.device is not None
    twins.device.synchronize()
    for mine, theirs in twins.pairs.values():
        assert isinstance(mine.wide, TieredCache)
        for layer, held in mine._layers.items():
            other = theirs._layers[layer]
            assert held.begin == other.begin
            for one, two in zip(held.window, other.window, strict=True):
                assert torch.equal(one[:, : held.num_held], two[:, : held.num_held])
            run = mine.wide.runs.get(layer)
            if run is None:
                continue
            memory, table = (tiers.ram, run.ram) if run.ram else (tiers.gpu, run.gpu)
            size, first = tiers._placement.units[layer], mine.start // PAGE_TOKENS
            expected = joined(other.pages, held.begin // PAGE_TOKENS)[first:]
            for page, wanted in enumerate(expected):
                found = torch.cat([memory[unit] for unit in table[page * size : (page + 1) * size]])
                assert torch.equal(found[: len(wanted)], wanted)


@settings(max_examples=10, deadline=None)
@given(
    HISTORIES, st.sampled_from([(8, 4, 4, 8), (4, 4, 4, 4, 4)]), st.integers(12, 30), st.integers(0, 1000),
    st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([None, None, 150]),
)  # fmt: skip
def test_sequences_that_begin_on_each_other(
    history: list[dict[str, Any]], bits: tuple[int, ...], pages: int, seed: int, eager: float, window: int | None
) -> None:
    device = FakeDevice(seed, eager)
    tiers = KVTiers(placement_of(bits, pages), torch.float32, device)
    twins = PackedTwins(tiers, bits, device, AttentionRule(0.1, window), seed, pages=pages)
    free = tiers._gpu_pool.num_free, tiers._ram_pool.num_free
    play(twins, history, seed, lambda: check_pages(twins, tiers))
    assert (tiers._gpu_pool.num_free, tiers._ram_pool.num_free) == free


@contextmanager
def in_two_tiers(packed_llama: PackedModel, most: int, bits: tuple[int, ...]) -> Iterator[Pipeline]:
    """Room for `most` pages of a layer, which do not all stay on the GPU if there are so many."""
    unit, units = tier_units(packed_llama.facts, LowBitKV.of(bits, packed_llama.facts))
    placement = KVPlacement(units, unit, 2 * most, ram_units_for(units, most, 2 * most), bits)
    with Pipeline(
        packed_llama, slot_bytes=1 << 20, ops=FakeDevice(),
        kv_store=lambda dtype, ops: LowBitStore(bits, None, KVTiers(placement, dtype, ops)),  # type: ignore[return-value]
    ) as pipeline:  # fmt: skip
        yield pipeline


@pytest.mark.parametrize(("most", "places", "seed"), [pytest.param(34, 3, 3, marks=pytest.mark.slow), (80, 9, 4)])
def test_greedy_tokens_never_change(packed_llama: PackedModel, most: int, places: int, seed: int) -> None:
    """Conversations through the scheduler; in little room what has ended is given up for those that wait."""
    bits = (8,) * packed_llama.facts.num_layers
    turns = conversations(packed_llama.facts.vocab_size, seed, system_tokens=300)[: 2 if most > 50 else 3]
    window = Window(WINDOW_TOKENS, PAGE_TOKENS, places=places)
    limits = Limits(
        most * PAGE_TOKENS, 96, max_sequences=places, page_tokens=PAGE_TOKENS, window=window, copies=False
    )  # fmt: skip
    with in_two_tiers(packed_llama, most, bits) as pipeline:
        alone, together = alone_and_together(pipeline, limits, turns)
        pipeline.runner.drop_all()
        assert pipeline.runner.cache_bytes == 0
    assert together.computed < 0.9 * alone.computed
    assert {"window", "share"} <= together.uses
