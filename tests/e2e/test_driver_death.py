"""Whatever ends a program that uses LLM, and whenever: within 10 s nothing of it is left on the machine.

tests/session/test_driver_death.py does the same to a bare session at more moments, tests/cli/test_run_real.py sends
Ctrl-C to the command line.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from architectures import Architecture

from pipo_ray.session import processes

from .checkpoints import make_checkpoint
from .footprint import Footprint, find_session, wait_until_gone

DRIVER = Path(__file__).with_name("driver.py")
GONE_S = 10.0
SEED = int(os.environ.get("PIPO_FAULT_SEED", "20"))
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 8192}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(bytes_llama: Path) -> Path:
    """A small one, packed before the drivers start."""
    return bytes_llama


class Driver:
    """A driver process, the leader of its process group as in a terminal."""

    def __init__(self, folder: Path, mode: str, cache: Path | None = None) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(DRIVER), str(folder), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | ({"PIPO_CACHE": str(cache)} if cache else {}),
        )
        self.pid = self._child.pid

    def wait_for(self, word: str) -> None:
        """Wait until it has said so."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.strip() == word:
                return
        assert self._child.stderr is not None
        raise AssertionError(f"the driver ended: {self._child.stderr.read()}")

    def end(self, number: signal.Signals) -> None:
        """SIGKILL it alone; Ctrl-C reaches its whole process group."""
        if number == signal.SIGKILL:
            os.kill(self.pid, number)
        else:
            os.killpg(self.pid, number)

    def wait(self) -> int:
        """Its exit status."""
        self._child.communicate(timeout=120)
        return self._child.returncode

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate(timeout=30)


@pytest.fixture(params=[signal.SIGKILL, pytest.param(signal.SIGINT, marks=SLOW)], ids=["SIGKILL", "Ctrl-C"])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    return request.param


def check_status(driver: Driver, number: signal.Signals) -> None:
    # Python ends itself with the signal when nobody has caught KeyboardInterrupt.
    assert driver.wait() == -number


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_while_packing(number: signal.Signals, tmp_path: Path) -> None:
    """What is packed stays in the cache and is used by the next start; nothing goes on packing."""
    folder = make_checkpoint(tmp_path / "wide", Architecture("wide", "Llama", "llama", WIDE))
    for attempt in range(5):
        cache = tmp_path / f"cache-{attempt}"
        with Driver(folder, "end", cache) as driver:
            driver.wait_for("packing")
            found = (processes.identify(pid) for pid in processes.descendants([driver.pid]))
            children = [child for child in found if child is not None]
            assert children
            # On a busy machine the packer may have come to its end before it was stopped, or nearly so.
            is_early = bytes_below(cache) < bytes_below(folder) / 2
            driver.end(number)
            if number == signal.SIGKILL:
                check_status(driver, number)  # it is gone, and not only told to go, before the packer goes on
            for child in children:
                processes.send_signal(child, signal.SIGCONT)
            begin = time.monotonic()
            while left := [child for child in children if processes.is_alive(child)]:
                assert time.monotonic() - begin < GONE_S, f"left: {left}"
                time.sleep(0.05)
            check_status(driver, number)
        if is_early:
            break
    else:
        pytest.fail("the packer was never stopped in the first half of its work")
    assert "manifest.json" not in {path.name for path in cache.rglob("*")}
    assert bytes_below(cache) < 1.2 * bytes_below(folder)


@pytest.mark.parametrize("moment", ["starting", "generating", pytest.param("idle", marks=pytest.mark.slow)])
def test_while_it_runs(moment: str, number: signal.Signals, checkpoint: Path) -> None:
    with Driver(checkpoint, "idle" if moment == "idle" else "generate") as driver:
        footprint = Footprint(find_session(driver.pid), driver.pid)
        if moment == "starting":
            # Anywhere between the first process of Ray's and the first token.
            delay_s = random.Random(f"{SEED} {number}").uniform(0, 4)
            print(f"PIPO_FAULT_SEED={SEED}: {number.name} {delay_s:.2f} s after the session folder appeared")
            time.sleep(delay_s)
        else:
            driver.wait_for("started" if moment == "idle" else "generating")
        footprint.note()
        assert footprint.processes
        if moment != "starting":
            assert len(footprint.processes) >= 7  # gcs_server, raylet, watcher, four actors
            assert footprint.mappings
        driver.end(number)
        took = wait_until_gone(footprint, GONE_S)
        print(f"nothing left after {took:.1f} s")
        check_status(driver, number)
