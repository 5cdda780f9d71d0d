"""Importing this has Triton interpret kernels on the CPU in this process, or skips the module that does.

It must come before triton is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available() or "triton" in sys.modules:
    pytest.skip("kernels are compiled in this process, so they cannot be interpreted", allow_module_level=True)

os.environ["TRITON_INTERPRET"] = "1"
_interpreter: Any = importlib.import_module("triton.runtime.interpreter")
_patch_tensor = _interpreter._patch_lang_tensor


def _patched(tensor: Any, scope: Any) -> None:
    """NumPy 2.4 makes no Python number of an array with one dimension; Triton 3.6 asks it to."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_interpreter._patch_lang_tensor = _patched

_builder: Any = _interpreter.InterpreterBuilder
_masked_load, _masked_store = _builder.create_masked_load, _builder.create_masked_store


def _loaded(builder: Any, places: Any, mask: Any, *others: Any) -> Any:
    """A condition that is the same everywhere is int8 in Triton 3.9, which takes none but bool as a mask."""
    return _masked_load(builder, places, _boolean(mask), *others)


def _stored(builder: Any, places: Any, values: Any, mask: Any, *others: Any) -> Any:
    return _masked_store(builder, places, values, _boolean(mask), *others)


def _boolean(mask: Any) -> Any:
    return _interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)


_builder.create_masked_load, _builder.create_masked_store = _loaded, _stored

STEP = 2.0**-7
"""What a bf16 number is off by at most: the interpreter cuts off where a GPU rounds."""
