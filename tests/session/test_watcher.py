"""The watcher: small, deaf to the terminal, certain about the driver's end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pipo_ray.session import processes
from pipo_ray.session.folder import SessionFolder
from pipo_ray.session.memory import MIB, proportional_size
from pipo_ray.session.watcher import Watcher

from .conftest import wait_until

DRIVER = """
import os, subprocess, sys, time
from pipo_ray.session.folder import SessionFolder
from pipo_ray.session.watcher import Watcher
folder = SessionFolder.create(sys.argv[1])
watcher = Watcher.start(folder.path, folder.session_id)
marked = subprocess.Popen(
    [sys.executable, "-S", "-c", sys.argv[2], "/dev/shm/sem.pipo-test-" + folder.session_id],
    env={**os.environ, "PIPO_SESSION": folder.session_id}, close_fds=False, stdout=subprocess.PIPE,
)
marked.stdout.readline()
other = subprocess.Popen(["sleep", "100"], close_fds=False)
forked = os.fork()
if forked == 0: time.sleep(100)
print(folder.path, watcher.process.pid, marked.pid, other.pid, forked, flush=True)
time.sleep(100)
"""

MAPPER = """
import mmap, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
os.truncate(file, 32)
mapped = mmap.mmap(file, 32)
print("mapped", flush=True)
time.sleep(100)
"""


def test_it_is_small_and_goes_when_dismissed(tmp_path: Path) -> None:
    folder = SessionFolder.create(str(tmp_path))
    watcher = Watcher.start(folder.path, folder.session_id)
    pid = watcher.process.pid
    wait_until(lambda: "poll" in Path(f"/proc/{pid}/wchan").read_text() or proportional_size([pid]) > 5 * MIB)
    assert proportional_size([pid]) < 12 * MIB
    assert os.getsid(pid) == pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert processes.is_alive(watcher.process)
    watcher.dismiss()
    watcher.dismiss()
    assert processes.identify(pid) is None
    # Dismissed means that it touches nothing.
    assert os.path.exists(folder.path)
    folder.remove()


def test_it_ends_the_session_of_a_killed_driver_and_nothing_else(tmp_path: Path) -> None:
    program = [sys.executable, "-c", DRIVER, str(tmp_path), MAPPER]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        path, *pids = driver.stdout.readline().split()
        semaphore = Path("/dev/shm", f"sem.pipo-test-{path[-8:]}")
        assert semaphore.exists()
        watcher, marked, other, forked = map(int, pids)
        # The forked child holds copies of whatever the driver had open, the sleepers whatever they could inherit.
        driver.kill()
        try:
            took = wait_until(lambda: processes.identify(watcher) is None)
            assert not os.path.exists(path)
            assert not semaphore.exists()  # although nobody recorded it
            assert processes.identify(marked) is None
            assert processes.identify(other) is not None
            assert processes.identify(forked) is not None
            assert took < 5
        finally:
            os.kill(other, signal.SIGKILL)
            os.kill(forked, signal.SIGKILL)


def test_a_process_is_its_pid_and_its_start_time() -> None:
    child = subprocess.Popen(["sleep", "100"])
    process = processes.identify(child.pid)
    assert process
    processes.send_signal(processes.ProcessId(child.pid, process.start_ticks + 1), signal.SIGKILL)
    assert child.poll() is None
    assert processes.is_alive(process)
    processes.send_signal(process, signal.SIGKILL)
    wait_until(lambda: not processes.is_alive(process))  # dead, although nobody has reaped it yet
    assert child.wait() == -signal.SIGKILL
    processes.send_signal(process, signal.SIGKILL)


def test_descendants_are_found_at_any_depth() -> None:
    code = "import subprocess, sys; subprocess.run(['sh', '-c', 'sleep 100 & wait'])"
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    try:
        wait_until(lambda: len(processes.descendants([child.pid])) == 2)
    finally:
        for pid in [*processes.descendants([child.pid]), child.pid]:
            os.kill(pid, signal.SIGKILL)
        child.wait()
