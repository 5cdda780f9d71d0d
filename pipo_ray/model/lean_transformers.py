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
from collections.abc import Callable, Iterator, MutableSequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed

from pipo_ray.model.model_index import kept_index

_COMPILER = "torch._dynamo"
_WRAPPED = "torch._dynamo._trace_wrapped_higher_order_op"
_SYMBOLIC = "torch.fx.experimental.symbolic_shapes"
_ALGEBRA = "sympy"


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """While it is open, `torch._dynamo` is a stand-in. Nesting is harmless."""
    if _COMPILER in sys.modules:
        yield
        return
    stand_ins = [_Compiler(_COMPILER), _Wrapped(_WRAPPED)]
    if _ALGEBRA not in sys.modules and _SYMBOLIC not in sys.modules:
        importlib.import_module("torch.fx.experimental._config")  # which it would have imported
        stand_ins += [_Symbolic(_SYMBOLIC), _Algebra(_ALGEBRA)]
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


def import_transformers(index_folder: Path | None = None) -> None:
    """Import the parts of transformers that a run needs; to be called before anything else of it is imported. In
    `index_folder` it keeps what it reads 3,000 files for (`model_index`).

    torchvision cannot be imported in this process afterwards, unless it was before.
    """
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # Python's way to say that there is none
    with without_compiler(), without_distributed(), kept_index(index_folder):
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
        _remove(self.__name__)
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


class _Symbolic(_StandIn):
    """What torch's Python kernels for meta tensors ask about sizes and conditions that may be symbols, for those that
    are plain numbers; the real module, which imports sympy, answers about others.
    """

    def __getattr__(self, name: str) -> Any:
        answer = _PLAIN_ANSWERS.get(name)
        if answer is None:
            return super().__getattr__(name)

        def ask(*arguments: Any) -> Any:
            if all(map(_is_plain, arguments)):
                return answer(*arguments)
            return super(_Symbolic, self).__getattr__(name)(*arguments)

        return ask


class _Algebra(_StandIn):
    """sympy, which torch's Python kernels import to ask whether a number is one of its expressions."""

    __path__: MutableSequence[str] = []  # noqa: RUF012  # as above
    Basic = type("Basic", (), {})


def _is_plain(value: Any) -> bool:
    return type(value) in (bool, int) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _same(value: Any) -> Any:
    return value


_PLAIN_ANSWERS: dict[str, Callable[..., Any]] = {
    "expect_true": _same,
    "guard_or_false": _same,
    "guard_or_true": _same,
    "guard_size_oblivious": _same,
    "guarding_hint_or_throw": _same,
    "has_guarding_hint": lambda value: True,
    "is_nested_int": lambda value: False,
    "statically_known_true": _same,
    "sym_and": lambda *values: all(values),
    "sym_eq": lambda left, right: tuple(left) == tuple(right) if isinstance(left, (tuple, list)) else left == right,
    "sym_or": lambda *values: any(values),
}


class _RealModules(importlib.abc.MetaPathFinder):
    """For the import of a module inside the stand-in: takes the stand-in away and finds the real one."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        package = fullname.partition(".")[0] if fullname.startswith(f"{_ALGEBRA}.") else _COMPILER
        if not fullname.startswith(f"{package}.") or not isinstance(sys.modules.get(package), _StandIn):
            return None
        _remove(package)
        return importlib.util.spec_from_loader(fullname, _Imported(importlib.import_module(fullname)))


class _Imported(importlib.abc.Loader):
    """Loads what is imported already."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put its own there


def _remove(name: str = _COMPILER) -> None:
    """Take the stand-ins away, if they are still there: those for symbols, for which another stays, or all."""
    symbols = (_SYMBOLIC, _ALGEBRA)
    for one in symbols if name in symbols else (*symbols, _COMPILER, _WRAPPED):
        if isinstance(sys.modules.get(one), _StandIn):
            del sys.modules[one]
    if name not in symbols and isinstance(torch.__dict__.get("_dynamo"), _StandIn):
        del torch.__dict__["_dynamo"]
