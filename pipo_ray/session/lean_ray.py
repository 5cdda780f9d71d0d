"""Ray without the processes that a private node never uses.

`ray.init` starts six Python processes next to the two that do the work (gcs_server, raylet): dashboard, dashboard
agent, runtime environment agent, autoscaler monitor, log monitor, and idle workers. Measured with Ray 2.60 on 2
cores, sum of PSS over the node and the driver, no actor yet: 534 MiB and 6.4 s as Ray comes, 172 MiB and 0.5 s lean.
Everything that was left out serves clusters: usage reports, `runtime_env`, adding machines, copying worker output to
the driver's terminal.

Switches exist for some of it (see `ENVIRONMENT`); the rest has none, so `lean()` swaps five internal functions of Ray
for the time of `ray.init`. Where this Ray does not have them as expected, nothing is swapped: it then only costs
memory. The one thing that must not be used on a lean node is `runtime_env`: nothing answers it.
"""

import contextlib
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    # Ray's own memory monitor kills actors at 95 % of a limit that it misreads in a plain cgroup; we plan our memory
    # ourselves.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Not a cluster: no other machine may connect, and a laptop that changes networks keeps its addresses. See
    # `loopback`.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # A full store would silently go on in files under the temporary folder. Ray allows that only while the disk is
    # filled less than this share; so it fails at once, and the message is ours.
    "RAY_local_fs_capacity_threshold": "0",
    # An actor that asks for no GPU would otherwise get CUDA_VISIBLE_DEVICES="": which device is used is our plan's
    # business.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray gives its workers the niceness 15: whatever else runs would go before our computation, even the driver that
    # prints its tokens. Who wants to give way has --background.
    "RAY_worker_niceness": "0",
}
"""Environment of a node that we start, with or without dashboard."""

LEAN_ENVIRONMENT = {
    # Idle workers take 46 MiB each, and our actors are all started at once anyway.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    # Each actor call would be reported to gcs_server and kept there, up to 100,000 of them, for the dashboard's eyes.
    "RAY_task_events_report_interval_ms": "0",
}
"""Added on a node without a dashboard."""

PRELOAD = ("ray._common.pydantic_compat",)
"""What Ray's workers import with their first object, pydantic with it where it is installed."""

_log = logging.getLogger(__name__)
_AGENT_SCRIPT = Path(__file__).with_name("idle_agent.py")
_WORKER_SCRIPT = Path(__file__).with_name("lean_worker.py")


def is_supported() -> bool:
    """Whether this Ray has the internals that `lean()` replaces, in the form it knows."""
    try:
        import ray._private.node as node
        import ray._private.services as services
        import ray._raylet as raylet
    except ImportError:
        return False
    names = ("start_api_server", "start_monitor", "start_log_monitor")
    # Before `persist_port` the driver chose the agents' ports and waited for them to listen.
    return (
        all(callable(getattr(node.Node, name, None)) for name in names)
        and callable(getattr(services, "_build_python_executable_command_memory_profileable", None))
        and hasattr(raylet, "persist_port")
        and "setup_worker_path" in inspect.signature(services.start_raylet).parameters
    )


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """While it is open, a Ray node that this process starts consists of gcs_server, raylet and two idle stand-ins."""
    if not is_supported():
        yield
        return
    import ray._private.node as node
    import ray._private.services as services

    original_command = services._build_python_executable_command_memory_profileable

    def command(component: str, *args: Any, **kwargs: Any) -> Any:
        if component in ("dashboard_agent", "runtime_env_agent"):
            # Ray appends the path and the options of its own agent; the stand-in reads the options.
            return [sys.executable, "-I", "-S", str(_AGENT_SCRIPT)]
        return original_command(component, *args, **kwargs)

    original_start = services.start_raylet
    signature = inspect.signature(original_start)

    def start_raylet(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["setup_worker_path"] = str(_WORKER_SCRIPT)
        return original_start(*bound.args, **bound.kwargs)

    def no_api_server(self: Any, **_: Any) -> None:
        self._webui_url = ""

    def nothing(self: Any) -> None:
        pass

    with contextlib.ExitStack() as stack:
        stack.enter_context(_swapped(node.Node, "start_api_server", no_api_server))
        stack.enter_context(_swapped(node.Node, "start_monitor", nothing))
        stack.enter_context(_swapped(node.Node, "start_log_monitor", nothing))
        stack.enter_context(_swapped(services, "_build_python_executable_command_memory_profileable", command))
        stack.enter_context(_swapped(services, "start_raylet", start_raylet))
        yield


@contextlib.contextmanager
def without_pyarrow() -> Iterator[None]:
    """While it is open, pyarrow is not installed, for Ray: it imports it to be ready for tables (10 MiB). Where the
    program has imported it already, nothing changes.
    """
    if "pyarrow" in sys.modules:
        yield
        return
    sys.modules["pyarrow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["pyarrow"]


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """While it is open, a Ray node that this process starts listens on 127.0.0.1 only.

    Ray replaces an explicit 127.0.0.1 by the machine's address and listens on all interfaces, except where it knows
    that it cannot be part of a cluster (Windows, macOS). This is that switch, for where Ray is imported already.
    """
    import ray._private.ray_constants as constants

    if not isinstance(getattr(constants, "ENABLE_RAY_CLUSTER", None), bool):
        yield
        return
    with _swapped(constants, "ENABLE_RAY_CLUSTER", False):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While it is open, what the raylet reports (a worker died, for one) goes to our log, not to stdout.

    Ray prints these even with `log_to_driver=False`, and a line of them would break the output of `--json`. They
    are in raylet.out too.
    """
    import ray._private.worker as worker

    if not callable(getattr(worker, "print_to_stdstream", None)):
        yield
        return

    def report(data: dict[str, Any], *_: Any, **__: Any) -> None:
        for line in data.get("lines", ()):
            _log.info("%s: %s", data.get("pid"), line)

    with _swapped(worker, "print_to_stdstream", report):
        yield


@contextlib.contextmanager
def _swapped(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
