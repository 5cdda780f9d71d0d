"""How many KV pages live where."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.plan.kv_pages import (
    PAGE_TOKENS,
    KVPlacement,
    fits,
    most_pages_per_layer,
    num_resident_layers,
    page_bytes,
    pages_of,
    ram_pages_for,
    resident_layers,
)

LAYERS, PAGES = st.integers(1, 80), st.integers(0, 500)


@given(LAYERS, PAGES, PAGES)
def test_whatever_is_admitted_fits_in_both_tiers(layers: int, gpu: int, ram: int) -> None:
    most = most_pages_per_layer(layers, gpu, ram)
    assert KVPlacement(layers, 1, gpu, ram).kv_tokens == most * PAGE_TOKENS
    assert not fits(layers, most + 1, gpu, ram)
    for count in range(1, most + 1):
        resident = num_resident_layers(layers, count, gpu)
        in_flight = 0 if resident == layers else 2
        assert (resident + in_flight) * count <= gpu
        assert (layers - resident) * count <= ram


@given(LAYERS, PAGES)
def test_without_ram_it_is_what_the_gpu_holds(layers: int, gpu: int) -> None:
    assert most_pages_per_layer(layers, gpu, 0) == gpu // layers


@given(LAYERS, st.integers(1, 200), PAGES)
def test_the_ram_that_is_asked_for_is_enough_and_no_less_is(layers: int, count: int, gpu: int) -> None:
    if 2 * count > gpu and count > gpu // layers:
        return  # not even two layers are on the GPU at once
    ram = ram_pages_for(layers, count, gpu)
    assert most_pages_per_layer(layers, gpu, ram) >= count
    assert ram == 0 or most_pages_per_layer(layers, gpu, ram - 1) < count


@given(LAYERS, st.integers(1, 100), PAGES)
def test_no_layer_leaves_the_gpu_for_another(layers: int, count: int, gpu: int) -> None:
    assert resident_layers(layers, count + 1, gpu) <= resident_layers(layers, count, gpu)


def test_what_stays_is_spread_over_the_sweep() -> None:
    assert sorted(resident_layers(8, 10, 59)) == [0, 2, 4]
    assert resident_layers(8, 10, 80) == frozenset(range(8))
    assert resident_layers(8, 0, 0) == frozenset(range(8))
    gaps = sorted(resident_layers(32, 10, 10 * 10))
    assert len(gaps) == 8
    assert {b - a for a, b in itertools.pairwise(gaps)} == {4}


def test_sizes() -> None:
    assert [pages_of(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert page_bytes(32 * 4096, 32) == 64 * 4096
    assert page_bytes(3 * 20, 3) == 64 * 32  # a token begins on a multiple of 16 bytes
