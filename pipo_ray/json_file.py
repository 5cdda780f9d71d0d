"""Small JSON files that others may read while they are written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, whose folder is made; the file is there whole or not at all. Raises OSError."""
    os.replace(_scratch(path, value), path)


def write_json_once(path: Path, value: Any) -> bool:
    """`write_json`, unless there is a file already, which stays: of several writers at the same time one is the first.
    Whether it was this one. Where files have no second name (hard links) the last one wins. Raises OSError.
    """
    scratch = _scratch(path, value)
    try:
        os.link(scratch, path)
    except FileExistsError:
        os.unlink(scratch)
        return False
    except OSError:
        os.replace(scratch, path)
        return True
    os.unlink(scratch)
    return True


def keep_first(path: Path, value: Any, read: Callable[[], T | None]) -> T | None:
    """Write `value` to `path` for those who come later: None, or what another has written there meanwhile, as `read`
    finds it. What `read` cannot use, and then gives None for, is replaced; where nothing can be written nothing is.
    """
    with suppress(OSError):
        if not write_json_once(path, value):
            if (others := read()) is not None:
                return others
            write_json(path, value)
    return None


def key_of(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits for a file's name: the same for the same facts, in whatever order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _scratch(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(value), encoding="utf-8")
    return scratch
