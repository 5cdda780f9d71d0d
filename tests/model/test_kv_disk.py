"""KV pages between RAM and a file: bit-identical, whatever joins, leaves, grows and fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from disk_twins import DIM, HEADS, KV_HEADS, LAYERS, STAGING, stores, watch_late_pages
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.errors import DriveError, ResourceError, UnsupportedModelError
from pipo_ray.model.disk_cache import DiskCache, DiskSpan
from pipo_ray.model.kv_disk import KVDisk, KVPagesLostError
from pipo_ray.model.kv_page import PageState
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.plan.disk_pages import PAGE_TOKENS
from pipo_ray.plan.kv_disk import pages_of


@dataclass
class Written:
    """A sequence's two caches, the one that is tested and one with room for everything, and all keys and values."""

    cache: DiskCache
    other: DiskCache
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class Stage:
    """A store that is short of RAM, and one that has enough."""

    disk: KVDisk
    ram: KVDisk
    device: FakeDevice | None

    def join(self, capacity: int) -> Written:
        return Written(self.disk.open(capacity), self.ram.open(capacity))

    def leave(self, one: Written) -> None:
        one.cache.drop()
        one.other.drop()

    def sweep(
        self, batch: list[tuple[Written, int]], window: int | None = None, layers: int = LAYERS, look: bool = True
    ) -> None:
        """One sweep, so many tokens to each; a sweep of fewer `layers` is one that was given up."""
        self.disk.begin_sweep([one.cache for one, _ in batch])
        self.ram.begin_sweep([one.other for one, _ in batch])
        for layer in range(layers):
            rule = AttentionRule(0.3, window if layer % 2 else None)
            for one, count in batch:
                dtype = self.disk.layout._dtype
                query = torch.randn(HEADS, count, DIM).to(dtype)
                keys, values = (torch.randn(KV_HEADS, count, DIM).to(dtype) for _ in range(2))
                with nullcontext() if self.device is None else self.device.watching():
                    got = one.cache.attend(layer, query, keys, values, rule).clone()
                assert torch.equal(got, one.other.attend(layer, query, keys, values, rule))
                if layers == LAYERS:
                    one.keys[layer] = torch.cat([one.keys.get(layer, keys[:, :0]), keys], dim=1)
                    one.values[layer] = torch.cat([one.values.get(layer, values[:, :0]), values], dim=1)
                if look and layers == LAYERS and rule.sliding_window is None:
                    self.check(one, layer)
        if layers == LAYERS:
            for one, count in batch:
                one.cache.advance(count)
                one.other.advance(count)
            self.disk.end_sweep()

    def check(self, one: Written, layer: int) -> None:
        """Everything is where it should be, bit for bit."""
        total = one.keys[layer].shape[1]
        with nullcontext() if self.device is None else self.device.watching():
            parts = [(k.clone(), v.clone()) for k, v in DiskSpan(self.disk, one.cache.layers[layer], total).chunks()]
        assert torch.equal(torch.cat([part[0] for part in parts], dim=1), one.keys[layer])
        assert torch.equal(torch.cat([part[1] for part in parts], dim=1), one.values[layer])


@contextmanager
def stage(
    ram_pages: int, disk_pages: int, dtype: torch.dtype = torch.float32, device: FakeDevice | None = None
) -> Iterator[Stage]:
    with stores(ram_pages, disk_pages, dtype, device, newest=8, shared=False) as (disk, ram):
        yield Stage(disk, ram, device)


def check_books(one: Stage) -> None:
    """With nobody there all frames and all of the file are free, once everything has ended."""
    disk = one.disk
    moves = disk.moves
    while moves.to_save or moves.saving or moves.leaving:
        moves.wait_for_one()
    assert sorted(moves.free) == list(range(disk.placement.ram_pages))
    assert sorted(moves.free_stored) == list(range(disk.placement.disk_pages))
    assert not disk._ahead.claimed
    assert disk._kept == [0] * LAYERS
    if disk._copies is not None:
        assert len(disk._copies._newest) == 8 * LAYERS
        assert len(disk._copies._groups) == 2


