"""KV pages between GPU and RAM: bit-identical and free of races, whatever joins, leaves and grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_sweeps import DIM, HEADS, VALUE_DIM, Written, append_random

from pipo_ray.errors import ResourceError, UnsupportedModelError
from pipo_ray.model.kv_tiers import KVTiers
from pipo_ray.pipeline.tracing import TraceWriter
from pipo_ray.plan.kv_pages import PAGE_TOKENS, KVPlacement, pages_of, ram_units_for

ROW_BYTES = HEADS * (DIM + VALUE_DIM) * 2
PAGE_BYTES = PAGE_TOKENS * -(-ROW_BYTES // 16) * 16
LAYERS = 5


def tiers_for(device: FakeDevice, gpu_pages: int, ram_pages: int, layers: int = LAYERS) -> KVTiers:
    placement = KVPlacement((1,) * layers, PAGE_BYTES, gpu_pages, ram_pages)
    return KVTiers(placement, torch.bfloat16, device)


def sweep(device: FakeDevice, tiers: KVTiers, batch: list[tuple[Written, int]]) -> None:
    append_random(tiers, batch, LAYERS, device.watching)


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, object]]:
    """Per sweep: who joins (capacity, first chunk), how many tokens the others take, who leaves behind it."""
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "join": st.lists(st.integers(2, 300), max_size=2),
                    "tokens": st.lists(st.sampled_from([0, 1, 1, 1, 40, 130]), min_size=8, max_size=8),
                    "leave": st.lists(st.integers(0, 7), max_size=1),
                }
            ),
            min_size=2,
            max_size=12,
        )
    )


@settings(max_examples=40, deadline=None)
@given(histories(), st.integers(8, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]))
def test_pages_are_bit_identical_through_the_tiers(
    history: list[dict[str, list[int]]], gpu_pages: int, seed: int, eager: float
) -> None:
    torch.manual_seed(seed)
    device = FakeDevice(seed, eager)
    most = gpu_pages // 2
    tiers = tiers_for(device, gpu_pages, ram_units_for((1,) * LAYERS, most, gpu_pages))
    live: list[Written] = []
    for step in history:
        for capacity in step["join"]:
            if sum(one.cache.num_pages for one in live) + pages_of(capacity) <= most:
                live.append(Written(tiers.open(capacity)))
        batch = []
        for one, wanted in zip(live, step["tokens"], strict=False):
            count = min(wanted, one.cache.capacity - one.cache.length)
            if count:
                batch.append((one, count))
        if batch:
            sweep(device, tiers, batch)
        for index in step["leave"]:
            if index < len(live):
                tiers.drop(live.pop(index).cache)
    for one in live:
        tiers.drop(one.cache)
    assert tiers._gpu_pool.num_free == gpu_pages
    assert tiers._ram_pool.num_free == ram_units_for((1,) * LAYERS, most, gpu_pages)


def test_what_fits_on_the_gpu_is_not_moved() -> None:
    device = FakeDevice()
    tiers = tiers_for(device, gpu_pages=LAYERS * 4, ram_pages=50)
    one, two = Written(tiers.open(2 * PAGE_TOKENS)), Written(tiers.open(2 * PAGE_TOKENS))
    for count in (100, 1, 1):
        sweep(device, tiers, [(one, count), (two, 1)])
    assert device.copied == []
    assert one.cache.nbytes == LAYERS * 2 * tiers.unit_bytes


def test_only_new_tokens_are_saved_and_only_pages_that_pass_through_are_loaded() -> None:
    """Of 50 pages two times 20 are kept for layers in flight, so none can stay; the 16 in use come three at a time."""
    device = FakeDevice()
    tiers = tiers_for(device, gpu_pages=50, ram_pages=100)
    one = Written(tiers.open(20 * PAGE_TOKENS))
    sweep(device, tiers, [(one, 1000)])
    row = tiers.unit_bytes // PAGE_TOKENS
    assert tiers.saved_bytes == LAYERS * 1000 * row
    sweep(device, tiers, [(one, 1)])
    assert tiers.saved_bytes == LAYERS * 1001 * row
    loads = [nbytes for stream, nbytes in device.copied if stream == "KV load" and nbytes]
    assert set(loads) <= {1000 * row, 1001 * row}  # a run of neighbours is one copy
    assert len(loads) == LAYERS + 3  # each layer once, and three ahead for the next sweep


def test_the_next_layer_is_under_way_before_it_is_asked_for() -> None:
    device = FakeDevice(eager=0.0)
    tiers = tiers_for(device, gpu_pages=40, ram_pages=100)
    one = Written(tiers.open(20 * PAGE_TOKENS))
    sweep(device, tiers, [(one, 1000)])
    tiers.begin_sweep([(one.cache, 1)])
    assert one.cache.runs[0].gpu
    assert one.cache.runs[1].gpu
    assert not one.cache.runs[2].gpu  # two layers is all there is room for
    before = len(device.copied)
    tiers.begin_layer(0)
    assert len(device.copied) == before
    tiers.end_layer(0)
    assert one.cache.runs[2].gpu


def test_a_layer_may_be_resident_for_a_while_without_being_used() -> None:
    """Promoted when a sequence leaves and demoted when one joins, while its own sequence takes no part."""
    device = FakeDevice(eager=0.0)
    tiers = tiers_for(device, gpu_pages=20, ram_pages=50)
    one, two, three = (Written(tiers.open(2 * PAGE_TOKENS)) for _ in range(3))
    sweep(device, tiers, [(one, 70), (two, 70), (three, 70)])
    tiers.drop(three.cache)
    sweep(device, tiers, [(two, 1)])
    assert not one.cache.runs[4].ram
    four = Written(tiers.open(4 * PAGE_TOKENS))
    sweep(device, tiers, [(two, 1), (four, 200)])
    assert one.cache.runs[4].ram
    sweep(device, tiers, [(one, 1), (two, 1), (four, 1)])


def test_loads_and_saves_are_in_the_trace(tmp_path: Path) -> None:
    device = FakeDevice()
    trace = TraceWriter(tmp_path / "trace.jsonl", "ComputeWorker")
    tiers = KVTiers(KVPlacement((1,) * LAYERS, PAGE_BYTES, 20, 50), torch.bfloat16, device, trace)
    one = Written(tiers.open(10 * PAGE_TOKENS))
    for count in (100, 1):
        sweep(device, tiers, [(one, count)])
    events = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    saves = [event["labels"] for event in events if event["kind"] == "KV save"]
    assert saves[0] == {"piece": "layer 0", "bytes": 100 * PAGE_BYTES // PAGE_TOKENS}
    assert sum(labels["bytes"] for labels in saves) == tiers.saved_bytes
    assert sum(event["labels"]["bytes"] for event in events if event["kind"] == "KV load") == tiers.loaded_bytes > 0


def test_more_than_both_tiers_hold_is_refused_by_name() -> None:
    device = FakeDevice()
    tiers = tiers_for(device, gpu_pages=10, ram_pages=3)
    one = Written(tiers.open(4 * PAGE_TOKENS))
    with pytest.raises(ResourceError, match="4 KV pages are needed in RAM, 3 of 3 are free"):
        sweep(device, tiers, [(one, 1)])


def test_a_token_wider_than_the_facts_say_is_refused() -> None:
    device = FakeDevice()
    tiers = tiers_for(device, gpu_pages=10, ram_pages=3)
    cache = tiers.open(3)
    tiers.begin_sweep([(cache, 1)])
    tiers.begin_layer(0)
    with pytest.raises(UnsupportedModelError, match="layer 0 caches 64 elements per token, its model's facts say 16"):
        cache.append(0, torch.zeros(HEADS, 1, 16), torch.zeros(HEADS, 1, 16))


def test_more_than_its_capacity_is_refused() -> None:
    tiers = tiers_for(FakeDevice(), gpu_pages=10, ram_pages=3)
    cache = tiers.open(3)
    tiers.begin_sweep([(cache, 4)])
    tiers.begin_layer(0)
    with pytest.raises(ValueError, match="KV cache of 3 tokens cannot hold 4"):
        cache.append(0, torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))
