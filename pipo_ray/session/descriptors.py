"""File descriptors whose being open means "this process lives": a forked child must not hold them too.

Python's descriptors close on exec, but a plain fork (multiprocessing, for one) copies them, and then a lock would stay
locked, a pipe unfinished, after the death of the process that they stand for. Standard library only.
"""

import contextlib
import os

_open: set[int] = set()


def keep_private(descriptor: int) -> int:
    """Close this descriptor in every child that is forked from now on, until `close_private`. Returns it."""
    _open.add(descriptor)
    return descriptor


def close_private(descriptor: int) -> None:
    """Close a descriptor that was kept private. In a forked child, where it is closed already, nothing happens."""
    if descriptor in _open:
        _open.discard(descriptor)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _close_in_child() -> None:
    for descriptor in list(_open):
        close_private(descriptor)


os.register_at_fork(after_in_child=_close_in_child)
