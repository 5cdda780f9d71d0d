"""Which runs share prefixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from plan.budget_models import GIB, model, plan

from pipo_ray.plan.kv_disk import KVOnDisk
from pipo_ray.plan.low_bit_pages import LowBitKV
from pipo_ray.scheduling.limits import limits_of
from pipo_ray.scheduling.window import NO_WINDOW, Window

ONE = model(2, 64, 100)
GPU = {"gpu_memory_bytes": 2 * GIB, "gpu_context_bytes": 500 << 20}


ON_DISK = {"kv_on_disk": KVOnDisk(4 * GIB, "/tmp")}


@pytest.mark.parametrize(
    "budgets", [{}, ON_DISK, GPU, GPU | {"kv_on_cpu": True}, GPU | {"kv_in_ram": True}, GPU | ON_DISK]
)
def test_prefixes_are_shared_where_a_sequence_can_read_anothers_cache(budgets: dict[str, Any]) -> None:
    found = plan(ONE, **budgets)
    limits = limits_of(found, ONE[1], prefix_cache=True)
    assert limits.sharing == "shared"
    assert limits.copies == (found.kv is None and found.kv_disk is None)
    assert limits_of(found, ONE[1], prefix_cache=False).sharing == "none"


@pytest.mark.parametrize("budgets", [{}, GPU, GPU | {"kv_on_cpu": True}])
def test_few_bits_are_shared_too(budgets: dict[str, Any]) -> None:
    facts = replace(ONE[1], kv_shapes=((2, 64, 64),))
    low = LowBitKV.of((4, 16), facts)
    limits = limits_of(plan((ONE[0], facts), low_bit_kv=low, **budgets), facts, prefix_cache=True)
    assert limits.sharing == "shared"
    assert limits.window == Window(128, 64, low.short_share)


@pytest.mark.parametrize("budgets", [GPU | {"kv_in_ram": True}, ON_DISK, GPU | ON_DISK])
@pytest.mark.parametrize("bits", [(4, 4), (4, 16)])
def test_packed_pages_that_move_are_shared_unless_layers_at_16_bits_are_among_them(
    bits: tuple[int, ...], budgets: dict[str, Any]
) -> None:
    """Windows have places of their own then, as many as the plan has room for."""
    facts = replace(ONE[1], kv_shapes=((2, 64, 64),))
    found = plan((ONE[0], facts), low_bit_kv=LowBitKV.of(bits, facts), **budgets)
    limits = limits_of(found, facts, prefix_cache=True)
    if 16 in bits:
        assert limits.sharing == "none"
        assert limits.window == NO_WINDOW
        return
    places = found.kv.max_sequences if found.kv is not None else found.kv_disk and found.kv_disk.num_windows
    assert places
    assert limits.sharing == "shared"
    assert limits.window == Window(128, 64, places=places)
    assert limits.max_sequences <= places
    assert not limits.copies
    assert limits_of(found, facts, prefix_cache=False).window == NO_WINDOW


@pytest.mark.parametrize("change", [{"ragged": False}, {"chunked": False}, {"rebuild_length": 100}])
@pytest.mark.parametrize("budgets", [{}, GPU])
def test_nothing_is_shared_where_a_prompt_cannot_begin_in_the_middle(
    budgets: dict[str, Any], change: dict[str, Any]
) -> None:
    manifest, facts = ONE
    changed = replace(facts, **change)
    assert limits_of(plan((manifest, changed), **budgets), changed, prefix_cache=True).sharing == "none"
