"""Session folders: who may enter, when they are swept, and that nobody else's is."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipo_ray.session import folder, processes
from pipo_ray.session.folder import SessionFolder, sweep_leftovers
from pipo_ray.session.processes import ProcessId

from .conftest import wait_until


def start_sleeper(**environment: str) -> "subprocess.Popen[bytes]":
    child = subprocess.Popen(["sleep", "100"], env={**os.environ, **environment})
    wait_until(
        lambda: processes.identify(child.pid) is not None and Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n"
    )
    return child


def make_dead(base: Path, session_id: str = "0123abcd", **changes: object) -> Path:
    """A session folder as a driver leaves it that was killed together with its watcher."""
    path = base / f"pipo-{session_id}"
    (path / "ray" / "session" / "sockets").mkdir(parents=True)
    (path / "ray" / "session" / "log").write_text("x")
    (path / "ray" / "session_latest").symlink_to(path / "ray" / "session")
    (path / "lock").touch()
    record = {"session_id": session_id, "driver": [1, 1], "processes": [], "files": [], **changes}
    (path / "session.json").write_text(json.dumps(record))
    return path


def test_a_folder_is_private_locked_and_short(tmp_path: Path) -> None:
    mine = SessionFolder.create(str(tmp_path))
    assert stat.S_IMODE(os.stat(mine.path).st_mode) == 0o700
    assert os.path.basename(mine.path) == f"pipo-{mine.session_id}"
    record = folder.read_record(mine.path)
    assert record
    assert record.driver == processes.identify(os.getpid())
    with open(os.path.join(mine.path, "lock")) as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert sweep_leftovers(str(tmp_path)) == []
    mine.remove()
    mine.remove()
    assert list(tmp_path.iterdir()) == []
    # The longest socket name of Ray has to fit into 107 bytes.
    session = "session_2026-12-31_23-59-59_999999_4194304"
    assert len(f"{folder.base_folder()}/pipo-01234567/ray/{session}/sockets/plasma_store.1") <= 107


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from pipo_ray.session.folder import SessionFolder\n"
        "SessionFolder.create(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0:\n"  # the child answers: it must have got as far as letting go of the lock
        "    print(os.getpid(), flush=True); time.sleep(100)\n"
        "os._exit(0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as driver:
        assert driver.stdout
        child = int(driver.stdout.readline())
    try:
        assert processes.identify(child)
        assert len(sweep_leftovers(str(tmp_path))) == 1
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_dead_session_is_swept_with_its_processes_and_files(tmp_path: Path) -> None:
    semaphore = f"/dev/shm/sem.pipo-test-{os.getpid()}"
    Path(semaphore).touch()
    marked = start_sleeper(PIPO_SESSION="0123abcd")
    recorded = start_sleeper()
    bystander = start_sleeper(PIPO_SESSION="ffffffff")
    reused = start_sleeper()
    identity = processes.identify(recorded.pid)
    make_dead(
        tmp_path, processes=[identity, ProcessId(reused.pid, 1)], files=[semaphore, "/etc/hostname", "/dev/shm/../null"]
    )
    try:
        assert sweep_leftovers(str(tmp_path)) == [str(tmp_path / "pipo-0123abcd")]
        assert marked.wait(5) == recorded.wait(5) == -signal.SIGKILL
        # Another session's process, and one that has the pid of a recorded process but not its start time, live on.
        assert bystander.poll() is None
        assert reused.poll() is None
        assert not os.path.exists(semaphore)
        assert os.path.exists("/etc/hostname")
        assert os.path.exists("/dev/null")
        assert list(tmp_path.iterdir()) == []
    finally:
        for child in (marked, recorded, bystander, reused):
            child.kill()
            child.wait()


def test_what_merely_looks_like_a_session_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (tmp_path / "pipo-01234567").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pipo-89abcdef").write_text("a file")
    (tmp_path / "pipo-0123456789").mkdir()
    (tmp_path / "pipo-notes").mkdir()
    # Being removed right now, or made by hand: only an old one goes.
    (tmp_path / "pipo-aaaaaaaa").mkdir()
    old = tmp_path / "pipo-bbbbbbbb"
    old.mkdir()
    os.utime(old, (time.time() - 600, time.time() - 600))
    driver = processes.identify(os.getpid())
    assert driver
    (tmp_path / f".pipo-cccccccc-{driver.pid}-{driver.start_ticks}").mkdir()
    dead = tmp_path / f".pipo-dddddddd-{driver.pid}-1"
    dead.mkdir()
    before = {entry.name for entry in tmp_path.iterdir()}
    assert sorted(sweep_leftovers(str(tmp_path))) == [str(dead), str(old)]
    assert {entry.name for entry in tmp_path.iterdir()} == before - {old.name, dead.name}
    assert (tmp_path / "elsewhere" / "lock").exists()


@pytest.mark.parametrize("record", ["", "{", "[]", '{"session_id": "0123abcd"}', '{"driver": 3}'])
def test_a_damaged_record_does_not_stop_the_sweep(tmp_path: Path, record: str) -> None:
    path = make_dead(tmp_path)
    (path / "session.json").write_text(record)
    assert sweep_leftovers(str(tmp_path)) == [str(path)]
    assert not path.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that is another user's")
def test_the_folder_of_another_user_is_left_alone(tmp_path: Path) -> None:
    path = make_dead(tmp_path)
    os.chown(path, 12345, 12345)
    assert sweep_leftovers(str(tmp_path)) == []
    assert (path / "lock").exists()


def test_links_in_a_folder_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    path = make_dead(tmp_path)
    (path / "ray" / "link").symlink_to(tmp_path / "precious")
    sweep_leftovers(str(tmp_path))
    assert (tmp_path / "precious" / "file").exists()
    assert not path.exists()
