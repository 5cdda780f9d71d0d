"""Runs a job of `packing.py`, which needs torch, in a child process, so that the driver stays small."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any

from pipo_ray import errors
from pipo_ray.errors import PipoError, ResourceError

Progress = Callable[[str, int, int], None]

_STOP_DEADLINE_S = 10.0
# `-m` would put the current folder in front of the path, where any random.py would be taken for Python's own.
# At the end everything is on the disk and said: taking torch and transformers apart first would take half a second.
_CHILD = "import os, sys; sys.path[:] = os.environ.pop('PIPO_PYTHONPATH').split(os.pathsep); " + (
    "from pipo_ray.packing import main; status = main(); sys.stderr.flush(); os._exit(status)"
)


def run_job(arguments: list[str], on_progress: Progress | None) -> dict[str, Any]:
    """Run a job of `packing.py`; its result. Raises the error that it reports; ends it when interrupted."""
    debug = os.environ.get("PIPO_DEBUG", "") not in ("", "0")
    with tempfile.TemporaryFile() as stderr:
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if debug else stderr,
                env=_child_environment(arguments[0]),
                encoding="utf-8",
            )
        except OSError as error:
            raise ResourceError(f"no process can be started: {error.strerror}; free some memory") from error
        last: dict[str, Any] = {}
        try:
            assert child.stdout is not None
            for line in child.stdout:
                last = json.loads(line)
                if last["type"] == "progress" and on_progress is not None:
                    on_progress(last["phase"], last["done"], last["total"])
            status = child.wait()
        finally:
            _end(child)
        if last.get("type") == "result" and status == 0:
            return last
        if last.get("type") == "error":
            raise _error_class(last["class"])(last["message"])
        raise _death(arguments, status, stderr)


def _child_environment(job: str) -> Mapping[str, str]:
    # No GPU is needed, and a CUDA context would take half a GB of it. Only a download may use the network.
    offline = {} if job == "download" else {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    own = {"PIPO_PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    # One thread reads and others quantize; those that torch starts for each of them would only spin beside them. Large
    # tensors come and go in a thread per window of text: each thread's share of the heap would keep what it once had.
    threads = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "4194304"}
    return os.environ | own | offline | threads


def _end(child: subprocess.Popen[str]) -> None:
    """The child sees its stdin close and stops; what it has finished stays for the next run."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.stdin.close()
            child.wait(_STOP_DEADLINE_S)
    finally:
        child.kill()  # does nothing to one that has ended
        child.wait()
        child.stdout.close()


def _error_class(name: str) -> type[PipoError]:
    found = getattr(errors, name, PipoError)
    return found if isinstance(found, type) and issubclass(found, PipoError) else PipoError


def _death(arguments: list[str], status: int, stderr: IO[bytes]) -> PipoError:
    what = f"{'downloading' if arguments[0] == 'download' else 'preparing'} {arguments[1]}"
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        memory = ", most likely because memory ran out; close other programs or raise the memory limit, and"
        return ResourceError(
            f"{what}: the process was ended by {name}{memory if -status == signal.SIGKILL else ';'} run it again: it "
            "goes on where it stopped"
        )
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return PipoError(f"{what}: the process ended with status {status}: {said[:300]}")
