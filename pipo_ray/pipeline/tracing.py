"""Trace events, written as they happen so that a killed actor's are not lost, and merged into one Chrome/Perfetto
trace.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class TraceWriter:
    """Appends events of one actor to `path` (JSON lines); with None it does nothing. Times are `time.perf_counter()`
    seconds, which on Linux is one clock for all processes.
    """

    def __init__(self, path: str | Path | None, actor: str) -> None:
        self._actor = actor
        self._lock = threading.Lock()
        self._file = open(path, "a", buffering=1, encoding="utf-8") if path is not None else None  # noqa: SIM115
        if self._file is not None:
            if self._file.tell():
                self._file.write("\n")  # a predecessor that was killed may have left half a line
            self.mark("start", {})

    @property
    def enabled(self) -> bool:
        """Whether events are kept."""
        return self._file is not None

    def add(self, kind: str, begin_s: float, end_s: float, labels: Mapping[str, object]) -> None:
        """A task of `kind` ran from `begin_s` to `end_s`."""
        if self._file is not None:
            self._write({"kind": kind, "begin": begin_s, "end": end_s, "labels": dict(labels)})

    def mark(self, kind: str, labels: Mapping[str, object]) -> None:
        """Something happened now."""
        if self._file is not None:
            self._write({"kind": kind, "begin": time.perf_counter(), "labels": dict(labels)})

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps({"actor": self._actor, "pid": os.getpid(), **event})
        with self._lock:
            assert self._file is not None
            self._file.write(line + "\n")


NO_TRACE = TraceWriter(None, "")


def merge_traces(files: Iterable[Path], destination: str | Path) -> int:
    """Write the events of `files` to `destination` in Chrome's trace format, one process per actor and one track per
    kind of task.

    Returns the number of events. Format: "Trace Event Format", JSON object form, complete ("X") and instant ("i")
    events, microseconds.
    """
    events: list[dict[str, Any]] = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # the last line of a process that was killed while it wrote
    origin = min((event["begin"] for event in events), default=0.0)
    actors = {name: number for number, name in enumerate(sorted({event["actor"] for event in events}), 1)}
    tracks: dict[tuple[str, str], int] = {}
    output: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for name, pid in actors.items()
    ]
    for event in sorted(events, key=lambda e: float(e["begin"])):
        key = (event["actor"], event["kind"])
        pid = actors[event["actor"]]
        if key not in tracks:
            tracks[key] = len(tracks) + 1
            output.append(
                {"ph": "M", "name": "thread_name", "pid": pid, "tid": tracks[key], "args": {"name": event["kind"]}}
            )
        entry = {
            "name": str(event["labels"].get("piece", event["kind"])), "cat": event["kind"], "pid": pid,
            "tid": tracks[key],
            "ts": (event["begin"] - origin) * 1e6, "args": {**event["labels"], "os_pid": event["pid"]},
        }  # fmt: skip
        if "end" in event:
            output.append({**entry, "ph": "X", "dur": (event["end"] - event["begin"]) * 1e6})
        else:
            output.append({**entry, "ph": "i", "s": "p"})
    Path(destination).write_text(json.dumps({"traceEvents": output, "displayTimeUnit": "ms"}), encoding="utf-8")
    return len(events)
