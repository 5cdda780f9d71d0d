"""Prefixes that several sequences read in one's pages, in RAM and on the drive: bit by bit as with all pages in RAM,
whoever begins, goes on, ends, goes, and whatever the drive loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_twins import LAYERS, STAGING, Twins, pages_that_are_lost, twins, watch_late_pages
from fake_device import FakeDevice
from harness import PackedModel, Pipeline, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline.pages_on_disk import pages_on_disk
from prefix_runs import alone_and_together, conversations, step
from prefix_twins import histories, play

from pipo_ray.errors import DriveError
from pipo_ray.messages import RequestSpec
from pipo_ray.model.kv_disk import KVDisk, KVPagesLostError
from pipo_ray.model.kv_page import PageState
from pipo_ray.params import SamplingParams
from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.plan.disk_pages import PAGE_TOKENS
from pipo_ray.scheduling.limits import Limits


@settings(max_examples=25, deadline=None)
@given(
    histories(PAGE_TOKENS, 900, [0, 0, 0, 1, 2]), st.integers(STAGING + 2 * LAYERS, 30), st.integers(3, 40),
    st.integers(0, 1000), st.sampled_from([None, None, 0.0, 0.5, 1.0]), st.sampled_from([None, None, 300]),
)  # fmt: skip
def test_sequences_that_begin_on_each_other(
    history: list[dict[str, Any]], ram_pages: int, disk_pages: int, seed: int, eager: float | None, window: int | None
) -> None:
    """What the books admit finds room in RAM and file, and nothing is left of it."""
    device = None if eager is None else FakeDevice(seed, eager)
    with twins(ram_pages, disk_pages, device=device, window=window, seed=seed) as two:
        if (first := two.open(600)) is not None:
            two.sweep([(first, 500)])
        play(two, history, seed, two.check_books)
        two.check_empty()


def opened(two: Twins, *options: Any) -> int:
    name = two.open(*options)
    assert name is not None
    return name


def ended(two: Twins, tokens: int) -> int:
    """A sequence of so many tokens that has been."""
    name = opened(two, tokens)
    two.sweep([(name, tokens)])
    two.resize(name, tokens, tokens)
    return name


def test_a_prefix_is_in_the_file_once_and_short_ones_are_read_once_for_all() -> None:
    """Of two pages a layer, in RAM for no more than the newest pages."""
    with twins(STAGING + 4 * LAYERS, 60) as two:
        first = ended(two, 2 * PAGE_TOKENS)
        names = [opened(two, PAGE_TOKENS, first, 2 * PAGE_TOKENS) for _ in range(4)]
        for _ in range(3):
            two.sweep([(name, 1) for name in names])
        assert two.stored() == 2 * LAYERS
        loaded, saved = two.disk.loaded_pages, two.disk.saved_pages
        two.sweep([(name, 1) for name in names])
        assert 0 < two.disk.loaded_pages - loaded <= 2 * LAYERS
        assert two.disk.saved_pages == saved


def test_no_page_of_a_prefix_is_asked_for_when_it_is_needed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though more than may be on their way, it is read ahead for each of two."""
    with twins(STAGING + 2 * LAYERS, 60) as two:
        first = ended(two, 9 * PAGE_TOKENS)
        names = [opened(two, PAGE_TOKENS, first, 9 * PAGE_TOKENS) for _ in range(2)]
        two.sweep([(name, 1) for name in names])
        two.sweep([(name, 1) for name in names])
        late = watch_late_pages(monkeypatch)
        for _ in range(3):
            two.sweep([(name, 1) for name in names])
    assert not late


def test_what_nobody_sees_leaves_ram_first() -> None:
    """An ended sequence's pages stay where they are until one that goes on wants the room, and are written then."""
    with twins(STAGING + 5 * LAYERS, 60) as two:
        first = ended(two, 4 * PAGE_TOKENS)
        assert two.disk._kept == [4] * LAYERS
        other = opened(two, 6 * PAGE_TOKENS)
        two.sweep([(other, PAGE_TOKENS)])
        assert two.stored() == 0
        for _ in range(4):
            two.sweep([(other, PAGE_TOKENS)])
        two.sweep([(other, 1)])
        states = [page.at for page in two.pairs[other][0].layers[0]]
        assert states == [PageState.KEPT] * 4 + [
            PageState.KEPT if states[4] is PageState.KEPT else states[4],
            PageState.OPEN,
        ]
        assert not any(page.at is PageState.KEPT for page in two.pairs[first][0].layers[0])
        assert two.disk.saved_pages == 5 * LAYERS
        two.resize(other, 5 * PAGE_TOKENS, 5 * PAGE_TOKENS)
        behind = opened(two, PAGE_TOKENS, first, 4 * PAGE_TOKENS)
        two.sweep([(behind, 5)])
        two.sweep([(behind, 1)])
        assert all(page.at is PageState.KEPT for page in two.pairs[first][0].layers[0])


def test_a_chat_that_goes_on_writes_no_page_again() -> None:
    """What is taken in whole pages is as it is."""
    with twins(STAGING + 3 * LAYERS, 60) as two:
        one = ended(two, 6 * PAGE_TOKENS)
        two.resize(one, 8 * PAGE_TOKENS, 5 * PAGE_TOKENS)
        saved = two.disk.saved_pages
        two.sweep([(one, 10)])
        assert two.disk.saved_pages == saved


def sweep_until_it_fails(two: Twins, batch: list[tuple[int, int]]) -> None:
    for _ in range(9):
        two.sweep(batch)


