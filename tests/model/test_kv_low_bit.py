"""A low-bit cache against attention in float64 over what its pages stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pages import joined

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import floats_obstacle, instruction_set
from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model import low_bit_layer
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_cache import SequenceCache
from pipo_ray.model.kv_low_bit import LowBitCache, LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import WINDOW_TOKENS, packed_pages
from pipo_ray.quant.kv_rounding import PageViews, round_along, views_of

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 16, 8


def rounded(keys: torch.Tensor, values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole pages as they come back, written in another way than the cache does it. Both heads share
    a value's scale.
    """
    got = []
    for tensor, dim in ((keys.unflatten(1, (-1, PAGE_TOKENS)), 2), (values, (0, 2))):
        parts = round_along(tensor.float(), dim, bits)
        got.append(
            (parts.zeros.double() + parts.scales.double() * parts.codes).reshape(*keys.shape[:2], tensor.shape[-1])
        )
    return got[0], got[1]


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: AttentionRule, bits: int
) -> torch.Tensor:
    """One token at a time: what it sees is packed if its page has left the window, and as it came otherwise."""
    whole = keys.shape[1] // PAGE_TOKENS * PAGE_TOKENS
    packed = rounded(keys[:, :whole], values[:, :whole], bits)
    rows = []
    for token in range(query.shape[1]):
        count = max(0, token - WINDOW_TOKENS) // PAGE_TOKENS * PAGE_TOKENS
        seen = [
            torch.cat([few[:, :count], exact.double()[:, count : token + 1]], dim=1)
            for few, exact in zip(packed, (keys, values), strict=True)
        ]
        rows.append(attend(query[:, token : token + 1].double(), seen[0], seen[1], rule))
    return torch.cat(rows, dim=1)


def in_chunks(
    cache: LowBitCache | SequenceCache,
    tensors: list[torch.Tensor],
    rule: AttentionRule,
    chunks: list[int],
    layer: int = 0,
) -> torch.Tensor:
    rows, at = [], 0
    for chunk in chunks:
        part = [tensor[:, at : at + chunk] for tensor in tensors]
        rows.append(cache.attend(layer, *part, rule))
        cache.advance(chunk)
        at += chunk
    return torch.cat(rows, dim=1)


