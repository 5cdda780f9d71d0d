"""Packed pages between RAM and a file: the same bits come out, wherever they are and whatever fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG
from disk_twins import STAGING, pages_that_are_lost, stores
from fake_device import FakeDevice
from harness import Pipeline, pack_checkpoint, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pages import joined
from pipeline.pages_on_disk import pages_on_disk

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import floats_obstacle, instruction_set
from pipo_ray.errors import DriveError, UnsupportedModelError
from pipo_ray.model.batch import SweepEntry
from pipo_ray.model.disk_cache import DiskCache
from pipo_ray.model.kv_disk import KVDisk, KVPagesLostError
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_page import PageState
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.plan.disk_pages import PAGE_TOKENS as DISK_TOKENS
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import PageLayout, packed_pages
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of

HEADS, KV_HEADS = 2, 1


@dataclass
class Stage:
    """A store that is short of RAM, one that has enough, one without a drive; and the sequences in all three."""

    disk: KVDisk
    ram: KVDisk
    stores: list[LowBitStore]
    dim: int
    dtype: torch.dtype
    device: FakeDevice | None
    sequences: list[list[LowBitCache]] = field(default_factory=list)

    def join(self, capacity: int) -> int:
        self.sequences.append([store.open(capacity) for store in self.stores])
        return len(self.sequences) - 1

    def leave(self, number: int) -> None:
        for cache in self.sequences[number]:
            cache.drop()

    def sweep(self, batch: dict[int, int], window: int | None = None, layers: int | None = None) -> None:
        """So many tokens to each; a sweep of fewer `layers` is one that was given up."""
        bits = self.stores[0].bits
        for which, store in enumerate((self.disk, self.ram)):
            store.begin_sweep([_pages(self.sequences[number][which]) for number in batch])
        for layer in range(len(bits) if layers is None else layers):
            rule = AttentionRule(0.3, window if layer % 2 else None)
            for number, count in batch.items():
                tensors = [torch.randn(n, count, self.dim).to(self.dtype) for n in (HEADS, KV_HEADS, KV_HEADS)]
                short, plenty, memory = self.sequences[number]
                with nullcontext() if self.device is None else self.device.watching():
                    got = short.attend(layer, *tensors, rule).clone()
                assert torch.equal(got, plenty.attend(layer, *tensors, rule))
                other = memory.attend(layer, *tensors, rule)
                if bits[layer] != 16:
                    assert torch.equal(got, other)
        if layers is None:
            for number, count in batch.items():
                for cache in self.sequences[number]:
                    cache.advance(count)
            self.disk.end_sweep()
            self.ram.end_sweep()

    def check(self, number: int) -> None:
        """All packed pages are those of the cache without a drive, and what they stand for is rounded to them again."""
        short, _, memory = self.sequences[number]
        self.disk.begin_sweep([_pages(short)])
        for layer, held in short._layers.items():
            stop = min(packed_pages(short.length), held._most)
            with nullcontext() if self.device is None else self.device.watching():
                got = [part.clone() for parts in held._pages.parts(0, stop) for part in parts]
            if stop:
                pages = torch.cat(got)
                used = sum(held.layout.parts)
                assert torch.equal(pages[:, :used], joined(memory._layers[layer]._pages, stop)[:, :used])
                assert torch.equal(_rounded_again(pages, held.layout)[:, :used], pages[:, :used])


def _pages(cache: LowBitCache) -> DiskCache:
    assert isinstance(cache.wide, DiskCache)
    return cache.wide


def _rounded_again(pages: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    sizes = [(layout.heads, len(pages) * PAGE_TOKENS, dim) for dim in (layout.key_dim, layout.value_dim)]
    keys, values = (torch.empty(size) for size in sizes)
    codes = torch.empty(max(keys.numel(), values.numel()), dtype=torch.uint8)
    unpack_pages(views_of(pages, layout), layout, keys, values, codes)
    again = torch.zeros_like(pages)
    pack_pages(keys, values, views_of(again, layout), layout)
    return again


@contextmanager
def stage(
    bits: tuple[int, ...],
    ram_pages: int,
    *,
    disk_pages: int = 120,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: FakeDevice | None = None,
    compiled: CompiledAttention | None = None,
) -> Iterator[Stage]:
    """A page has four packed pages of the most bits, or DISK_TOKENS tokens of a layer at 16."""
    packed = {few: PageLayout(KV_HEADS, dim, dim, few).page_bytes for few in set(bits) - {16}}
    whole = DISK_TOKENS * KV_HEADS * 2 * dim * dtype.itemsize if 16 in bits else 4 * max(packed.values())
    nbytes = -(-whole // 4096) * 4096
    tokens = tuple(DISK_TOKENS if few == 16 else nbytes // packed[few] * PAGE_TOKENS for few in bits)
    with stores(
        ram_pages, disk_pages, dtype, device, shared=False, page_bytes=nbytes, tokens=tokens
    ) as (disk, ram):  # fmt: skip
        caches = [LowBitStore(bits, compiled, paged) for paged in (disk, ram, None)]
        yield Stage(disk, ram, caches, dim, dtype, device)


CHUNKS = st.lists(st.sampled_from([1, 2, 63, 64, 65, 200, 700]), min_size=3, max_size=9)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([(4, 4, 4), (8, 8, 8), (16, 4, 8), (4, 16, 16)]), CHUNKS, CHUNKS,
    st.sampled_from([None, 3, 150, 600]), st.integers(0, 12), st.integers(0, 50), st.sampled_from([None, 0.0, 0.5]),
)  # fmt: skip
def test_the_same_comes_out_wherever_packed_pages_are(
    bits: tuple[int, ...], first: list[int], second: list[int], window: int | None, more: int, seed: int,
    eager: float | None,
) -> None:  # fmt: skip
    """Of two sequences, one of which comes late and leaves early; also where a GPU computes."""
    torch.manual_seed(seed)
    device = None if eager is None else FakeDevice(seed, eager)
    dtype = torch.bfloat16 if seed % 2 else torch.float32
    with stage(bits, STAGING + 2 * len(bits) + more, dtype=dtype, device=device) as one:
        one.join(sum(first) + 10)
        for number, chunk in enumerate(first):
            batch = {0: chunk}
            if number == 1:
                one.join(sum(second))
            if 1 <= number <= len(second):
                batch[1] = second[number - 1]
            one.sweep(batch, window)
        if window is None:
            one.check(0)
            one.check(1)
        one.leave(1)
        for _ in range(3):
            one.sweep({0: 1}, window)
        one.leave(0)
        assert sorted(one.disk.moves.free_stored + [s for _, s in one.disk.moves.leaving if s >= 0]) == list(range(120))


def test_token_by_token_across_pages() -> None:
    torch.manual_seed(2)
    with stage((4, 16), STAGING + 2 * 2) as one:
        one.join(1200)
        one.sweep({0: 700})
        for _ in range(300):
            one.sweep({0: 1})
        assert one.disk.loaded_pages
        one.check(0)


def test_a_sweep_that_failed_is_undone_unless_a_page_has_left_a_window() -> None:
    torch.manual_seed(3)
    with stage((16, 4, 8), STAGING + 2 * 3) as one:
        one.join(2000)
        one.sweep({0: 900})  # 12 packed pages, and 132 tokens
        for tokens, layers in ((59, 3), (1, 2), (700, 1)):  # of the last only the layer at 16 bits has heard
            one.sweep({0: tokens}, layers=layers)
            assert all(cache.undo() for cache in one.sequences[0])
        one.sweep({0: 20})
        one.sweep({0: 1})
        one.check(0)
        one.sweep({0: 60}, layers=2)
        assert not any(cache.undo() for cache in one.sequences[0])
        one.leave(0)
        one.join(1500)
        one.sweep({1: 1000})
        one.sweep({1: 1})
        one.check(1)


def sweeps(one: Stage, tokens: list[int]) -> None:
    for count in tokens:
        one.sweep({0: count})


@pytest.mark.parametrize("verb", ["reading", "writing"])
def test_a_page_that_fails_costs_its_sequence_alone(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    with stage((4, 4), STAGING + 3 * 2) as one:
        one.join(3000)
        one.join(500)
        one.sweep({1: 450})
        if verb == "reading":
            one.sweep({0: 2500})
        name, fails = ("load" if verb == "reading" else "save"), [True]
        real = getattr(PageFile, name)

        def fail(self: PageFile, pages: list[memoryview], first: int, *seals: object) -> object:
            if fails[0]:
                raise OSError(28, "No space left on device")
            return real(self, pages, first, *seals)

        monkeypatch.setattr(PageFile, name, fail)
        with pytest.raises(KVPagesLostError):
            sweeps(one, [1] * 20 if verb == "reading" else [2500, *[1] * 20])
        lost, sound = (_pages(one.sequences[number][0]) for number in (0, 1))
        assert isinstance(lost.lost, DriveError)
        assert f"{verb} failed: No space left on device; check that the drive" in str(lost.lost)
        assert sound.lost is None
        fails[0] = False
        one.leave(0)
        for _ in range(20):
            one.sweep({1: 1})
        one.check(1)
        one.join(3000)
        one.sweep({2: 2500, 1: 1})
        one.check(2)


def test_who_shared_a_sweep_that_failed_goes_on_or_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence that has given up a page in it cannot go back, but that is no error of its own."""
    BY_SLUG["llama"].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    bits = (4,) * packed.facts.num_layers
    long, short = random_prompts(packed.facts.vocab_size, (2000, 400))
    with (
        pages_on_disk(packed.facts, tmp_path, 15, bits) as disk,
        Pipeline(packed, kv_bits=bits, slot_bytes=1 << 20, resident_pieces=None) as pipeline,
    ):
        runner = pipeline.runner
        runner._kv_store = LowBitStore(bits, None, disk(packed.dtype, None))
        tokens = {"lost": long, "torn": short, "sound": short[:100]}
        for name, stop in (("lost", 1900), ("torn", 150), ("sound", 100)):
            runner.run([SweepEntry(name, tuple(tokens[name][:stop]), 0, 2000, "none")])
        sound = runner.run([SweepEntry("sound", (7,), 100, 2000, "last")])[0]
        runner.run([SweepEntry("sound", tuple(short[:100]), 0, 2000, "none")])
        last = [
            SweepEntry("torn", tuple(short[150:]), 150, 2000, "last"),
            SweepEntry("sound", (7,), 100, 2000, "last"),
            SweepEntry("lost", (7,), 1900, 2000, "last"),
        ]
        with pages_that_are_lost(monkeypatch):
            runner.run(last)
        lost = runner.undo()
        assert isinstance(lost.pop("lost"), DriveError)
        assert lost == {"torn": None}
        again = runner.run([SweepEntry("torn", tuple(short), 0, 2000, "last"), last[1]])
        assert sound is not None
        assert again[1] is not None
        torch.testing.assert_close(again[1], sound)


