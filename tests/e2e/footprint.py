"""What a session takes on the machine, seen from outside: processes, memory of the object store, files."""

from __future__ import annotations

import glob
import os
import time
from pathlib import Path

from pipo_ray.session import folder, processes


def wait_until_gone(footprint: Footprint, timeout_s: float = 10.0) -> float:
    """Seconds until nothing of a session was left; fails with what is left."""
    begin = time.monotonic()
    while left := footprint.remains():
        assert time.monotonic() - begin < timeout_s, f"left after {timeout_s:.0f} s: " + "; ".join(left)
        time.sleep(0.05)
    return time.monotonic() - begin


def find_session(driver: int, timeout_s: float = 60.0) -> str:
    """The folder of the session whose driver has this pid; waits for it."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for path in glob.glob(os.path.join(folder.base_folder(), "pipo-*")):
            record = folder.read_record(path)
            if record is not None and record.driver.pid == driver:
                return path
        assert processes.identify(driver) is not None, "the driver ended before it had a session"
        time.sleep(0.01)
    raise AssertionError(f"no session of process {driver} within {timeout_s:.0f} s")


def store_mappings(pid: int) -> set[str]:
    """device:inode of every file in /dev/shm that a process maps; the object store's own is unlinked, not unused."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {" ".join(line.split()[3:5]) for line in lines if "/dev/shm/" in line}


class Footprint:
    """What the live session in `path` takes, noted when it is made and whenever `note` is called."""

    def __init__(self, path: str, driver: int) -> None:
        self.path, self.session_id, self.driver = path, path[-8:], driver
        self.processes: set[processes.ProcessId] = set()
        self.mappings: set[str] = set()
        self.semaphores: set[str] = set()
        self.note()

    def note(self) -> None:
        """Remember what is there now."""
        own = {one for one in (processes.identify(pid) for pid in self._watchers()) if one is not None}
        now = processes.of_session(self.session_id, self.path) | own
        self.processes |= now
        for process in now:
            self.mappings |= store_mappings(process.pid)
            self.semaphores |= processes.mapped_semaphores(process)

    def remains(self) -> list[str]:
        """Everything of it that is still there. A driver that lives on counts only with the memory that it holds."""
        self.note()
        left = [f"process {one}" for one in self.processes if processes.is_alive(one) and one.pid != self.driver]
        left += [path for path in (self.path, *self.semaphores) if os.path.lexists(path)]
        if self.mappings:
            pids = processes.all_pids()
            left += [f"memory, mapped by process {pid}" for pid in pids if store_mappings(pid) & self.mappings]
        return left

    def _watchers(self) -> list[int]:
        found = []
        for pid in processes.all_pids():
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if self.path.encode() in arguments and any(argument.endswith(b"watch.py") for argument in arguments):
                found.append(pid)
        return found
