"""Prefixes in packed pages in RAM and on the drive: bit by bit as in the cache that lies where it is computed, whoever
begins, goes on, ends and goes, and whatever the drive loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_twins import STAGING, pages_that_are_lost, stores
from fake_device import FakeDevice
from harness import PackedModel, Pipeline, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pages import joined
from packed_twins import DIM, HISTORIES, KV_HEADS, PackedTwins, play
from pipeline.pages_on_disk import pages_on_disk
from prefix_runs import alone_and_together, conversations, step

from pipo_ray.errors import DriveError
from pipo_ray.model.batch import KeptPoint, PrefixPart, SweepEntry
from pipo_ray.model.disk_cache import DiskCache
from pipo_ray.model.kv_disk import KVDisk
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_page import PageState
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.disk_pages import DiskPages
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import WINDOW_TOKENS, LowBitKV, PageLayout
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.window import Window


@contextmanager
def on_drive(bits: tuple[int, ...], ram_pages: int, disk_pages: int, device: FakeDevice | None) -> Iterator[KVDisk]:
    """A page has two packed pages of the most bits."""
    packed = {few: PageLayout(KV_HEADS, DIM, DIM, few).page_bytes for few in bits}
    nbytes = -(-2 * max(packed.values()) // 4096) * 4096
    tokens = tuple(nbytes // packed[few] * PAGE_TOKENS for few in bits)
    with stores(ram_pages, disk_pages, device=device, page_bytes=nbytes, tokens=tokens) as (disk, _):
        yield disk


def check_pages(twins: PackedTwins, disk: KVDisk) -> None:
    """Every page that a sequence sees, and every window, is byte-identical; of those that have ended none is open."""
    for mine, theirs in twins.pairs.values():
        paged = mine.wide
        assert isinstance(paged, DiskCache)
        assert paged.lost is None
        for pages in paged.layers.values():
            assert not pages or paged.grows or pages[-1].at is not PageState.OPEN
        disk.begin_sweep([paged])
        for layer, held in mine._layers.items():
            other = theirs._layers[layer]
            assert held.begin == other.begin
            for one, two in zip(held.window, other.window, strict=True):
                assert torch.equal(one[:, : held.num_held], two[:, : held.num_held])
            stop = held.begin // PAGE_TOKENS
            with nullcontext() if twins.device is None else twins.device.watching():
                found = [part.clone() for parts in held.pages.parts(0, stop) for part in parts]
            if stop:
                assert torch.equal(torch.cat(found), joined(other.pages, stop))


@settings(max_examples=10, deadline=None)
@given(
    HISTORIES, st.sampled_from([(8, 4, 4), (4, 4, 4)]), st.integers(0, 12), st.integers(10, 60), st.integers(0, 1000),
    st.sampled_from([None, None, 0.0, 0.5, 1.0]), st.sampled_from([None, None, 150]),
)  # fmt: skip
def test_sequences_that_begin_on_each_other(
    history: list[dict[str, Any]], bits: tuple[int, ...], more: int, disk_pages: int, seed: int, eager: float | None,
    window: int | None,
) -> None:  # fmt: skip
    """And what the books admit finds room in RAM and file."""
    device = None if eager is None else FakeDevice(seed, eager)
    with on_drive(bits, STAGING + 2 * len(bits) + more, disk_pages, device) as disk:
        placement = disk.placement
        twins = PackedTwins(
            disk, bits, device, AttentionRule(0.1, window), seed,
            pages=placement.kv_tokens // placement.most_page_tokens, page_tokens=placement.most_page_tokens,
            grow=placement.max_sequences,
        )  # fmt: skip
        play(twins, history, seed, lambda: check_pages(twins, disk))
        moves = disk.moves
        while moves.to_save or moves.saving or moves.leaving:
            moves.wait_for_one()
        assert sorted(moves.free) == list(range(placement.ram_pages))
        assert sorted(moves.free_stored) == list(range(disk_pages))
        assert not disk._ahead.claimed


@contextmanager
def pipeline_on_disk(packed_llama: PackedModel, folder: Path, ram_pages: int) -> Iterator[Pipeline]:
    bits = (8,) * packed_llama.facts.num_layers
    with (
        pages_on_disk(packed_llama.facts, folder, ram_pages, bits) as disk,
        Pipeline(packed_llama, slot_bytes=1 << 20, resident_pieces=None) as pipeline,
    ):
        pipeline.runner._kv_store = LowBitStore(bits, None, disk(packed_llama.dtype, None))
        yield pipeline


@pytest.mark.parametrize(("most", "places", "seed"), [(5, 3, 3), (20, 9, 4)])
def test_greedy_tokens_never_change(
    packed_llama: PackedModel, tmp_path: Path, most: int, places: int, seed: int
) -> None:
    """Conversations through the scheduler; in little room what has ended is given up for those that wait."""
    layers = packed_llama.facts.num_layers
    tokens = max(DiskPages.of(packed_llama.facts, LowBitKV.of((8,) * layers, packed_llama.facts)).tokens)
    turns = conversations(packed_llama.facts.vocab_size, seed, system_tokens=700)[: 2 if most > 10 else 3]
    window = Window(WINDOW_TOKENS, PAGE_TOKENS, places=places)
    limits = Limits(most * tokens, 512, max_sequences=3, page_tokens=tokens, window=window, copies=False)
    with pipeline_on_disk(packed_llama, tmp_path, STAGING + 3 * layers + 1) as pipeline:
        alone, together = alone_and_together(pipeline, limits, turns)
        pipeline.runner.drop_all()
        assert pipeline.runner.cache_bytes == 0
    assert together.computed < 0.9 * alone.computed
    assert {"window", "share"} <= together.uses


def test_a_lost_page_costs_all_who_stand_on_it_or_await_tokens_of_it(
    packed_llama: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also who begins in the sweep in which it is lost, and a point that is kept in it; and nobody else."""
    tokens, more = random_prompts(packed_llama.facts.vocab_size, (4000, 60))
    with pipeline_on_disk(packed_llama, tmp_path, STAGING + 3 * packed_llama.facts.num_layers) as pipeline:
        runner = pipeline.runner
        runner.run([SweepEntry("sound", tuple(more[:30]), 0, 60, "none")])
        runner.run([SweepEntry("long", tuple(tokens[:3600]), 0, 3900, "none")])
        line = PrefixPart("long", 3520), PrefixPart("long", 181, "window")
        sweep = [
            SweepEntry("sound", tuple(more[30:40]), 30, 60, "all"),
            SweepEntry("long", tuple(tokens[3600:3710]), 3600, 3900, "none", keep=(KeptPoint("point", line),)),
            SweepEntry("passing", tuple(tokens[3701:3711]), 3701, 3800, "none", line),
        ]
        with pages_that_are_lost(monkeypatch):
            runner.run(sweep)
        lost = runner.undo()
        assert {*lost} == {"long", "passing", "point"}
        assert isinstance(lost["long"], DriveError)
        (got,) = runner.run(sweep[:1], again=True)
        (wanted,) = runner.run([step("alone", more[:40], 0, 40)])
        assert got is not None
        assert wanted is not None
        torch.testing.assert_close(got, wanted[30:])
        for name in ("sound", "alone"):
            runner.drop([name])
        assert runner.cache_bytes == 0
