"""Waiting for a word of memory."""

from __future__ import annotations

import errno
import mmap
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipo_ray.pipeline import futex

WAITER = """
import mmap, sys
import numpy as np
from pipo_ray.pipeline import futex
with open(sys.argv[1], "r+b") as file:
    words = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint32)
mine = int(sys.argv[2])  # a word of its own: adding to one is not atomic
words[mine] = 1
while words[0] == 0:
    futex.wait(words.ctypes.data, 0, 60.0)
words[mine] = 2
"""


def test_a_changed_word_is_not_waited_for() -> None:
    word = np.array([5], np.uint32)
    begin = time.perf_counter()
    futex.wait(word.ctypes.data, 4, 30.0)
    assert time.perf_counter() - begin < 5


def test_the_time_is_limited() -> None:
    word = np.array([5], np.uint32)
    begin = time.perf_counter()
    futex.wait(word.ctypes.data, 5, 0.05)
    assert 0.04 < time.perf_counter() - begin < 5


def test_everybody_is_woken() -> None:
    word = np.zeros(1, np.uint32)
    woken = []

    def wait() -> None:
        while word[0] == 0:
            futex.wait(word.ctypes.data, 0, 60.0)
        woken.append(1)

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    word[0] = 1
    futex.wake(word.ctypes.data)
    for thread in threads:
        thread.join(10)
    assert len(woken) == 5


def test_other_processes_are_woken(tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_bytes(bytes(mmap.PAGESIZE))
    with open(file, "r+b") as opened:
        words = np.frombuffer(mmap.mmap(opened.fileno(), 0), np.uint32)
    processes = [subprocess.Popen([sys.executable, "-c", WAITER, str(file), word]) for word in ("1", "2")]
    deadline = time.monotonic() + 60
    while not words[1:3].all() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert words[1:3].tolist() == [1, 1]
    words[0] = 1
    futex.wake(words.ctypes.data)
    assert [process.wait(timeout=20) for process in processes] == [0, 0]
    assert words[1:3].tolist() == [2, 2]


def test_an_address_that_cannot_be_waited_for_is_an_error() -> None:
    words = np.zeros(2, np.uint32)
    with pytest.raises(OSError) as caught:
        futex.wait(words.ctypes.data + 1, 0, 1.0)
    assert caught.value.errno == errno.EINVAL
