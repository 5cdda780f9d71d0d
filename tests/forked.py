"""Programs that need the same imports, each in a process of its own, without the seconds that importing takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

_SERVE = """
import json, os, sys, traceback

for _line in sys.stdin:
    _program, _streams = json.loads(_line)
    if os.fork() == 0:
        for _number, _flags in enumerate((os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)):
            os.dup2(os.open(_streams[_number], _flags), _number)
        _status = 0
        try:
            exec(_program, {"__name__": "__main__"})
        except SystemExit as _ended:
            _status = _ended.code or 0
        except BaseException:
            traceback.print_exc()
            _status = 1
        sys.stdout.flush()
        os._exit(_status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class Forked:
    """A Python process that has run `prelude`, and from which one is forked for each program. A context manager.

    What the programs write goes through files in `folder`.
    """

    def __init__(self, prelude: str, folder: Path) -> None:
        self._folder, self._started = folder, 0
        # Threads that the prelude leaves are not in a forked process, which would wait for those of OpenMP for ever.
        self._child = subprocess.Popen(
            [sys.executable, "-c", prelude + _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        """Its exit status and what it wrote; its stdin is empty."""
        self._started += 1
        files = [self._folder / f"{self._started}.{name}" for name in ("out", "err")]
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps([program, [os.devnull, *map(str, files)]]), file=self._child.stdin, flush=True)
        status = self._child.stdout.readline()
        assert status, "the prelude failed"
        return subprocess.CompletedProcess([], int(status), *(file.read_text() for file in files))

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.communicate()
