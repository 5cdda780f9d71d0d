"""A drive that reads no faster than it is told to: the blkio controller of cgroup v1. Needs root.

`staging_modes.py`, `staging_runs.py` and `striping.py` import `throttle.py`, which does nothing by itself.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipo_ray.session.memory import parse_size

CONTROLLER = Path("/sys/fs/cgroup/blkio")


def obstacle() -> str | None:
    """Why nothing can be throttled here."""
    if os.geteuid() != 0 or not (CONTROLLER / "blkio.throttle.read_bps_device").exists():
        return f"needs root and the blkio controller of cgroup v1 in {CONTROLLER}"
    return None


def disk_of(folder: Path) -> str:
    """major:minor of the whole disk that a folder is on."""
    number = os.stat(folder).st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    return ((place.parent if (place / "partition").exists() else place) / "dev").read_text().strip()


def held_to(rate: str | None, folder: Path) -> contextlib.AbstractContextManager[None]:
    """The drive that `folder` is on held to `rate` ("1GB": a second) while it is open; None: as it is."""
    return throttled([disk_of(folder)], parse_size(rate)) if rate else contextlib.nullcontext()


@contextlib.contextmanager
def throttled(devices: list[str], bytes_per_s: int) -> Iterator[None]:
    """This process, and what it starts, reads from each of `devices` at most so fast."""
    before = next(
        CONTROLLER / line.split(":", 2)[2].lstrip("/")
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if "blkio" in line.split(":", 2)[1].split(",")
    )
    group = CONTROLLER / f"pipo-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        for device in devices:
            (group / "blkio.throttle.read_bps_device").write_text(f"{device} {bytes_per_s}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        for _ in range(100):  # until the last process is out, or gone: multiprocessing's own outlives the sessions
            for process in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    (before / "cgroup.procs").write_text(process)
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)
