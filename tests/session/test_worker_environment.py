"""What Ray's workers get in their environment."""

from __future__ import annotations

import pytest

from pipo_ray.session.worker_environment import LEAST_KEPT_PRODUCTS, worker_environment

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("shapes", "kept"), [(0, 32), (5, 32), (16, 32), (17, 34), (200, 400)])
def test_compiled_products_of_two_sweeps_are_kept_and_not_of_all_that_ever_were(shapes: int, kept: int) -> None:
    assert LEAST_KEPT_PRODUCTS == 32
    assert [worker_environment(shapes)[name] for name in CACHES] == [str(kept)] * 2


def test_what_the_user_has_said_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    assert [worker_environment(5)[name] for name in CACHES] == ["32", "7"]
