"""Low-bit caches of sequences that begin on others': as if each had been computed from its first token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG
from harness import PackedModel, Pipeline, pack_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_runs import Stage, answers, conversations

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import floats_obstacle, instruction_set
from pipo_ray.model import low_bit_layer
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import WINDOW_TOKENS, LowBitKV, packed_pages
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.window import Window

HEADS, KV_HEADS, DIM = 4, 2, 16
RULE = AttentionRule(0.5)
BITS = (4, 16, 8)


@dataclass
class Line:
    """A sequence's query, keys and values in each layer, and what has been computed of them, and where."""

    tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    cache: LowBitCache

    @staticmethod
    def random(tokens: int, seed: int, store: LowBitStore, behind: Line | None = None, common: int = 0) -> Line:
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for layer in range(len(store.bits)):
            made = [torch.randn(heads, tokens, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            if behind is not None:
                for tensor, other in zip(made, behind.tensors[layer], strict=True):
                    tensor[:, :common] = other[:, :common]
            tensors.append((made[0], made[1], made[2]))
        return Line(tensors, store.open(tokens))

    def attend(self, layer: int, count: int) -> torch.Tensor:
        start = self.cache.start + self.cache.length
        return self.cache.attend(layer, *(tensor[:, start : start + count] for tensor in self.tensors[layer]), RULE)


def sweep(*steps: tuple[Line, int]) -> list[list[torch.Tensor]]:
    """So many tokens of each, layer by layer; what came of each layer."""
    made = [[line.attend(layer, count) for line, count in steps] for layer in range(len(BITS))]
    for line, count in steps:
        line.cache.advance(count)
    return made


def alone(line: Line, chunks: list[int]) -> tuple[LowBitCache, list[list[torch.Tensor]]]:
    """The same from its first token on; of the last chunk, what came of each layer."""
    again = Line(line.tensors, LowBitStore(BITS).open(line.tensors[0][0].shape[1]))
    made = [sweep((again, chunk)) for chunk in chunks]
    return again.cache, made[-1]


def check_same(shared: LowBitCache, own: LowBitCache) -> None:
    """Bit by bit, wherever it lies."""
    assert shared.start + shared.length == own.length
    for layer, bits in enumerate(BITS):
        if bits == 16:
            for tensor, other in zip(shared.wide.layers[layer], own.wide.layers[layer], strict=True):  # type: ignore[attr-defined]
                assert torch.equal(tensor[:, : shared.length], other[:, shared.start : own.length])
            continue
        mine, wanted = shared._layers[layer], own._layers[layer]
        assert mine.begin == wanted.begin
        packed = mine.begin // PAGE_TOKENS
        assert torch.equal(_codes(mine, packed), _codes(wanted, packed))
        for tensor, other in zip(mine.window, wanted.window, strict=True):
            assert torch.equal(tensor[:, : mine.num_held], other[:, : wanted.num_held])


def _codes(layer: object, stop: int) -> torch.Tensor:
    parts = [page for part in layer._pages.parts(0, stop) for page in part]  # type: ignore[attr-defined]
    return torch.cat(parts)[:, : sum(layer.layout.parts)] if parts else torch.empty(0)  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([1, 5, 63, 64, 65, 130, 200]), min_size=1, max_size=4),
    st.integers(0, 63), st.lists(st.sampled_from([1, 2, 64, 100, 150]), min_size=1, max_size=3),
    st.sampled_from(["behind", "ended", "in passing", "point", "copied", "taken"]), st.integers(0, 50),
)  # fmt: skip
def test_whoever_begins_on_another_has_what_it_would_have_alone(
    chunks: list[int], back: int, more: list[int], way: str, seed: int
) -> None:
    """Behind tokens that the other has at 16 bits, or in the sweep that computes them, and a third one behind that."""
    store = LowBitStore(BITS)
    length = sum(chunks)
    parent = Line.random(length + 40, seed, store)
    for chunk in chunks[:-1]:
        sweep((parent, chunk))
    before = length - chunks[-1]
    point = max(1, length - back)
    if way == "in passing":
        point = max(point, before)
        first = min(packed_pages(point), packed_pages(length + 39)) * PAGE_TOKENS
    else:
        sweep((parent, chunks[-1]))
        point = max(point, 1, packed_pages(length) * PAGE_TOKENS + 128 if packed_pages(length) else 1)
        first = packed_pages(length) * PAGE_TOKENS
    total = point + sum(more)
    child = Line.random(total, seed + 1, store, parent, point)
    prefix = ((parent.cache, first),) if first else ()
    if way == "taken":
        parent.cache.resize(total, point)
        child.cache = parent.cache
    elif way == "copied":
        child.cache = store.open(total)
        child.cache.copy_from(prefix)
        child.cache.begin_with(parent.cache, point - first)
    else:
        source = parent.cache
        if way == "ended":
            source.resize(length, length)
        if way == "point":
            source = store.open(point - first, prefix)
            source.begin_with(parent.cache, point - first)
            sweep((parent, 39))  # and moves on
        child.cache = store.open(total - first, prefix)
        child.cache.begin_with(source, point - first)
    if way == "in passing":
        *_, made = zip(*sweep((parent, chunks[-1]), (child, more[0])), strict=True)
        got: list[list[torch.Tensor]] = [[one] for one in made]
    else:
        got = sweep((child, more[0]))
    for chunk in more[1:]:
        got = sweep((child, chunk))
    own, wanted = alone(child, [point, *more])
    check_same(child.cache, own)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
