"""What `LLM` hands over before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e.checkpoints import packed

from pipo_ray import llm
from pipo_ray.session import worker_environment


class Asked(Exception):
    """In place of a session."""


def test_workers_keep_compiled_products_for_the_plans_shapes(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so small a model the least would be kept otherwise, whatever the plan."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(worker_environment, "LEAST_KEPT_PRODUCTS", 0)
    plans, environments = [], []

    def session(*, worker_environment: dict[str, str], **_: Any) -> None:
        environments.append(worker_environment)
        raise Asked

    monkeypatch.setattr(llm, "Session", session)
    folder = packed(tiny_checkpoint("LlamaConfig"))
    with pytest.raises(Asked):
        llm.LLM(
            folder,
            memory="3GiB",
            device="cpu",
            ray_address="local",
            before_start=lambda made: plans.append(made._plan.sweep),
        )
    (plan,), (environment,) = plans, environments
    # Queries and outputs; keys and values; gates and what goes up; what comes down; the head.
    assert plan.num_matrix_shapes == 5
    assert [environment[name] for name in names] == ["10", "10"]
