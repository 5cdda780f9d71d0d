"""Attention of a sequence and of a ragged row against a reference that is as plain as can be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.model import dense_attention
from pipo_ray.model.attention import ragged_attention, ragged_row
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_cache import RaggedCache, Segment, SequenceCache
from pipo_ray.model.kv_spans import AttentionRule


def naive(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """In float64, one head and one token at a time."""
    heads, new, _ = query.shape
    groups, length = heads // keys.shape[0], keys.shape[1]
    output = torch.zeros(heads, new, values.shape[2], dtype=torch.float64)
    for head in range(heads):
        for row in range(new):
            position = length - new + row
            first = 0 if window is None else max(0, position - window + 1)
            k = keys[head // groups, first : position + 1].double()
            v = values[head // groups, first : position + 1].double()
            scores = k @ query[head, row].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (sinks[head].double().exp() if sinks is not None else 0.0)
            output[head, row] = weights / total @ v
    return output


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    kv_heads, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    new = draw(st.integers(1, 12))
    return {
        "heads": kv_heads * groups,
        "kv_heads": kv_heads,
        "new": new,
        "length": new + draw(st.sampled_from([0, 0, 1, 5, 20])),
        "dim": draw(st.sampled_from([4, 16])),
        "value_dim": draw(st.sampled_from([4, 16])),
        "window": draw(st.sampled_from([None, None, 1, 3, 8, 100])),
        "softcap": draw(st.sampled_from([None, None, 2.0, 30.0])),
        "sinks": draw(st.booleans()),
        "max_scores": draw(st.sampled_from([1, 64, 1 << 24])),
        "seed": draw(st.integers(0, 1000)),
    }


def attend_in_parts(max_scores: int, *arguments: Any) -> torch.Tensor:
    """`attend` with at most so many scores at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_attention, "MAX_SCORES", max_scores)
        return attend(*arguments)


@settings(max_examples=150, deadline=None)
@given(shapes(), st.sampled_from([torch.bfloat16, torch.float16]), st.booleans())
def test_attend_in_16_bits_is_attention(case: dict[str, int], dtype: torch.dtype, one: bool) -> None:
    """Values between 1 and 2, so that each may be wrong by a few roundings of 16 bits and not more."""
    generator = torch.Generator().manual_seed(case["seed"])
    new = 1 if one else case["new"]
    query = torch.randn(case["heads"], new, case["dim"], generator=generator).to(dtype)
    keys = torch.randn(case["kv_heads"], case["length"] + 3, case["dim"], generator=generator).to(dtype)
    values = torch.rand(case["kv_heads"], case["length"] + 3, case["value_dim"], generator=generator).to(dtype) + 1
    keys, values = keys[:, : case["length"]], values[:, : case["length"]]  # as the cache hands them out
    options = (0.4, case["window"], case["softcap"], None)
    got = attend_in_parts(case["max_scores"], query, keys, values, AttentionRule(*options))
    assert got.shape == (case["heads"], new, case["value_dim"])
    assert got.dtype == dtype
    assert float((got.double() - naive(query, keys, values, *options)).abs().max()) < 4 * torch.finfo(dtype).eps


