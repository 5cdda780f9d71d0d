"""Attention over spans, and over tensors in one piece, against a float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.model import kv_spans
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_spans import AttentionRule, DenseSpan, attend_spans

LARGE_SCORE = 90.0
"""Float32 has no exponential of it. Of scores of 250 no attention in float32 is within the bound below of float64, not
torch's either: each is rounded by 1e-5, and its weight with it.
"""


@dataclass
class ChunkedSpan:
    """Chunks of the given lengths in one scratch that is overwritten; remembers the first token that was read."""

    keys: torch.Tensor
    values: torch.Tensor
    chunk: int
    asked: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    def chunks(self, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.asked.append(first)
        scratch = [torch.full_like(t[:, : self.chunk], float("nan")) for t in (self.keys, self.values)]
        for start in range(first, self.num_tokens, self.chunk):
            count = min(self.chunk, self.num_tokens - start)
            for room, all_tokens in zip(scratch, (self.keys, self.values), strict=True):
                room.fill_(float("nan"))
                room[:, :count] = all_tokens[:, start : start + count]
            yield scratch[0][:, :count], scratch[1][:, :count]


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
    """In float64 and as plain as can be."""
    heads, new, _ = query.shape
    groups, length = heads // keys.shape[0], keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(groups, 0) for tensor in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    at = torch.arange(length - new, length)[:, None]
    hidden = torch.arange(length)[None] > at
    if rule.sliding_window is not None:
        hidden |= torch.arange(length)[None] <= at - rule.sliding_window
    weights = scores.masked_fill(hidden, -torch.inf)
    if rule.sinks is not None:
        weights = torch.cat([weights, rule.sinks.double().view(heads, 1, 1).expand(heads, new, 1)], dim=-1)
    return torch.softmax(weights, dim=-1)[..., :length] @ values


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any))
    return {
        "heads": kv_heads * groups,
        "kv_heads": kv_heads,
        "lengths": lengths,
        "new": draw(st.sampled_from([1, 1, sum(lengths), draw(st.integers(1, sum(lengths)))])),
        "dims": draw(st.sampled_from([(16, 16), (16, 16), (12, 12), (16, 4)])),
        "chunks": [draw(st.sampled_from([1, 3, 7, 100])) for _ in lengths],
        "dense": draw(st.booleans()),
        "window": draw(st.sampled_from([None, None, 1, 3, 8, 100])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
        "sinks": draw(st.booleans()),
        "large": draw(st.sampled_from([1.0, 1.0, 30.0])),
        "max_scores": draw(st.sampled_from([1, 64, 1 << 22])),
        "seed": draw(st.integers(0, 1000)),
    }


def random_case(case: dict[str, Any], dtype: torch.dtype) -> tuple[list[torch.Tensor], list[Any], AttentionRule]:
    """Query, keys, values of all tokens; the spans; the rule."""
    generator = torch.Generator().manual_seed(case["seed"])
    length, (dim, value_dim) = sum(case["lengths"]), case["dims"]
    query = torch.randn(case["heads"], case["new"], dim, generator=generator) * case["large"]
    # Token by token, as a view with another order of strides than a fresh tensor.
    keys = torch.randn(length, case["kv_heads"], dim, generator=generator).to(dtype).transpose(0, 1)
    values = torch.randn(case["kv_heads"], length, value_dim, generator=generator).to(dtype)
    sinks = torch.randn(case["heads"], generator=generator) if case["sinks"] else None
    rule = AttentionRule(0.4, case["window"], case["softcap"], sinks)
    products = query @ keys.float().repeat_interleave(case["heads"] // case["kv_heads"], 0).transpose(1, 2)
    query *= min(1.0, LARGE_SCORE / (rule.scale * float(products.abs().max())))
    spans, at = [], 0
    for count, chunk in zip(case["lengths"], case["chunks"], strict=True):
        part = keys[:, at : at + count], values[:, at : at + count]
        spans.append(DenseSpan(*part) if case["dense"] else ChunkedSpan(*part, chunk))
        at += count
    return [query.to(dtype), keys, values], spans, rule


@settings(max_examples=200, deadline=None)
@given(cases())
def test_attention_over_spans_is_attention(case: dict[str, Any]) -> None:
    tensors, spans, rule = random_case(case, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_spans, "MAX_SCORES", case["max_scores"])
        patch.setattr(kv_spans, "CHUNK_TOKENS", min(case["chunks"]))
        got = attend_spans(tensors[0], spans, rule)
    # Each by itself: two that are within a bound of the truth, on either side, may be twice as far from each other.
    expected = reference(*tensors, rule)
    for found in (got, attend(*tensors, rule)):
        assert found.shape == (case["heads"], case["new"], case["dims"][1])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_16_bits_cost_a_few_roundings(case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, spans, rule = random_case(case | {"large": 1.0}, dtype)
    got = attend_spans(tensors[0], spans, rule)
    assert got.dtype == dtype
    expected = reference(*tensors, rule)
    largest = float(tensors[2].abs().max())
    assert float((got.double() - expected).abs().max()) < 4 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("new", [1, 5])
def test_what_no_token_sees_is_not_read(new: int) -> None:
    keys = torch.randn(2, 40, 8)
    spans = [ChunkedSpan(keys[:, start : start + 10], keys[:, start : start + 10], 4) for start in range(0, 40, 10)]
    attend_spans(torch.randn(2, new, 8), spans, AttentionRule(0.3, sliding_window=12))
    assert [span.asked for span in spans] == [[], [], [9 - new], [0]]


def test_scores_of_a_long_prompt_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = kv_spans._attend_plain

    def recording(query: torch.Tensor, keys: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(query.shape[0] * query.shape[1] * keys.shape[1])
        return real(query, keys, *rest)

    monkeypatch.setattr(kv_spans, "_attend_plain", recording)
    monkeypatch.setattr(kv_spans, "MAX_SCORES", 1000)
    query, keys = torch.randn(8, 50, 8), torch.randn(4, 90, 8)
    rule = AttentionRule(0.3, softcap=5.0)
    got = attend_spans(query, [ChunkedSpan(keys, keys, 20)], rule)
    assert made
    assert max(made) <= 1000
    torch.testing.assert_close(got.double(), reference(query, keys, keys, rule), rtol=1e-5, atol=1e-5)


def test_a_last_row_that_sees_all_is_attended_with_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a call for one row: of the second span the rows see 6, 7, ... and all 15 tokens."""
    asked: list[int] = []
    real = kv_spans._attend_fused

    def recording(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(query.shape[1])
        return real(query, *rest)

    monkeypatch.setattr(kv_spans, "_attend_fused", recording)
    query, keys = torch.randn(4, 10, 8), torch.randn(2, 40, 8)
    spans = [DenseSpan(keys[:, start:stop], keys[:, start:stop]) for start, stop in ((0, 25), (25, 40))]
    got = attend_spans(query, spans, AttentionRule(0.3))
    assert asked == [10, 10]
    torch.testing.assert_close(got.double(), reference(query, keys, keys, AttentionRule(0.3)), rtol=1e-5, atol=1e-5)


def test_scores_far_apart_and_beyond_the_range_of_their_exponentials() -> None:
    """exp(200) is no float32."""
    keys = torch.zeros(1, 6, 4)
    keys[0, :, 0] = torch.tensor([-200.0, 200.0, 199.0, -200.0, 0.0, 200.0])
    query = torch.zeros(1, 1, 4)
    query[..., 0] = 1.0
    values = torch.randn(1, 6, 4)
    rule = AttentionRule(1.0)
    got = attend_spans(query, [ChunkedSpan(keys, values, 2)], rule)
    torch.testing.assert_close(got.double(), reference(query, keys, values, rule), rtol=1e-5, atol=1e-6)
