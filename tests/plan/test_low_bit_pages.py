"""What a low-bit KV cache costs: never less than the cache itself takes, and what more fits the same budget."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.budget_models import GIB, model, plan

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.lengths import Lengths
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.params import SamplingParams
from pipo_ray.plan.budget import CUDA_PROCESS_BYTES, PROCESS_BYTES, RunPlan
from pipo_ray.plan.kv_pages import fits
from pipo_ray.plan.low_bit_pages import LowBitKV, PageLayout, low_bit_kv
from pipo_ray.quant.kv_policy import KVPrecision
from pipo_ray.scheduling.limits import Limits, limits_of
from pipo_ray.scheduling.sequences import Sequence
from pipo_ray.scheduling.window import NO_WINDOW, Window


def facts_of(heads: int, key_dim: int, value_dim: int, layers: int, itemsize: int = 2) -> ModelFacts:
    _, facts = model(layers, 64, 100)
    width = heads * (key_dim + value_dim)
    return replace(
        facts, kv_bytes_per_token=layers * width * itemsize, kv_shapes=((heads, key_dim, value_dim),), num_layers=layers
    )


def with_low_bit(low: LowBitKV) -> RunPlan:
    return replace(FOUND, low_bit_kv=low, state_tokens=-(-low.window_bytes // low.token_bytes))


def of_plan(found: RunPlan, facts: ModelFacts) -> Limits:
    return limits_of(found, facts, prefix_cache=True)


FOUND = plan(model(1, 64, 100), memory_bytes=3 * GIB)
SEQUENCE = partial(Sequence, "", "", "", 0, params=SamplingParams(max_tokens=1), seed=0, max_tokens=1)


def test_llamas_heads_take_the_share_that_is_promised() -> None:
    """32,768 tokens, scales and the 16-bit window included."""
    facts = facts_of(8, 128, 128, 32)
    for bits, least in ((8, 1.85), (4, 3.5)):
        low = LowBitKV.of((bits,) * 32, facts)
        assert 32768 * facts.kv_bytes_per_token / (32768 * low.token_bytes + low.window_bytes) >= least
    assert LowBitKV.of((4,) * 32, facts).label == "4 bits"
    assert LowBitKV.of((16, *(4,) * 30, 8), facts).label == "16, 8 and 4 bits"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 700), st.lists(st.sampled_from([16, 8, 4]), min_size=1, max_size=3).filter(lambda b: min(b) < 16),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([16, 24, 128]),
)  # fmt: skip
def test_what_is_reserved_is_what_the_cache_takes(capacity: int, bits: list[int], dtype: torch.dtype, dim: int) -> None:
    facts = facts_of(2, dim, 16, len(bits), dtype.itemsize)
    low = LowBitKV.of(bits, facts)
    cache = LowBitStore(tuple(bits)).open(capacity)
    for layer in range(len(bits)):
        cache.attend(layer, *(torch.zeros(2, 1, size, dtype=dtype) for size in (dim, dim, 16)), AttentionRule(1.0))
    assert cache.nbytes <= capacity * low.token_bytes + low.window_bytes
    reserved = of_plan(with_low_bit(low), facts).reserved(SEQUENCE(prompt=(0,) * (capacity - 1)))
    assert cache.nbytes <= reserved * low.token_bytes
    if capacity <= 192:  # of a short sequence no more than at 16 bits
        assert reserved <= capacity * low.wide_token_bytes / low.token_bytes + 1


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 500), st.integers(0, 3),
    st.lists(st.sampled_from([16, 8, 4]), min_size=1, max_size=3).filter(lambda b: min(b) < 16),
)  # fmt: skip
def test_what_has_ended_takes_what_the_books_say(length: int, more: int, bits: list[int]) -> None:
    """And so does whoever stands on its pages, and a point."""
    facts = facts_of(2, 128, 128, len(bits))
    low, store = LowBitKV.of(bits, facts), LowBitStore(tuple(bits))
    window = of_plan(with_low_bit(low), facts).window
    cache = store.open(length + more)
    for layer in range(len(bits)):
        cache.attend(layer, *[torch.zeros(2, length, 128, dtype=torch.bfloat16)] * 3, AttentionRule(1.0))
    cache.advance(length)
    cache.resize(length, length)
    packed = window.packed_of(length, length + more)
    assert cache.nbytes <= window.budget(packed, length - packed) * low.token_bytes
    point = store.open(length - packed, ((cache, packed),) if packed else ())
    point.begin_with(cache, length - packed)
    assert point.nbytes <= window.budget(0, length - packed) * low.token_bytes
    child = store.open(length + 200 - packed, ((cache, packed),) if packed else ())
    child.begin_with(cache, length - packed)
    sequence = SEQUENCE(prompt=(0,) * (length + 199), shared=packed)
    assert child.nbytes <= of_plan(with_low_bit(low), facts).reserved(sequence) * low.token_bytes


@given(st.integers(1, 5000), st.sampled_from([8, 4]))
def test_the_longest_sequence_is_the_longest(kv_tokens: int, bits: int) -> None:
    facts = facts_of(2, 128, 128, 3)
    limits = replace(of_plan(with_low_bit(LowBitKV.of((bits,) * 3, facts)), facts), kv_tokens=kv_tokens)
    longest = limits.longest
    if longest > 0:
        assert limits.reserved(SEQUENCE(prompt=(0,) * (longest - 1))) <= kv_tokens
    assert limits.reserved(SEQUENCE(prompt=(0,) * longest)) > kv_tokens


def test_more_tokens_fit_the_same_budget_and_the_user_is_told() -> None:
    one = model(4, 64, 100)
    facts = replace(facts_of(8, 128, 128, 4, 4), chunked=True)
    memory = PROCESS_BYTES + (174 << 20)
    wide, low = (
        plan((one[0], facts), memory_bytes=memory, low_bit_kv=few) for few in (None, LowBitKV.of((4,) * 4, facts))
    )
    assert low.kv_tokens - low.state_tokens > 3 * wide.kv_tokens or low.kv_bytes < wide.kv_bytes / 3
    assert f"({low.kv_tokens} tokens at 4 bits, {low.kv_bytes // facts.kv_bytes_per_token} at 16)" in low.explanation[0]
    assert "at 16" not in wide.explanation[0]


@given(st.integers(300, 5000), st.sampled_from([8, 4]), st.integers(1, 5))
def test_what_was_asked_for_is_what_fits(tokens: int, bits: int, layers: int) -> None:
    one = model(layers, 64, 100)
    facts = replace(facts_of(2, 32, 32, layers), chunked=True, context_length=8192)
    low = LowBitKV.of((bits,) * layers, facts)
    weights = plan((one[0], facts)).weight_bytes
    found = plan((one[0], facts), weight_memory_bytes=weights, max_kv_tokens=tokens, low_bit_kv=low)
    assert limits_of(found, facts, prefix_cache=False).longest >= tokens


def test_beside_a_gpu_the_same_ram_holds_more_tokens_and_the_gpu_has_no_more_of_them() -> None:
    one = model(4, 64, 100)
    facts = replace(facts_of(8, 128, 128, 4, 4), chunked=True, context_length=4096)
    options = {"memory_bytes": CUDA_PROCESS_BYTES + (472 << 20), "gpu_memory_bytes": GIB,
               "gpu_context_bytes": 100 << 20, "max_batch_tokens": 64, "kv_on_cpu": True}  # fmt: skip
    kinds = [None, LowBitKV.of((4,) * 4, facts), LowBitKV.of((16, 4, 4, 4), facts)]
    wide, low, mixed = (plan((one[0], facts), low_bit_kv=few, **options) for few in kinds)
    for found, few in ((low, kinds[1]), (mixed, kinds[2])):
        assert few is not None
        assert found.kv_tokens == found.kv_bytes // few.token_bytes
        assert found.state_tokens == -(-few.window_bytes // few.token_bytes)
        line = f"({found.kv_tokens} tokens at {few.label}, {found.kv_bytes // few.wide_token_bytes} at 16, for which"
        assert line in found.explanation[0]
        assert "KV cache" not in found.explanation[1]
    assert low.kv_tokens - low.state_tokens > 3 * wide.kv_tokens or low.kv_bytes < wide.kv_bytes / 3
    # What visits the GPU: of a layer at 16 bits the whole context, of others the window and some pages.
    layer = facts.kv_bytes_per_token // 4
    visits = [found.activation_bytes - low.activation_bytes for found in (low, mixed)]
    assert visits == [0, (4096 - 192) * layer]


TIERED = {"memory_bytes": 4 * GIB, "gpu_memory_bytes": 700 << 20, "gpu_context_bytes": 100 << 20,
          "max_batch_tokens": 256, "kv_in_ram": True}  # fmt: skip


@pytest.mark.parametrize("bits", [(8,) * 8, (4,) * 8, (16, 4, 4, 4, 8, 4, 4, 16)])
@pytest.mark.parametrize("options", [{}, {"max_kv_tokens": 9000, "max_kv_sequences": 3}, {"memory_bytes": 2780 << 20}])
def test_two_tiers_of_few_bits_take_what_the_plan_says(bits: tuple[int, ...], options: dict[str, int]) -> None:
    manifest, facts = model(8, 64, 100)
    facts = replace(facts_of(8, 128, 128, 8), ragged=True, context_length=2048)
    few = LowBitKV.of(bits, facts)
    options = {**TIERED, **options}
    found, wide = (plan((manifest, facts), low_bit_kv=low, **options) for low in (few, None))
    kv = found.kv
    assert kv is not None
    assert wide.kv is not None
    page = {16: 64 * 4096} | {one: PageLayout(8, 128, 128, one).page_bytes for one in (8, 4)}
    for units, one in zip(kv.units, bits, strict=True):
        assert page[one] <= units * kv.unit_bytes < 1.1 * page[one]
    assert kv.window_bytes == 192 * 4096 * sum(one != 16 for one in bits)
    assert kv.max_sequences is not None
    windows = kv.window_bytes * kv.max_sequences
    assert kv.gpu_units * kv.unit_bytes + windows <= found.kv_bytes - kv.ram_bytes
    placement = found.placement
    on_gpu = sum(found.sweep.pieces[index].read_bytes for index in placement.gpu_residents)
    on_gpu += placement.num_gpu_slots * placement.slot_bytes + found.activation_bytes
    assert on_gpu + windows + kv.gpu_units * kv.unit_bytes + (100 << 20) <= 700 << 20
    assert found.kv_tokens == kv.kv_tokens >= 256
    assert found.max_sequences <= kv.max_sequences
    assert f"{found.kv_tokens} tokens at {few.label}, " in found.explanation[1]
    assert f"windows at 16 bits of {kv.max_sequences} sequences beside them" in found.explanation[1]
    if kv.ram_units:
        assert f"of pages at {few.label}" in found.explanation[0]
    # As many sequences as the limits let run: whatever their lengths are, they are held.
    limits = of_plan(found, facts)
    assert limits.state_tokens == 0
    # Windows are no tokens here: they have places of their own. Where layers are mixed nothing is shared.
    assert limits.window == (NO_WINDOW if 16 in bits else Window(128, 64, places=kv.max_sequences))
    reserved = [limits.reserved(SEQUENCE(prompt=(0,) * (count - 1))) for count in (1, 64, 65, 1000)]
    assert reserved == [64, 64, 128, 1024]
    most = found.kv_tokens // 64
    assert all(fits(kv.units, count, kv.gpu_units, kv.ram_units) for count in range(1, most + 1))


def test_two_tiers_of_few_bits_hold_more() -> None:
    manifest, facts = model(8, 64, 100)
    facts = replace(facts_of(8, 128, 128, 8), ragged=True, context_length=32768)
    kinds = [None, *(LowBitKV.of(bits, facts) for bits in ((8,) * 8, (4,) * 8))]
    wide, eight, four = (plan((manifest, facts), low_bit_kv=low, **TIERED).kv for low in kinds)
    assert wide is not None
    assert eight is not None
    assert four is not None
    per_gib = [kv.kv_tokens / (kv.gpu_units * kv.unit_bytes + kv.ram_bytes) for kv in (wide, eight, four)]
    assert per_gib[1] > 1.8 * per_gib[0]
    assert per_gib[2] > 3.5 * per_gib[0]


def test_what_a_run_needs_depends_on_the_number_of_its_sequences() -> None:
    one, facts = model(4, 64, 100), facts_of(8, 128, 128, 4, 4)
    low = LowBitKV.of((4,) * 4, facts)
    options = {"memory_bytes": 3 * GIB, "weight_memory_bytes": None, "max_kv_tokens": 20000, "low_bit_kv": low}
    single, several, many = (
        plan((one[0], facts), max_kv_sequences=count, **options).kv_bytes for count in (1, 10, 20000)
    )
    assert single <= several <= many


def test_an_architecture_with_its_own_cache_is_refused_by_name() -> None:
    facts = replace(facts_of(2, 16, 16, 3), ragged=False, model_type="falcon")
    assert low_bit_kv(KVPrecision.parse(16), facts) is None
    with pytest.raises(UnsupportedModelError, match=r"architecture 'falcon' keeps its model's own KV cache"):
        low_bit_kv(KVPrecision.parse(4), facts)


def test_pages_are_aligned() -> None:
    assert all(PageLayout(h, k, v, bits).page_bytes % 64 == 0 for h in (1, 3) for k in (2, 6) for v in (3, 130)
               for bits in (4, 8))  # fmt: skip


def test_a_request_that_the_cache_cannot_hold_is_refused() -> None:
    from pipo_ray.errors import InputError

    one, facts = model(4, 64, 100), replace(facts_of(8, 128, 128, 4, 4), context_length=1 << 20)
    found = plan((one[0], facts), memory_bytes=2 * GIB, low_bit_kv=LowBitKV.of((4,) * 4, facts))
    lengths = Lengths(facts, found, of_plan(found, facts), None)
    longest = of_plan(found, facts).longest
    assert longest == found.kv_tokens - found.state_tokens
    params = SamplingParams(max_tokens=1)
    assert lengths.most_new_tokens("the prompt", longest - 1, params, False) == 1
    with pytest.raises(InputError, match=rf"need {longest + 1} tokens of KV cache, the memory budget holds {longest}"):
        lengths.most_new_tokens("the prompt", longest, params, False)