@pytest.mark.parametrize("verb", ["reading", "writing"])
def test_a_lost_page_costs_all_who_stand_on_it_and_nobody_else(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with twins(STAGING + 4 * LAYERS, 60) as two:
        sound = opened(two, 3 * PAGE_TOKENS)
        two.sweep([(sound, 100)])
        first = opened(two, 6 * PAGE_TOKENS)
        fails = [verb == "writing"]
        name = "load" if verb == "reading" else "save"
        real = getattr(PageFile, name)

        def fail(self: PageFile, *arguments: Any) -> object:
            if fails[0]:
                raise OSError(5, "Input/output error")
            return real(self, *arguments)

        monkeypatch.setattr(PageFile, name, fail)
        if verb == "reading":
            two.sweep([(first, 6 * PAGE_TOKENS)])
            two.resize(first, 6 * PAGE_TOKENS, 6 * PAGE_TOKENS)
            behind = opened(two, PAGE_TOKENS, first, 6 * PAGE_TOKENS)
            fails[0] = True
        else:
            two.sweep([(first, 2 * PAGE_TOKENS), (behind := opened(two, PAGE_TOKENS, first, 2 * PAGE_TOKENS), 1)])
        with pytest.raises(KVPagesLostError):
            sweep_until_it_fails(two, [(sound, 1), (behind, 1), *([(first, 400)] if verb == "writing" else [])])
        assert two.pairs[behind][0].lost is two.pairs[first][0].lost is two.pairs[first][0].failed
        assert isinstance(two.pairs[behind][0].lost, DriveError)
        assert two.pairs[behind][0].failed is None
        assert two.pairs[sound][0].lost is None
        fails[0] = False
        two.drop(behind)
        two.drop(first)
        for _ in range(3):
            two.sweep([(sound, 1)])
        again = opened(two, 4 * PAGE_TOKENS)
        two.sweep([(again, 900), (sound, 1)])


# -- a model
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def on_disk(packed_llama: PackedModel, folder: Path, ram_pages: int) -> Iterator[Pipeline]:
    with (
        pages_on_disk(packed_llama.facts, folder, ram_pages) as disk,
        Pipeline(packed_llama, slot_bytes=1 << 20, resident_pieces=None) as pipeline,
    ):
        pipeline.runner._kv_store = disk(packed_llama.dtype, None)
        yield pipeline


def saved_pages(pipeline: Pipeline) -> int:
    store = pipeline.runner._kv_store
    assert isinstance(store, KVDisk)
    return store.saved_pages


@pytest.mark.parametrize(("most", "seed"), [(5, 3), (16, 4)])
def test_greedy_tokens_never_change(packed_llama: PackedModel, tmp_path: Path, most: int, seed: int) -> None:
    """Conversations through the scheduler; in little room what has ended is given up for those that wait."""
    layers = packed_llama.facts.num_layers
    turns = conversations(packed_llama.facts.vocab_size, seed, system_tokens=530)
    limits = Limits(most * PAGE_TOKENS, 512, max_sequences=3, page_tokens=PAGE_TOKENS, copies=False)
    with on_disk(packed_llama, tmp_path, STAGING + 3 * layers + 2) as pipeline:
        alone, together = alone_and_together(pipeline, limits, turns)
        assert saved_pages(pipeline)
        pipeline.runner.drop_all()
        assert pipeline.runner.cache_bytes == 0
    assert together.computed < (0.9 if most < 10 else 0.3) * alone.computed
    assert together.uses <= {"share", "take"}


def test_a_chat_goes_on_with_its_cache(packed_llama: PackedModel, tmp_path: Path) -> None:
    (tokens,) = random_prompts(packed_llama.facts.vocab_size, (1200,))
    params = SamplingParams(max_tokens=6)
    turns = [[RequestSpec(str(stop), tuple(tokens[:stop]), params, 0, 6)] for stop in (300, 500, 540, 1200)]
    limits = Limits(6 * PAGE_TOKENS, 512, page_tokens=PAGE_TOKENS, copies=False)
    with on_disk(packed_llama, tmp_path, STAGING + packed_llama.facts.num_layers + 1) as pipeline:
        _, together = alone_and_together(pipeline, limits, turns)
    assert together.uses == {"take"}
    assert together.computed == sum(stop - common // PAGE_TOKENS * PAGE_TOKENS + 5 for stop, common in
                                    ((300, 0), (500, 300), (540, 500), (1200, 540)))  # fmt: skip


def test_a_sweep_in_which_a_cache_was_taken_is_done_again_for_those_that_are_left(
    packed_llama: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In it one goes on with another's cache, and one loses a page on which a third stands."""
    tokens, more = random_prompts(packed_llama.facts.vocab_size, (1800, 60))
    with on_disk(packed_llama, tmp_path, STAGING + 3 * packed_llama.facts.num_layers) as pipeline:
        runner = pipeline.runner
        for name, prompt, stop in (("long", tokens, 1792), ("chat", more[:30], 30)):
            runner.run([step(name, prompt, 0, len(prompt))])
            runner.cut([(name, stop)])
        takes = step("next", more, 30, 60, (("chat", 30, "take"),))
        behind = step("behind", [*tokens[:1792], 5], 1792, 1793, (("long", 1792, "share"),))
        with pages_that_are_lost(monkeypatch):
            runner.run([takes, behind])
        lost = runner.undo()
        assert {*lost} == {"behind", "long"}
        assert isinstance(lost["behind"], DriveError)
        (got,) = runner.run([takes], again=True)
        runner.drop(["next"])
        (wanted,) = runner.run([step("alone", more, 0, 60)])
        assert got is not None
        assert wanted is not None
        torch.testing.assert_close(got, wanted[30:])
