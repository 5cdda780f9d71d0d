"""Prefixes of few bits that are in RAM once, beside a device, which here is the CPU: what comes out is, bit by bit,
what comes out of sharing them in the device's memory.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_SLUG
from fake_device import FakeDevice
from harness import CPU, PackedModel, Pipeline, pack_checkpoint, random_prompts
from host_twins import COMPILED, PACKING, Twins
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_runs import Stage, answers, conversations, step

from pipo_ray.compiled.machine import run_here
from pipo_ray.compiled.support import floats_obstacle
from pipo_ray.messages import SweepRequest, SweepResult
from pipo_ray.model import host_link, packed_pages
from pipo_ray.model.batch import KeptPoint, PrefixPart, SweepEntry
from pipo_ray.model.kv_cache import Segment
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import WINDOW_TOKENS, LowBitKV
from pipo_ray.plan.low_bit_pages import packed_pages as num_packed
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.window import Window

COUNTS = st.sampled_from([1, 1, 1, 2, 64, 150])


class Family:
    """Sequences that begin on each other's pages, in RAM and where they are computed."""

    def __init__(self, twins: Twins) -> None:
        self.twins, self.names = twins, itertools.count()
        self.points: set[int] = set()

    def total(self, name: int) -> int:
        cache = self.twins.pairs[name][0]
        return cache.start + cache.length

    def room(self, name: int) -> int:
        cache = self.twins.pairs[name][0]
        return 0 if name in self.points else cache.capacity - cache.length

    def new(self, tokens: int) -> int:
        name = next(self.names)
        self.twins.open(name, tokens + 300)
        return name

    def behind(self, name: int, back: int, more: int) -> int | None:
        """A sequence behind all but `back` tokens of one that it still has at 16 bits; None if there are none."""
        total = self.total(name)
        least = max(1, num_packed(total) * PAGE_TOKENS + WINDOW_TOKENS if num_packed(total) else 1)
        if name in self.points or total < least:
            least = total
        if not total:
            return None
        tokens = max(least, total - back)
        child = next(self.names)
        self.twins.open(child, tokens + more + 200, name, tokens)
        return child

    def ended(self, name: int) -> None:
        for cache in self.twins.pairs[name]:
            cache.resize(cache.length, cache.length)

    def in_use(self) -> set[int]:
        """Those on which others stand."""
        return {one for name in self.twins.pairs for one, _ in self.twins.lines[name]}

    def drop_some(self, chance: Any) -> None:
        while free := sorted({*self.twins.pairs} - self.in_use()):
            self.twins.drop(chance.choice(free))
            self.twins.check_pages()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "on": st.integers(0, 20), "way": st.sampled_from(["behind", "passing", "point", "ended", "new"]),
                "back": st.integers(0, 63), "first": COUNTS, "tokens": st.lists(COUNTS, min_size=5, max_size=5),
                "checks": st.booleans(),
            }
        ),
        min_size=3, max_size=8,
    ),
    st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from([None, None, 150]), st.booleans(),
    st.sampled_from([1, 4 << 20]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_sequences_that_begin_on_each_other(
    history: list[dict[str, Any]], dtype: torch.dtype, window: int | None, packs: bool, at_once: int, chance: Any
) -> None:
    """Behind one that runs or has ended, in the sweep that computes what they share, whether that is a chunk or a token
    that comes alone, and on a point; and when they end, in any order, nothing of them is left.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_link, "BUFFER_BYTES", 3000)
        patch.setattr(packed_pages, "VISITING_BYTES", at_once)
        twins = Twins(dtype, COMPILED, AttentionRule(0.1, window), PACKING if packs else None)
        family, ended = Family(twins), set[int]()
        twins.sweep([(family.new(200), 200)])
        for event in history:
            live = [name for name in twins.pairs if family.total(name)]
            on, joined = live[event["on"] % len(live)], list[tuple[int, int]]()
            batch = {name: count for name, count in zip(live, event["tokens"], strict=False) if name not in ended}
            batch = {name: min(count, family.room(name)) for name, count in batch.items()}
            if event["way"] == "ended":
                family.ended(on)
                ended.add(on)
                batch.pop(on, None)
            if event["way"] in ("behind", "ended"):
                child = family.behind(on, event["back"], event["first"])
                joined = [] if child is None else [(child, event["first"])]
            elif event["way"] == "new":
                joined = [(family.new(event["first"]), event["first"])]
            elif batch.get(on):
                tokens = max(family.total(on) + 1, family.total(on) + batch[on] - event["back"])
                child = next(family.names)
                if event["way"] == "point":
                    twins.open(child, tokens, on, tokens)
                    family.points.add(child)
                else:
                    twins.open(child, tokens + 300, on, tokens)
                    joined = [(child, event["first"])]
                    batch = {on: batch.pop(on), **batch} if chance.random() < 0.5 else batch
            if steps := [(name, count) for name, count in [*batch.items(), *joined] if count]:
                twins.sweep(steps)
            if event["checks"]:  # which packs what has left windows
                twins.check_pages()
        held = [weakref.ref(one) for name in twins.pairs for cache in twins.pairs[name]
                for layer in cache._layers.values() for one in (layer.own_pages, *layer.window)]  # fmt: skip
        family.drop_some(chance)
        del live, batch
        assert not twins.pairs, "each stands on others that have to stay"
        gc.collect()
        assert all(one() is None for one in held)


@pytest.mark.parametrize("copied", [False, True])
def test_a_page_that_has_just_left_a_window_is_packed_before_anybody_begins_on_it(copied: bool) -> None:
    """It would be with the next token of its sequence, which does not come."""
    twins = Twins(torch.bfloat16, COMPILED, AttentionRule(0.1), PACKING)
    twins.open(0, 400)
    twins.sweep([(0, 191)])
    twins.sweep([(0, 1)])
    if copied:
        twins.open(1, 400)
        for cache, other in zip(twins.pairs[1], twins.pairs[0], strict=True):
            cache.copy_from([(other, 64)])
            cache.begin_with(other, 128)
    else:
        twins.open(1, 400, 0, 192)
    twins.sweep([(1, 1)])
    twins.sweep([(1, 3)])


@pytest.mark.skipif(COMPILED is None, reason=str(floats_obstacle()))
@pytest.mark.parametrize("packing", [PACKING, None], ids=["kernel", "torch"])
def test_in_the_streams_order_tokens_attend_to_others_pages(packing: Any) -> None:
    """Of two that stand on a third and one that stands on them; each packs pages of its own, and what they stand on
    moves: only then is a call told again.
    """
    pending: list[tuple[int, int]] = []
    rule = AttentionRule(0.1)
    twins = Twins(torch.bfloat16, COMPILED, rule, packing)
    twins.open(0, 400)
    twins.sweep([(0, 280)])
    twins.open(1, 420, 0, 270)
    twins.open(2, 460, 0, 280)
    twins.sweep([(1, 30), (2, 64)])
    twins.open(3, 470, 2, 340)
    twins.sweep([(3, 2)])
    twins.host._in_stream_order = lambda *call: pending.append(call)
    order, told = [3, 1, 2], []
    for number in range(100):
        if number == 50:
            for cache in twins.pairs[0]:
                cache.resize(128, 128)
        segments = [Segment(twins.pairs[name][0], at, at + 1) for at, name in enumerate(order)]
        for layer in (0, 1):
            rows = twins.tensors(len(order))
            twins.host.attend_row(segments, layer, *rows, rule)
            expected = [
                twins.pairs[name][1].attend(layer, *(x[:, at : at + 1] for x in rows), rule)[:, 0]
                for at, name in enumerate(order)
            ]
            for call in pending:
                run_here(*call)
            pending.clear()
            got = twins.host._link.buffers["output"][: 2 * 64 * 8 * len(order)].view(torch.bfloat16).view(-1, 8, 64)
            assert torch.equal(got, torch.stack(expected))
        told.append(twins.host._deferred[0])
        for name in order:
            for cache in twins.pairs[name]:
                cache._layers.pop(2, None)
                cache.length += 1
    assert len({id(one) for one in told}) == 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder: Path = tmp_path_factory.mktemp("llama")
    BY_SLUG["llama"].save(folder / "checkpoint")
    return pack_checkpoint(folder / "checkpoint", folder / "store", torch.float32)


def in_ram(packed: PackedModel, bits: tuple[int, ...]) -> Pipeline:
    return Pipeline(
        packed, slot_bytes=1 << 20, ops=FakeDevice(), kv_store=lambda *_: HostKV(CPU, low_bit=LowBitStore(bits))
    )  # type: ignore[arg-type, return-value]


class Recording(Stage):
    """Keeps the logits of every sweep, and how many tokens there is KV of."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        self.logits: list[torch.Tensor] = []
        self.bytes: list[int] = []
        run = self._runner.run

        def recorded(entries: Any) -> list[torch.Tensor | None]:
            made = run(entries)
            self.logits += [one for one in made if one is not None]
            return made

        self._runner.run = recorded  # type: ignore[method-assign]

    async def run_sweep(self, request: SweepRequest) -> SweepResult:
        result = await super().run_sweep(request)
        self.bytes.append(self._runner.cache_bytes)
        return result


@pytest.mark.parametrize(
    ("few", "kv_tokens", "batch"), [(4, 12_000, 512), pytest.param(8, 2_000, 64, marks=pytest.mark.slow)]
)
def test_conversations_are_as_in_the_devices_memory(packed: PackedModel, few: int, kv_tokens: int, batch: int) -> None:
    """Through the scheduler, with points and what is taken, in ample and in little room: the same sweeps, every logit
    the same, and as many bytes.
    """
    bits = tuple(few if layer % 3 != 1 else 16 for layer in range(packed.facts.num_layers))
    low = LowBitKV.of(bits, packed.facts)
    turns = conversations(packed.facts.vocab_size, 1, system_tokens=300)[:2]
    limits = Limits(
        kv_tokens, batch, state_tokens=-(-low.window_bytes // low.token_bytes), sharing="shared",
        window=Window(WINDOW_TOKENS, PAGE_TOKENS, low.short_share),
    )  # fmt: skip
    found = []
    for pipeline in (in_ram(packed, bits), Pipeline(packed, slot_bytes=1 << 20, ops=FakeDevice(), kv_bits=bits)):
        with pipeline:
            stage = Recording(pipeline)
            tokens = asyncio.run(answers(stage, limits, turns))
            found.append((stage, tokens))
    (ours, our_tokens), (theirs, their_tokens) = found
    assert our_tokens == their_tokens
    assert ours.bytes == theirs.bytes
    assert all(torch.equal(*pair) for pair in zip(ours.logits, theirs.logits, strict=True))
    assert {"window", "share"} <= ours.uses
    assert ours.points
    with in_ram(packed, bits) as pipeline:
        alone = Recording(pipeline)
        asyncio.run(answers(alone, replace(limits, sharing="none"), turns))
    assert ours.computed < 0.85 * alone.computed


def test_a_sweep_that_failed_leaves_what_others_stand_on(packed: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a layer in the middle, of a row in which one begins in passing and a point is kept: those are gone, nothing is
    held for them, and what is computed behind the others is as if it had not been.
    """
    bits = (4,) * packed.facts.num_layers
    tokens, more = random_prompts(packed.facts.vocab_size, (300, 60))
    point = KeptPoint("p", (PrefixPart("a", 64), PrefixPart("b", 130, "window")))
    behind_a = PrefixPart("a", 64), PrefixPart("a", 128, "window")
    b = SweepEntry("b", tuple(tokens[192:210]), 192, 330, "all", behind_a, (point,))
    c = step("c", tokens[:200] + more, 200, 260, (("a", 64, "share"), ("b", 136, "window")))
    d = step("d", tokens[:194] + more, 194, 254, (("a", 64, "share"), ("p", 130, "window")))
    with in_ram(packed, bits) as pipeline:
        runner = pipeline.runner
        runner.run([step("a", tokens, 0, 192)])
        before = runner.cache_bytes
        wanted = [one for one in runner.run([b, c]) if one is not None]
        wanted += [one for one in runner.run([d]) if one is not None]
        runner.drop(["b", "c", "p", "d"])
        assert runner.cache_bytes == before
        attend_row, layers = HostKV.attend_row, list[int]()

        def failing(host: HostKV, segments: Any, layer: int, *rest: Any) -> torch.Tensor:
            layers.append(layer)
            if layer == 1:
                raise RuntimeError("a kernel failed")
            return attend_row(host, segments, layer, *rest)

        monkeypatch.setattr(HostKV, "attend_row", failing)
        with pytest.raises(RuntimeError, match="a kernel failed"):
            runner.run([b, c])
        assert layers == [0, 1]
        assert runner.cache_bytes == before
        assert [runner.length(name) for name in "abcp"] == [192, 0, 0, 0]
        monkeypatch.undo()
        got = [one for one in runner.run([b, c]) if one is not None]
        got += [one for one in runner.run([d]) if one is not None]
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))
        for name in "dcpba":
            runner.drop([name])
        assert runner.cache_bytes == 0
