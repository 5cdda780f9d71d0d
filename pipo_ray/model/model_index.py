"""The index of its models that transformers makes when it is imported, kept for the processes that come later.

To know which file has which class, transformers reads all of its models' source, 3,000 files, and does so twice in a
process: for `transformers` and for `transformers.models` (5.23, `define_import_structure`). The answer is the same as
long as no file changes, so it is kept as JSON, under a key made of every file's name, size and time of change. A
version of transformers without that function is imported as it is.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from pipo_ray.json_file import key_of, write_json

Structure = dict[frozenset[str], dict[str, set[str]]]
"""What is exported: by the packages that it needs, and by module, dotted, below the folder of all models."""
Define = Callable[..., Structure]

_MODULE = "transformers.utils.import_utils"
_FUNCTION = "define_import_structure"
_FORMAT = 1


@contextlib.contextmanager
def kept_index(folder: Path | None) -> Iterator[None]:
    """While it is open, an import of transformers finds the index in `folder`, or leaves it there. None: it is made."""
    if folder is None or _MODULE in sys.modules:
        yield
        return
    finder = _Finder(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class ModelIndex:
    """Stands for `define`, transformers' own function, where it is asked about the folder `models`."""

    def __init__(self, define: Define, models: Path, folder: Path) -> None:
        self._define, self._models, self._folder = define, models, folder

    def __call__(self, module_path: str | os.PathLike[str], prefix: str | None = None) -> Structure:
        """The structure of a folder, or of the folder of a file; modules' names behind `prefix`."""
        path = Path(module_path)
        if (path.parent if path.name == "__init__.py" else path) != self._models:
            return self._define(module_path, prefix)
        before = "" if prefix is None else f"{prefix}."
        structure: Structure = {}
        for packages, module, names in self._rows:
            structure.setdefault(frozenset(packages), {})[before + module] = set(names)
        return structure

    @cached_property
    def _rows(self) -> list[tuple[list[str], str, list[str]]]:
        file = self._folder / f"transformers-{files_key(self._models)}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [
                (list(packages), str(module), list(names)) for packages, module, names in json.loads(file.read_text())
            ]
        rows = _rows_of(self._define(self._models))
        with contextlib.suppress(OSError):  # without a cache it is made every time
            write_json(file, rows)
        return rows


def files_key(folder: Path) -> str:
    """16 hexadecimal digits that change with any file's name, size or time of change below `folder`."""
    return key_of({"format": _FORMAT, "folder": str(folder), "files": sorted(_describe(folder))})


def _describe(folder: Path | str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _describe(entry.path)
            else:
                status = entry.stat()
                yield f"{entry.path} {status.st_size} {status.st_mtime_ns}"


def _rows_of(structure: Mapping[frozenset[str], Mapping[str, Sequence[str] | set[str]]]) -> list[Any]:
    """In the structure's order: of two modules that export one name transformers takes the later."""
    return [
        (sorted(packages), module, sorted(names))
        for packages, modules in structure.items()
        for module, names in modules.items()
    ]


class _Finder(importlib.abc.MetaPathFinder):
    """For one module: what Python finds, with a loader that puts the index in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._folder)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, folder: Path) -> None:
        self._loader, self._folder = loader, folder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        define = getattr(module, _FUNCTION, None)
        if callable(define) and module.__file__:
            models = Path(module.__file__).parents[1] / "models"
            setattr(module, _FUNCTION, ModelIndex(define, models, self._folder))
