"""The roll of actors, a small mapped file in the session folder: who was started when, so that anybody can tell how
often an actor died.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LOADER = "NvmeLoader"
ACTORS = (LOADER, "StagingPool", "ComputeWorker", "Scheduler")
DEATHS_ALLOWED = 2
"""So many deaths of one actor within `WINDOW_S` seconds are mended; one more ends the run."""
WINDOW_S = 60.0

_ROW_BYTES = 64
_REMEMBERED = 5
# float64 words of a row: number of starts, pid, then the last start times.
_STARTS, _PID, _TIMES = 0, 1, 2


def loader_name(number: int) -> str:
    """The loader of drive `number`, from 0: NvmeLoader, NvmeLoader-2, ..."""
    return f"{LOADER}-{number + 1}" if number else LOADER


class ActorRoll:
    """Over the file at `path`, one row per actor; each actor writes its own row. The driver makes the file with
    `create`. `actors` are those of ACTORS, and behind them the loaders of further drives.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        num_rows = Path(path).stat().st_size // _ROW_BYTES
        self.actors = (*ACTORS, *(loader_name(1 + n) for n in range(num_rows - len(ACTORS))))
        self._rows = np.memmap(path, np.float64, "r+", shape=(num_rows, _ROW_BYTES // 8))

    @staticmethod
    def create(path: str | Path, num_loaders: int = 1) -> ActorRoll:
        """An empty roll."""
        Path(path).write_bytes(bytes(_ROW_BYTES * (len(ACTORS) + num_loaders - 1)))
        return ActorRoll(path)

    def sign_in(self, actor: str) -> int:
        """The actor's process has started. Returns the number of starts so far, this one included."""
        row = self._rows[self.actors.index(actor)]
        starts = int(row[_STARTS]) + 1
        row[_TIMES + starts % _REMEMBERED] = time.time()
        row[_PID] = os.getpid()
        row[_STARTS] = starts
        return starts

    def starts(self, actor: str) -> int:
        """How often the actor was started."""
        return int(self._rows[self.actors.index(actor)][_STARTS])

    def pid(self, actor: str) -> int:
        """The pid of its latest process; 0 before the first."""
        return int(self._rows[self.actors.index(actor)][_PID])

    def start_times(self, actor: str) -> list[float]:
        """Seconds since the epoch of its latest starts, oldest first, at most five."""
        row = self._rows[self.actors.index(actor)]
        starts = int(row[_STARTS])
        return [float(row[_TIMES + n % _REMEMBERED]) for n in range(max(1, starts - _REMEMBERED + 1), starts + 1)]

    def lost(self) -> str | None:
        """The actor that has died more often than is mended, or None."""
        for actor in self.actors:
            if died_too_often(self.start_times(actor), self.starts(actor)):
                return actor
        return None


def died_too_often(start_times: Sequence[float], starts: int) -> bool:
    """Whether more than `DEATHS_ALLOWED` restarts lie within `WINDOW_S` seconds. The first start is no restart."""
    restarts = list(start_times)[1:] if starts == len(start_times) else list(start_times)
    recent = restarts[-(DEATHS_ALLOWED + 1) :]
    return len(recent) > DEATHS_ALLOWED and recent[-1] - recent[0] <= WINDOW_S