@settings(max_examples=150)
@given(shapes())
def test_attend_is_attention(case: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    query = torch.randn(case["heads"], case["new"], case["dim"], generator=generator)
    keys = torch.randn(case["kv_heads"], case["length"], case["dim"], generator=generator)
    values = torch.randn(case["kv_heads"], case["length"], case["value_dim"], generator=generator)
    sinks = torch.randn(case["heads"], generator=generator) if case["sinks"] else None
    options = (0.4, case["window"], case["softcap"], sinks)
    got = attend_in_parts(case["max_scores"], query, keys, values, AttentionRule(*options))
    assert got.shape == (case["heads"], case["new"], case["value_dim"])
    assert got.dtype == query.dtype
    torch.testing.assert_close(got.double(), naive(query, keys, values, *options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_bf16_accumulates_no_more_error_than_its_width(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(4, 40, 16, generator=generator).bfloat16() for _ in range(3))
    got = attend(query, keys, values, AttentionRule(0.25, None, softcap))
    assert got.dtype == torch.bfloat16
    expected = naive(query, keys, values, 0.25, None, softcap, None)
    assert (got.double() - expected).abs().max() < 0.03


def test_scores_of_a_long_prompt_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a soft cap no more than the limit at once, but never less than the heads that share one KV head."""
    made: list[int] = []
    real = dense_attention._attend_plain

    def recording(query: torch.Tensor, keys: torch.Tensor, *rest: object) -> torch.Tensor:
        made.append(query.shape[0] * query.shape[1] * keys.shape[1])
        return real(query, keys, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(dense_attention, "_attend_plain", recording)
    monkeypatch.setattr(dense_attention, "MAX_SCORES", 4 * 50 * 50)
    query, keys = torch.randn(16, 50, 8), torch.randn(8, 50, 8)
    got = attend(query, keys, keys, AttentionRule(0.3, None, 5.0))
    assert made == [4 * 50 * 50] * 4
    torch.testing.assert_close(got.double(), naive(query, keys, keys, 0.3, None, 5.0, None), rtol=1e-5, atol=1e-5)


@st.composite
def rows(draw: st.DrawFn) -> list[list[int]]:
    """Sequences, each as the lengths of the chunks it comes in."""
    return draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4))


@settings(max_examples=60)
@given(rows(), st.sampled_from([None, 3]), st.sampled_from([None, 4.0]), st.integers(0, 100))
def test_sequences_in_a_row_do_not_see_each_other(
    sequences: list[list[int]], window: int | None, softcap: float | None, seed: int
) -> None:
    """Chunk after chunk, all in one row, is the same as each alone and at once."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim = 4, 2, 8
    whole = [
        [torch.randn(n, sum(chunks), dim, generator=generator) for n in (heads, kv_heads, kv_heads)]
        for chunks in sequences
    ]
    caches = [SequenceCache(capacity=sum(chunks)) for chunks in sequences]
    got: list[list[torch.Tensor]] = [[] for _ in sequences]
    for sweep in range(max(map(len, sequences))):
        parts, segments, members, column = [], [], [], 0
        for index, chunks in enumerate(sequences):
            if sweep < len(chunks):
                done = caches[index].length
                parts.append([tensor[:, done : done + chunks[sweep]] for tensor in whole[index]])
                segments.append(Segment(caches[index], column, column + chunks[sweep]))
                members.append(index)
                column += chunks[sweep]
        query, key, value = (torch.cat([part[i] for part in parts], dim=1)[None] for i in range(3))
        row = RaggedCache(tuple(segments))
        with ragged_row(row):
            for layer in range(2):  # the second layer must not see the first one's keys
                made, _ = ragged_attention(
                    torch.nn.Module(), query, *row.update(key + layer, value + layer, layer), None,
                    scaling=None, sliding_window=window, softcap=softcap,
                )  # fmt: skip
                if layer == 0:
                    for index, segment in zip(members, segments, strict=True):
                        got[index].append(made[0, segment.start : segment.stop])
        row.advance()
    for chunks, (query, key, value), parts in zip(sequences, whole, got, strict=True):
        expected = naive(query, key, value, 1 / math.sqrt(dim), window, softcap, None).transpose(0, 1)
        assert len(parts) == len(chunks)
        torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_outside_a_shared_row_there_is_one_sequence_with_a_cache_of_its_own(window: int | None) -> None:
    query, key, value = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    made, _ = ragged_attention(torch.nn.Module(), query, key, value, sliding_window=window)
    padded = torch.cat([torch.zeros(4, 5, 8), query[0]], dim=1)  # the two last of seven tokens
    expected = naive(padded, key[0], value[0], 1 / math.sqrt(8), window, None, None)[:, 5:].transpose(0, 1)
    torch.testing.assert_close(made[0].double(), expected, rtol=1e-5, atol=1e-5)
