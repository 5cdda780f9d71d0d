"""Workers are forked from one process that has imported what they need; with a program and a raylet that stand in for
Ray's. That Ray takes them for its own is in test_ray_node.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipo_ray.session import fork_server, lean_worker, processes

from .conftest import wait_until

PROGRAM = """
import imported_by_the_program, json, os, sys

if __name__ == "__main__":
    import preloaded
    seen = {
        "arguments": sys.argv, "path": sys.path[0], "value": os.environ.get("VALUE"), "pid": os.getpid(),
        "parent": os.getppid(), "group": os.getpgid(0),
        "ignored": open("/proc/self/status").read().partition("SigIgn:")[2].split()[0],
    }
    with open(sys.argv[1] + ".new", "w") as file:
        json.dump(seen, file)
    os.rename(sys.argv[1] + ".new", sys.argv[1])
"""
COUNTED = "with open({log!r}, 'a') as file:\n    file.write(__name__ + '\\n')\n"
RAYLET = "import subprocess, sys\nfor line in sys.stdin: subprocess.run(line.split(), check=True)"


class Raylet:
    """Starts workers, as the raylet does."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.log = folder, folder / "imports"
        (folder / "program.py").write_text(PROGRAM)
        for name in ("imported_by_the_program", "preloaded"):
            (folder / f"{name}.py").write_text(COUNTED.format(log=str(self.log)))
        self.socket = folder / "socket"
        known = {fork_server.SOCKET: str(self.socket), fork_server.PRELOAD: "preloaded,not_there"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", RAYLET], stdin=subprocess.PIPE, text=True, env=os.environ | known | environment
        )
        self.started = 0

    def worker(self, **environment: str) -> dict[str, Any]:
        """Start one; what it saw."""
        self.started += 1
        out = self.folder / f"worker-{self.started}"
        command = [*("env", *(f"{name}={value}" for name, value in environment.items())), sys.executable]
        command += [str(Path(lean_worker.__file__)), "--serialized-runtime-env-context={}", "--language=PYTHON", "-s"]
        command += [str(self.folder / "program.py"), str(out)]
        assert self.child.stdin is not None
        self.child.stdin.write(" ".join(command) + "\n")
        self.child.stdin.flush()
        wait_until(out.exists, 30)
        seen: dict[str, Any] = json.loads(out.read_text())
        assert seen["arguments"] == command[-2:]
        assert seen["path"] == str(self.folder)
        return seen

    def imports(self) -> list[str]:
        """Names of modules, once for each time that one was imported."""
        return self.log.read_text().split()

    def end(self) -> None:
        self.child.kill()
        self.child.communicate()


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[Raylet]:
    made = Raylet(tmp_path)
    yield made
    made.end()


def test_workers_are_forked_from_one_server_that_has_imported_everything(raylet: Raylet) -> None:
    first, second = raylet.worker(VALUE="1"), raylet.worker(VALUE="2")
    assert first["parent"] == second["parent"] not in (raylet.child.pid, os.getpid())
    assert first["pid"] != second["pid"]
    assert (first["value"], second["value"]) == ("1", "2"), "each has the environment that the raylet gave it"
    assert raylet.imports() == ["imported_by_the_program", "preloaded"]
    assert first["group"] == first["pid"], "what ends a group of the raylet's ends nobody else"
    assert not int(first["ignored"], 16) & 1 << (signal.SIGCHLD - 1), "it may have children of its own"


def test_who_connects_and_leaves_stops_nothing(raylet: Raylet) -> None:
    server = raylet.worker()["parent"]
    for said in (b"", b"\x05\0\0\0[1,2", b"\x02\0\0\0{}"):
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(raylet.socket))
            channel.sendall(said)
    assert raylet.worker()["parent"] == server


def test_another_server_takes_the_place_of_one_that_died(raylet: Raylet) -> None:
    first = raylet.worker()["parent"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: processes.identify(first) is None)
    second = raylet.worker()["parent"]
    assert second not in (first, raylet.child.pid)
    assert raylet.worker()["parent"] == second


def test_it_ends_with_the_raylet(raylet: Raylet) -> None:
    server = raylet.worker()["parent"]
    assert processes.identify(server) is not None
    raylet.end()
    wait_until(lambda: processes.identify(server) is None)


@pytest.mark.parametrize("place", ["", "nowhere/socket"])
def test_without_a_server_a_worker_starts_by_itself(place: str, tmp_path: Path) -> None:
    raylet = Raylet(tmp_path, **{fork_server.SOCKET: str(tmp_path / place) if place else ""})
    try:
        seen = raylet.worker()
        assert seen["parent"] == raylet.child.pid
    finally:
        raylet.end()
