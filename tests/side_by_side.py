"""`make test` shares the tests out to several processes with pytest-xdist: by files, and who must be alone waits."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

RAY_CLUSTERS = (
    "tests/e2e/test_bad_input.py",
    "tests/e2e/test_two_nodes.py",
    "tests/session/test_ray_node.py",
)
"""They start Ray clusters of somebody else, or need that there is none: never two of them at once."""


def by_files(config: pytest.Config, log: Any) -> Any:
    """A scheduler for pytest-xdist: a process takes a whole file, whose tests share what the first of them has made.

    Files come in the order of their names, not the one with most tests first: so the runs through the real actors,
    which have few tests that take long, are not left to the end, where one process would wait for the other.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFiles(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "Ray clusters" if file in RAY_CLUSTERS else file

    config.option.loadscopereorder = False
    return ByFiles(config, log)


class Turns:
    """Lets a test that is marked `alone` wait until no other process runs one, and the others wait for it.

    Two locks on files of `folder`, which all processes of a test run share. Everybody passes the gate; who wants to be
    alone keeps it shut until nobody is behind it and the test is over.
    """

    def __init__(self, folder: Path) -> None:
        self._gate: IO[bytes] = (folder / "gate").open("wb")
        self._inside: IO[bytes] = (folder / "inside").open("wb")

    @contextlib.contextmanager
    def turn(self, alone: bool) -> Iterator[None]:
        """One test's."""
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._inside, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            if not alone:
                fcntl.flock(self._gate, fcntl.LOCK_UN)
            yield
        finally:
            fcntl.flock(self._inside, fcntl.LOCK_UN)
            fcntl.flock(self._gate, fcntl.LOCK_UN)
