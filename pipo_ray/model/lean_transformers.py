"""transformers without torch's compiler and without torch.distributed, which it imports and we never use.

Importing transformers' model code and building a model imports `torch._dynamo` for the sake of three decorators, and
with it sympy, torch.fx's symbolic shapes and `torch.distributed.tensor`: 70 MiB of private memory and 2 s of a core
(torch 2.13, transformers 5.23; `benchmarks/footprint.py` shows the compute worker's share). Inside `without_compiler()`
a stand-in answers these decorators by handing the function back, which is all that they do where nothing is compiled.
Outside it `torch._dynamo` is the real one, imported when somebody asks for it. Where it was imported before, nothing is
swapped. A package that asks for a module inside it (torchvision does, and transformers imports torchvision where it is
installed) gets the real one, too.

`torch.distributed` and torchvision are reported as absent to transformers in the compute worker: one process computes,
and no images.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator, MutableSequence
from importlib.machinery import ModuleSpec
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
    finder = _RealModules()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
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
    """Import the parts of transformers that a run needs; to be called before anything else of it is imported.

    torchvision cannot be imported in this process afterwards, unless it was before.
    """
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # Python's way to say that there is none
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

    __path__: MutableSequence[str] = []  # noqa: RUF012  # a package: `_RealModules` finds what is in it

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


class _RealModules(importlib.abc.MetaPathFinder):
    """For the import of a module inside the stand-in: takes the stand-in away and finds the real one."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{_COMPILER}.") or not isinstance(sys.modules.get(_COMPILER), _StandIn):
            return None
        _remove()
        return importlib.util.spec_from_loader(fullname, _Imported(importlib.import_module(fullname)))


class _Imported(importlib.abc.Loader):
    """Loads what is imported already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put its own there


def _remove() -> None:
    """Take the stand-ins away, if they are still there."""
    for name in (_COMPILER, _WRAPPED):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
    if isinstance(torch.__dict__.get("_dynamo"), _StandIn):
        del torch.__dict__["_dynamo"]
