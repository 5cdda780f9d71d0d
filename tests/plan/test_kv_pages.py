"""How many KV pages live where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.plan.kv_pages import (
    PAGE_TOKENS,
    KVPlacement,
    fits,
    most_pages_per_layer,
    page_bytes,
    pages_of,
    ram_units_for,
    resident_layers,
)

UNITS = st.one_of(
    st.integers(1, 80).map(lambda layers: (1,) * layers), st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=40)
)
PAGES = st.integers(0, 500)


@given(UNITS, PAGES, PAGES)
def test_whatever_is_admitted_fits_in_both_tiers(units: Sequence[int], gpu: int, ram: int) -> None:
    most = most_pages_per_layer(units, gpu, ram)
    assert KVPlacement(tuple(units), 1, gpu, ram).kv_tokens == most * PAGE_TOKENS
    assert not fits(units, most + 1, gpu, ram)
    for count in range(1, most + 1):
        resident = resident_layers(units, count, gpu)
        stay = sum(units[layer] for layer in resident)
        in_flight = 0 if len(resident) == len(units) else 2 * max(units)
        assert (stay + in_flight) * count <= gpu
        assert (sum(units) - stay) * count <= ram


@given(UNITS, PAGES)
def test_without_ram_it_is_what_the_gpu_holds(units: Sequence[int], gpu: int) -> None:
    assert most_pages_per_layer(units, gpu, 0) == gpu // sum(units)


@given(UNITS, st.integers(1, 200), PAGES)
def test_the_ram_that_is_asked_for_is_enough_and_no_less_is(units: Sequence[int], count: int, gpu: int) -> None:
    if 2 * max(units) * count > gpu and count > gpu // sum(units):
        return  # not even two layers are on the GPU at once
    ram = ram_units_for(units, count, gpu)
    assert most_pages_per_layer(units, gpu, ram) >= count
    assert ram == 0 or most_pages_per_layer(units, gpu, ram - 1) < count


@given(UNITS, st.integers(1, 100), PAGES)
def test_no_layer_leaves_the_gpu_for_another(units: Sequence[int], count: int, gpu: int) -> None:
    assert resident_layers(units, count + 1, gpu) <= resident_layers(units, count, gpu)


def test_what_stays_is_spread_over_the_sweep() -> None:
    assert sorted(resident_layers((1,) * 8, 10, 59)) == [0, 2, 4]
    assert resident_layers((1,) * 8, 10, 80) == frozenset(range(8))
    assert resident_layers((1,) * 8, 0, 0) == frozenset(range(8))
    gaps = sorted(resident_layers((1,) * 32, 10, 10 * 10))
    assert len(gaps) == 8
    assert {b - a for a, b in itertools.pairwise(gaps)} == {4}


def test_sizes() -> None:
    assert [pages_of(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert page_bytes(32 * 4096, 32) == 64 * 4096
    assert page_bytes(3 * 20, 3) == 64 * 32  # a token begins on a multiple of 16 bytes
