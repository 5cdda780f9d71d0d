"""What is in huge pages stays what it was, and everybody who maps it sees it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipo_ray.session import huge_pages
from pipo_ray.session.huge_pages import huge_page_bytes, private_memory, scratch_memory, use_huge_pages

MIB = 1 << 20


def can_collapse() -> bool:
    """Whether this kernel does it at all: MADV_COLLAPSE came with Linux 6.1."""
    version = tuple(int(part) for part in os.uname().release.split(".")[:2])
    return huge_page_bytes() == 2 * MIB and version >= (6, 1)


needs_collapse = pytest.mark.skipif(not can_collapse(), reason="no MADV_COLLAPSE")


@pytest.fixture
def shm() -> Iterator[int]:
    """A file in /dev/shm, as Ray's object store is one."""
    file = f"/dev/shm/pytest-pipo-{os.getpid()}"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink(file)
    os.ftruncate(descriptor, 24 * MIB)
    yield descriptor
    os.close(descriptor)


@needs_collapse
def test_memory_in_shm_is_moved_to_huge_pages(shm: int) -> None:
    """Slots as they lie there: one behind the other, not at multiples of anything, mapped twice."""
    mapped = np.frombuffer(mmap.mmap(shm, 24 * MIB), np.uint8)
    other = np.frombuffer(mmap.mmap(shm, 24 * MIB), np.uint8)
    mapped[:] = np.random.default_rng(0).integers(0, 256, len(mapped), np.uint8)
    before = mapped.copy()
    slots = [mapped[start + 4096 : start + 8 * MIB - 4096] for start in (5000, 5000 + 8 * MIB)]
    others = shared_huge_bytes()
    done = use_huge_pages(slots)
    assert done == 16 * MIB - 2 * 4096  # all of them: from 5000 + 4096 to 16 MiB + 5000 - 4096
    assert shared_huge_bytes() - others == 18 * MIB  # the huge pages that they touch
    assert (mapped == before).all()
    assert (other == before).all()
    mapped[3 * MIB] ^= 1
    assert other[3 * MIB] == mapped[3 * MIB]


@needs_collapse
def test_no_page_outside_of_the_mapping_is_moved(shm: int) -> None:
    """Slots that begin or end in a huge page of which the process has only a part."""
    mapped = np.frombuffer(mmap.mmap(shm, 6 * MIB + 8192, offset=MIB), np.uint8)
    mapped[:] = 1
    others = shared_huge_bytes()
    assert use_huge_pages([mapped]) == 4 * MIB  # of the file's bytes from 2 to 6 MiB
    assert shared_huge_bytes() - others == 4 * MIB
    assert (mapped == 1).all()


@needs_collapse
def test_what_is_smaller_than_a_huge_page_takes_none(shm: int) -> None:
    mapped = np.frombuffer(mmap.mmap(shm, 24 * MIB), np.uint8)
    mapped[: 4 * MIB] = 1
    others = shared_huge_bytes()
    assert use_huge_pages([mapped[MIB : 3 * MIB - 4096]]) == 0
    assert shared_huge_bytes() == others


@needs_collapse
def test_scratch_memory_is_in_huge_pages() -> None:
    others = shared_huge_bytes()
    memory = scratch_memory(8 * MIB)
    assert memory.nbytes == 8 * MIB
    assert memory.flags.writeable
    assert shared_huge_bytes() - others == 8 * MIB


def private_huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@needs_collapse
def test_private_memory_is_in_huge_pages() -> None:
    before = private_huge_bytes()
    memory = private_memory(8 * MIB)
    assert memory.nbytes == 8 * MIB
    assert memory.ctypes.data % mmap.PAGESIZE == 0
    assert memory.flags.writeable
    assert private_huge_bytes() - before == 8 * MIB


def test_private_and_small_memory_is_left_alone() -> None:
    assert use_huge_pages([np.zeros(8 * MIB, np.uint8)]) == 0
    assert use_huge_pages([np.frombuffer(mmap.mmap(-1, 4096), np.uint8)]) == 0
    assert use_huge_pages([]) == 0


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE_FILE", tmp_path / "missing")
    assert use_huge_pages([np.frombuffer(mmap.mmap(-1, 8 * MIB), np.uint8)]) == 0
    assert scratch_memory(MIB).nbytes == MIB
    assert private_memory(MIB + 5).nbytes == MIB + 5


def test_a_kernel_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that is older than MADV_COLLAPSE: EINVAL, and the memory is as it was."""
    monkeypatch.setattr(huge_pages, "_MADV_COLLAPSE", 9999)
    memory = scratch_memory(8 * MIB)
    memory[:] = 7
    assert use_huge_pages([memory]) == 0
    assert (memory == 7).all()


def shared_huge_bytes() -> int:
    """On the whole machine, in shared memory."""
    (line,) = [one for one in Path("/proc/meminfo").read_text().splitlines() if one.startswith("ShmemHugePages:")]
    return int(line.split()[1]) * 1024
