"""Whatever ends the driver: within 10 s no process, no memory, no semaphore, no folder of the session is left."""

import glob
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from pipo_ray.session import folder, processes

from .conftest import mapped_inodes, someone_maps, wait_until

DRIVER = Path(__file__).with_name("driver.py")


class Driver:
    """A driver process of the test, and what it holds on the machine."""

    started: ClassVar[list["Driver"]] = []

    def __init__(self, mode: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, str(DRIVER), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(self)
        self.inodes: set[str] = set()
        self.path = ""

    def find_folder(self) -> None:
        """Wait until its session folder exists."""

        def found() -> bool:
            for path in glob.glob(os.path.join(folder.base_folder(), "pipo-*")):
                record = folder.read_record(path)
                if record and record.driver.pid == self.child.pid:
                    self.path = path
            return bool(self.path)

        wait_until(found, 30)
        self.session_id = self.path[-8:]

    def wait_for(self, word: str) -> None:
        """Wait until it printed a line with this word."""
        assert self.child.stdout
        while word not in (line := self.child.stdout.readline()):
            assert line, f"the driver ended: {self.child.stderr.read() if self.child.stderr else ''}"

    def processes(self) -> set[processes.ProcessId]:
        """Processes of its session, without itself."""
        return processes.of_session(self.session_id, self.path)

    def watchers(self) -> list[int]:
        """Pids of its watcher: the process with the session's folder as an argument and without the marker."""
        found = []
        for pid in processes.all_pids():
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(argument.endswith(b"watch.py") for argument in arguments) and self.path.encode() in arguments:
                found.append(pid)
        return found

    def note_memory(self) -> None:
        """Remember the object store's file, to see later whether anyone still holds it."""
        for process in self.processes():
            try:
                self.inodes |= mapped_inodes(process.pid)
            except OSError:
                continue

    def semaphore(self) -> str:
        """The file that its worker maps in mode "work"."""
        return f"/dev/shm/sem.pipo-test-{self.session_id}"

    def is_gone(self) -> bool:
        """Whether nothing of the session is left."""
        return not (
            os.path.lexists(self.path)
            or self.processes()
            or self.watchers()
            or someone_maps(self.inodes)
            or os.path.lexists(self.semaphore())
        )

    def assert_gone_within(self, seconds: float) -> float:
        """Fail unless everything of the session disappears in time; returns the seconds it took."""
        try:
            return wait_until(self.is_gone, seconds)
        except AssertionError:
            names = {
                process.pid: Path(f"/proc/{process.pid}/cmdline").read_bytes()[:80] for process in self.processes()
            }
            raise AssertionError(
                f"left after {seconds} s: folder {os.path.lexists(self.path)}, processes {names}, "
                f"watcher {self.watchers()}, memory {someone_maps(self.inodes)}, "
                f"semaphore {os.path.lexists(self.semaphore())}"
            ) from None

    def finish(self) -> int:
        """Reap the driver."""
        self.child.communicate(timeout=10)
        return self.child.returncode


@pytest.fixture(autouse=True)
def no_driver_outlives_its_test() -> Iterator[None]:
    """A test that fails leaves its drivers at work."""
    yield
    while Driver.started:
        child = Driver.started.pop().child
        child.kill()
        child.wait()


@pytest.mark.alone  # bounds on time, with seven sessions at once
def test_sigkill_and_ctrl_c_at_any_moment_leave_nothing() -> None:
    semaphores = set(glob.glob("/dev/shm/sem.*"))
    moments = {
        "idle": ("idle", "started", signal.SIGKILL),
        "allocating": ("allocate", "allocated", signal.SIGKILL),
        "working": ("work", "working", signal.SIGKILL),
        "Ctrl-C while working": ("work", "working", signal.SIGINT),
        "SIGTERM while working": ("work", "working", signal.SIGTERM),
    }
    # All at once: it is faster, and none may touch what belongs to the others.
    drivers = {moment: Driver(mode) for moment, (mode, _, _) in moments.items()}
    bystander = Driver("idle")
    for driver in (*drivers.values(), bystander):
        driver.find_folder()
    bystander.wait_for("started")
    alive = bystander.processes()
    took = {}
    for moment, (_, word, number) in moments.items():
        driver = drivers[moment]
        driver.wait_for(word)
        assert driver.watchers()
        driver.note_memory()
        assert driver.inodes
        os.kill(driver.child.pid, number)
        took[moment] = driver.assert_gone_within(10)
        driver.finish()
    for moment, delay_s, number in (
        ("first process", 0.0, signal.SIGKILL),
        ("during ray.init", 0.3, signal.SIGKILL),
        ("Ctrl-C during ray.init", 0.2, signal.SIGINT),
    ):
        driver = Driver("idle")
        driver.find_folder()
        wait_until(lambda driver=driver: bool(driver.processes()))  # type: ignore[misc]
        time.sleep(delay_s)
        driver.note_memory()
        os.kill(driver.child.pid, number)
        took[moment] = driver.assert_gone_within(10)
        driver.finish()
    print("seconds until nothing was left:", {moment: round(seconds, 1) for moment, seconds in took.items()})
    # Another session on the same machine lost nothing.
    assert bystander.processes() >= alive
    assert bystander.child.poll() is None
    bystander.child.send_signal(signal.SIGINT)
    bystander.assert_gone_within(10)
    bystander.finish()
    # Semaphores that appeared meanwhile belong to live processes of others.
    mapped = set()
    for pid in processes.all_pids():
        process = processes.identify(pid)
        if process:
            mapped |= processes.mapped_semaphores(process)
    assert set(glob.glob("/dev/shm/sem.*")) - semaphores <= mapped


@pytest.mark.alone  # any session that starts sweeps
def test_power_cut_is_swept_by_the_next_start() -> None:
    driver = Driver("work")
    driver.find_folder()
    driver.wait_for("working")
    driver.note_memory()
    (watcher,) = driver.watchers()
    os.kill(watcher, signal.SIGKILL)
    os.kill(driver.child.pid, signal.SIGKILL)
    driver.finish()
    assert os.path.lexists(driver.path)
    following = Driver("exit")
    following.find_folder()
    following.wait_for("started")
    assert not os.path.lexists(driver.path)
    driver.assert_gone_within(10)
    assert following.finish() == 0
    following.assert_gone_within(5)


@pytest.mark.parametrize("mode, status", [("exit", 0), ("raise", 1)])
def test_a_normal_end_and_an_exception_leave_nothing_at_once(mode: str, status: int) -> None:
    driver = Driver(mode)
    driver.find_folder()
    driver.wait_for("started")
    _, errors = driver.child.communicate(timeout=20)
    assert driver.child.returncode == status
    assert ("on purpose" in errors) == (mode == "raise")
    assert mode == "raise" or errors == ""
    assert driver.is_gone()