def random_tensors(tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    return [torch.randn(heads, tokens, dim, generator=generator) for heads, dim in shapes]


CHUNKS = st.lists(st.sampled_from([1, 2, 5, 63, 64, 65, 200]), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(
    CHUNKS, st.sampled_from([8, 4]), st.sampled_from([None, None, 3, 150, 300]), st.sampled_from([None, 2.0]),
    st.booleans(), st.sampled_from([1, 1 << 22]), st.integers(0, 50),
)  # fmt: skip
def test_every_token_sees_its_pages_packed_and_its_window_as_it_was(
    chunks: list[int], bits: int, window: int | None, softcap: float | None, sinks: bool, scratch: int, seed: int
) -> None:
    tensors = random_tensors(sum(chunks), seed)
    rule = AttentionRule(0.7, window, softcap, torch.randn(HEADS) if sinks else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_bit_layer, "_SCRATCH_BYTES", scratch)
        cache = LowBitStore((bits,)).open(sum(chunks) + seed % 3)
        got = in_chunks(cache, tensors, rule, chunks)
    torch.testing.assert_close(got.double(), reference(*tensors, rule, bits), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_the_same_within_their_rounding(dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in random_tensors(330, 3)]
    rule = AttentionRule(0.25)
    got = in_chunks(LowBitStore((4,)).open(330), tensors, rule, [300, 1, 29])
    assert got.dtype == dtype
    expected = reference(*tensors, rule, 4)
    assert float((got.double() - expected).abs().max()) < 4 * torch.finfo(dtype).eps * float(tensors[2].abs().max())


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
@pytest.mark.parametrize("window", [None, 3, 150, 300])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_that_comes_alone_attends_to_pages_as_they_are(
    window: int | None, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a page leaves the window with it, and where the cache ends."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((8, 64), (2, 64), (2, 64))
    tensors = [torch.randn(heads, 400, dim, generator=generator).bfloat16() for heads, dim in shapes]
    rule, chunks = AttentionRule(0.2, window), [1, 1, 187, 1, 1, 1, 61, *[1] * 70, 68, *[1] * 9]
    unpacking, packed = (LowBitStore((bits,), one).open(400) for one in (None, CompiledAttention()))
    wanted = in_chunks(unpacking, tensors, rule, chunks)
    unpacked: list[int] = []
    real = low_bit_layer.unpack_pages
    monkeypatch.setattr(low_bit_layer, "unpack_pages", lambda *given: unpacked.append(1) or real(*given))
    got = in_chunks(packed, tensors, rule, chunks)
    assert len(unpacked) <= 2 * sum(chunk > 1 for chunk in chunks)  # for the others nothing is
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=6e-3)  # torch rounds weights to bf16
    assert packed.nbytes == unpacking.nbytes
    for one, other in zip(packed._layers[0]._window, unpacking._layers[0]._window, strict=True):
        assert torch.equal(one[:, : 400 - 4 * PAGE_TOKENS], other[:, : 400 - 4 * PAGE_TOKENS])
    assert torch.equal(
        *(
            views_of(joined(cache._layers[0]._pages, 4), cache._layers[0].layout).key_codes
            for cache in (packed, unpacking)
        )
    )


@pytest.mark.skipif(instruction_set() is None, reason=str(floats_obstacle()))
def test_what_is_not_for_the_kernel_is_unpacked() -> None:
    for dim, rule in (
        (64, AttentionRule(0.2, softcap=5.0)),
        (64, AttentionRule(0.2, sinks=torch.ones(4))),
        (32, AttentionRule(0.2)),
    ):
        tensors = [torch.randn(heads, 260, dim).bfloat16() for heads in (4, 2, 2)]
        caches = (LowBitStore((4,), one).open(260) for one in (None, CompiledAttention()))
        assert torch.equal(*(in_chunks(cache, tensors, rule, [250, *[1] * 10]) for cache in caches))


def test_up_to_the_window_nothing_is_rounded() -> None:
    tensors = random_tensors(WINDOW_TOKENS + PAGE_TOKENS, 1)
    rule = AttentionRule(0.25)
    few, wide = (
        in_chunks(cache, tensors, rule, [100, 92]) for cache in (LowBitStore((4,)).open(192), SequenceCache(192))
    )
    torch.testing.assert_close(few, wide, rtol=1e-5, atol=1e-6)


def test_a_page_is_unpacked_once_for_all_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []
    real = low_bit_layer.unpack_pages

    def recording(views: PageViews, *rest: Any) -> None:
        unpacked.append(len(views.key_codes))
        real(views, *rest)

    monkeypatch.setattr(low_bit_layer, "unpack_pages", recording)
    in_chunks(LowBitStore((4,)).open(900), random_tensors(900, 5), AttentionRule(0.5), [500, 400])
    assert sum(unpacked) == packed_pages(499) + packed_pages(899)


def test_each_layer_has_its_bits() -> None:
    store = LowBitStore((16, 8, 4))
    cache = store.open(400)
    tensors, rule = random_tensors(400, 2), AttentionRule(0.5)
    for start, stop in ((0, 390), (390, 400)):
        part = [tensor[:, start:stop] for tensor in tensors]
        made = [cache.attend(layer, *part, rule) for layer in range(3)]
        cache.advance(stop - start)
    wide = in_chunks(SequenceCache(400), tensors, rule, [390, 10])[:, 390:]
    assert torch.equal(made[0], wide)
    errors = [float((few - wide).abs().max()) for few in made]
    assert 0 == errors[0] < 4 * errors[1] < errors[2] < 1


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_are_those_of_pages_and_window(bits: int) -> None:
    capacity = 1000
    cache = LowBitStore((bits, bits)).open(capacity)
    tensors = random_tensors(1, 0)
    for layer in range(2):
        cache.attend(layer, *tensors, AttentionRule(1.0))
    page = KV_HEADS * (64 * (DIM + VALUE_DIM) * bits // 8 + 4 * DIM) + 4 * 64  # both heads share a value's scale
    assert page % 64 == 0
    assert packed_pages(capacity - 1) == 13
    assert cache.nbytes == 2 * (13 * page + 192 * KV_HEADS * (DIM + VALUE_DIM) * 4)
    cache.drop()
    assert cache.nbytes == 0


def test_it_refuses_what_it_cannot_hold() -> None:
    cache = LowBitStore((4,)).open(3)
    tensors: list[Any] = random_tensors(4, 0)
    with pytest.raises(ValueError, match="KV cache of 3 tokens cannot hold 4"):
        cache.attend(0, *tensors, AttentionRule(1.0))
    with pytest.raises(UnsupportedModelError, match="layer 1 has a KV cache"):
        cache.attend(1, *tensors, AttentionRule(1.0))
    two = [tensor[:, :2] for tensor in tensors]
    cache.attend(0, *two, AttentionRule(1.0))
    with pytest.raises(ValueError, match="holds 2 tokens of this layer, not 0"):
        cache.attend(0, *two, AttentionRule(1.0))
