"""The Ray node that a session runs on: a private one of our own, or, when asked to, a cluster that exists already."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from pipo_ray.errors import BudgetError, ResourceError
from pipo_ray.session import fork_server, lean_ray, processes
from pipo_ray.session.folder import SessionFolder, remove_shared_memory_file
from pipo_ray.session.memory import available_memory, format_size, machine_total, memory_limit, shm_free
from pipo_ray.session.ray_clusters import access_environment, address_to_join, find_cluster

NAMESPACE = "pipo"
"""Ray namespace of the actors' names."""

MINIMUM_OBJECT_STORE_BYTES = 75 << 20
"""Ray refuses a smaller object store."""

_FOLDER_BYTES = 32 << 20  # logs and sockets; without room for them Ray hangs for half a minute and names nothing

# Variables of the user's environment that would make `ray.init` start something else than the private node we ask for.
_FOREIGN_ENVIRONMENT = (
    *("RAY_ADDRESS", "RAY_TMPDIR", "RAY_REDIS_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
    *("RAY_RUNTIME_ENV_HOOK", "RAY_START_HOOK", "RAY_object_spilling_config", "RAY_object_spilling_directory"),
    *(
        "RAY_gcs_storage",
        "RAY_gcs_storage_path",
        "RAY_GCS_SERVER_PORT",
        "RAY_AUTH_TOKEN",
        "RAY_OVERRIDE_JOB_RUNTIME_ENV",
    ),
    *("RAY_OVERRIDE_RESOURCES", "RAY_OVERRIDE_NODE_ID_FOR_TESTING", "RAY_ENABLE_AUTO_CONNECT"),
)

_STOP_DEADLINE_S = 8.0


class RayNode:
    """A started or joined Ray node. One per process, because Ray allows a process one connection.

    Attributes:
        address: `ip:port` of the cluster's control service.
        is_private: whether we started it (and `stop` ends it) or joined it (and `stop` only leaves it).
        logs: folder with the logs of every Ray process and actor, or None on a cluster that we joined.
    """

    def __init__(self, folder: SessionFolder, is_private: bool) -> None:
        self.address = ""
        self.is_private = is_private
        self.logs: str | None = None
        self._folder = folder
        self._connected = False
        self._owns_connection = True
        self._keeper: _Keeper | None = None
        self._quiet = contextlib.ExitStack()

    @classmethod
    def start(
        cls,
        *,
        object_store_bytes: int,
        session: SessionFolder,
        address: str | None = None,
        dashboard: bool = False,
        worker_environment: Mapping[str, str] | None = None,
        preload: Sequence[str] = (),
    ) -> "RayNode":
        """Start a private node, or join a cluster.

        Args:
            object_store_bytes: size of the object store; at least Ray's minimum of 75 MiB is taken. See
                `slots.object_store_bytes`.
            session: the folder that takes Ray's files and the record of its processes.
            address: None starts a private node unless another Ray cluster runs on this machine; "local" starts one in
                any case; "auto" or "host:port" joins a running cluster.
            dashboard: start Ray's dashboard and agents too (about 400 MiB more; needs `ray[default]`).
            worker_environment: environment variables for every actor process, on top of ours. (`runtime_env` of an
                actor does not work on a private node, see `lean_ray`.)
            preload: modules that every actor imports: on a private node once for all, see `fork_server`.
        Raises:
            ResourceError: another Ray cluster is running, none is there to join, or Ray does not start.
            BudgetError: /dev/shm, or the memory limit that we run under, is too small for the object store.
        """
        _refuse_second_connection(address)
        node = cls(session, is_private=address in (None, "local"))
        try:
            with signals_later():
                if node.is_private:
                    if address is None:
                        _refuse_other_cluster()
                    node._start_private(
                        max(object_store_bytes, MINIMUM_OBJECT_STORE_BYTES),
                        dashboard,
                        worker_environment or {},
                        preload,
                    )
                else:
                    assert address is not None
                    node._join(address, object_store_bytes, worker_environment or {})
        except BaseException:
            node.stop()
            raise
        return node

    def pids(self) -> list[int]:
        """Pids of all processes of this node now, actors included; on a joined cluster only our session's actors."""
        return sorted(process.pid for process in self._processes())

    def stop(self) -> None:
        """End every process of the node and remove what it left (joined: leave the cluster). Twice is harmless."""
        files = set(self._folder.record.files)
        known = self._processes()
        for process in known:
            files |= processes.mapped_semaphores(process)
        if self._connected and self._owns_connection:
            import ray

            with contextlib.suppress(Exception):
                ray.shutdown()
        self._connected = False
        self._quiet.close()
        recorded = known | set(self._folder.record.processes)

        def remaining() -> set[processes.ProcessId]:
            return self._processes() | {process for process in recorded if processes.is_alive(process)}

        # What Ray was asked to end gets a moment to go by itself; on a cluster that we joined, Ray ends the actors of
        # our job.
        _wait_until(lambda: not remaining(), timeout_s=0.5 if self.is_private else 5)
        _, mapped = processes.end_all(remaining, _STOP_DEADLINE_S, settle_s=0)
        _reap(process.pid for process in recorded)
        for path in files | mapped:
            remove_shared_memory_file(path)
        if self._keeper is not None:
            self._keeper.release()
            self._keeper = None
        if self._owns_connection:
            _forget_access()

    def _processes(self) -> set[processes.ProcessId]:
        return processes.of_session(self._folder.session_id, self._folder.path)

    def _start_private(
        self, object_store: int, dashboard: bool, worker_environment: Mapping[str, str], preload: Sequence[str]
    ) -> None:
        _require_room(object_store)
        _require_disk(os.path.dirname(self._folder.path))
        token = os.path.join(self._folder.path, "token")
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            # Ray would otherwise write one into ~/.ray and leave it there.
            file.write(os.urandom(16).hex())
        environment = {
            **lean_ray.ENVIRONMENT,
            **({} if dashboard else lean_ray.LEAN_ENVIRONMENT),
            "RAY_AUTH_TOKEN_PATH": token,
            fork_server.SOCKET: os.path.join(self._folder.path, "fork_server"),
            fork_server.PRELOAD: ",".join((*lean_ray.PRELOAD, *preload)),
            **worker_environment,
            processes.MARKER: self._folder.session_id,
        }
        options: dict[str, Any] = {
            "address": "local",
            "_temp_dir": os.path.join(self._folder.path, "ray"),
            # Named, so that Ray neither falls back to a disk nor judges /dev/shm by its own rules; we have checked it.
            "_plasma_directory": "/dev/shm",
            "object_store_memory": object_store,
            # Only a number in Ray's books; named, because Ray would derive it from a RAM that a cgroup does not give
            # us.
            "_memory": min(machine_total(), memory_limit() or machine_total()),
            "num_cpus": len(os.sched_getaffinity(0)),
            "include_dashboard": dashboard,
            "_node_ip_address": "127.0.0.1",
            "_system_config": {"automatic_object_spilling_enabled": False},
            "_skip_env_hook": True,
        }
        # Nothing of Ray is imported before the environment is set: Ray reads some of it only then.
        with (
            _environment(environment, without=_FOREIGN_ENVIRONMENT),
            lean_ray.loopback(),
            contextlib.nullcontext() if dashboard else lean_ray.lean(),
        ):
            _forget_access()
            self._initialize(options)
        self._folder.record.processes[:] = sorted(self._processes())
        self._folder.write_record()

    def _join(self, address: str, object_store: int, worker_environment: Mapping[str, str]) -> None:
        import ray

        if ray.is_initialized():  # only with address "auto": the user's own connection, which stays theirs
            self._connected, self._owns_connection = True, False
            self.address = ray.get_runtime_context().gcs_address
        else:
            marked = {**worker_environment, processes.MARKER: self._folder.session_id}
            address = address_to_join(address)
            options = {"address": address, "runtime_env": {"env_vars": marked}, "_skip_env_hook": True}
            with _environment(access_environment(address)):
                _forget_access()
                self._initialize(options)
        _require_local_store(self.address, object_store)

    def _initialize(self, options: dict[str, Any]) -> None:
        import ray

        options = {**options, "namespace": NAMESPACE, "logging_level": logging.ERROR, "log_to_driver": False}

        # Before, not after: Ctrl-C may come when it is half connected.
        self._connected = True
        self._quiet.enter_context(lean_ray.quiet())

        def initialize() -> None:
            with _ray_failures(options["address"], self._folder.path), lean_ray.without_pyarrow():
                ray.init(**options)
                # It would import pyarrow with the first object; not every version of Ray has this name.
                with contextlib.suppress(AttributeError):
                    ray._private.worker.global_worker.get_serialization_context()

        if threading.current_thread() is threading.main_thread():
            initialize()
        else:
            # Ray's processes die with the thread that started them (PR_SET_PDEATHSIG), so it has to outlast this one.
            self._keeper = _Keeper()
            self._keeper.run(initialize)
        self.address = ray.get_runtime_context().gcs_address
        if self.is_private:
            self.logs = os.path.join(options["_temp_dir"], "session_latest", "logs")


class _Keeper:
    """A thread that runs one function and then stays until it is released."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._released = threading.Event()
        self._error: BaseException | None = None

    def run(self, function: Callable[[], None]) -> None:
        def body() -> None:
            try:
                function()
            except BaseException as error:
                self._error = error
            self._done.set()
            self._released.wait()

        threading.Thread(target=body, name="pipo-ray-keeper", daemon=True).start()
        self._done.wait()
        if self._error is not None:
            raise self._error

    def release(self) -> None:
        self._released.set()


def check_address(address: str | None) -> None:
    """Raise what `RayNode.start` will raise for this address anyway; cheap, for before the packing of a model."""
    _refuse_second_connection(address)
    if address is None:
        _refuse_other_cluster()
    elif address != "local" and not _is_connected():
        address_to_join(address)


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(getattr(ray, "is_initialized", bool)())


def _refuse_second_connection(address: str | None) -> None:
    if _is_connected() and address != "auto":
        import ray

        raise ResourceError(
            f"this process is already connected to the Ray cluster at {ray.get_runtime_context().gcs_address}: "
            'call ray.shutdown() or close the other LLM first, or use that cluster with address="auto"'
        )


def _refuse_other_cluster() -> None:
    cluster = find_cluster()
    if cluster is not None:
        raise ResourceError(
            f"another Ray cluster is running on this machine ({cluster}): join it with --ray-address auto, "
            "or start a separate private one with --ray-address local"
        )


def _require_room(object_store: int) -> None:
    """Raise BudgetError where an object store of this size would not be backed by memory."""
    free = shm_free()
    if object_store > free:
        raise BudgetError(
            f"the object store needs {format_size(object_store)} of /dev/shm, {format_size(free)} are free: "
            "lower --weight-memory, or enlarge it (mount -o remount,size=... /dev/shm; docker run --shm-size=...)"
        )
    available = available_memory()
    if object_store > available:
        raise BudgetError(
            f"the object store needs {format_size(object_store)} of memory, {format_size(available)} are available: "
            "lower --weight-memory, close other programs, or raise the limit of the control group"
        )


def _require_disk(folder: str) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < _FOLDER_BYTES:
        raise ResourceError(
            f"Ray's logs and sockets need {format_size(_FOLDER_BYTES)} in {folder}, {format_size(free)} are free: free "
            "some space there"
        )


def _require_local_store(address: str, object_store: int) -> None:
    """Raise where a joined cluster has no node on this machine whose object store has so much room."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["NodeID"] == node_id and node["Alive"]]
    capacity = int(nodes[0]["Resources"].get("object_store_memory", 0)) if nodes else 0
    if object_store > capacity:
        raise BudgetError(
            f"slots and resident blocks need {format_size(object_store)} of object store, the Ray cluster at {address} "
            f"has {format_size(capacity)} on this machine: lower --weight-memory, or start Ray with a larger "
            "--object-store-memory"
        )


@contextlib.contextmanager
def _ray_failures(address: str, folder: str) -> Iterator[None]:
    """Turn what Ray raises when it cannot start or connect into one line."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if address == "local":
            raise ResourceError(
                f"Ray does not start: {reason}; free some memory, and some space in {os.path.dirname(folder)}, and run "
                "it again"
            ) from error
        raise ResourceError(
            f"no Ray cluster can be joined at --ray-address {address}: {reason}; start one with `ray start --head`, "
            "or use --ray-address local for a private one"
        ) from error


@contextlib.contextmanager
def _environment(changes: Mapping[str, str], without: Iterable[str] = ()) -> Iterator[None]:
    """Environment variables for the processes started inside; undone afterwards, whatever Ray added included."""
    before = dict(os.environ)
    try:
        for name in without:
            os.environ.pop(name, None)
        os.environ.update(changes)
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@contextlib.contextmanager
def signals_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when what is within has ended; a second one does at once. In another thread than
    the main one, to which they never come, this does nothing.

    For the import of Ray and `ray.init`, a second or two: an exception in their middle is lost at times in compiled
    parts, and the run goes on; or Ray is left half imported or connected, and closing it crashes the process. Ray also
    replaces SIGTERM's handler: the one before is kept.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler = before[signal.Signals(number)]
        if len(came) > 1 and callable(handler):
            handler(number, frame)

    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _forget_access() -> None:
    """Make Ray read its access mode and token anew: it keeps those of the previous cluster."""
    with contextlib.suppress(ImportError, AttributeError):
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _reap(pids: Iterable[int]) -> None:
    """Collect the exit status of dead children, so that no zombie stays while the driver lives on."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError, OSError):
            os.waitpid(pid, os.WNOHANG)
