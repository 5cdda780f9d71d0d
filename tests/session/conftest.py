"""What several tests of this folder look at: waiting, and who holds the object store's memory."""

import os
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> float:
    """Seconds until the condition held; fails the test when it does not within the time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - start


def mapped_inodes(pid: int) -> set[str]:
    """device:inode of the object store's file as a Ray process maps it (the file itself is unlinked)."""
    with open(f"/proc/{pid}/maps") as file:
        return {" ".join(line.split()[3:5]) for line in file if "/dev/shm/" in line}


def someone_maps(inodes: set[str]) -> bool:
    """Whether any process of the machine still maps one of these: then its memory is not free."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if mapped_inodes(int(name)) & inodes:
                    return True
            except OSError:
                continue
    return False
