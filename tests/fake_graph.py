"""Graphs as a GPU has them, of operations on the CPU: noted when they are captured, done when they are replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero")


class FakeGraphs:
    """`Graphs` whose `room_bytes` are given. Counts what is captured and replayed.

    `error` is added to what replays compute; a capture fails at operations whose names are in `refused`.
    """

    def __init__(self, room_bytes: int = 1 << 40, refused: tuple[str, ...] = ()) -> None:
        self.room_bytes, self.refused = room_bytes, refused
        self.taken_bytes = 0
        self.error = 0.0
        self.captured = self.replayed = self.closed = 0
        self.open = 0

    def new(self) -> _FakeGraph:
        return _FakeGraph(self)

    @contextlib.contextmanager
    def count(self) -> Iterator[None]:
        yield
        self.room_bytes -= self.taken_bytes

    @contextlib.contextmanager
    def forbid_waiting(self) -> Iterator[None]:
        with _NoWaiting():
            yield

    @contextlib.contextmanager
    def allow_waiting(self) -> Iterator[None]:
        with torch.utils._python_dispatch._disable_current_modes():
            yield

    def wait(self) -> None:
        assert not self.open, "the device can't be waited for in a capture"

    def give_back(self) -> None:
        self.closed += 1


class _FakeGraph:
    def __init__(self, owner: FakeGraphs) -> None:
        self._owner = owner
        self._mode: _Noting | None = None
        self._noted: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def begin(self) -> None:
        self._mode = _Noting(self._noted, self._owner.refused)
        self._mode.__enter__()
        self._owner.open += 1

    def end(self) -> None:
        assert self._mode is not None
        self._mode.__exit__(None, None, None)
        self._mode = None
        self._owner.open -= 1
        self._owner.captured += 1
        self._poison()

    def abandon(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self._mode = None
            self._owner.open -= 1

    def replay(self) -> None:
        assert self._mode is None
        self._owner.replayed += 1
        self._poison()
        for function, args, kwargs, made in self._noted:
            done = tree_leaves(function(*args, **kwargs))
            for target, value in zip(made, [one for one in done if isinstance(one, torch.Tensor)], strict=False):
                target.copy_(value + self._owner.error if target.is_floating_point() else value)

    def _poison(self) -> None:
        """What is not computed anew has no meaning."""
        for _, _, _, made in self._noted:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))


class _Noting(TorchDispatchMode):
    def __init__(self, noted: list[tuple[Any, Any, Any, list[torch.Tensor]]], refused: tuple[str, ...]) -> None:
        super().__init__()
        self._noted, self._refused = noted, refused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in (*_WAITS, *self._refused):
            raise RuntimeError(f"{func._schema.name} is not permitted in a capture")
        result = func(*args, **kwargs)
        given = {
            one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        }
        tensors = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        made = [one for one in tensors if one.untyped_storage().data_ptr() not in given]
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        if made or writes:
            assert not made or len(made) == len(tensors)
            self._noted.append((func, args, kwargs, made))
        return result


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _WAITS:
            raise RuntimeError(f"{func._schema.name} waits for the device")
        return func(*args, **(kwargs or {}))
