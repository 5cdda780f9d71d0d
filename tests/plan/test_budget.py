"""Budgets: the least that an error states is the least that works, and what is given is never exceeded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.budget_models import GIB, CutOnce, model, plan

from pipo_ray.errors import BudgetError, InputError, UnsupportedModelError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan import placement
from pipo_ray.plan.budget import CUDA_PROCESS_BYTES, LOADER_BYTES, PROCESS_BYTES, whole_bytes
from pipo_ray.plan.kv_disk import KVOnDisk
from pipo_ray.plan.kv_pages import pages_of
from pipo_ray.plan.transfer import Transfer
from pipo_ray.quant.panels import INT8_LAYOUT, Panels
from pipo_ray.session.memory import MIB, parse_size
from pipo_ray.store.manifest import Manifest

MODELS = st.builds(model, st.integers(1, 3), st.sampled_from([8, 64, 1000]), st.sampled_from([100, 1000]))
FEW = settings(max_examples=20)  # with the least slots a model has thousands of pieces


@pytest.fixture(scope="module", autouse=True)
def cut_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "cut_pieces", CutOnce())
        yield


def least_of(error: BudgetError) -> int:
    found = re.search(r"is too low: at least (\S+ \S+) would do: ", str(error))
    assert found, error
    return parse_size(found[1])


@FEW
@given(MODELS)
def test_the_least_memory_that_is_stated_works_and_no_less_does(one: tuple[Manifest, ModelFacts]) -> None:
    with pytest.raises(BudgetError, match=r"--memory 1\.0 MiB is too low.*processes.*activations.*KV cache") as caught:
        plan(one, memory_bytes=1 << 20)
    least = least_of(caught.value)
    assert plan(one, memory_bytes=least).kv_tokens >= 256
    with pytest.raises(BudgetError, match="--memory"):
        plan(one, memory_bytes=least * 98 // 100)


def test_a_loader_for_each_further_drive_is_paid_for() -> None:
    manifest, facts = model(2, 64, 100)
    least = []
    for stripes in ((), ("/mnt/a", "/mnt/b")):
        for gpu in ({}, {"gpu_memory_bytes": 10 * GIB}):
            with pytest.raises(BudgetError) as caught:
                plan((replace(manifest, stripes=stripes), facts), memory_bytes=1 << 20, **gpu)
            least.append(least_of(caught.value))
    # What is stated is rounded up.
    assert least[2] - least[0] == pytest.approx(2 * LOADER_BYTES, rel=0.1)
    assert least[3] - least[1] == pytest.approx(2 * LOADER_BYTES, rel=0.1)


@FEW
@given(MODELS)
def test_the_least_weight_memory_that_is_stated_works_and_no_less_does(one: tuple[Manifest, ModelFacts]) -> None:
    with pytest.raises(BudgetError, match=r"--weight-memory 1 B is too low") as caught:
        plan(one, weight_memory_bytes=1)
    least = least_of(caught.value)
    assert plan(one, weight_memory_bytes=least).weight_bytes <= least
    with pytest.raises(BudgetError, match="--weight-memory"):
        plan(one, weight_memory_bytes=least * 98 // 100)


@FEW
@given(MODELS, st.integers(1, 1 << 32))
def test_both_together_state_a_memory_that_works(one: tuple[Manifest, ModelFacts], weights: int) -> None:
    try:
        plan(one, weight_memory_bytes=weights, memory_bytes=PROCESS_BYTES)
    except BudgetError as error:
        if "--weight-memory" not in str(error).split(" is too low")[0]:
            plan(one, weight_memory_bytes=weights, memory_bytes=least_of(error))


@FEW
@given(MODELS, st.integers(1, 200 << 20))
def test_weights_stay_within_their_budget(one: tuple[Manifest, ModelFacts], weights: int) -> None:
    try:
        found = plan(one, weight_memory_bytes=weights)
    except BudgetError:
        return
    placement = found.placement
    assert found.weight_bytes == placement.num_slots * placement.slot_bytes + sum(placement.arena_bytes) <= weights
    assert found.resident_bytes + found.streamed_bytes_per_sweep == found.model_bytes


def test_matrices_that_cannot_be_cut_as_small_as_slots_get_fewer_slots_and_not_more_staging() -> None:
    transfer = Transfer(2 * MIB, 6, 2 * MIB, 12)
    placement = plan(model(1, 32768, 100), weight_memory_bytes=8 * GIB, transfer=transfer).placement
    assert placement.slot_bytes > 4 * MIB  # a 4096th of the model
    assert placement.num_slots * placement.slot_bytes <= transfer.staging_bytes
    assert transfer.staging_bytes < (placement.num_slots + 1) * placement.slot_bytes


@FEW
@given(MODELS)
def test_a_model_that_fits_is_resident_and_more_is_not_asked_for(one: tuple[Manifest, ModelFacts]) -> None:
    whole = whole_bytes(*one)
    fitting, plenty = (
        plan(one, weight_memory_bytes=whole),
        plan(one, weight_memory_bytes=90 * GIB, memory_bytes=3 * GIB),
    )
    for found in (fitting, plenty):
        assert found.placement.num_slots == found.streamed_bytes_per_sweep == 0
        assert found.weight_bytes == whole
        assert "(all resident)" in found.explanation[0]
        assert "nothing has to stream" in found.explanation[1]


def test_on_a_gpu_each_budget_is_told_by_its_name() -> None:
    one = model(2, 64, 1000)
    gpu = {"gpu_memory_bytes": GIB, "gpu_context_bytes": 500 << 20, "memory_bytes": 4 * GIB}
    for option in ("gpu_memory_bytes", "memory_bytes", "weight_memory_bytes"):
        name = "--" + option.removesuffix("_bytes").replace("_", "-")
        with pytest.raises(BudgetError, match=f"^{name} 4.0 KiB is too low") as caught:
            plan(one, **gpu | {option: 4096})
        found = plan(one, **gpu | {option: least_of(caught.value)})
        assert found.weight_bytes <= found.memory_bytes
    least = least_of(caught.value)  # for weights
    assert found.placement.num_slots * found.placement.slot_bytes <= found.weight_bytes <= least


@pytest.mark.parametrize("gpu", [{}, {"gpu_memory_bytes": 2 * GIB, "gpu_context_bytes": 500 << 20}])
def test_named_tokens_have_room_before_weights_have(gpu: dict[str, int]) -> None:
    """8 KiB of KV a token: more of it than its usual share, and no more than is asked for."""
    one = model(3, 1000, 1000)
    budget = {"memory_bytes": (4 if gpu else 2) * GIB, **gpu}
    usual, named = plan(one, **budget), plan(one, **budget, max_kv_tokens=60_000)
    assert usual.kv_tokens < 60_000 <= named.kv_tokens
    few = plan(one, **budget, max_kv_tokens=300)
    assert 300 <= few.kv_tokens <= usual.kv_tokens


@pytest.mark.parametrize("memory", [3 * GIB // 2, 4 * GIB, 64 * GIB])
def test_logits_of_a_large_vocabulary_are_in_the_plan(memory: int) -> None:
    vocabulary = 262144
    found = plan(model(1, 64, vocabulary), memory_bytes=memory)
    assert found.max_sequences >= 8
    # What the sampler makes of all rows at the same time: the model's logits, a stack of them, a row in float32.
    assert found.activation_bytes >= 3 * 4 * vocabulary * found.max_sequences
    assert 4 * vocabulary * found.max_scored_tokens <= 8 << 20
    more = plan(model(1, 64, 1000), memory_bytes=memory)
    assert more.max_sequences > found.max_sequences or memory > 32 * GIB


@pytest.mark.parametrize("gpu", [{}, {"gpu_memory_bytes": 2 * GIB}])
def test_logits_are_there_for_as_many_sequences_as_are_named(gpu: dict[str, Any]) -> None:
    """Eight always go together; what more would take is left to the weights."""
    one = model(60, 1000, 32_000)
    budget = {"memory_bytes": (2 if gpu else 1) * CUDA_PROCESS_BYTES, **gpu}
    anybody = plan(one, **budget)
    assert anybody.max_sequences > 20
    for named, rows in ((1, 8), (8, 8), (17, 17), (100_000, anybody.max_sequences)):
        found = plan(one, **budget, max_kv_sequences=named)
        assert found.max_sequences == rows
        saved = (anybody.max_sequences - rows) * 3 * 4 * 32_000
        assert anybody.activation_bytes - found.activation_bytes >= saved
    named = plan(one, **budget, max_kv_sequences=1, max_kv_tokens=500)
    assert named.max_sequences == 8


@pytest.mark.parametrize("gpu", [{}, {"gpu_memory_bytes": 2 * GIB}])
def test_a_tokenizer_is_paid_for(gpu: dict[str, Any]) -> None:
    one = model(300, 1000, 1000)
    memory = (CUDA_PROCESS_BYTES if gpu else PROCESS_BYTES) + 900 * MIB
    taken = plan(one, memory_bytes=memory, tokenizer_bytes=300 * MIB, **gpu)
    same = plan(one, memory_bytes=memory - 300 * MIB, **gpu)
    without = plan(one, memory_bytes=memory, **gpu)
    assert (taken.kv_bytes, taken.weight_bytes) == (same.kv_bytes, same.weight_bytes)
    assert taken.kv_bytes + taken.weight_bytes < without.kv_bytes + without.weight_bytes - 200 * MIB


def test_a_sequence_that_cannot_be_split_is_as_long_as_its_activations_fit() -> None:
    manifest, facts = model(1, 64, 1000)
    whole = replace(facts, chunked=False, ragged=False, attention="eager", num_attention_heads=32, context_length=65536)
    small, large = plan((manifest, whole), memory_bytes=2 * GIB), plan((manifest, whole), memory_bytes=16 * GIB)
    for found in (small, large):
        assert found.max_length == found.max_batch_tokens
        # Scores of every head in float32, and their softmax.
        assert found.activation_bytes >= 2 * 4 * 32 * found.max_length**2
        assert found.activation_bytes <= found.memory_bytes // 4
    assert 512 <= small.max_length < large.max_length < 65536
    asked = plan((manifest, whole), memory_bytes=16 * GIB, max_batch_tokens=600)
    assert asked.max_length == 600
    assert plan((manifest, facts), memory_bytes=2 * GIB).max_length is None


def test_a_recurrent_state_is_paid_for_with_tokens_of_kv_cache() -> None:
    manifest, facts = model(1, 64, 1000)
    found = plan((manifest, replace(facts, state_bytes=10 * facts.kv_bytes_per_token + 1)), memory_bytes=2 * GIB)
    assert found.state_tokens == 11


@FEW
@given(MODELS, st.integers(0, 1 << 30), st.integers(0, 3 << 30))
def test_kv_pages_on_a_gpu_and_in_ram_stay_within_both_budgets(
    one: tuple[Manifest, ModelFacts], gpu_spare: int, ram_spare: int
) -> None:
    context = 500 << 20
    try:
        found = plan(one, memory_bytes=CUDA_PROCESS_BYTES + ram_spare, gpu_memory_bytes=context + gpu_spare,
                     gpu_context_bytes=context, max_batch_tokens=16, kv_in_ram=True)  # fmt: skip
    except BudgetError:
        return
    kv, placement = found.kv, found.placement
    assert kv is not None
    assert found.kv_tokens == kv.kv_tokens >= 256
    assert found.weight_bytes + kv.ram_bytes <= ram_spare
    on_gpu = sum(found.sweep.pieces[i].read_bytes for i in placement.gpu_residents)
    on_gpu += placement.num_gpu_slots * placement.slot_bytes + kv.gpu_units * kv.unit_bytes + found.activation_bytes
    assert on_gpu <= gpu_spare
    assert found.kv_bytes >= kv.gpu_units * kv.unit_bytes + kv.ram_bytes


def test_a_full_sweep_has_its_pages_in_one_piece() -> None:
    """A share of what is spare would hold half of them, and the prompts would take two sweeps."""
    manifest, facts = model(8, 1000, 1000)
    facts = replace(facts, kv_bytes_per_token=8 * 32768, num_layers=8)
    gpu = {"gpu_memory_bytes": 2 * GIB, "gpu_context_bytes": 500 << 20, "memory_bytes": 16 * GIB, "kv_in_ram": True}
    for tokens in (512, 5000):  # ten prompts as long as the context
        found = plan((manifest, facts), **gpu, max_batch_tokens=tokens, max_kv_tokens=600)
        assert found.kv is not None
        assert found.kv_tokens >= tokens + tokens // 512
        assert found.kv.gpu_units >= 2 * pages_of(tokens)
    # Half of what is spare is the most: more would leave too little to the weights.
    found = plan((manifest, facts), **gpu, max_batch_tokens=9000)
    assert found.kv is not None
    assert 3500 < found.kv_tokens < 9000
    spare = 2 * GIB - (500 << 20) - found.activation_bytes
    assert 0.45 * spare < found.kv.gpu_units * found.kv.unit_bytes <= 0.5 * spare


def test_what_a_token_takes_is_what_was_measured() -> None:
    manifest, facts = model(2, 1000, 1000)
    measured = replace(facts, token_bytes=(1000, 3000))

    def activations(one: ModelFacts, tokens: int, **options: Any) -> int:
        return plan((manifest, one), memory_bytes=16 * GIB, max_batch_tokens=tokens, **options).activation_bytes

    def each(one: ModelFacts, **options: Any) -> float:
        return (activations(one, 1100, **options) - activations(one, 100, **options)) / 1000

    by_sizes = (8 * 1000 + 4 * 4000) * 4
    assert each(facts) == each(measured) == by_sizes  # on the CPU no less
    assert each(replace(facts, token_bytes=(1000, by_sizes))) == 1.25 * by_sizes
    gpu = {"gpu_memory_bytes": 4 * GIB, "gpu_context_bytes": 500 << 20}
    loose = 1.2  # the allocator's, where there is room
    assert each(measured, **gpu) == loose * 1.25 * 1000
    # Attention to pages that are few at a time is merged in float32.
    on_disk = KVOnDisk(GIB, "")
    assert each(measured, **gpu, kv_on_disk=on_disk) == loose * 1.25 * 3000


def test_the_embedding_is_in_ram_where_everything_else_is() -> None:
    one = model(8, 1000, 1000)
    gpu = {"gpu_memory_bytes": 600 << 20, "gpu_context_bytes": 500 << 20, "max_batch_tokens": 16}
    ample = plan(one, **gpu, memory_bytes=16 * GIB)
    assert ample.tables_in_ram
    assert ample.streamed_bytes_per_sweep == 0
    assert "the embedding table (3.8 MiB) is in RAM" in ample.explanation[2]
    exact = plan(one, **gpu, memory_bytes=16 * GIB, weight_memory_bytes=ample.weight_bytes)
    assert exact.tables_in_ram
    assert exact.weight_bytes == ample.weight_bytes
    short = plan(one, **gpu, memory_bytes=16 * GIB, weight_memory_bytes=ample.weight_bytes - 4096)
    assert not short.tables_in_ram
    assert short.streamed_bytes_per_sweep == 0
    assert "of the embedding table (3.8 MiB) only the rows needed are read" in short.explanation[2]


def test_what_a_gpus_allocator_is_better_given_is_never_asked_for() -> None:
    """A budget is refused for what cannot do without."""
    manifest, facts = model(2, 1000, 1000)
    facts = replace(facts, token_bytes=(100_000, 100_000))
    options = {"memory_bytes": 16 * GIB, "gpu_context_bytes": 500 << 20, "max_batch_tokens": 4096}
    with pytest.raises(BudgetError) as refused:
        plan((manifest, facts), gpu_memory_bytes=600 << 20, **options)
    tight = plan((manifest, facts), gpu_memory_bytes=least_of(refused.value), **options)
    ample = plan((manifest, facts), gpu_memory_bytes=8 * GIB, **options)
    assert ample.activation_bytes - tight.activation_bytes == pytest.approx(0.25 * 4096 * 100_000, rel=0.05)


def test_what_the_gpu_has_no_room_for_is_kept_in_ram() -> None:
    manifest, facts = model(8, 1000, 1000)
    facts = replace(facts, kv_bytes_per_token=8 * 32768, num_layers=8)
    gpu = {"gpu_memory_bytes": 3 * GIB, "gpu_context_bytes": 500 << 20, "memory_bytes": 16 * GIB, "kv_in_ram": True}
    found = plan((manifest, facts), **gpu)
    assert found.kv is not None
    assert found.kv.ram_units
    assert found.kv_tokens > 1.5 * found.kv.gpu_units // 8 * 64
    assert re.search(r"KV cache .* \(\d+ tokens, of them \d+ without moving to RAM and back\)", found.explanation[1])
    assert "KV cache" in found.explanation[0]
    alone = plan((manifest, replace(facts, ragged=False)), **gpu)
    assert alone.kv is None
    assert "RAM and back" not in alone.explanation[1]


def test_kv_on_the_cpu_leaves_the_gpu_to_weights() -> None:
    manifest, facts = model(8, 1000, 1000)
    facts = replace(facts, kv_bytes_per_token=8 * 32768, num_layers=8)
    gpu = {"gpu_memory_bytes": 1 * GIB, "gpu_context_bytes": 500 << 20, "memory_bytes": 16 * GIB, "max_kv_tokens": 1000}
    beside = plan((manifest, facts), **gpu)
    found = plan((manifest, facts), **gpu, kv_on_cpu=True)
    assert found.kv_tokens == 1000
    assert found.kv_bytes == 1000 * 8 * 32768
    assert "KV cache 250.0 MiB (1000 tokens, for which the processor attends)" in found.explanation[0]
    assert "KV cache" not in found.explanation[1]
    large = model(32, 4096, 1000)
    roomy = {**gpu, "gpu_memory_bytes": 3 * GIB, "max_kv_tokens": 300}
    slots = [plan(large, **roomy, kv_on_cpu=on).placement for on in (False, True)]
    assert [placement.num_gpu_slots for placement in slots] == [3, 4]
    assert slots[1].slot_bytes == 2 * slots[0].slot_bytes  # fewer orders to give in a sweep
    manifest, of_large = large
    first, *others = manifest.blocks
    rows, columns = first.tensors[0].shape
    panels = Panels("int8", INT8_LAYOUT, rows, columns, rows)
    low_bit = replace(first, tensors=(replace(first.tensors[0], panels=panels), *first.tensors[1:]))
    few_bits = [
        plan((replace(manifest, blocks=(low_bit, *others)), of_large), **roomy, kv_on_cpu=on).placement
        for on in (False, True)
    ]
    assert [placement.num_gpu_slots for placement in few_bits] == [3, 4]
    assert few_bits[0].slot_bytes == few_bits[1].slot_bytes == slots[1].slot_bytes  # each is reason enough
    assert found.activation_bytes == beside.activation_bytes + 512 * 32768  # a layer's, of the context
    with pytest.raises(UnsupportedModelError, match="keeps its model's own KV cache"):
        plan((manifest, replace(facts, ragged=False)), **gpu, kv_on_cpu=True)
    with pytest.raises(InputError, match="--kv-on-cpu is for a GPU"):
        plan((manifest, facts), kv_on_cpu=True)
    with pytest.raises(InputError, match="--kv-in-ram is for a GPU"):
        plan((manifest, facts), kv_in_ram=True)
    with pytest.raises(BudgetError, match=r"--memory .* is too low: .* KV cache of 256 tokens 64.0 MiB"):
        plan((manifest, facts), **{**gpu, "memory_bytes": CUDA_PROCESS_BYTES + (60 << 20)}, kv_on_cpu=True)


@pytest.mark.parametrize("gpu", [{}, {"gpu_memory_bytes": 3 * GIB, "gpu_context_bytes": 500 << 20}])
def test_kv_for_more_tokens_than_there_is_room_for_leaves_weights_their_staging(gpu: dict[str, int]) -> None:
    manifest, facts = model(32, 4096, 1000)
    facts = replace(facts, kv_bytes_per_token=32 * 8192, num_layers=32)
    found = plan((manifest, facts), memory_bytes=4 * GIB, max_kv_tokens=10**7, **gpu)
    slots = found.placement.num_gpu_slots if gpu else found.placement.num_slots
    assert slots >= (3 if gpu else 4)
    assert found.placement.slot_bytes > 8 << 20
    assert found.kv_tokens * facts.kv_bytes_per_token > GIB  # and still most of what there is is theirs


@pytest.mark.parametrize("place", [{"kv_on_cpu": True}, {"kv_on_disk": KVOnDisk(None, "/x")}])
def test_kv_in_ram_beside_a_gpu_leaves_what_streams_its_staging(place: dict[str, Any]) -> None:
    manifest, facts = model(32, 4096, 1000)
    facts = replace(facts, kv_bytes_per_token=32 * 8192, num_layers=32)
    gpu = {"memory_bytes": 6 * GIB, "gpu_memory_bytes": 3 * GIB, "gpu_context_bytes": 500 << 20}
    found = plan((manifest, facts), **gpu, max_kv_tokens=10**7, **place)
    assert found.streamed_bytes_per_sweep > GIB
    # Beside a processor that attends the same memory is in half as many slots (`Transfer.in_fewer_slots`).
    larger = 2 if "kv_on_cpu" in place else 1
    assert found.placement.num_slots >= 4 // larger
    assert found.placement.slot_bytes > larger * (8 << 20)


def test_ram_holds_as_many_tokens_beside_a_gpu_as_were_asked_for() -> None:
    manifest, facts = model(8, 1000, 1000)
    facts = replace(facts, kv_bytes_per_token=8 * 32768, num_layers=8)
    gpu = {"gpu_memory_bytes": 3 * GIB, "gpu_context_bytes": 500 << 20, "memory_bytes": 64 * GIB, "kv_in_ram": True}
    for tokens, sequences in ((9_000, 1), (16_000, 20)):
        found = plan((manifest, facts), **gpu, max_kv_tokens=tokens, max_kv_sequences=sequences)
        # Each sequence takes whole pages.
        assert tokens + 63 * sequences <= found.kv_tokens <= tokens + 64 * (sequences + 1)


def test_prompts_that_cannot_be_split_are_scored_whole_however_few_sequences_there_are() -> None:
    manifest, facts = model(1, 64, 1000)
    whole = replace(facts, chunked=False, ragged=False, attention="eager", num_attention_heads=4, context_length=512)
    options = {"memory_bytes": 4 * GIB}
    few, anybody = (plan((manifest, whole), **options, max_kv_sequences=count) for count in (1, None))
    assert few.max_scored_tokens == anybody.max_scored_tokens > 8
