"""Staging as much smaller than on a PC as the tests' models are, and the switch that has all of them in memory-saver.

With PIPO_TEST_MODE=memory-saver (`make test-memory-saver`) whoever chose no mode runs in memory-saver, in this process
and in those that it starts: the tests, which know nothing of it, are unchanged. With a PC's staging both modes would
cut a small model's weights into the same pieces, for the same slots.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipo_ray.plan.transfer import Mode, Transfer

SWITCH = "PIPO_TEST_MODE"
TIMES_SMALLER = 1024
_CHOOSES = "pipo_ray.planner"


def switched() -> bool:
    """Whether the tests run in memory-saver. Raises ValueError for what the switch cannot be."""
    mode = os.environ.get(SWITCH, "")
    if mode not in ("", "memory-saver"):
        raise ValueError(f"{SWITCH}={mode} is not known; leave it out, or give memory-saver")
    return bool(mode)


def smaller(times: int, mode: Mode | None = None) -> Callable[..., Transfer]:
    """`choose_transfer` of transfers and slots so many times smaller, always in `mode` if that is given."""
    from pipo_ray.plan.pieces import PAGE
    from pipo_ray.plan.transfer import choose_transfer

    def choose(profile: Any, asked: Mode = "performance", **sizes: Any) -> Transfer:
        found = choose_transfer(profile, mode or asked, **sizes)
        transfer_bytes = max(PAGE, found.transfer_bytes // times // PAGE * PAGE)
        return replace(found, transfer_bytes=transfer_bytes, slot_bytes=found.slot_bytes // times)

    return choose


def install() -> None:
    """Where the switch is on: for every run that this process, or one that it starts, plans."""
    if not switched():
        return
    folder = str(Path(__file__).parent)
    others = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one not in ("", folder)]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *others])
    if (planner := sys.modules.get(_CHOOSES)) is not None:
        _change(planner)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _change(planner: ModuleType) -> None:
    planner.choose_transfer = smaller(TIMES_SMALLER, "memory-saver")  # type: ignore[attr-defined]


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the planner: imported here, it would take time in processes that have no need of it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _CHOOSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _change(module)
