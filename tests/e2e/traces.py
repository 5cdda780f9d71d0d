"""Reading what the actors wrote down while they worked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipo_ray import LLM


@dataclass(frozen=True)
class Event:
    """Seconds are of `time.perf_counter`, one clock for all processes. `end` equals `begin` for a mark."""

    actor: str
    pid: int
    kind: str
    begin: float
    end: float
    labels: dict[str, Any]


def live_events(llm: LLM, since: float = 0.0) -> list[Event]:
    """The events so far of a running LLM with a trace, those that ended after `since`."""
    folder = llm._stage.trace_folder
    assert folder is not None
    found = []
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                raw = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            end = raw.get("end", raw["begin"])
            if end >= since:
                found.append(Event(raw["actor"], raw["pid"], raw["kind"], raw["begin"], end, raw["labels"]))
    return sorted(found, key=lambda event: event.begin)


def finished_trace(file: Path) -> list[Event]:
    """The events of a Chrome trace; `pid` is the operating system's, times count from the trace's beginning."""
    raw = json.loads(file.read_text())["traceEvents"]
    names = {entry["pid"]: entry["args"]["name"] for entry in raw if entry["name"] == "process_name"}
    found = []
    for entry in raw:
        if entry["ph"] == "M":
            continue
        begin = entry["ts"] / 1e6
        args = dict(entry["args"])
        pid = args.pop("os_pid")
        found.append(Event(names[entry["pid"]], pid, entry["cat"], begin, begin + entry.get("dur", 0.0) / 1e6, args))
    return found


def overlap(first: list[Event], second: list[Event]) -> float:
    """Seconds in which an event of `first` and one of `second` ran at the same time."""
    ones, others = _union(first), _union(second)
    total, at = 0.0, 0
    for begin, end in ones:
        while at < len(others) and others[at][1] <= begin:
            at += 1
        number = at
        while number < len(others) and others[number][0] < end:
            total += min(end, others[number][1]) - max(begin, others[number][0])
            number += 1
    return total


def covered(events: list[Event]) -> float:
    """Seconds in which one of `events` ran."""
    return sum(end - begin for begin, end in _union(events))


def _union(events: list[Event]) -> list[tuple[float, float]]:
    spans: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda event: event.begin):
        if spans and event.begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], event.end))
        else:
            spans.append((event.begin, event.end))
    return spans
