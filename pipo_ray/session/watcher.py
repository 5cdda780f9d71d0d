"""Starts the watcher process and dismisses it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from pipo_ray.session import descriptors, processes

_PROGRAM = Path(__file__).with_name("watch.py")
# What an interpreter may need to start at all (conda builds and Nix find their libraries this way), and nothing else.
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "NIX_LD", "NIX_LD_LIBRARY_PATH")


class Watcher:
    """A child process that cleans up after us if we cannot. Belongs to the driver.

    Attributes:
        process: pid and start time of the watcher.
    """

    def __init__(self, child: "subprocess.Popen[bytes]", pipe: int, process: processes.ProcessId) -> None:
        self.process = process
        self._child = child
        self._pipe = pipe

    @classmethod
    def start(cls, folder: str, session_id: str) -> "Watcher":
        """Start it for the calling process as driver.

        Args:
            folder: the session's folder.
            session_id: value of the session's marker.
        Raises:
            OSError: the process cannot be started.
        """
        driver = processes.identify(os.getpid())
        assert driver is not None
        # Python's descriptors are close-on-exec: the write end stays with the driver, Ray's processes do not inherit
        # it.
        read_end, write_end = os.pipe()
        try:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-S", "-E", str(_PROGRAM)),
                    *(folder, session_id, str(driver.pid), str(driver.start_ticks), str(read_end)),
                ],
                pass_fds=(read_end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Without the session's marker, or it would find itself among the processes to end.
                env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        return cls(
            child,
            descriptors.keep_private(write_end),
            processes.identify(child.pid) or processes.ProcessId(child.pid, -1),
        )

    def dismiss(self) -> None:
        """Tell it that nothing is left to do, and wait for its end. Calling it twice is harmless."""
        if self._pipe < 0:
            return
        with contextlib.suppress(OSError):
            os.write(self._pipe, b"d")
        descriptors.close_private(self._pipe)
        self._pipe = -1
        try:
            self._child.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
