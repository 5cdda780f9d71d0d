"""Processes of a session: who they are, how they are found, how they are ended. Standard library only.

The watcher runs this module in an interpreter without site-packages, so nothing here may import the rest of pipo_ray.

A pid alone proves nothing, because the kernel hands it out again. A process is therefore its pid together with its
start time, and it belongs to a session when its environment carries the session's marker, which only processes that
we started (and what they start) inherit.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

MARKER = "PIPO_SESSION"
"""Name of the environment variable that marks what a session started; its value is the session's id."""

_SETTLE_S = 0.4
_SCAN_INTERVAL_S = 0.05


class ProcessId(NamedTuple):
    """One process, proof against the reuse of its pid.

    `start_ticks` is field 22 of /proc/PID/stat: clock ticks from boot to the start of the process.
    """

    pid: int
    start_ticks: int


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on, or None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read().decode("latin-1")
    except OSError:
        return None
    # The second field, the name in parentheses, may itself hold spaces and parentheses.
    return text[text.rfind(")") + 2 :].split()


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now; None when there is none, or only an unreaped zombie."""
    fields = _stat_fields(pid)
    if not fields or fields[0] in "ZX":
        return None
    return ProcessId(pid, int(fields[19]))


def is_alive(process: ProcessId) -> bool:
    """Whether exactly this process still runs."""
    return identify(process.pid) == process


def all_pids() -> list[int]:
    """Every pid of the machine that /proc shows us."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(pids: Iterable[int]) -> set[int]:
    """Pids of all children, their children and so on of `pids`, without `pids` themselves."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        fields = _stat_fields(pid)
        if fields:
            children.setdefault(int(fields[1]), []).append(pid)
    found: set[int] = set()
    queue = list(pids)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    return found


def marker_of(pid: int) -> str | None:
    """The session id in the environment of a process; None without one, or when we may not read its environment."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
    except OSError:
        return None
    prefix = MARKER.encode() + b"="
    for entry in environment.split(b"\0"):
        if entry.startswith(prefix):
            return entry[len(prefix) :].decode("latin-1")
    return None


def _is_ray_process_in(pid: int, folder: str) -> bool:
    """Whether `pid` is a Ray process that renamed itself ("ray::...") and keeps a file under `folder` open.

    Renaming can overwrite the environment that /proc shows, marker included (Ray's agents do this). The open log file
    proves the same; the name keeps out whoever merely looks at our logs.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if file.read(5) != b"ray::":
                return False
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{descriptor}").startswith(folder + "/"):
                return True
    except OSError:
        return False
    return False


def of_session(session_id: str, folder: str) -> set[ProcessId]:
    """Every live process, except the caller, that provably belongs to a session of this user, and its descendants.

    Args:
        session_id: value of the marker.
        folder: the session's folder, absolute.
    """
    found = set()
    for pid in all_pids():
        try:
            if os.stat(f"/proc/{pid}").st_uid != os.getuid():
                continue
        except OSError:
            continue
        if marker_of(pid) == session_id or _is_ray_process_in(pid, folder):
            found.add(pid)
    found |= descendants(found)
    found.discard(os.getpid())
    identified = (identify(pid) for pid in found)
    return {process for process in identified if process is not None}


def mapped_semaphores(process: ProcessId) -> set[str]:
    """Named semaphores (/dev/shm/sem.*) that a process maps. Empty when its map is not ours to read.

    Only semaphores: any other file in /dev/shm that a process has mapped may be the user's, a checkpoint even.
    """
    found = set()
    try:
        with open(f"/proc/{process.pid}/maps", "rb") as file:
            for line in file:
                position = line.find(b" /dev/shm/sem.")
                if position >= 0 and not line.endswith(b"(deleted)\n"):
                    found.add(os.fsdecode(line[position + 1 : -1]))
    except OSError:
        return set()
    return found


def send_signal(process: ProcessId, number: int) -> None:
    """Send a signal to exactly this process; nothing happens when it is gone, even when its pid lives on.

    A pidfd closes the gap between looking and signalling; kernels before 5.3 have none and keep the gap.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except OSError:
        if is_alive(process):
            try:
                os.kill(process.pid, number)
            except OSError:
                return
        return
    try:
        if is_alive(process):
            signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return
    finally:
        os.close(descriptor)


def end_all(
    find: Callable[[], set[ProcessId]], deadline_s: float, settle_s: float = _SETTLE_S
) -> tuple[set[ProcessId], set[str]]:
    """SIGKILL whatever `find` returns, again and again, until it returned nothing for `settle_s` seconds.

    A process that was between fork and exec when the driver died shows its marker only a moment later: one empty answer
    is not the end.

    Args:
        find: the processes that are left; called about 20 times per second.
        deadline_s: give up after so many seconds.
        settle_s: seconds of empty answers that count as the end.
    Returns:
        Processes that are still there at the deadline, and the named semaphores that the ended ones had mapped.
    """
    deadline = time.monotonic() + deadline_s
    quiet_since: float | None = None
    files: set[str] = set()
    while True:
        remaining = find()
        now = time.monotonic()
        if remaining:
            quiet_since = None
        elif quiet_since is None:
            quiet_since = now
        if now >= deadline or (quiet_since is not None and now - quiet_since >= settle_s):
            return remaining, files
        for process in remaining:
            files |= mapped_semaphores(process)
        for process in remaining:
            send_signal(process, signal.SIGKILL)
        time.sleep(_SCAN_INTERVAL_S)
