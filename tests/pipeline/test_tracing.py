"""Traces: written as things happen, merged into one file that Perfetto reads."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from pipo_ray.pipeline.tracing import NO_TRACE, TraceWriter, merge_traces


def merged(folder: Path, *files: Path) -> list[dict[str, Any]]:
    merge_traces(files, folder / "out.json")
    document = json.loads((folder / "out.json").read_text())
    assert document["displayTimeUnit"] == "ms"
    return document["traceEvents"]


def test_without_a_file_nothing_is_kept() -> None:
    assert not NO_TRACE.enabled
    NO_TRACE.add("weight load", 1.0, 2.0, {})
    NO_TRACE.mark("start", {})


def test_merged_traces_are_in_chromes_format(tmp_path: Path) -> None:
    loader, compute = (TraceWriter(tmp_path / name, name) for name in ("loader", "compute"))
    loader.add("weight load", 10.0, 10.5, {"piece": "layers.0.mlp", "bytes": 4096})
    loader.add("weight load", 10.5, 10.75, {"piece": "layers.1.mlp", "bytes": 4096})
    compute.add("compute", 10.5, 11.0, {"piece": "layers.0.mlp"})
    compute.mark("sweep", {"tokens": 3})
    events = merged(tmp_path, tmp_path / "loader", tmp_path / "compute")
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(names.values()) == ["compute", "loader"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["compute", "start", "start", "sweep", "weight load"]
    real = [event for event in events if event["ph"] != "M"]
    assert [event["ts"] for event in real] == sorted(event["ts"] for event in real)
    assert real[0]["ts"] == 0
    complete = [event for event in real if event["ph"] == "X"]
    assert [(names[event["pid"]], tracks[event["tid"]], event["name"], event["dur"]) for event in complete] == [
        ("loader", "weight load", "layers.0.mlp", 500_000.0),
        ("loader", "weight load", "layers.1.mlp", 250_000.0),
        ("compute", "compute", "layers.0.mlp", 500_000.0),
    ]
    assert complete[0]["args"]["bytes"] == 4096
    instants = [event for event in real if event["ph"] == "i"]
    assert len(instants) == 3
    assert all(event["s"] == "p" and "dur" not in event for event in instants)


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    """An actor that was killed while it wrote."""
    writer = TraceWriter(tmp_path / "loader", "loader")
    writer.add("weight load", 1.0, 2.0, {"piece": "a"})
    whole = (tmp_path / "loader").read_text()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        (tmp_path / "torn").write_text(whole + whole.splitlines()[-1][:cut])
        events = [event for event in merged(tmp_path, tmp_path / "torn") if event["ph"] == "X"]
        assert [event["name"] for event in events] == ["a"] * (1 + (cut == len(whole.splitlines()[-1])))


def test_a_successor_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "loader", "loader").add("weight load", 1.0, 2.0, {"piece": "a"})
    with open(tmp_path / "loader", "a") as file:
        file.write('{"actor": "loa')
    TraceWriter(tmp_path / "loader", "loader").add("weight load", 3.0, 4.0, {"piece": "b"})
    events = merged(tmp_path, tmp_path / "loader")
    assert [event["name"] for event in events if event["ph"] == "X"] == ["a", "b"]
    assert len([event for event in events if event["ph"] == "i"]) == 2


def test_an_empty_trace(tmp_path: Path) -> None:
    assert merge_traces([], tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["traceEvents"] == []


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", "loader")

    def write() -> None:
        for number in range(200):
            writer.add("weight load", number, number + 1, {"piece": "x" * 100})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "t").read_text().splitlines()
    assert len(lines) == 801
    assert all(json.loads(line)["actor"] == "loader" for line in lines)
