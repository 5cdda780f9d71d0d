"""The folder of a session, and the removal of folders whose driver is gone. Standard library only: the watcher runs
it too.

`/tmp/pipo-<8 hex>/` holds Ray's temporary folder, a lock file that the driver keeps locked as long as it lives, and
`session.json`, the record of what belongs to the session. A free lock therefore means: everything recorded here is
garbage.
"""

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterable
from typing import NamedTuple

# The watcher runs this file from its own folder, without the package around it.
if __package__:
    from pipo_ray.session import descriptors, processes
else:
    import descriptors  # type: ignore[import-not-found, no-redef]
    import processes  # type: ignore[import-not-found, no-redef]

_NAME = re.compile(r"pipo-([0-9a-f]{8})")
_UNFINISHED_NAME = re.compile(r"\.pipo-[0-9a-f]{8}-(\d+)-(\d+)")
_LOCK = "lock"
_RECORD = "session.json"


def base_folder() -> str:
    """Where session folders lie: /tmp whatever TMPDIR says, because a Unix socket's path is limited to 107 bytes."""
    if os.access("/tmp", os.W_OK | os.X_OK):
        return "/tmp"
    import tempfile  # 2 MB that the watcher never needs

    return tempfile.gettempdir()


class Record(NamedTuple):
    """What belongs to a session.

    Attributes:
        session_id: 8 hex digits, also the value of the environment marker.
        driver: the process that owns the session.
        processes: Ray's processes as far as they were known when it was written.
        files: absolute paths of files outside the folder (in /dev/shm) that are the session's.
    """

    session_id: str
    driver: processes.ProcessId
    processes: list[processes.ProcessId]
    files: list[str]


