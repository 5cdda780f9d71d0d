"""Packed pages between GPU and RAM: what comes out is, bit by bit, what the cache makes that lies where it is computed,
whatever joins, leaves and grows; and without races.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG, VOCAB_SIZE
from fake_device import FakeDevice
from harness import Pipeline, pack_checkpoint, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pages import joined
from plan.budget_models import model

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.kv_cache import RaggedCache, Segment
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.kv_tiers import KVTiers, TieredCache
from pipo_ray.model.tier_rows import TieredPages
from pipo_ray.plan.kv_budget import tier_units
from pipo_ray.plan.kv_pages import KVPlacement, pages_of, ram_units_for
from pipo_ray.plan.low_bit_pages import LowBitKV, PageLayout, packed_pages
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of

HEADS, KV_HEADS, DIM = 4, 2, 64
LAYOUTS = {bits: PageLayout(KV_HEADS, DIM, DIM, bits) for bits in (8, 4)}
MIXED = (4, 16, 8, 4, 8)


def placement_of(bits: tuple[int, ...], gpu_pages: int, dtype: torch.dtype = torch.bfloat16) -> KVPlacement:
    """With so many pages per layer at most, all of which pass through the GPU two layers at a time."""
    facts = facts_of(bits, dtype)
    nbytes, units = tier_units(facts, LowBitKV.of(bits, facts))
    gpu_units = gpu_pages * 2 * max(units)
    return KVPlacement(units, nbytes, gpu_units, ram_units_for(units, gpu_pages, gpu_units), bits)


def facts_of(bits: tuple[int, ...], dtype: torch.dtype) -> ModelFacts:
    from dataclasses import replace

    _, facts = model(len(bits), 64, 100)
    width = KV_HEADS * 2 * DIM * dtype.itemsize
    return replace(facts, kv_bytes_per_token=len(bits) * width, kv_shapes=((KV_HEADS, DIM, DIM),), num_layers=len(bits))


class Twins:
    """Sequences twice: in two tiers of a device, and where they are computed."""

    def __init__(self, device: FakeDevice, placement: KVPlacement, dtype: torch.dtype) -> None:
        assert placement.bits is not None
        self.device, self.placement, self.bits, self.dtype = device, placement, placement.bits, dtype
        self.tiers = KVTiers(placement, dtype, device)
        self.store, self.here = LowBitStore(self.bits, None, self.tiers), LowBitStore(self.bits)
        self.pairs: list[tuple[LowBitCache, LowBitCache]] = []
        self.rule = AttentionRule(0.1)

    def open(self, capacity: int) -> None:
        self.pairs.append((self.store.open(capacity), self.here.open(capacity)))

    def drop(self, number: int) -> None:
        for cache in self.pairs.pop(number):
            cache.drop()

    def sweep(self, batch: list[tuple[int, int]]) -> None:
        segments, at = [], 0
        for number, count in batch:
            segments.append(Segment(self.pairs[number][0], at, at + count))
            at += count
        row = RaggedCache(tuple(segments), self.store)
        row.begin_sweep()
        for layer in range(len(self.bits)):
            query, keys, values = (torch.randn(heads, at, DIM).to(self.dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
            row.update(keys[None], values[None], layer)
            row.begin_layer()
            for (number, _), segment in zip(batch, segments, strict=True):
                part = slice(segment.start, segment.stop)
                own = layer, query[:, part], keys[:, part], values[:, part], self.rule
                with self.device.watching():
                    got = segment.cache.attend(*own).clone()
                assert torch.equal(got, self.pairs[number][1].attend(*own))
            row.end_layer()
        row.advance()
        for number, count in batch:
            self.pairs[number][1].advance(count)

    def check_pages(self) -> int:
        """Every page, where it is at home, is byte-identical, and rounded to itself again. How many there are."""
        self.device.synchronize()
        checked = 0
        for mine, theirs in self.pairs:
            tiered = mine.wide
            assert isinstance(tiered, TieredCache)
            for layer, run in tiered.runs.items():
                if (bits := self.bits[layer]) == 16:
                    continue
                memory, table = (self.tiers.ram, run.ram) if run.ram else (self.tiers.gpu, run.gpu)
                size, layout = self.placement.units[layer], LAYOUTS[bits]
                count = min(packed_pages(run.tokens), packed_pages(mine.capacity - 1))
                expected = joined(theirs._layers[layer].pages, count)
                for page in range(count):
                    units = table[page * size : (page + 1) * size]
                    found = torch.cat([memory[unit] for unit in units])[: layout.page_bytes]
                    assert torch.equal(found, expected[page])
                    assert torch.equal(again(found, layout)[: sum(layout.parts)], found[: sum(layout.parts)])
                    checked += 1
        return checked


def again(page: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """A page, unpacked and packed."""
    keys, values = torch.empty(KV_HEADS, 64, DIM), torch.empty(KV_HEADS, 64, DIM)
    unpack_pages(views_of(page[None], layout), layout, keys, values, torch.empty(keys.numel(), dtype=torch.uint8))
    made = torch.zeros_like(page[None])
    pack_pages(keys, values, views_of(made, layout), layout)
    return made[0]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({"joins": st.lists(st.integers(2, 460), max_size=2),
                               "tokens": st.lists(st.sampled_from([0, 1, 1, 1, 40, 130, 200]), min_size=6, max_size=6),
                               "leaves": st.lists(st.integers(0, 5), max_size=1)}),
        min_size=2, max_size=10,
    ),
    st.sampled_from([MIXED, (8,) * 5, (4,) * 5, (16, 4, 4, 4, 4)]), st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(8, 20), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([None, 100]),
)  # fmt: skip
def test_sequences_that_come_and_go(
    history: list[dict[str, list[int]]], bits: tuple[int, ...], dtype: torch.dtype, pages: int, seed: int,
    eager: float, window: int | None,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    twins = Twins(FakeDevice(seed, eager), placement_of(bits, pages, dtype), dtype)
    twins.rule = AttentionRule(0.1, window)
    for step in history:
        for capacity in step["joins"]:
            if sum(pages_of(mine.capacity) for mine, _ in twins.pairs) + pages_of(capacity) <= pages:
                twins.open(capacity)
        batch = []
        for number, ((mine, _), wanted) in enumerate(zip(twins.pairs, step["tokens"], strict=False)):
            if count := min(wanted, mine.capacity - mine.length):
                batch.append((number, count))
        if batch:
            twins.sweep(batch)
            twins.check_pages()
        for number in step["leaves"]:
            if number < len(twins.pairs):
                twins.drop(number)
    while twins.pairs:
        twins.drop(0)
    assert twins.tiers._gpu_pool.num_free == twins.placement.gpu_units
    assert twins.tiers._ram_pool.num_free == twins.placement.ram_units


def test_a_page_that_lies_apart_behind_one_in_place_is_written_where_it_is() -> None:
    memory = torch.zeros(6, 4, dtype=torch.uint8)
    pages = TieredPages(memory, lambda: [0, 1, 5, 3], 2, 8)
    for number, place in enumerate(pages.places(0, 2), 1):
        place.fill_(number)
    assert memory[:, 0].tolist() == [1, 1, 0, 2, 0, 2]


def test_only_new_pages_are_saved_and_what_passes_through_comes_ahead() -> None:
    """Token by token over the border of a page; the window is never moved."""
    bits = (4,) * 5
    twins = Twins(FakeDevice(), placement_of(bits, 12), torch.bfloat16)
    twins.open(12 * 64)
    twins.sweep([(0, 500)])
    page, tiers = twins.tiers.unit_bytes, twins.tiers
    assert tiers.saved_bytes == 5 * 5 * page
    saves = len([1 for stream, nbytes in twins.device.copied if stream == "KV save" and nbytes])
    loaded = tiers.loaded_bytes
    for _ in range(11):
        twins.sweep([(0, 1)])
    assert tiers.saved_bytes == 5 * 5 * page
    assert len([1 for stream, nbytes in twins.device.copied if stream == "KV save" and nbytes]) == saves
    assert tiers.loaded_bytes - loaded >= 11 * 5 * 5 * page
    twins.sweep([(0, 1)])  # number 511: with it the sixth page leaves the window
    assert tiers.saved_bytes == 6 * 5 * page
    assert twins.check_pages() == 30


@pytest.mark.parametrize("bits", [MIXED, (16, 4, 4, 16, 4), (4, 4, 16, 4, 4, 4, 8)])
@pytest.mark.parametrize("seed", range(2))
def test_some_layers_are_saved_in_every_sweep_and_some_are_not(bits: tuple[int, ...], seed: int) -> None:
    """Layers at 16 bits, and those of few; with little room, so that none can stay."""
    twins = Twins(FakeDevice(seed, 0.0), placement_of(bits, 12), torch.bfloat16)
    for capacity in (5 * 64, 4 * 64, 3 * 64):
        twins.open(capacity)
    twins.sweep([(0, 300), (1, 200), (2, 100)])
    for _ in range(6):
        twins.sweep([(0, 1), (1, 1), (2, 1)])
    assert twins.check_pages()
    assert twins.tiers.loaded_bytes


@pytest.mark.parametrize(
    "bits, tokens", [((8, 4, 16, 16), (208, 17)), ((4, 4, 16, 4, 16), (194, 30)), ((8, 8, 16, 16), (192, 1, 1, 1))]
)
def test_a_layer_without_a_save_frees_its_places_behind_the_saves_before_it(
    bits: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    """A layer at 16 bits is loaded again while its tokens may still be on their way to RAM. It goes to where a layer of
    few bits was, which had no page to save: this place is free later than that save was asked for, and is what the load
    waits for.
    """
    twins = Twins(FakeDevice(0, 0.0), placement_of(bits, 4), torch.bfloat16)
    twins.open(4 * 64 - 4)
    for count in tokens:
        twins.sweep([(0, count)])
    assert twins.check_pages()
    assert twins.tiers.saved_bytes
    assert twins.tiers.loaded_bytes


def test_pages_whose_units_lie_apart_are_brought_together() -> None:
    """Two units a page, in a pool of which single units are free."""
    placement = placement_of((4, 8, 8), 12)
    assert placement.units == (1, 2, 2)
    twins = Twins(FakeDevice(), placement, torch.bfloat16)
    taken = twins.tiers._ram_pool.take(placement.ram_units)
    twins.tiers._ram_pool.give(taken[::2])
    kept = twins.tiers._gpu_pool.take(placement.gpu_units)
    twins.tiers._gpu_pool.give(kept[::2])
    twins.open(370)
    for count in (300, 1, 60, 1):
        twins.sweep([(0, count)])
    runs = twins.pairs[0][0].wide.runs  # type: ignore[attr-defined]
    assert all(abs(one - other) > 1 for one, other in zip(runs[1].ram, runs[1].ram[1:], strict=False))
    assert twins.check_pages() == 3 * 3


def test_larger_pages_than_the_facts_say_are_refused() -> None:
    twins = Twins(FakeDevice(), placement_of((4,), 4), torch.bfloat16)
    twins.open(3)
    cache = twins.pairs[0][0]
    row = RaggedCache((Segment(cache, 0, 1),), twins.store)
    row.begin_sweep()
    row.update(*torch.zeros(2, 1, 1, 1, 1), 0)
    row.begin_layer()
    wide = torch.zeros(8, 1, 128).bfloat16()
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has packed pages of \d+ bytes, its model's facts say"):
        cache.attend(0, wide, wide, wide, twins.rule)


@pytest.mark.parametrize("slug", ["llama", "gpt-oss"])
def test_logits_of_a_model(slug: str, tmp_path: Path) -> None:
    packed = pack_checkpoint(BY_SLUG[slug].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32)
    sequences = random_prompts(VOCAB_SIZE, (240, 30, 201))
    bits, found = (4, 4, 4), []
    low = LowBitKV.of(bits, packed.facts)
    nbytes, units = tier_units(packed.facts, low)
    gpu_units = 2 * max(units) * 9
    placement = KVPlacement(units, nbytes, gpu_units, ram_units_for(units, 9, gpu_units), bits)
    for options in (
        {"kv_bits": bits},
        {"kv_store": lambda dtype, ops: LowBitStore(bits, None, KVTiers(placement, dtype, ops))},
    ):  # fmt: skip
        with Pipeline(packed, slot_bytes=1 << 20, ops=FakeDevice(), chunk=70, **options) as pipeline:  # type: ignore[arg-type]
            found.append(pipeline.follow(sequences, (235, 25, 186), joins=[0, 1, 1]))
    tiers = pipeline.runner._kv_store.paged  # type: ignore[union-attr]
    assert tiers.loaded_bytes > tiers.saved_bytes > 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
