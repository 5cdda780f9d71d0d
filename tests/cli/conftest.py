"""A stand-in for LLM."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from cli.fake_llm import FakeLLM


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """`pipo_ray.llm.LLM` is a FakeLLM; `made` lists those that were started."""
    module: Any = types.ModuleType("pipo_ray.llm")
    module.LLM = type("LLM", (FakeLLM,), {"made": []})
    monkeypatch.setitem(sys.modules, "pipo_ray.llm", module)
    return module.LLM
