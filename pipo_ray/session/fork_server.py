"""The process that a lean node's workers are forked from, so that Ray is imported once and not by each of them.

Importing Ray, numpy and what all actors share takes a second of a core and 60 MiB; a forked process finds both done.
Ray itself needs no more than that: a worker tells the raylet its id, whatever its pid. The server runs nothing of
Ray's and has no thread when it forks.

It listens at a socket in the session's folder, which all workers know from their environment. The starter of the first
worker makes it, and the next one makes another when it is gone. It ends with the raylet, and like every process of a
session it has the session's marker. Standard library only: whoever starts a worker imports nothing else.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback

SOCKET = "PIPO_FORK_SERVER"
"""Environment variable: path of the server's socket. Without it every worker starts by itself."""
PRELOAD = "PIPO_PRELOAD"
"""Environment variable: modules, separated by commas, that every worker imports, besides those of its program."""

_PATIENCE_S = 10.0
_ALIVE_S = 1.0


def obtain(arguments: list[str]) -> list[str] | None:
    """Have the server fork a worker that runs the program `arguments` (path, options) in this process's environment.

    Returns:
        None once that worker runs: this process is to end. Else what this process is to run: it is a forked worker
        itself, or no server could be reached.
    """
    path = os.environ.get(SOCKET)
    if not path:
        return arguments
    try:
        channel, listener = _connect_or_listen(path)
        if listener is not None:
            raylet = os.getppid()
            if os.fork() == 0:
                channel.close()
                return _serve_or_end(listener, raylet, arguments)
            listener.close()
        with channel:
            message = json.dumps([arguments, dict(os.environ)]).encode()
            channel.sendall(len(message).to_bytes(4, "little") + message)
            # It may still be importing. If it dies, this reads its end.
            return None if channel.recv(1) else arguments
    except OSError:
        return arguments


def run(arguments: list[str]) -> None:
    """Run a worker's program as if Python had been called with `arguments`."""
    _take_place_of(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


def _take_place_of(arguments: list[str]) -> None:
    sys.modules["pyarrow"] = None  # type: ignore[assignment]  # so that importing it fails as if it were not installed
    sys.argv[:] = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))


def _connect_or_listen(path: str) -> tuple[socket.socket, socket.socket | None]:
    """A connection to the server, and, where there was none, the socket at which a new one has to listen."""
    listener = None
    channel = socket.socket(socket.AF_UNIX)
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            channel.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen(64)
            channel.connect(path)
    return channel, listener


def _serve_or_end(listener: socket.socket, raylet: int, arguments: list[str]) -> list[str]:
    """What a forked worker has to run. The server itself does not come back, whatever happens to it."""
    try:
        return _serve(listener, raylet, arguments)
    except BaseException:
        traceback.print_exc()  # into raylet.err
        os._exit(1)


def _serve(listener: socket.socket, raylet: int, arguments: list[str]) -> list[str]:
    # A raylet that cleans up behind a worker may end the whole process group of the one that it started.
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers: the kernel buries them
    watched = _watch(raylet)
    _preload(arguments)
    while True:
        ready, _, _ = select.select([listener.fileno(), *watched], [], [], None if watched else _ALIVE_S)
        if any(descriptor in ready for descriptor in watched) or not os.path.exists(f"/proc/{raylet}"):
            os._exit(0)
        if not ready:
            continue
        channel, _ = listener.accept()
        with channel:
            request = _receive(channel)
            if request is None:
                continue
            if os.fork() == 0:
                listener.close()
                for descriptor in watched:
                    os.close(descriptor)
                return _become_worker(*request)
            with contextlib.suppress(OSError):
                channel.sendall(b"1")


def _watch(raylet: int) -> list[int]:
    """A descriptor that becomes readable when the raylet is gone; none where the kernel has no pidfd."""
    try:
        return [os.pidfd_open(raylet)]
    except OSError:
        return []


def _preload(arguments: list[str]) -> None:
    """Import what workers import."""
    _take_place_of(arguments)
    runpy.run_path(arguments[0], run_name="preload")  # all but the part under `if __name__ == "__main__"`
    for name in filter(None, os.environ.get(PRELOAD, "").split(",")):
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"every worker will have to import {name} itself: {error}", file=sys.stderr, flush=True)
    # What is there now is never garbage. Looking through it would also make a copy of its pages in each worker.
    gc.collect()
    gc.freeze()


def _receive(channel: socket.socket) -> tuple[list[str], dict[str, str]] | None:
    """Arguments and environment of a worker; None if its starter is gone."""
    channel.settimeout(_PATIENCE_S)
    try:
        with channel.makefile("rb") as stream:
            size = int.from_bytes(stream.read(4), "little")
            arguments, environment = json.loads(stream.read(size))
    except (OSError, ValueError):
        return None
    return arguments, environment


def _become_worker(arguments: list[str], environment: dict[str, str]) -> list[str]:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    return arguments
