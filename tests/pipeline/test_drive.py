"""Reading the store's files, whatever the file system and the drive do."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from pipeline.fake_store import aligned

from pipo_ray.errors import DriveError, StoreError
from pipo_ray.pipeline.drive import Drive

PAGE = 4096
Preadv = Callable[[int, Sequence[memoryview], int], int]
real_preadv: Preadv = os.preadv
real_open = os.open


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = np.random.default_rng(1).bytes(10 * PAGE)
    (tmp_path / "f").write_bytes(data)
    return data


def refuse_direct_open(path: str, flags: int, *rest: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real_open(path, flags, *rest)


def read(drive: Drive, num_bytes: int, offset: int, file: str = "f") -> bytes:
    memory = aligned(num_bytes)
    drive.read_into(memoryview(memory), file, offset)
    return memory.tobytes()


@pytest.mark.parametrize("direct", [True, False])
def test_reads_what_is_there(direct: bool, tmp_path: Path, content: bytes) -> None:
    drive = Drive(tmp_path, direct=direct)
    assert read(drive, 3 * PAGE, 2 * PAGE) == content[2 * PAGE : 5 * PAGE]
    assert read(drive, 10 * PAGE, 0) == content
    assert drive.retries == 0
    if not direct:
        assert drive.why_buffered == "asked for"
    drive.close()


def test_buffered_where_o_direct_cannot_be_opened(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", refuse_direct_open)
    drive = Drive(tmp_path)
    assert read(drive, 2 * PAGE, PAGE) == content[PAGE : 3 * PAGE]
    assert not drive.direct
    assert drive.why_buffered == f"the file system of {tmp_path} refuses O_DIRECT"
    drive.close()


def test_buffered_where_o_direct_cannot_be_read(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems open and then refuse to read; several threads find out at the same time."""
    both = threading.Barrier(2)
    direct: set[int] = set()

    def track_open(path: str, flags: int, *rest: int) -> int:
        descriptor = real_open(path, flags & ~os.O_DIRECT, *rest)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def refuse(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if descriptor in direct:
            both.wait(10)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", track_open)
    monkeypatch.setattr(os, "preadv", refuse)
    drive = Drive(tmp_path)
    results: list[bytes | Exception] = []

    def work(offset: int) -> None:
        try:
            results.append(read(drive, PAGE, offset))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work, args=(PAGE,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [content[PAGE : 2 * PAGE]] * 2
    assert drive.why_buffered == "O_DIRECT read refused (Invalid argument)"
    drive.close()


@pytest.mark.parametrize(
    ("direct", "step"),
    [(True, PAGE), (True, PAGE + 512), (True, 2 * PAGE + 3584), (False, PAGE), (False, 512), (False, 100)],
)
def test_short_reads_are_continued(
    step: int, direct: bool, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may end a direct read between two sectors; the next one must begin at a page again."""

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert not direct or offset % PAGE == len(buffers[0]) % PAGE == 0
        count = min(step, len(buffers[0]))
        buffers[0][:count] = content[offset : offset + count]
        return count

    monkeypatch.setattr(os, "preadv", short)
    drive = Drive(tmp_path, direct=direct)
    assert read(drive, 5 * PAGE, PAGE) == content[PAGE : 6 * PAGE]
    assert drive.retries == 0
    drive.close()


def test_a_direct_read_that_never_gets_on_is_an_error(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: 512)
    drive = Drive(tmp_path)
    with pytest.raises(DriveError, match=r"nothing but a part of a page was read \(after 4 attempts\)"):
        read(drive, 2 * PAGE, 0)
    drive.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_may_end_within_the_last_page(direct: bool, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * (PAGE + 100))
    drive = Drive(tmp_path, direct=direct)
    memory = aligned(2 * PAGE)
    drive.read_into(memoryview(memory), "f", 0)
    assert memory[: PAGE + 100].tobytes() == b"x" * (PAGE + 100)
    drive.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, PAGE, PAGE + 100])
def test_a_file_that_ends_before_is_truncated(direct: bool, size: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * size)
    drive = Drive(tmp_path, direct=direct)
    with pytest.raises(StoreError, match=r"f: ends at byte \d+, but 16384 bytes are wanted from 0: it was truncated"):
        drive.read_into(memoryview(aligned(4 * PAGE)), "f", 0)
    drive.close()


@pytest.mark.parametrize("failures", [1, 3])
@pytest.mark.parametrize("cause", [errno.EIO, errno.EAGAIN, errno.ENODEV])
def test_errors_that_pass_are_tried_again(
    failures: int, cause: int, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [failures]

    def flaky(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(cause, os.strerror(cause))
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", flaky)
    drive = Drive(tmp_path)
    assert read(drive, PAGE, PAGE) == content[PAGE : 2 * PAGE]
    assert drive.retries == failures
    drive.close()


def test_a_file_whose_device_went_is_opened_again(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor of before stays dead when the device is back; and none is left open."""
    dead: set[tuple[int, int]] = set()

    def file_of(descriptor: int) -> tuple[int, int]:
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino

    def gone(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if file_of(descriptor) in dead:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", gone)
    drive = Drive(tmp_path)
    assert read(drive, PAGE, 0) == content[:PAGE]
    descriptors = len(os.listdir("/proc/self/fd"))
    status = (tmp_path / "f").stat()
    dead.add((status.st_dev, status.st_ino))
    (tmp_path / "back").write_bytes(content)
    (tmp_path / "back").rename(tmp_path / "f")
    assert read(drive, PAGE, PAGE) == content[PAGE : 2 * PAGE]
    assert drive.retries == 1
    assert len(os.listdir("/proc/self/fd")) == descriptors
    drive.close()


@pytest.mark.parametrize(("cause", "attempts"), [(errno.EIO, "4 attempts"), (errno.EBADF, "1 attempt")])
def test_errors_that_stay_name_file_offset_and_cause(
    cause: int, attempts: str, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(cause, os.strerror(cause))

    monkeypatch.setattr(os, "preadv", broken)
    drive = Drive(tmp_path)
    message = rf"{tmp_path}/f: reading 4096 bytes at offset 8192 failed: {os.strerror(cause)} \(after {attempts}\)"
    with pytest.raises(DriveError, match=message) as caught:
        read(drive, PAGE, 2 * PAGE)
    assert caught.value.exit_status == 1
    drive.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    drive = Drive(tmp_path)
    with pytest.raises(StoreError, match=rf"{tmp_path}/gone: cannot be opened: No such file"):
        read(drive, PAGE, 0, file="gone")
    drive.close()


def test_close_closes_all(tmp_path: Path, content: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    drive = Drive(tmp_path)
    read(drive, PAGE, 0)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    drive.close()
    assert len(os.listdir("/proc/self/fd")) == before
