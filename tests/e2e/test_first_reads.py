"""A drive that fails below `preadv` from the start: what a run reads first is checked, and told in one line."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline.failing_drive import FailingDrive, Kind

from pipo_ray.store.manifest import Manifest

from .drive_runs import start, tokens
from .test_bad_input import session_processes


@pytest.fixture(autouse=True)
def mended(failing: FailingDrive) -> Iterator[None]:
    """No fault outlives its test."""
    failing.mend()
    yield
    failing.mend()


@pytest.mark.parametrize("block", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_bytes_that_come_out_wrong_once_are_read_again(
    block: int, store: Path, failing: FailingDrive, expected: list[list[int]]
) -> None:
    """On the first load of a block, which is when checksums are looked at; the sweep is done again."""
    stored = [one for one in Manifest.load(store).blocks if one.kind not in ("embedding", "head")][block]
    failing.fail("flip", times=1, offset=stored.offset + stored.nbytes // 2)
    with start(store, failing) as llm:
        assert tokens(llm) == expected


def pipo(store: Path, failing: FailingDrive, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pipo_ray.cli", "run", str(store), "--prompt-ids", "5,6,7", "--max-tokens", "3"),
            *("--memory", "2GiB", "--weight-memory", "450KiB", "--device", "cpu", "--ray-address", "local", *more),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, env=os.environ | failing.environment,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "status", "words"), [
    pytest.param("eio", 1, "cannot be read: ", marks=pytest.mark.slow),
    ("flip", 2, "is damaged: "),  # every reading is wrong, as if it were wrong on the drive
])  # fmt: skip
def test_the_command_line_says_it_in_one_line(
    kind: Kind, status: int, words: str, store: Path, failing: FailingDrive
) -> None:
    stored = next(one for one in Manifest.load(store).blocks if one.kind not in ("embedding", "head"))
    failing.fail(kind, offset=stored.offset + 1)
    done = pipo(store, failing)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"pipo: error: block {stored.name} "), line
    assert words in line
    assert stored.file in line
    assert not session_processes()


def cached_bytes(file: Path) -> int:
    """How much of it is in the page cache."""
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found) == 0
    return sum(page & 1 for page in found) * mmap.PAGESIZE


def test_without_o_direct_the_page_cache_is_dropped_behind_the_reader(
    store: Path, failing: FailingDrive, expected: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """What `--memory` does not count must not fill up; and the user hears once why it is slower."""
    blocks = [block for block in Manifest.load(store).blocks if block.kind != "embedding"]
    files = {store / block.file for block in blocks}
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sum(map(cached_bytes, files)) > sum(file.stat().st_size for file in files) // 4:
        pytest.skip("the page cache of this file system is not dropped on request: it may be memory itself")
    failing.fail("einval-open")
    with caplog.at_level(logging.WARNING, "pipo_ray"), start(store, failing) as llm:
        assert tokens(llm) == expected
        assert not next(one["direct"] for one in llm.report()["stages"] if one["stage"] == "NvmeLoader")
        total = sum(block.nbytes for block in blocks)
        found = sum(map(cached_bytes, files))
        print(f"{found >> 10} KiB of {total >> 10} are cached")
        assert found < total // 2  # the rest: rows that are looked up, and what the kernel read ahead
    told = [record.getMessage() for record in caplog.records if "O_DIRECT" in record.getMessage()]
    assert len(told) == 1, told
    assert str(store) in told[0]
