"""A loader with a limit uses as many slots as a session with so many: what `benchmarks/staging_modes.py` relies on."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest
from pipeline import test_loader
from pipeline.fake_store import FakeStore, make_store
from pipeline.test_loader import SIZES, Pipeline, check_sweep
from scripts import load_script

from pipo_ray.pipeline.slots import SlotState

NUM_SLOTS = 5


@pytest.fixture(scope="module")
def limited_loader() -> ModuleType:
    return load_script("limited_loader.py")


def used(pipeline: Pipeline) -> set[int]:
    """The slots that are not free, once the loader has done what it may do."""
    before: set[int] = set()
    while True:
        time.sleep(0.02)
        now = {n for n in range(NUM_SLOTS) if pipeline.table.view(n).state != SlotState.FREE}
        if now == before:
            return now
        before = now


@pytest.mark.parametrize("limit", [1, 2, 4, 5])
def test_no_more_slots_than_the_limit_and_all_in_turn(
    limit: int, limited_loader: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: FakeStore = make_store(tmp_path / "store", SIZES)
    monkeypatch.setattr(test_loader, "kind_of_loader", lambda: limited_loader.limited)
    pipeline = Pipeline(store, NUM_SLOTS, resident=(1,))
    try:
        check_sweep(pipeline.stream, store)
        pipeline.loader.limit(store.loads(limit, {1: 0}), 8192, 1)  # type: ignore[attr-defined]
        check_sweep(pipeline.stream, store)  # what was read ahead is used up
        seen: set[int] = set()
        for _ in range(NUM_SLOTS):
            now = used(pipeline)
            assert len(now) == limit
            seen |= now
            check_sweep(pipeline.stream, store)
        assert seen == set(range(NUM_SLOTS))
    finally:
        pipeline.close()
