"""How many KV pages stay in RAM, and how many are on the drive."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import BudgetError, InputError, UnsupportedModelError
from pipo_ray.model.facts import ModelFacts
from pipo_ray.plan.budget import CUDA_PROCESS_BYTES, PROCESS_BYTES, plan_run
from pipo_ray.plan.disk_pages import PAGE_TOKENS, DiskPages
from pipo_ray.plan.kv_disk import (
    PASSING_PAGES,
    KVDiskPlacement,
    KVOnDisk,
    check_model,
    disk_page_bytes,
    gpu_bytes_for,
    kept_pages,
    least_ram_bytes,
    pages_of,
    place_kv,
    ram_bytes_for,
)
from pipo_ray.plan.low_bit_pages import LowBitKV, PageLayout
from pipo_ray.scheduling.limits import limits_of
from pipo_ray.session.memory import format_size, parse_size

from .test_budget import GIB, model

_, FACTS = model(3, 64, 100)
MODELS = st.builds(
    lambda layers, per_layer: replace(FACTS, num_layers=layers, kv_bytes_per_token=layers * per_layer),
    st.integers(1, 80),
    st.integers(4, 8192),
)


@given(MODELS, st.integers(0, 1 << 32), st.integers(1, 100_000), st.none() | st.integers(0, 1 << 34))
def test_everything_that_is_admitted_has_a_place(
    facts: ModelFacts, ram_bytes: int, wanted: int, size: int | None
) -> None:
    try:
        placement = place_kv(facts, ram_bytes, wanted, KVOnDisk(size, "folder"))
    except BudgetError as error:
        least = parse_size(re.search(r"at least (\S+ \S+) would do", str(error))[1])  # type: ignore[index]
        given_bytes = ram_bytes if "in RAM is too low" in str(error) else size
        assert given_bytes is not None
        assert given_bytes < least
        return
    layers = facts.num_layers
    assert placement.ram_bytes <= ram_bytes
    assert size is None or placement.disk_bytes <= size
    assert placement.page_bytes % 4096 == 0
    assert placement.page_bytes * layers >= PAGE_TOKENS * facts.kv_bytes_per_token
    assert 1 <= placement.ahead_pages <= placement.staging_pages - 2
    assert placement.max_sequences >= 1
    if size is None:
        assert placement.kv_tokens >= wanted
    for sequences in (1, placement.max_sequences):
        kept = sum(kept_pages(placement, sequences))
        in_ram = kept + layers * sequences + placement.staging_pages
        assert in_ram <= placement.ram_pages
        # The newest page of each layer of each sequence is in RAM, and what is full and not kept on the drive.
        full = placement.kv_tokens // PAGE_TOKENS * layers - layers * sequences
        assert full - kept <= placement.disk_pages


@st.composite
def few_bits(draw: st.DrawFn) -> tuple[ModelFacts, LowBitKV]:
    """A model, and bits of its layers, of which at least one has few."""
    heads, dim = draw(st.sampled_from([(1, 8), (2, 32), (8, 128), (3, 80)]))
    bits = draw(st.lists(st.sampled_from([16, 8, 4]), min_size=1, max_size=40).filter(lambda bits: min(bits) < 16))
    shape = (heads, dim, dim)
    facts = replace(FACTS, num_layers=len(bits), kv_bytes_per_token=len(bits) * heads * 2 * dim * 2, kv_shapes=(shape,))
    low = LowBitKV.of(bits, facts)
    return low.applied_to(facts), low


def said_least(error: BudgetError) -> str:
    """The memory that an error says would do."""
    found = re.match(r"KV cache of .* in RAM is too low for --kv-on-disk: at least (\S+ \S+) would do", str(error))
    assert found, error
    return found[1]


@given(few_bits(), st.integers(0, 1 << 32), st.integers(1, 100_000), st.integers(0, 1 << 31), st.integers(1, 40))
def test_packed_pages_that_are_admitted_have_a_place(
    model: tuple[ModelFacts, LowBitKV], ram_bytes: int, wanted: int, gpu_bytes: int, sequences: int
) -> None:
    facts, low = model
    gpu = gpu_bytes if gpu_bytes >= gpu_bytes_for(facts, 1, low) else 0
    try:
        placement = place_kv(facts, ram_bytes, wanted, KVOnDisk(None, "folder"), gpu, low, sequences)
    except BudgetError as error:
        least = least_ram_bytes(facts, low, num_windows=0 if gpu else 1)
        assert ram_bytes < least
        place_kv(facts, parse_size(said_least(error), "least"), wanted, KVOnDisk(None, "folder"), gpu, low, sequences)
        return
    sizes = DiskPages.of(facts, low)
    assert placement.ram_bytes + (0 if gpu else placement.windows_bytes) <= ram_bytes
    assert placement.gpu_pages * placement.page_bytes + (placement.windows_bytes if gpu else 0) <= gpu
    assert 1 <= placement.max_sequences <= placement.num_windows
    assert placement.kv_tokens >= wanted
    wide = low.wide_token_bytes // len(low.bits)
    for bits, tokens in zip(low.bits, placement.tokens, strict=True):
        assert tokens >= 256
        packed = PageLayout(*facts.kv_shapes[0], bits).page_bytes if bits != 16 else 64 * wide
        assert tokens // 64 * packed <= placement.page_bytes
        assert bits == 16 or (tokens // 64 + 1) * packed > placement.page_bytes
    for count in (1, placement.max_sequences):
        kept = kept_pages(placement, count)
        assert sum(kept) == max(0, placement.ram_pages - placement.staging_pages - len(low.bits) * count)
        # Whoever is admitted takes a unit of tokens at a time, and that is as many pages of each layer as it needs.
        unit, full = placement.most_page_tokens, placement.ram_pages - placement.staging_pages + placement.disk_pages
        assert placement.kv_tokens // unit * sizes.pages_of(unit) <= full


def test_a_plan_with_packed_pages_on_the_drive_keeps_its_budget_and_says_so() -> None:
    manifest, facts = model(3, 64, 100)
    facts = replace(facts, kv_bytes_per_token=3 * 256, kv_shapes=((2, 32, 32),))
    low = LowBitKV.of((16, 4, 4), facts)
    options = {"max_kv_tokens": 50_000, "max_batch_tokens": 64, "max_kv_sequences": 2, "low_bit_kv": low}
    wide = plan_run(manifest, facts, memory_bytes=2 * GIB, **options | {"low_bit_kv": None})
    memory = PROCESS_BYTES + wide.activation_bytes + wide.weight_bytes + (4 << 20)
    plan = plan_run(manifest, facts, memory_bytes=memory, weight_memory_bytes=wide.weight_bytes, **options,
                    kv_on_disk=KVOnDisk(None, "/somewhere"))  # fmt: skip
    kv = plan.kv_disk
    assert kv is not None
    assert PROCESS_BYTES + plan.kv_bytes + plan.weight_bytes + plan.activation_bytes <= memory
    assert plan.kv_bytes == kv.ram_bytes + 2 * 192 * 2 * 256
    assert (plan.max_sequences, plan.state_tokens, plan.kv_page_tokens) == (2, 0, max(kv.tokens))
    assert plan.kv_tokens >= 50_000
    assert kv.page_bytes == disk_page_bytes(facts) == 65536
    assert kv.tokens == (256, *(65536 // PageLayout(2, 32, 32, 4).page_bytes * 64,) * 2)
    assert f"up to {plan.kv_tokens} tokens at 16 and 4 bits: " in plan.explanation[-1]
    assert "windows at 16 bits: 2" in plan.explanation[-1]
    limits = limits_of(plan, facts, prefix_cache=True)
    assert (limits.short_tokens, limits.state_tokens, limits.sharing) == (0, 0, "none")
    on_gpu = plan_run(manifest, facts, memory_bytes=3 * GIB, gpu_memory_bytes=100 << 20, **options,
                      kv_on_disk=KVOnDisk(None, "/somewhere"))  # fmt: skip
    assert on_gpu.kv_disk is not None
    assert on_gpu.kv_disk.gpu_pages == PASSING_PAGES + 2 * 3
    assert on_gpu.kv_bytes == on_gpu.kv_disk.ram_bytes + gpu_bytes_for(facts, 2, low)


def test_of_layers_that_differ_as_many_tokens_stay() -> None:
    placement = KVDiskPlacement(4, 4096, 106, 6, 100, "", tokens=(256, 768, 768, 256))
    assert kept_pages(placement, 1) == (36, 12, 12, 36)


@given(st.integers(1, 80), st.integers(0, 3000), st.integers(1, 5))
def test_as_many_stay_in_every_layer(layers: int, pages: int, sequences: int) -> None:
    placement = KVDiskPlacement(layers, 4096, pages, 6, 100, "")
    kept = kept_pages(placement, sequences)
    assert len(kept) == layers
    assert max(kept) - min(kept) <= 1
    assert sum(kept) == max(0, pages - 6 - layers * sequences)


@given(MODELS, st.integers(1, 100_000))
def test_what_a_sequence_wants_is_enough_for_it(facts: ModelFacts, num_tokens: int) -> None:
    placement = place_kv(facts, ram_bytes_for(facts, num_tokens), num_tokens, KVOnDisk(GIB << 10, ""))
    assert sum(kept_pages(placement, 1)) >= facts.num_layers * (pages_of(num_tokens) - 1)


def test_a_run_keeps_its_budget_and_says_where_the_pages_are() -> None:
    manifest, facts = model(3, 64, 100)
    without = plan_run(manifest, facts, memory_bytes=2 * GIB, max_kv_tokens=10_000, max_batch_tokens=64)
    fixed = PROCESS_BYTES + without.activation_bytes + without.weight_bytes
    plan = plan_run(manifest, facts, memory_bytes=fixed + least_ram_bytes(facts), max_kv_tokens=10_000,
                    max_batch_tokens=64, weight_memory_bytes=without.weight_bytes,
                    kv_on_disk=KVOnDisk(None, "/somewhere"))  # fmt: skip
    assert plan.kv_disk is not None
    assert plan.kv_tokens == plan.kv_disk.kv_tokens >= 10_000
    assert plan.max_sequences <= plan.kv_disk.max_sequences
    assert plan.kv_page_tokens == PAGE_TOKENS
    assert PROCESS_BYTES + plan.kv_bytes + plan.weight_bytes + plan.activation_bytes <= plan.memory_bytes
    assert "without a name in /somewhere (encrypted)" in plan.explanation[-1]


def test_models_and_machines_that_have_no_such_pages_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="--kv-on-disk: falcon keeps its model's own cache"):
        check_model(replace(FACTS, ragged=False, model_type="falcon"))
    with pytest.raises(InputError, match="--kv-on-disk uses RAM, too: leave --kv-in-ram out"):
        plan_run(*model(3, 64, 100), memory_bytes=8 * GIB, gpu_memory_bytes=GIB, kv_in_ram=True,
                 kv_on_disk=KVOnDisk(None, ""))  # fmt: skip


@pytest.mark.parametrize("max_kv_tokens", [None, 20_000])
def test_a_gpu_has_the_newest_pages_and_ram_and_drive_the_others(max_kv_tokens: int | None) -> None:
    manifest, facts = model(3, 64, 100)
    options = {"memory_bytes": 3 * GIB, "gpu_memory_bytes": 100 << 20, "max_batch_tokens": 64}
    plan = plan_run(manifest, facts, **options, max_kv_tokens=max_kv_tokens, kv_on_disk=KVOnDisk(64 << 20, "folder"))
    kv = plan.kv_disk
    assert kv is not None
    assert plan.kv_tokens == kv.kv_tokens > 16_384
    assert kv.ram_bytes < plan.kv_bytes < kv.ram_bytes + (100 << 20)
    assert 1 <= plan.max_sequences <= kv.max_sequences
    assert kv.gpu_pages >= PASSING_PAGES + plan.max_sequences * facts.num_layers
    assert CUDA_PROCESS_BYTES + kv.ram_bytes + plan.weight_bytes <= 3 * GIB
    with pytest.raises(BudgetError, match=r"--memory .* would do: .*KV pages"):
        plan_run(manifest, facts, **options | {"memory_bytes": CUDA_PROCESS_BYTES + (300 << 10)},
                 kv_on_disk=KVOnDisk(64 << 20, "folder"))  # fmt: skip


@pytest.mark.parametrize("short", ["--memory", "--gpu-memory", "--memory beside a GPU"])
def test_too_little_memory_is_said_in_pages(short: str) -> None:
    """With a drive behind it the least KV cache is no number of tokens."""
    options = {"memory_bytes": PROCESS_BYTES, "max_batch_tokens": 64}
    if short != "--memory":
        options = {"memory_bytes": 3 * GIB, "gpu_memory_bytes": 100 << 10, "max_batch_tokens": 64}
    if short == "--memory beside a GPU":
        options |= {"memory_bytes": CUDA_PROCESS_BYTES, "gpu_memory_bytes": 100 << 20}
    manifest, facts = model(3, 64, 100)
    if short == "--memory beside a GPU":
        options["memory_bytes"] += 300 << 10
    staging = PASSING_PAGES if short == "--gpu-memory" else 6
    size = format_size((staging + facts.num_layers) * disk_page_bytes(facts))
    with pytest.raises(BudgetError) as caught:
        plan_run(manifest, facts, **options, kv_on_disk=KVOnDisk(64 << 20, "folder"))
    assert str(caught.value).startswith(f"{short.split()[0]} ")
    assert f"KV pages {size} (one of each layer, and those on their way)" in str(caught.value)
    assert "256 tokens" not in str(caught.value)


def test_what_is_on_its_way_has_room_before_what_stays() -> None:
    """As far as the drive needs it, and as long as that makes little more to read, and leaves room for sequences."""
    facts = replace(FACTS, num_layers=16, kv_bytes_per_token=16 * 4096)  # pages of 1 MiB

    def staging(ram_mib: int, tokens: int) -> int:
        return place_kv(facts, ram_mib << 20, tokens, KVOnDisk(16 * GIB, "")).staging_pages

    assert staging(56, 65_536) == 20  # half of what is beyond a page of each layer
    assert staging(80, 65_536) == 32
    assert staging(80, 16 * PAGE_TOKENS) == 16 + (16 * 16 - 64) // 16  # most of it would have stayed
    assert staging(2 * 16 + 7, 65_536) == 7  # and two sequences
    assert staging(2048, 65_536) == 64


def test_the_gpu_gives_pages_to_those_that_run_and_the_rest_to_weights() -> None:
    manifest, facts = model(3, 64, 100)
    options = {"memory_bytes": 3 * GIB, "gpu_memory_bytes": 1 * GIB, "max_batch_tokens": 64,
               "kv_on_disk": KVOnDisk(64 << 20, "folder")}  # fmt: skip
    plans = {
        sequences: plan_run(manifest, facts, **options, max_kv_tokens=20_000, max_kv_sequences=sequences)
        for sequences in (1, 2)
    }
    for sequences, plan in plans.items():
        assert plan.kv_disk is not None
        assert plan.kv_disk.gpu_pages == PASSING_PAGES + sequences * facts.num_layers
        assert plan.max_sequences == sequences
    unnamed = plan_run(manifest, facts, **options).kv_disk
    assert unnamed is not None
    assert unnamed.gpu_pages > PASSING_PAGES + 2 * facts.num_layers


def test_pages_are_whole_blocks_of_the_drive() -> None:
    assert disk_page_bytes(replace(FACTS, num_layers=32, kv_bytes_per_token=32 * 4096)) == 1 << 20
