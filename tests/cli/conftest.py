"""A stand-in for LLM, and for the child process that packs."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from cli.fake_llm import FakeLLM
from pipo_ray import auto_precision, packing, prepare
from pipo_ray.packing_process import Progress


class _Listener:
    def __init__(self, on_progress: Progress | None) -> None:
        self._on_progress = on_progress

    def progress(self, phase: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(phase, done, total)


def pack_here(patch: pytest.MonkeyPatch) -> None:
    """Jobs are done in this process as the child gets them, without the seconds in which a child imports torch."""

    def run_job(arguments: list[str], on_progress: Progress | None) -> dict[str, Any]:
        return packing._job(packing._arguments(arguments), _Listener(on_progress))  # type: ignore[arg-type]

    for module in (prepare, auto_precision):
        patch.setattr(module, "run_job", run_job)
    patch.setattr(packing, "_import_torch", lambda: None)


@pytest.fixture
def packed_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what says nothing about the child."""
    pack_here(monkeypatch)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """`pipo_ray.llm.LLM` is a FakeLLM; `made` lists those that were started."""
    module: Any = types.ModuleType("pipo_ray.llm")
    module.LLM = type("LLM", (FakeLLM,), {"made": []})
    monkeypatch.setitem(sys.modules, "pipo_ray.llm", module)
    return module.LLM