@st.composite
def histories(draw: st.DrawFn) -> list[dict[str, object]]:
    """Per sweep: who joins (capacity), how many tokens each takes, whether a sweep is given up first, who leaves."""
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "join": st.lists(st.integers(2, 1500), max_size=2),
                    "tokens": st.lists(st.sampled_from([0, 1, 1, 1, 200, 256, 700]), min_size=5, max_size=5),
                    "given_up": st.sampled_from([0, 0, 0, 1, 2]),
                    "leave": st.lists(st.integers(0, 4), max_size=1),
                }
            ),
            min_size=2,
            max_size=10,
        )
    )


@settings(max_examples=20, deadline=None)
@given(
    histories(),
    st.integers(STAGING + 2 * LAYERS, 30),
    st.sampled_from([None, 100, 600]),
    st.integers(0, 100),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_pages_are_bit_identical_wherever_they_are(
    history: list[dict[str, list[int]]], ram_pages: int, window: int | None, seed: int, eager: float | None
) -> None:
    """Also where a GPU computes, whose copies are done as late or as early as their order allows."""
    torch.manual_seed(seed)
    disk_pages = 40
    dtype = torch.bfloat16 if seed % 2 else torch.float32
    device = None if eager is None else FakeDevice(seed, eager)
    with stage(ram_pages, disk_pages, dtype, device) as one:
        most_tokens, most = one.disk.placement.kv_tokens, one.disk.placement.max_sequences
        live: list[Written] = []
        for step in history:
            for capacity in step["join"]:
                reserved = sum(pages_of(other.cache.capacity) for other in live) + pages_of(capacity)
                if len(live) < most and reserved * PAGE_TOKENS <= most_tokens:
                    live.append(one.join(capacity))
            batch = []
            for written, wanted in zip(live, step["tokens"], strict=False):
                count = min(wanted, written.cache.capacity - written.cache.length)
                if count:
                    batch.append((written, count))
            if batch and step["given_up"]:
                one.sweep(batch, window, layers=step["given_up"])
            if batch:
                one.sweep(batch, window)
            for index in step["leave"]:
                if index < len(live):
                    one.leave(live.pop(index))
        assert not any(written.cache.lost for written in live)
        for written in live:
            one.leave(written)
        check_books(one)


@pytest.mark.parametrize("ram_pages", [STAGING + LAYERS, STAGING + 3 * LAYERS, STAGING + 9 * LAYERS])
@pytest.mark.parametrize("length", [100, PAGE_TOKENS, 700])
@pytest.mark.parametrize("eager", [None, 0.0])
def test_a_sweep_that_was_given_up_leaves_nothing_behind(ram_pages: int, length: int, eager: float | None) -> None:
    """Whether the page that it appended to stays, is being saved, or has left RAM by the time it is done again."""
    with stage(ram_pages, 60, device=None if eager is None else FakeDevice(1, eager)) as one:
        written = one.join(10 * PAGE_TOKENS)
        one.sweep([(written, length)])
        for tokens in (900, 1, 300):
            one.sweep([(written, tokens)], layers=2)
        one.sweep([(written, 500)])
        one.sweep([(written, 1)])
        one.leave(written)
        check_books(one)


def test_a_fixed_part_stays_in_every_layer_and_nothing_is_written_twice() -> None:
    with stage(STAGING + 3 * LAYERS, 60) as one:
        written = one.join(10 * PAGE_TOKENS)
        for _ in range(10):
            one.sweep([(written, PAGE_TOKENS - 1)], look=False)
        assert one.disk.saved_pages == LAYERS * (9 - 2)
        before = one.disk.loaded_pages
        for _ in range(4):
            one.sweep([(written, 1)], look=False)
        ahead = one.disk.placement.ahead_pages
        assert abs(one.disk.loaded_pages - before - 4 * LAYERS * 7) <= ahead
        assert one.disk.saved_pages == LAYERS * 7
        assert one.disk._kept == [2] * LAYERS


@pytest.mark.parametrize("device", [None, FakeDevice(eager=1.0)])
def test_no_page_is_asked_for_when_it_is_needed_only(
    device: FakeDevice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read ahead before the sweep began is not read ahead once more when it has been used."""
    with stage(STAGING + 3 * LAYERS, 60, device=device) as one:
        written = one.join(10 * PAGE_TOKENS)
        for _ in range(9):
            one.sweep([(written, PAGE_TOKENS)], look=False)
        one.sweep([(written, 1)], look=False)
        late = watch_late_pages(monkeypatch)
        for _ in range(4):
            one.sweep([(written, 1)], look=False)
    assert not late


def test_pages_come_back_to_ram_when_there_is_room() -> None:
    with stage(STAGING + 5 * LAYERS, 60) as one:
        first, second = one.join(4 * PAGE_TOKENS), one.join(4 * PAGE_TOKENS)
        one.sweep([(first, 900), (second, 900)])
        assert one.disk._kept == [3] * LAYERS
        one.leave(first)
        one.sweep([(second, 1)])
        one.sweep([(second, 1)])
        loaded = one.disk.loaded_pages
        one.sweep([(second, 1)])
        assert one.disk.loaded_pages == loaded


def test_what_no_window_reaches_is_given_back() -> None:
    with stage(STAGING + 2 * LAYERS, 60) as one:
        written = one.join(8 * PAGE_TOKENS)
        for _ in range(7):
            one.sweep([(written, PAGE_TOKENS)], window=PAGE_TOKENS)
        assert sum(page.at is PageState.GONE for page in written.cache.layers[1]) == 5
        assert not any(page.at is PageState.GONE for page in written.cache.layers[0])


def sweep_until_it_fails(one: Stage, written: Written, first: int) -> None:
    for _ in range(20):
        one.sweep([(written, 1 if written.cache.length else first)], look=False)


@pytest.mark.parametrize("verb", ["reading", "writing"])
def test_a_page_that_fails_costs_its_sequence_alone(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage(STAGING + 3 * LAYERS, 60) as one:
        broken, sound = one.join(4 * PAGE_TOKENS), one.join(2 * PAGE_TOKENS)
        one.sweep([(sound, 300)])
        real = getattr(PageFile, "load" if verb == "reading" else "save")
        fails = [True]

        def fail(self: PageFile, pages: list[memoryview], first: int, *seals: object) -> object:
            if fails[0]:
                raise OSError(5, "Input/output error")
            return real(self, pages, first, *seals)

        if verb == "reading":
            one.sweep([(broken, 900)], look=False)
        monkeypatch.setattr(PageFile, "load" if verb == "reading" else "save", fail)
        with pytest.raises(KVPagesLostError):
            sweep_until_it_fails(one, broken, 900)
        assert isinstance(broken.cache.lost, DriveError)
        assert f"{verb} failed: Input/output error; check that the drive" in str(broken.cache.lost)
        assert sound.cache.lost is None
        fails[0] = False
        one.leave(broken)
        for _ in range(3):
            one.sweep([(sound, 1)])
        again = one.join(4 * PAGE_TOKENS)
        one.sweep([(again, 900), (sound, 1)])


def test_a_drive_that_takes_nothing_at_all_does_not_take_the_pages_in_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PageFile, "save", fail)
    with stage(STAGING + 2 * LAYERS, 60) as one:
        for _ in range(5):
            broken, sound = one.join(8 * PAGE_TOKENS), one.join(PAGE_TOKENS)
            one.sweep([(sound, 200)])
            with pytest.raises(KVPagesLostError):
                sweep_until_it_fails(one, broken, 1900)
            assert sound.cache.lost is None
            one.leave(broken)
            one.sweep([(sound, 1)])
            one.leave(sound)
        moves = one.disk.moves
        assert len(moves.free) + len(moves.saving) + len(moves.leaving) == one.disk.placement.ram_pages


def test_a_full_file_costs_one_sequence() -> None:
    with stage(STAGING + LAYERS, 2) as one:
        written = one.join(4 * PAGE_TOKENS)
        with pytest.raises(KVPagesLostError):
            sweep_until_it_fails(one, written, 900)
        assert "the file has no room for more than 2" in str(written.cache.lost)


def test_more_sequences_than_pages_in_ram_are_refused() -> None:
    with stage(STAGING + LAYERS, 60) as one:
        one.join(10)
        with pytest.raises(ResourceError, match="2 sequences at the same time, but RAM has KV pages for 1"):
            one.join(10)


def test_a_token_that_is_larger_than_the_facts_say_is_refused() -> None:
    with stage(STAGING + LAYERS, 60) as one:
        cache = one.join(10).cache
        wide = torch.zeros(KV_HEADS, 1, DIM + 1)
        with pytest.raises(UnsupportedModelError, match="layer 0 caches 17 elements per token, its model's facts say"):
            cache.attend(0, torch.zeros(HEADS, 1, DIM), wide, torch.zeros(KV_HEADS, 1, DIM), AttentionRule(1.0))