class SessionFolder:
    """The folder of a live session. Its driver holds the lock.

    Attributes:
        path: absolute path.
        session_id: 8 hex digits.
    """

    def __init__(self, path: str, session_id: str, lock: int, record: Record) -> None:
        self.path = path
        self.session_id = session_id
        self.record = record
        self._lock = lock

    @classmethod
    def create(cls, base: str | None = None) -> "SessionFolder":
        """Make a folder that only this user can enter, and lock it.

        Raises:
            OSError: the base folder is full or not writable.
        """
        base = base or base_folder()
        driver = processes.identify(os.getpid())
        assert driver is not None
        while True:
            session_id = os.urandom(4).hex()
            path = os.path.join(base, f"pipo-{session_id}")
            # Locked before it gets its final name: a folder that others can see is never unlocked while its driver
            # lives.
            unfinished = os.path.join(base, f".pipo-{session_id}-{driver.pid}-{driver.start_ticks}")
            os.mkdir(unfinished, 0o700)
            lock = os.open(os.path.join(unfinished, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.lexists(path):
                    raise FileExistsError(path)
                os.rename(unfinished, path)
            except FileExistsError:
                os.close(lock)
                remove_tree(unfinished)
                continue
            except BaseException:
                os.close(lock)
                remove_tree(unfinished)
                raise
            folder = cls(path, session_id, descriptors.keep_private(lock), Record(session_id, driver, [], []))
            folder.write_record()
            return folder

    def write_record(self) -> None:
        """Write the record so that it is whole whenever anybody reads it."""
        path = os.path.join(self.path, _RECORD)
        with open(path + ".new", "w") as file:
            json.dump(self.record._asdict(), file)
        os.rename(path + ".new", path)

    def add_file(self, path: str) -> None:
        """Record a file in /dev/shm that the session owns, so that it goes even if driver and watcher both die."""
        self.record.files.append(path)
        self.write_record()

    def remove(self) -> None:
        """Remove the folder with everything in it and give the lock back. Calling it twice is harmless."""
        remove_tree(self.path)
        descriptors.close_private(self._lock)


def read_record(path: str) -> Record | None:
    """The record in a session folder, or None when there is no whole one."""
    try:
        with open(os.path.join(path, _RECORD)) as file:
            data = json.load(file)
        return Record(
            session_id=str(data["session_id"]),
            driver=processes.ProcessId(*map(int, data["driver"])),
            processes=[processes.ProcessId(*map(int, entry)) for entry in data["processes"]],
            files=[str(entry) for entry in data["files"]],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def end_session(path: str, session_id: str, deadline_s: float, settle_s: float = 0.4) -> bool:
    """End everything that a dead session left: processes, files in /dev/shm, the folder itself.

    Args:
        path: the session's folder.
        session_id: value of its marker.
        deadline_s: seconds after which the folder is removed although a process still hangs in the kernel.
        settle_s: how many seconds no process may show up before the session counts as ended.
    Returns:
        Whether no process and no folder is left.
    """
    record = read_record(path)
    recorded = set(record.processes) if record else set()
    files = set(record.files) if record else set()

    def remaining() -> set[processes.ProcessId]:
        return processes.of_session(session_id, path) | {one for one in recorded if processes.is_alive(one)}

    left, mapped = processes.end_all(remaining, deadline_s, settle_s)
    for file in files | mapped:
        remove_shared_memory_file(file)
    remove_tree(path)
    return not left and not os.path.lexists(path)


def remove_shared_memory_file(path: str) -> None:
    """Remove a file in /dev/shm that a session owned, unless a live process still maps it."""
    if os.path.dirname(path) != "/dev/shm":
        return
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            return
        for pid in processes.all_pids():
            process = processes.identify(pid)
            if process is not None and path in processes.mapped_semaphores(process):
                return
        os.unlink(path)
    except OSError:
        return


def sweep_leftovers(base: str | None = None) -> list[str]:
    """Remove what dead sessions of this user left behind (power cut, driver and watcher both killed).

    A session is dead when its lock is free. Folders of other users, of live sessions, and anything that merely looks
    similar are not touched.

    Returns:
        Paths of the folders that were removed.
    """
    base = base or base_folder()
    removed = []
    try:
        names = os.listdir(base)
    except OSError:
        return []
    for name in names:
        path = os.path.join(base, name)
        match = _NAME.fullmatch(name)
        if match and _is_own_folder(path):
            lock = _take_lock(path)
            if lock is None:
                continue
            try:
                # No process of it can be between fork and exec any more: nothing to wait for.
                if end_session(path, match[1], deadline_s=5, settle_s=0):
                    removed.append(path)
            finally:
                os.close(lock)
            continue
        match = _UNFINISHED_NAME.fullmatch(name)
        if match and _is_own_folder(path):
            creator = processes.ProcessId(int(match[1]), int(match[2]))
            if not processes.is_alive(creator):
                remove_tree(path)
                removed.append(path)
    return removed


def _is_own_folder(path: str) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _take_lock(path: str) -> int | None:
    """Lock a session folder whose driver is gone; None when it lives, or when there is no lock file to judge by."""
    try:
        lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        # The lock file goes last, so a folder without one is what an interrupted removal left. Only an old one, to be
        # sure.
        return _lock_old_remains(path)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _lock_old_remains(path: str) -> int | None:
    try:
        if time.time() - os.lstat(path).st_mtime < 60:
            return None
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None


def take_over(path: str) -> int | None:
    """Lock the folder of a driver that has just died, so that no sweep works on it meanwhile. None: one does."""
    return _take_lock(path)


def remove_tree(path: str) -> None:
    """Remove a folder and everything below it, the lock file last. Links are removed, never followed. What resists
    stays.

    (shutil.rmtree would bring the compression modules into the watcher's memory.)
    """
    last = os.path.join(path, _LOCK)
    for parent, folders, files in os.walk(path, topdown=False):
        for name in files:
            entry = os.path.join(parent, name)
            if entry != last:
                _remove_entries((entry,))
        for name in folders:
            entry = os.path.join(parent, name)
            with contextlib.suppress(OSError):
                if os.path.islink(entry):
                    os.unlink(entry)
                else:
                    os.rmdir(entry)
    _remove_entries((last,))
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _remove_entries(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)