@pytest.mark.parametrize("window", [None, 150, 300])
def test_a_token_that_comes_alone_attends_to_others_pages_as_they_are(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit what it is where all pages are its own, and without unpacking any."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(heads, 520, 64, generator=generator).bfloat16() for heads in (8, 2, 2)]
    rule, store = AttentionRule(0.2, window), LowBitStore((4,), CompiledAttention())
    own, first = store.open(520), store.open(400)

    def attend(cache: LowBitCache, count: int) -> torch.Tensor:
        at = cache.start + cache.length
        made = cache.attend(0, *(tensor[:, at : at + count] for tensor in tensors), rule)
        cache.advance(count)
        return made

    attend(own, 400)
    attend(first, 210)
    second = store.open(480 - 64, ((first, 64),))
    second.begin_with(first, 210 - 64)
    attend(second, 160)
    third = store.open(520 - 192, ((first, 64), (second, 128)))
    third.begin_with(second, 370 - 192)
    attend(third, 30)
    monkeypatch.setattr(low_bit_layer, "unpack_pages", None)
    for _ in range(120):
        assert torch.equal(attend(third, 1), attend(own, 1))


def test_what_ends_takes_what_it_has() -> None:
    """And its pages, once its window is gone; who stands on them does not change."""
    store = LowBitStore(BITS)
    parent = Line.random(400, 1, store)
    sweep((parent, 300))
    child = Line.random(340, 2, store, parent, 290)
    child.cache = store.open(340 - 128, ((parent.cache, 128),))
    child.cache.begin_with(parent.cache, 162)
    sweep((child, 20))
    full = parent.cache.nbytes
    token = KV_HEADS * 2 * DIM * 4
    pages = sum(layer.own_pages.nbytes for layer in parent.cache._layers.values())
    parent.cache.resize(300, 300)
    assert parent.cache.nbytes < full
    assert parent.cache.nbytes == pages // 2 + 2 * (300 - 128) * token + 300 * token
    parent.cache.resize(128, 128)
    assert parent.cache.nbytes == pages // 2 + 128 * token
    sweep((child, 10))
    own, _ = alone(child, [320])
    check_same(child.cache, own)


def test_tokens_that_are_packed_are_not_had_at_16_bits() -> None:
    store = LowBitStore((8,))
    parent = Line.random(400, 1, store)
    parent.attend(0, 300)
    parent.cache.advance(300)
    with pytest.raises(ValueError, match="of tokens from 64 on those before 128 are packed"):
        store.open(300, ((parent.cache, 64),)).begin_with(parent.cache, 130)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder: Path = tmp_path_factory.mktemp("llama")
    BY_SLUG["llama"].save(folder / "checkpoint")
    return pack_checkpoint(folder / "checkpoint", folder / "store", torch.float32)


@pytest.mark.parametrize(
    ("few", "kv_tokens", "batch", "seed"),
    [
        (4, 12_000, 512, 1),
        *(
            pytest.param(few, kv_tokens, batch, seed, marks=pytest.mark.slow)
            for few, kv_tokens, batch, seed in (
                (8, 2_500, 96, 2), (4, 2_000, 64, 10), (8, 2_000, 512, 11), (4, 4_000, 64, 12), (8, 20_000, 64, 13),
            )
        ),
    ],
)  # fmt: skip
def test_greedy_tokens_never_change(packed: PackedModel, few: int, kv_tokens: int, batch: int, seed: int) -> None:
    """With layers at 16 bits between, and where what has ended is given up for those that wait."""
    bits = tuple(few if layer % 3 != 1 else 16 for layer in range(packed.facts.num_layers))
    low = LowBitKV.of(bits, packed.facts)
    turns = conversations(packed.facts.vocab_size, seed, system_tokens=300)[: 2 if kv_tokens == 12_000 else 3]
    limits = Limits(
        kv_tokens, batch, state_tokens=-(-low.window_bytes // low.token_bytes),
        window=Window(WINDOW_TOKENS, PAGE_TOKENS, low.short_share),
    )  # fmt: skip
    with Pipeline(packed, kv_bits=bits, slot_bytes=1 << 20, resident_pieces=None) as pipeline:
        alone, together = Stage(pipeline), Stage(pipeline)
        wanted = asyncio.run(answers(alone, limits, turns))
        got = asyncio.run(answers(together, replace(limits, sharing="shared"), turns))
    assert got == wanted
    assert together.computed < (0.8 if kv_tokens < 4000 else 0.5) * alone.computed
    assert {"window", "share"} <= together.uses
    assert together.points
