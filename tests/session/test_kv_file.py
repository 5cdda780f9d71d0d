"""The file for KV pages and its key: without a name, reserved, and gone with the processes that hold them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipo_ray.errors import InputError, ResourceError
from pipo_ray.session.kv_file import KEY_BYTES, KVFile, check_folder, read_key

MIB = 1 << 20


def test_it_has_no_name_and_all_its_space(tmp_path: Path) -> None:
    file = KVFile(tmp_path, 3 * MIB)
    assert not list(tmp_path.iterdir())
    status = os.stat(file.path)
    assert (status.st_size, status.st_nlink) == (3 * MIB, 0)
    assert status.st_blocks * 512 >= 3 * MIB
    assert status.st_mode & 0o777 == 0o600
    file.close()
    assert not os.path.exists(file.path)
    file.close()


def test_another_process_opens_it_and_its_key_through_the_holder(tmp_path: Path) -> None:
    file = KVFile(tmp_path, MIB)
    program = (
        "import sys; from pipo_ray.session.kv_file import read_key; f = open(sys.argv[1], 'r+b'); f.write(b'hello'); "
        "print(read_key(sys.argv[2]).hex())"
    )
    assert file.key_path is not None
    printed = subprocess.run([sys.executable, "-c", program, file.path, file.key_path], capture_output=True, check=True)
    assert bytes.fromhex(printed.stdout.decode()) == read_key(file.key_path)
    with open(file.path, "rb") as again:
        assert again.read(5) == b"hello"
    file.close()


def test_keys_differ_and_there_is_none_without_encryption(tmp_path: Path) -> None:
    files = [KVFile(tmp_path, MIB), KVFile(tmp_path, MIB), KVFile(tmp_path, MIB, encrypted=False)]
    keys = [read_key(file.key_path) for file in files]
    assert keys[0] != keys[1]
    assert [None if key is None else len(key) for key in keys] == [KEY_BYTES, KEY_BYTES, None]
    for file in files:
        file.close()


def test_nothing_is_left_of_a_killed_holder(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pipo_ray.session.kv_file import KVFile; f = KVFile(sys.argv[1], 64 << 20); "
        "print(flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert not list(tmp_path.iterdir())
    holder.kill()
    holder.wait()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_nameless_files_has_its_name_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    file = KVFile(tmp_path, MIB)
    assert not list(tmp_path.iterdir())
    with open(file.path, "r+b") as opened:
        assert opened.write(b"x") == 1
    file.close()


def test_a_drive_without_room_says_how_much_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"8\.0 EiB|8388608\.0 TiB of KV pages do not fit into"):
        KVFile(tmp_path, 1 << 63)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceError, match=r"1\.0 MiB of KV pages do not fit .* \(No space left on device\); lower"):
        KVFile(tmp_path, MIB)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("folder", "message"), [("/dev/shm", "lies in memory"), ("/nowhere", "there is no such")])
def test_folders_that_are_no_place_on_a_drive_are_refused(folder: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_folder(folder)
