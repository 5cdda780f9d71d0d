"""The node: private, lean, quiet; and what happens where another Ray cluster is running."""

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pipo_ray.errors import BudgetError, ResourceError
from pipo_ray.session import lean_ray, processes, ray_clusters, ray_node, slots
from pipo_ray.session.memory import MIB, proportional_size, shm_free
from pipo_ray.session.ray_node import signals_later
from pipo_ray.session.session import Session

from .conftest import mapped_inodes, someone_maps, wait_until

FOREIGN = Path(__file__).with_name("foreign_cluster.py")


@ray.remote(num_cpus=0)
class Actor:
    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def interpreter(self) -> str:
        return sys.executable

    def fail(self) -> None:
        print("a trace for the logs", flush=True)
        raise ValueError("a reason")

    def hold(self, refs: list[Any]) -> int:
        self.view = slots.attach(refs[0])
        return int(self.view[-1])

    def pid(self) -> int:
        return os.getpid()

    def parent(self) -> int:
        return os.getppid()

    def has_pyarrow(self) -> bool:
        return sys.modules.get("pyarrow") is not None

    def program(self) -> str:
        return str(sys.modules["__main__"].__spec__ or sys.argv[0])


class Foreign:
    """Another program's Ray cluster."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        environment = {name: value for name, value in os.environ.items() if name != processes.MARKER}
        self.child = subprocess.Popen(
            [sys.executable, str(FOREIGN), self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.child.stdout
        self.address = self.child.stdout.readline().strip()
        self.processes = {processes.identify(pid) for pid in processes.descendants([self.child.pid])}

    def stop(self) -> None:
        try:
            self.child.communicate("", timeout=20)
        finally:
            for process in self.processes:
                if process:
                    processes.send_signal(process, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def foreign() -> Iterator[Foreign]:
    cluster = Foreign()
    yield cluster
    cluster.stop()


def start(size: int = 80 * MIB, **options: Any) -> Session:
    return Session(object_store_bytes=size, **{"address": "local", **options})


def listening_addresses(pids: set[int]) -> set[str]:
    """Local addresses (hex, as the kernel writes them) at which these processes accept TCP connections."""
    inodes = set()
    for pid in pids:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            try:
                inodes.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


def test_a_private_node_is_lean_private_and_leaves_no_trace(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    before = dict(os.environ)
    handler = signal.getsignal(signal.SIGTERM)
    held_before = mapped_inodes(os.getpid())  # by earlier tests: the lock of a progress bar is a semaphore there
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    with start(worker_environment={"PIPO_TEST": "here"}) as session:
        assert dict(os.environ) == before
        node_pids = session.node.pids()
        assert len(node_pids) == 4
        assert set(session.pids()) > set(node_pids)
        size = proportional_size(node_pids)
        print(f"node without driver and actors: {size / MIB:.0f} MiB")
        assert size < 120 * MIB
        actor = Actor.remote()
        assert ray.get(actor.environment.remote("PIPO_TEST")) == "here"
        assert ray.get(actor.environment.remote(processes.MARKER)) == session.id
        assert ray.get(actor.interpreter.remote()) == sys.executable
        assert not ray.get(actor.has_pyarrow.remote())
        assert ray.get(actor.program.remote()).endswith("default_worker.py")
        actor_pid = ray.get(actor.pid.remote())
        assert actor_pid in session.node.pids()
        # Both are forked from the process that has imported Ray (test_fork_server.py), and not started by the raylet.
        fork_server = ray.get(actor.parent.remote())
        assert fork_server == ray.get(Actor.remote().parent.remote())
        assert fork_server in set(session.node.pids()) - set(node_pids)
        # Ctrl-C in the terminal reaches every process of the foreground; those of Ray are deaf to it.
        os.kill(actor_pid, signal.SIGINT)
        with pytest.raises(ValueError, match="a reason"):
            ray.get(actor.fail.remote())
        assert session.node.logs
        assert any("a trace for the logs" in path.read_text() for path in Path(session.node.logs).glob("worker-*"))
        # 127.0.0.1, and the same written as an IPv6 address.
        loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
        assert listening_addresses({*session.node.pids(), os.getpid()}) <= loopback
        inodes = (mapped_inodes(node_pids[1]) | mapped_inodes(os.getpid())) - held_before
        assert inodes
        path, pids = session.path, set(session.pids()) - {os.getpid()}
    session.close()
    assert not os.path.exists(path)
    assert not [pid for pid in pids if processes.identify(pid)]
    assert not someone_maps(inodes)
    assert importlib.import_module("pyarrow").__name__ == "pyarrow"  # kept from Ray, not from us
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) is handler
    assert token.exists() == had_token
    output = capfd.readouterr()
    assert output.err == ""
    assert [line for line in output.out.splitlines() if "node without" not in line] == []


def test_sessions_follow_each_other_and_a_store_holds_what_was_promised() -> None:
    sizes = [9 * MIB + 1] * 3 + [4097] * 60 + [64] * 60
    with start(slots.object_store_bytes(sizes)) as session:
        buffers = [session.allocate(size) for size in sizes]
        assert [len(buffer.view) for buffer in buffers] == sizes
        with pytest.raises(ResourceError, match=r"already connected to the Ray cluster at .*close the other"):
            start()


def test_a_session_from_another_thread_outlives_it() -> None:
    made: list[Session] = []
    thread = threading.Thread(target=lambda: made.append(start()))
    thread.start()
    thread.join()
    (session,) = made
    # Ray's processes are set to die with the thread that started them.
    time.sleep(0.3)
    assert ray.get(Actor.remote().pid.remote()) > 0
    path = session.path
    session.close()
    assert not os.path.exists(path)


def test_too_little_dev_shm_or_memory_is_a_budget_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"needs .* of /dev/shm, .* are free: lower --weight-memory"):
        start(shm_free() + MIB)
    monkeypatch.setattr(ray_node, "available_memory", lambda: 50 * MIB)
    with pytest.raises(BudgetError, match=r"needs 75\.0 MiB of memory, 50\.0 MiB are available"):
        start(1)
    assert not ray.is_initialized()


def test_when_ray_does_not_start_one_line_says_so_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    real_init = ray.init

    def init(**options: Any) -> None:
        paths.append(Path(options["_temp_dir"]).parent)
        real_init(**options)
        raise RuntimeError("something\nwith lines")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourceError, match="Ray does not start: something") as failure:
        start()
    assert "\n" not in str(failure.value)
    assert not paths[0].exists()
    assert not processes.of_session(paths[0].name[-8:], str(paths[0]))


@pytest.mark.slow
def test_without_ray_s_internals_the_node_is_just_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_ray, "is_supported", lambda: False)
    with start() as session:
        assert len(session.node.pids()) > 4
        path, pids = session.path, session.node.pids()
        assert ray.get(Actor.remote().pid.remote()) > 0
    assert not os.path.exists(path)
    assert not [pid for pid in pids if processes.identify(pid)]


def test_another_cluster_is_refused_unless_asked_for(foreign: Foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [pid for pid in processes.all_pids() if ray_clusters._name(pid) in ray_clusters._SERVERS]
    with pytest.raises(ResourceError, match=r"another Ray cluster is running .*address auto.*address local") as failure:
        start(address=None)
    assert any(f"pid {pid}," in str(failure.value) for pid in others)
    assert "\n" not in str(failure.value)
    # Ours is separate, whatever the environment says.
    monkeypatch.setenv("RAY_ADDRESS", foreign.address)
    with start(address="local") as session:
        assert session.node.address != foreign.address
        assert session.node.is_private


def test_slots_on_a_joined_cluster_survive_spilling(foreign: Foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", foreign.address)
    before = dict(os.environ)
    with start(60 * MIB, address="auto") as session:
        assert dict(os.environ) == before
        assert session.node.address == foreign.address
        assert not session.node.is_private
        slot = session.allocate(30 * MIB)
        content = np.random.default_rng(0).integers(0, 256, slot.nbytes, np.uint8)
        slot.view[:] = content
        unprotected = ray.put(np.zeros(10 * MIB, np.uint8))
        slots.attach(unprotected)[:] = 1  # written in place like a slot, but nobody keeps the view
        fillers = [ray.put(np.full(10 * MIB, 2, np.uint8)) for _ in range(12)]
        spilled = wait_until(
            lambda: any("spilled" in name for _, folders, _ in os.walk(foreign.folder) for name in folders)
        )
        assert spilled >= 0
        assert (slot.view == content).all()
        slots.assert_in_shm(slot.view)
        actor = Actor.remote()
        assert ray.get(actor.hold.remote([slot.ref])) == content[-1]
        # A process that joins a cluster marks its actors, and Ray ends them with the driver.
        assert ray.get(actor.pid.remote()) in session.node.pids()
        # What the view saved the slot from. (No assertion: whether it was spilled is Ray's choice.)
        print("unprotected object kept its writes:", bool(slots.attach(unprotected)[: slots.ALIGNMENT].all()))
        del fillers
        path, pids = session.path, session.node.pids()
    wait_until(lambda: not [pid for pid in pids if processes.identify(pid)])
    assert not os.path.exists(path)
    assert all(process and processes.is_alive(process) for process in foreign.processes if process)


def test_a_joined_store_that_falls_back_to_files_is_refused(foreign: Foreign) -> None:
    with start(60 * MIB, address=foreign.address) as session:
        slot = session.allocate(60 * MIB)
        with pytest.raises(ResourceError, match=r"not in /dev/shm|no room"):
            session.allocate(60 * MIB)
        assert not slot.view.any()


@pytest.mark.parametrize(
    "size, address, error, message",
    [
        (4000 * MIB, None, BudgetError, r"need 3\.9 GiB of object store, the Ray cluster at .* has 100\.0 MiB"),
        (80 * MIB, "ray://127.0.0.1:10001", ResourceError, "Ray Client cannot"),
        (80 * MIB, "nonsense", ResourceError, "no Ray cluster can be joined at --ray-address nonsense"),
    ],
)
def test_a_cluster_that_cannot_serve_is_refused(
    foreign: Foreign, size: int, address: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as failure:
        start(size, address=address or foreign.address)
    assert "\n" not in str(failure.value)
    assert not ray.is_initialized()


def test_dead_addresses_and_private_nodes_are_no_clusters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "all_pids", list)
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    assert ray_clusters.find_cluster() is None
    free.listen()
    found = ray_clusters.find_cluster()
    assert found
    assert str(found) == f"RAY_ADDRESS, address {address}"
    monkeypatch.delenv("RAY_ADDRESS")
    found = ray_clusters.find_cluster()
    assert found
    assert found.found_by.endswith("ray_current_cluster")
    free.close()
    with pytest.raises(ResourceError, match="no Ray cluster is running"):
        ray_clusters.address_to_join("auto")


def test_ctrl_c_waits_for_the_end_of_what_it_would_break() -> None:
    done, handler = [], signal.getsignal(signal.SIGTERM)

    def initialize() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as `ray.init` replaces it
        done.append("all of it")

    with pytest.raises(KeyboardInterrupt), signals_later():
        initialize()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is handler
    with signals_later():
        done.append("and without Ctrl-C")
    assert len(done) == 2


def test_a_second_ctrl_c_does_not_wait() -> None:
    done = []

    def initialize() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        done.append("goes on")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("not any more")

    with pytest.raises(KeyboardInterrupt), signals_later():
        initialize()
    assert done == ["goes on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_is_deaf_to_ctrl_c_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_later():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_middle_of_ray_init_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    init, held = ray.init, mapped_inodes(os.getpid())
    inodes: set[str] = set()

    def interrupted(**options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        init(**options)
        inodes.update(mapped_inodes(os.getpid()) - held)

    monkeypatch.setattr(ray, "init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert inodes, "it had been connected"
    assert not ray.is_initialized()
    assert not someone_maps(inodes)