def test_a_full_file_costs_one_sequence() -> None:
    with stage((4, 4), STAGING + 2, disk_pages=3) as one:
        one.join(3000)
        with pytest.raises(KVPagesLostError):
            sweeps(one, [200] * 15)
        assert "the file has no room for more than 3" in str(_pages(one.sequences[0][0]).lost)


def test_what_no_window_reaches_is_given_back() -> None:
    """But never the page that is written to."""
    with stage((4, 4), STAGING + 2 * 2) as one:
        one.join(3000)
        for _ in range(10):
            one.sweep({0: 130}, window=3)
        of_all, of_few = (_pages(one.sequences[0][0]).layers[layer] for layer in range(2))
        assert not any(page.at is PageState.GONE for page in of_all)
        assert {page.at for page in of_few[:-2]} == {PageState.GONE}  # the last was full a sweep ago
        assert of_few[-1].at is PageState.OPEN


def test_larger_pages_than_the_facts_say_are_refused() -> None:
    with stage((4,), STAGING + 1) as one:
        cache = one.stores[0].open(300)
        wide = [torch.zeros(heads, 1, 64) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        with pytest.raises(UnsupportedModelError, match="layer 0 caches pages of 4608 bytes, its model's facts say"):
            cache.attend(0, *wide, AttentionRule(1.0))


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
@pytest.mark.parametrize("bits", [(8, 8), (4, 16)])
def test_the_compiled_kernel_reads_them(bits: tuple[int, ...]) -> None:
    """A token that comes alone: to the last bit what it is with all pages in one place."""
    torch.manual_seed(5)
    with stage(bits, STAGING + 3 * 2, dim=64, dtype=torch.bfloat16, compiled=CompiledAttention()) as one:
        one.join(2500)
        one.sweep({0: 2200})
        for window in (None, None, 600, 100):
            for _ in range(20):
                one.sweep({0: 1}, window)
        assert one.disk.loaded_pages
        one.check(0)
