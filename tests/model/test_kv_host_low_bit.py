"""A low-bit KV cache in RAM beside a device, which here is the CPU: what comes out is, bit by bit, what comes out of
one in the device's memory.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG, VOCAB_SIZE
from fake_device import FakeDevice
from harness import CPU, Pipeline, pack_checkpoint, random_prompts
from host_twins import BITS, COMPILED, PACKING, Twins
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.compiled.machine import run_here
from pipo_ray.compiled.pack import CompiledPacking
from pipo_ray.compiled.support import floats_obstacle
from pipo_ray.model import host_link, packed_pages
from pipo_ray.model.kv_cache import Segment
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({"joins": st.lists(st.integers(1, 500), max_size=2), "leaves": st.booleans(),
                               "tokens": st.lists(st.sampled_from([1, 1, 1, 2, 60, 150]), min_size=4, max_size=4)}),
        min_size=3, max_size=10,
    ),
    st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from([None, None, 150]), st.booleans(),
    st.sampled_from([1, 4 << 20]), st.booleans(),
)  # fmt: skip
def test_sequences_that_come_and_go(
    history: list[dict[str, list[int]]],
    dtype: torch.dtype,
    window: int | None,
    caps: bool,
    at_once: int,
    packs: bool,
) -> None:
    """Prompts, chunks and tokens that come alone in a row; by the kernel in bf16, by torch otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_link, "BUFFER_BYTES", 3000)
        patch.setattr(packed_pages, "VISITING_BYTES", at_once)
        twins = Twins(dtype, COMPILED, AttentionRule(0.1, window, 5.0 if caps else None), PACKING if packs else None)
        names = 0
        for step in history:
            for capacity in step["joins"]:
                twins.open(names, capacity)
                names += 1
            batch = []
            for wanted, (name, (mine, _)) in zip(step["tokens"], twins.pairs.items(), strict=False):
                if count := min(wanted, mine.capacity - mine.length):
                    batch.append((name, count))
            if batch:
                twins.sweep(batch)
                twins.check_pages()
            if step["leaves"] and twins.pairs:
                twins.drop(next(iter(twins.pairs)))


@pytest.mark.skipif(COMPILED is None, reason=str(floats_obstacle()))
@pytest.mark.parametrize("packing", [PACKING, None], ids=["kernel", "torch"])
@pytest.mark.parametrize("window", [None, 70])
def test_in_the_streams_order_a_page_leaves_its_window_when_the_next_token_comes(
    window: int | None, packing: CompiledPacking | None
) -> None:
    """Three sequences, whose windows are full at different times; a call is told again only where it has to be."""
    pending: list[tuple[int, int]] = []
    assert COMPILED is not None
    rule = AttentionRule(0.1, window)
    twins = Twins(torch.bfloat16, COMPILED, rule, packing)
    for name, capacity in ((0, 400), (1, 330), (2, 192)):
        twins.open(name, capacity)
    twins.sweep([(0, 250), (1, 180), (2, 120)])
    host = twins.host
    host._in_stream_order = lambda *call: pending.append(call)
    told: list[object] = []
    packed_at = {6, 12, 70}  # behind token number 255 of the first sequence, 191 of the second, 319 of the first
    for step in range(72):
        order = [0, 1, 2] if step < 60 else [1, 0]
        rows = [twins.tensors(len(order)) for _ in BITS]
        segments = [Segment(twins.pairs[name][0], at, at + 1) for at, name in enumerate(order)]
        for layer, row in enumerate(rows):
            host.attend_row(segments, layer, *row, rule)
            expected = [
                twins.pairs[name][1].attend(layer, *(x[:, at : at + 1] for x in row), rule)[:, 0]
                for at, name in enumerate(order)
            ]
            # The device comes to it behind all of the layer, and another layer's tokens use the same buffers then.
            assert len(pending) == 1 + (step in packed_at and BITS[layer] != 16 and packing is not None)
            for call in pending:
                run_here(*call)
            pending.clear()
            got = host._link.buffers["output"][: 2 * 64 * 8 * len(order)].view(torch.bfloat16).view(-1, 8, 64)
            assert torch.equal(got, torch.stack(expected))
        told.append(host._deferred[0])
        for name in order:
            for cache in twins.pairs[name]:
                cache.advance(1)
    twins.check_pages()
    assert len({id(one) for one in told}) == (2 if window is None else 72)
    full = [Segment(twins.pairs[2][0], 0, 1)]
    for _ in range(12):
        host.attend_row(full, 0, *twins.tensors(1), rule)
        twins.pairs[2][0].advance(1)
    with pytest.raises(ValueError, match="KV cache of 192 tokens cannot hold 193"):
        host.attend_row(full, 0, *twins.tensors(1), rule)


@pytest.mark.parametrize("slug", ["llama", "gemma2", "gpt-oss"])  # plain; windows and a soft cap; sinks
def test_logits_of_a_model(slug: str, tmp_path: Path) -> None:
    """Prompts in chunks beside tokens of others: as with the cache in the device's memory, to the last bit."""
    model = pack_checkpoint(BY_SLUG[slug].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32)
    sequences = random_prompts(VOCAB_SIZE, (240, 30, 201))
    bits, found = (4, 16, 8), []
    for options in (
        {"kv_bits": bits},
        {"kv_store": lambda *_: HostKV(CPU, low_bit=LowBitStore(bits))},
    ):  # fmt: skip
        with Pipeline(model, slot_bytes=1 << 20, ops=FakeDevice(), chunk=70, **options) as pipeline:  # type: ignore[arg-type]
            found.append(pipeline.follow(sequences, (235, 25, 186), joins=[0, 1, 1]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
