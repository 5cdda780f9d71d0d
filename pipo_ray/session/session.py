"""One run's hold on the machine: folder, watcher, Ray node. Whatever ends the driver, nothing of it stays."""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from pipo_ray.errors import ResourceError
from pipo_ray.session import slots
from pipo_ray.session.folder import SessionFolder, base_folder, sweep_leftovers
from pipo_ray.session.ray_node import RayNode
from pipo_ray.session.watcher import Watcher

SignalHandler = Callable[[int, FrameType | None], Any] | int | None


class Session:
    """Started by the driver; a context manager. One at a time per process, because Ray allows one connection.

    Leaving it, an exception, Ctrl-C, SIGTERM and the interpreter's end all close it; SIGKILL leaves the closing to
    the watcher.

    Attributes:
        id: 8 hex digits; every process of the session has it in its environment as PIPO_SESSION.
        path: the session's folder, gone after `close`.
        node: the Ray node.
    """

    def __init__(
        self,
        *,
        object_store_bytes: int,
        address: str | None = None,
        dashboard: bool = False,
        worker_environment: Mapping[str, str] | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        """Remove what dead sessions left, then start watcher and node.

        Args:
            object_store_bytes: size of the object store, see `slots.object_store_bytes`.
            address: None, "local", "auto" or "host:port", see `RayNode.start`.
            dashboard: start Ray's dashboard too.
            worker_environment: environment variables for every actor process.
            preload: modules that every actor imports, see `RayNode.start`.
        Raises:
            ResourceError: another Ray cluster is running, or Ray or the folder cannot be made.
            BudgetError: /dev/shm or the memory limit is too small.
        """
        self._folder: SessionFolder | None = None
        self._watcher: Watcher | None = None
        self._node: RayNode | None = None
        self._pid = os.getpid()
        self._previous_handler: SignalHandler = None
        self._lock = threading.RLock()
        sweep_leftovers()
        try:
            self._take_sigterm()
            try:
                self._folder = SessionFolder.create()
            except OSError as error:
                raise ResourceError(
                    f"no session folder can be made in {base_folder()}: {error.strerror}; free some space there"
                ) from error
            self.id = self._folder.session_id
            self.path = self._folder.path
            self._watcher = Watcher.start(self.path, self.id)
            atexit.register(self.close)
            self._node = RayNode.start(
                object_store_bytes=object_store_bytes,
                session=self._folder,
                address=address,
                dashboard=dashboard,
                worker_environment=worker_environment,
                preload=preload,
            )
            # Ray registers its own closing when imported; the last one registered runs first, and that has to be ours.
            atexit.unregister(self.close)
            atexit.register(self.close)
        except BaseException:
            self.close()
            raise

    @property
    def node(self) -> RayNode:
        """The Ray node.

        Raises:
            ResourceError: the session is closed.
        """
        if self._node is None:
            raise ResourceError("the session is closed: start a new one")
        return self._node

    def allocate(self, nbytes: int) -> slots.SharedBuffer:
        """A buffer in the object store, see `slots.allocate`. Keep it for as long as actors use it."""
        return slots.allocate(nbytes)

    def own_file(self, path: str) -> None:
        """Record a file in /dev/shm (a semaphore, for one) that has to go with the session, however it ends.

        Files that a process of the session has mapped when it ends are found without it.
        """
        if self._folder is not None:
            self._folder.add_file(path)

    def pids(self) -> list[int]:
        """Pids of everything that the session takes memory with: driver, watcher, Ray's processes, actors."""
        own = [os.getpid()]
        if self._watcher is not None:
            own.append(self._watcher.process.pid)
        return own + (self._node.pids() if self._node is not None else [])

    def close(self) -> None:
        """End and remove everything. Calling it twice, or in a forked child, is harmless."""
        if os.getpid() != self._pid:
            return
        with self._lock, _no_interrupt():
            if self._node is not None:
                self._node.stop()
                self._node = None
            if self._folder is not None:
                self._folder.remove()
                self._folder = None
            # Last: until here the watcher would finish what a SIGKILL interrupts.
            if self._watcher is not None:
                self._watcher.dismiss()
                self._watcher = None
            atexit.unregister(self.close)
        self._return_sigterm()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_sigterm(self) -> None:
        """SIGTERM unwinds the stack as Ctrl-C does, unless the program has its own idea of it."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._previous_handler = signal.signal(signal.SIGTERM, _exit_on_signal)

    def _return_sigterm(self) -> None:
        if self._previous_handler is not None and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) is _exit_on_signal:
                signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """An impatient second Ctrl-C or SIGTERM does not interrupt the cleaning up, which takes about a second."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
