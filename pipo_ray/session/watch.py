"""The watcher's program: waits until the driver is gone, then ends everything that belongs to its session.

    python -S -E watch.py FOLDER SESSION_ID DRIVER_PID DRIVER_START_TICKS PIPE

It runs in a process session of its own (Ctrl-C in the terminal does not reach it) and without site-packages, which
keeps it at a few MB. The driver's end is noticed twice: its pidfd becomes readable, and the pipe whose write end only
the driver has reports its end. One byte in the pipe means that the driver cleaned up itself.
"""

import contextlib
import os
import select
import signal
import sys

# Run as a script, the folder of this file is what Python imports from.
if __package__:
    from pipo_ray.session import folder, processes
else:
    import folder  # type: ignore[import-not-found, no-redef]
    import processes  # type: ignore[import-not-found, no-redef]

_DEADLINE_S = 8.0


def wait_for_driver(driver: processes.ProcessId, pipe: int) -> bool:
    """Block until the driver is gone or dismisses us.

    Args:
        driver: the process to wait for.
        pipe: read end of a pipe whose write end the driver holds.
    Returns:
        True when the driver is gone, False when it sent the byte that says that nothing is left to do.
    """
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    # No pidfd in this kernel, or the driver is gone already: the pipe tells us either way.
    with contextlib.suppress(OSError):
        waiting.register(os.pidfd_open(driver.pid), select.POLLIN)
    while True:
        ready = waiting.poll(5000)
        if any(descriptor == pipe for descriptor, _ in ready):
            return os.read(pipe, 1) == b""
        # The timeout serves kernels without pidfd when a forked child holds the pipe open.
        if ready or not processes.is_alive(driver):
            return True


def main() -> None:
    """Read the arguments, wait, clean up. See the module's text for the arguments."""
    path, session_id, pid, ticks, pipe = sys.argv[1:6]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT):
        # A shutdown of the desktop sends SIGTERM to everyone at once; we go when the driver is gone.
        signal.signal(number, signal.SIG_IGN)
    if not wait_for_driver(processes.ProcessId(int(pid), int(ticks)), int(pipe)):
        return
    lock = folder.take_over(path)
    folder.end_session(path, session_id, _DEADLINE_S)
    if lock is not None:
        os.close(lock)


if __name__ == "__main__":
    main()
