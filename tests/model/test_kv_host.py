"""Keys and values in RAM beside a device, which here is the CPU: what comes out is what each sequence alone makes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG
from fake_device import FakeDevice
from harness import CPU, PackedModel, Pipeline, pack_checkpoint, random_prompts, relative_errors

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.machine import run_here
from pipo_ray.compiled.support import floats_obstacle, instruction_set
from pipo_ray.model import host_link
from pipo_ray.model.batch import PrefixPart, SweepEntry
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_cache import Segment, SequenceCache
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_spans import AttentionRule


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_link, "BUFFER_BYTES", 3000)


def packed(slug: str, folder: Path) -> PackedModel:
    BY_SLUG[slug].save(folder / "checkpoint")
    return pack_checkpoint(folder / "checkpoint", folder / "store", torch.float32)


@pytest.mark.parametrize("slug", ["llama", "gemma2", "gpt-oss"])  # plain; windows and a soft cap; sinks
def test_logits_of_a_row_in_which_some_decode_and_some_begin(slug: str, tmp_path: Path) -> None:
    """In chunks of five, and with a prefix that grows in the sweep that uses it."""
    model = packed(slug, tmp_path)
    sequences = random_prompts(model.facts.vocab_size, (40, 33, 21))
    other = sequences[0][:30] + random_prompts(model.facts.vocab_size, (9,), seed=6)[0]
    with Pipeline(model, slot_bytes=1 << 20, resident_pieces=None) as pipeline:
        wanted = pipeline.follow(sequences, (11, 30, 2))
        (wanted_other,) = pipeline.runner.run([SweepEntry("x", tuple(other), 0, 39, "all")])
    with Pipeline(model, slot_bytes=1 << 20, ops=FakeDevice(), kv_store=lambda *_: HostKV(CPU)) as pipeline:  # type: ignore[arg-type, return-value]
        for ours, theirs in zip(pipeline.follow(sequences, (11, 30, 2), joins=[0, 4, 9]), wanted, strict=True):
            assert max(relative_errors(ours.logits, theirs.logits)) < 1e-5
        first = SweepEntry("a", tuple(sequences[0][:20]), 0, 40, "all")
        pipeline.runner.run([first])
        more = SweepEntry("a", tuple(sequences[0][20:30]), 20, 40, "all")
        begins = SweepEntry("b", tuple(other[25:38]), 25, 39, "all", (PrefixPart("a", 25, "share"),))
        _, got = pipeline.runner.run([more, begins])
        (last,) = pipeline.runner.run([SweepEntry("b", tuple(other[38:]), 38, 39, "all")])
        assert wanted_other is not None
        for part, rows in ((got, slice(25, 38)), (last, slice(38, 39))):
            assert part is not None
            assert max(relative_errors(part, wanted_other[rows])) < 1e-5


def exactly(cache: SequenceCache, query: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
    """In float64, to what the cache holds with the query's own tokens appended."""
    parts = [(part.layers[0], count) for part, count in cache.prefix]
    parts.append((cache.layers[0], cache.length + query.shape[1]))
    keys, values = (torch.cat([pair[which][:, :count] for pair, count in parts], 1).double() for which in (0, 1))
    return attend(query.double(), keys, values, rule)


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
@pytest.mark.parametrize("window", [None, 7])
def test_tokens_that_come_alone_are_the_kernels(window: int | None) -> None:
    """In 16 bits; with a token of a sequence that has a prefix, and a chunk, which are not."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    rule = AttentionRule(0.1, sliding_window=window)
    base = SequenceCache(30)
    ones = [SequenceCache(30, compiled=None) for _ in range(3)]
    ones[1].prefix = ((base, 10),)
    chunk = SequenceCache(30)
    for cache, count in zip((base, *ones, chunk), (12, 20, 5, 1, 9), strict=True):
        cache.append(0, normal(2, count, 64), normal(2, count, 64))
        cache.advance(count)
    query, keys, values = normal(8, 6, 64), normal(2, 6, 64), normal(2, 6, 64)
    row = [(ones[0], 0, 1), (chunk, 1, 4), (ones[1], 4, 5), (ones[2], 5, 6)]
    expected = torch.cat([
        cache.attend(0, query[:, a:b], keys[:, a:b], values[:, a:b], rule).transpose(0, 1) for cache, a, b in row
    ])  # fmt: skip
    exact = [exactly(cache, query[:, a:b], rule).transpose(0, 1) for cache, a, b in row]
    memories = [[tensor.clone() for tensor in cache.layers[0]] for cache, _, _ in row]
    for cache, _, _ in row:
        for tensor in cache.layers[0]:
            tensor[:, cache.length :] = float("nan")
    host = HostKV(CPU, CompiledAttention())
    got = host.attend_row([Segment(*one) for one in row], 0, query, keys, values, rule)
    for (_, a, b), wanted in zip(row, exact, strict=True):
        mine, torchs = ((one[a:b] - wanted).abs().max() for one in (got, expected))
        assert mine <= 1.5 * torchs + 2**-8
    for (cache, a, b), memory in zip(row, memories, strict=True):
        for tensor, before in zip(cache.layers[0], memory, strict=True):
            assert torch.equal(tensor[:, : cache.length + b - a], before[:, : cache.length + b - a])


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
def test_a_row_of_single_tokens_is_left_to_the_stream() -> None:
    """Two layers, whose calls come when the host is done with both."""
    generator = torch.Generator().manual_seed(0)
    calls: list[tuple[int, int]] = []
    host = HostKV(CPU, CompiledAttention(), lambda *call: calls.append(call))
    caches = [SequenceCache(30), SequenceCache(30)]
    rows = [torch.randn(heads, 2, 64, generator=generator).bfloat16() for heads in (8, 2, 2)]
    segments = [Segment(cache, number, number + 1) for number, cache in enumerate(caches)]
    for layer in (0, 1):
        host.attend_row(segments, layer, *rows, AttentionRule(0.1))
    assert len(calls) == 2
    for function, context in calls:
        run_here(function, context)
    for cache, number in ((caches[0], 0), (caches[1], 1)):
        for layer in (0, 1):  # a single token sees its own value
            assert torch.equal(cache.layers[layer][1][:, :1], rows[2][:, number : number + 1])
    got = host.attend_row(segments, 0, *rows, AttentionRule(0.1, softcap=9.0))  # which the kernel does not take
    assert torch.equal(got[:, ::4], rows[2].transpose(0, 1))


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
@pytest.mark.parametrize("window", [None, 3])
def test_a_call_is_told_again_only_where_tokens_lie_elsewhere(window: int | None) -> None:
    """Token by token, in another order, with one sequence less, with one that has moved: as without a stream."""
    generator = torch.Generator().manual_seed(0)
    pending: list[tuple[int, int]] = []
    rule = AttentionRule(0.1, sliding_window=window)
    streamed, direct = HostKV(CPU, CompiledAttention(), lambda *call: pending.append(call)), HostKV(CPU, None)
    pairs = [(SequenceCache(30), SequenceCache(30)) for _ in range(3)]
    told = []

    def step(order: list[int]) -> None:
        rows = [torch.randn(heads, len(order), 64, generator=generator).bfloat16() for heads in (8, 2, 2)]
        results = []
        for which, host in enumerate((streamed, direct)):
            segments = [Segment(pairs[number][which], at, at + 1) for at, number in enumerate(order)]
            outputs = [host.attend_row(segments, layer, *rows, rule) for layer in (0, 1)]
            if which == 0:
                told.append(streamed._deferred[0])
                for function, context in pending:
                    run_here(function, context)
                pending.clear()
                outputs = [
                    streamed._link.buffers["output"][: outputs[1].nbytes].view(torch.bfloat16).view(outputs[1].shape)
                ]
            results.append(outputs[-1].clone())
            for number in order:
                pairs[number][which].advance(1)
        torch.testing.assert_close(results[0], results[1], rtol=2**-6, atol=2**-7)
        for number in order:
            mine, theirs = (pairs[number][which] for which in (0, 1))
            for layer in (0, 1):
                for one, other in zip(mine.layers[layer], theirs.layers[layer], strict=True):
                    assert torch.equal(one[:, : mine.length], other[:, : theirs.length])

    for order in ([0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 0, 1], [2, 0], [2, 0]):
        step(order)
    pairs[2][0].resize(20, 4)
    pairs[2][1].resize(20, 4)
    step([2, 0])
    step([2, 0])
    same = [one is other for one, other in itertools.pairwise(told)]
    assert same == ([True, True, False, False, True, False, True] if window is None else [False] * 7)
    full = [(SequenceCache(1), 0, 1), (SequenceCache(1), 1, 2)]
    rows = [torch.randn(heads, 2, 64, generator=generator).bfloat16() for heads in (8, 2, 2)]
    streamed.attend_row([Segment(*one) for one in full], 0, *rows, rule)
    for cache, _, _ in full:
        cache.advance(1)
    with pytest.raises(ValueError, match="KV cache of 1 tokens cannot hold 2"):
        streamed.attend_row([Segment(*one) for one in full], 0, *rows, rule)
