"""A memory control group of cgroup v1, to imitate a machine with less memory: what runs in it is held to a limit.

The page cache of files that its processes read and what they write into /dev/shm count in it. Needs root. Benchmarks
import it; by hand it runs one command in a group and says at the end how much memory that took:

    python benchmarks/cgroup.py 4GiB pipo run MODEL --memory 4GiB -p "Once upon a time"
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipo_ray.session.memory import format_size, parse_size

CONTROLLER = Path("/sys/fs/cgroup/memory")
ENDED_S = 15.0


def require_controller() -> None:
    """End the program unless it is root's and the machine has the memory controller of cgroup v1."""
    if os.geteuid() != 0 or not os.access(CONTROLLER / "memory.limit_in_bytes", os.R_OK):
        print(f"needs root and the memory controller of cgroup v1 in {CONTROLLER}", file=sys.stderr)
        raise SystemExit(2)


class Group:
    """A memory control group with a limit. A context manager: leaving it ends what is in it, and removes it."""

    def __init__(self, limit: int) -> None:
        self.folder = CONTROLLER / f"pipo-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        (self.folder / "memory.limit_in_bytes").write_text(str(limit))

    def enter(self) -> None:
        """Move the calling process into the group: for a child, between fork and exec."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def pids(self) -> list[int]:
        """The processes in it."""
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]

    def number(self, name: str) -> int:
        """The number in the group's file `memory.NAME`."""
        return int((self.folder / f"memory.{name}").read_text())

    def table(self, name: str) -> dict[str, int]:
        """The group's file `memory.NAME` of names and numbers."""
        rows = (line.split() for line in (self.folder / f"memory.{name}").read_text().splitlines())
        return {row[0]: int(row[1]) for row in rows}

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + ENDED_S
        while time.monotonic() < deadline:
            for pid in self.pids():
                with contextlib.suppress(OSError):
                    os.kill(pid, 9)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.1)


def drop_from_page_cache(*roots: Path) -> None:
    """Write back these files, or all files in these folders, and drop them from the page cache.

    What is read afterwards comes from the disk and counts in the group of its reader. Pages that a living process has
    mapped stay.
    """
    os.sync()  # once: tens of thousands of fdatasync take a minute
    for path in _files(roots):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _files(roots: tuple[Path, ...]) -> Iterator[Path]:
    for root in roots:
        if root.is_file():
            yield root
        for folder, _, names in os.walk(root):
            yield from (path for name in names if (path := Path(folder, name)).is_file())


def main() -> int:
    """The command line."""
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    require_controller()
    with Group(parse_size(sys.argv[1], "the limit")) as group:
        status = subprocess.run(sys.argv[2:], preexec_fn=group.enter, check=False).returncode
        used, killed = group.number("max_usage_in_bytes"), group.table("oom_control")["oom_kill"]
    print(f"at most {format_size(used)} of {sys.argv[1]}; processes killed for memory: {killed}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
