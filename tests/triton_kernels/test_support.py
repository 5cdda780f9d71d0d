from __future__ import annotations

import importlib.util
import os
import stat
from pathlib import Path

import pytest

from pipo_ray.triton_kernels.support import keep_compiled_in, obstacle


def test_an_obstacle_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle((7, 5)) == "the GPU has compute capability 7.5, and Triton's bf16 needs 8.0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert obstacle((9, 0)) == "triton is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert obstacle((8, 0)) is None


def test_compiled_kernels_are_kept_for_their_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    keep_compiled_in(tmp_path / "code" / "triton")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    keep_compiled_in(None)
    assert "TRITON_CACHE_DIR" not in os.environ
    keep_compiled_in(tmp_path / "code" / "triton")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "code" / "triton")
    assert stat.S_IMODE((tmp_path / "code" / "triton").stat().st_mode) == 0o700
