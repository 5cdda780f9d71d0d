"""Attention of one token, compiled."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from instruction_params import INSTRUCTIONS
from torch import Tensor

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.machine import run_here
from pipo_ray.model.kv_cache import SequenceCache
from pipo_ray.model.kv_spans import AttentionRule


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """In float64."""
    groups = len(query) // len(keys)
    keys, values = (tensor.double().repeat_interleave(groups, 0) for tensor in (keys, values))
    return torch.softmax(query.double() @ keys.transpose(1, 2) * scale, dim=-1) @ values


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def attention(request: pytest.FixtureRequest) -> CompiledAttention:
    return CompiledAttention(instructions=request.param)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (7, 1, 64), (3, 3, 64), (10, 2, 256)])
@pytest.mark.parametrize("length", [1, 2, 16, 33, 700])
def test_it_is_exact_to_the_last_bits_of_bf16(
    heads: int, kv_heads: int, dim: int, length: int, attention: CompiledAttention
) -> None:
    keys, values = normal(kv_heads, length + 3, dim), normal(kv_heads, length + 3, dim, seed=1)
    query = 3 * normal(heads, 1, dim, seed=2)
    new = normal(kv_heads, 1, dim, seed=3), normal(kv_heads, 1, dim, seed=4)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, length - 1], expected_values[:, length - 1] = new[0][:, 0], new[1][:, 0]
    got = attention.attend(query, new, (keys, values), 0, length, dim**-0.5)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    expected = exact(query, keys[:, :length], values[:, :length], dim**-0.5)
    assert torch.allclose(got.double(), expected, rtol=2**-8, atol=1e-4)


def test_scores_of_any_size(attention: CompiledAttention) -> None:
    for size in (1e-3, 1.0, 100.0):
        query, keys, values = size * normal(4, 1, 64), size * normal(1, 100, 64, seed=1), normal(1, 100, 64, seed=2)
        new = keys[:, 99:].clone(), values[:, 99:].clone()
        got = attention.attend(query, new, (keys, values), 0, 100, 1.0)
        assert torch.allclose(got.double(), exact(query, keys, values, 1.0), rtol=2**-8, atol=1e-4)


def test_the_number_of_threads_and_what_lies_behind_change_no_bit(attention: CompiledAttention) -> None:
    keys, values, query = normal(4, 2000, 128), normal(4, 2000, 128, seed=1), normal(8, 1, 128, seed=2)
    new = keys[:, 1500:1501].clone(), values[:, 1500:1501].clone()
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(attention.attend(query, new, (keys, values), 0, 1501, 0.1))
    finally:
        torch.set_num_threads(before)
    keys[:, 1501:], values[:, 1501:] = torch.nan, torch.nan
    results.append(attention.attend(query, new, (keys, values), 0, 1501, 0.1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_values_that_are_no_numbers_stay_so(attention: CompiledAttention) -> None:
    for broken in (0, 1, 2):
        tensors = [normal(2, 1, 64), normal(2, 20, 64, seed=1), normal(2, 20, 64, seed=2)]
        tensors[broken][0, 0, 0] = math.nan
        query, keys, values = tensors
        got = attention.attend(query, (keys[:, 19:].clone(), values[:, 19:].clone()), (keys, values), 0, 20, 0.1)
        assert got[0].isnan().any()
        assert not got[1].isnan().any()


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_a_cache_with_it_is_the_cache_without(window: int | None, attention: CompiledAttention) -> None:
    rule = AttentionRule(0.1, window)
    caches = SequenceCache(40), SequenceCache(40, compiled=attention)
    used = []
    takes = attention.takes
    for step, tokens in enumerate((7, 1, 1, 3, 1, 1)):
        # As a model's projections come: the tokens of a head do not lie side by side.
        query = normal(1, tokens, 4, 64, seed=step)[0].transpose(0, 1)
        keys = normal(1, tokens, 2, 64, seed=step + 50)[0].transpose(0, 1)
        values = normal(1, tokens, 2, 64, seed=step + 90)[0].transpose(0, 1)
        outputs = [cache.attend(0, query, keys, values, rule) for cache in caches]
        used.append(takes(query, keys, values))
        assert torch.allclose(outputs[1].float(), outputs[0].float(), rtol=2**-6, atol=1e-2)
        for cache in caches:
            cache.advance(tokens)
    assert used == [False, True, True, False, True, True]
    for one, other in zip(caches[0].layers[0], caches[1].layers[0], strict=True):
        assert torch.equal(one[:, :14], other[:, :14])
    caches[1].resize(14, 14)
    with pytest.raises(ValueError, match="14 tokens cannot hold 15"):
        caches[1].attend(0, query[:, :1], keys[:, :1], values[:, :1], rule)


def test_what_the_kernel_is_not_made_for_is_left_to_torch(attention: CompiledAttention) -> None:
    query, keys = normal(4, 1, 64), normal(2, 1, 64)
    assert attention.takes(query, keys, keys)
    assert not attention.takes(normal(4, 2, 64), normal(2, 2, 64), normal(2, 2, 64))
    assert not attention.takes(query.float(), keys.float(), keys.float())
    assert not attention.takes(query, keys, normal(2, 1, 128))
    assert not attention.takes(normal(4, 1, 96), normal(2, 1, 96), normal(2, 1, 96))
    assert not attention.takes(normal(4, 1, 512), normal(2, 1, 512), normal(2, 1, 512))
    assert not attention.takes(query, normal(2, 1, 128)[..., ::2], keys)
    for rule in (AttentionRule(0.1, softcap=20.0), AttentionRule(0.1, sinks=torch.zeros(4).bfloat16())):
        outputs = [
            SequenceCache(8, compiled=one).attend(0, query, keys, normal(2, 1, 64), rule) for one in (None, attention)
        ]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_tokens_of_several_sequences_are_as_each_alone(
    threads: int, attention: CompiledAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the call is put off, and made by somebody else."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lengths = (5, 3000, 1, 64)
    queries, new = normal(8, 4, 128), (normal(2, 4, 128, seed=1), normal(2, 4, 128, seed=2))
    memories = [(normal(2, n + 3, 128, seed=3 + n), normal(2, n + 3, 128, seed=4 + n)) for n in lengths]
    spans = [(max(0, n - 2000), n) for n in lengths]
    alone = [
        attention.attend(
            queries[:, i : i + 1], (new[0][:, i : i + 1], new[1][:, i : i + 1]),
            (memory[0].clone(), memory[1].clone()), *span, 0.1,
        )
        for i, (memory, span) in enumerate(zip(memories, spans, strict=True))
    ]  # fmt: skip
    for deferred in (False, True):
        copies = [(memory[0].clone(), memory[1].clone()) for memory in memories]
        output = torch.zeros(4, 8, 128, dtype=torch.bfloat16)
        call = attention.each(queries, new, copies, spans, 0.1, output)
        if deferred:
            call = attention.deferred(call)
            assert not output.any()
            run_here(call.function, ctypes.addressof(call.context))
        else:
            attention.run(call)
        for i, (copy, length, expected) in enumerate(zip(copies, lengths, alone, strict=True)):
            assert torch.equal(output[i], expected[:, 0])
            assert torch.equal(copy[0][:, length - 1], new[0][:, i])
