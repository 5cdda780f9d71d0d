"""transformers without torch's compiler and without torch.distributed, which it imports and we never use.

Importing transformers' model code and building a model imports `torch._dynamo` for the sake of three decorators, and
with it sympy, torch.fx's symbolic shapes and `torch.distributed.tensor`: 70 MiB of private memory and 2 s of a core
(torch 2.13, transformers 5.23; `benchmarks/footprint.py` shows the compute worker's share). Inside `without_compiler()`
a stand-in answers these decorators by handing the function back, which is all that they do where nothing is compiled.
Outside it `torch._dynamo` is the real one, imported when somebody asks for it. Where it was imported before, nothing is
swapped.

`torch.distributed` is reported as absent to transformers, as a torch without it would: one process computes here.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed

_COMPILER = "torch._dynamo"
_WRAPPED = "torch._dynamo._trace_wrapped_higher_order_op"


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """While it is open, `torch._dynamo` is a stand-in. Nesting is harmless."""
    if _COMPILER in sys.modules:
        yield
        return
    stand_ins = (_Compiler(_COMPILER), _Wrapped(_WRAPPED))
    sys.modules.update({one.__name__: one for one in stand_ins})
    torch.__dict__["_dynamo"] = stand_ins[0]
    try:
        yield
    finally:
        _remove()


@contextlib.contextmanager
def without_distributed() -> Iterator[None]:
    """While it is open, torch says that it was built without `torch.distributed`."""
    original = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = original


def import_transformers() -> None:
    """Import the parts of transformers that a run needs; to be called before anything else of it is imported."""
    with without_compiler(), without_distributed():
        importlib.import_module("transformers.utils").is_torch_distributed_available()  # it keeps the answer
        for name in ("masking_utils", "modeling_utils", "generation", "models.auto.modeling_auto"):
            importlib.import_module(f"transformers.{name}")
        # Found by transformers only when it is asked for, and not by two threads at the same time.
        importlib.import_module("transformers").AutoTokenizer  # noqa: B018


class _StandIn(ModuleType):
    """Of what it does not answer itself, the real module takes its place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks every module
            raise AttributeError(name)
        _remove()
        return getattr(importlib.import_module(self.__name__), name)


class _Compiler(_StandIn):
    """Marks on functions that only a compiler reads."""

    def disable(self, function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else lambda function: function

    def assume_constant_result(self, function: Any) -> Any:
        return function

    allow_in_graph = assume_constant_result


class _Wrapped(_StandIn):
    """A context manager for masks that are built under vmap."""

    def TransformGetItemToIndex(self, *arguments: Any) -> Any:
        _remove()
        return importlib.import_module(self.__name__).TransformGetItemToIndex(*arguments)


def _remove() -> None:
    """Take the stand-ins away, if they are still there."""
    for name in (_COMPILER, _WRAPPED):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
    if isinstance(torch.__dict__.get("_dynamo"), _StandIn):
        del torch.__dict__["_dynamo"]
