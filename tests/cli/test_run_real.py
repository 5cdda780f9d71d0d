"""`pipo run` and `pipo chat` with everything that belongs to them: Ray, the four actors, a model that streams."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2e.checkpoints import packed

from pipo_ray.cli.result import JSON_KEYS

PIPO = [sys.executable, "-m", "pipo_ray.cli"]
NOISE = "\ufffd".encode()
"""Is in the middle of the text soon: its bytes are random."""
BUDGET = ["--memory", "2GiB", "--weight-memory", "400KiB", "--device", "cpu", "--ray-address", "local"]


@pytest.fixture(scope="module")
def store(chat_checkpoint: Path) -> str:
    """Packed once for all tests here."""
    return str(packed(chat_checkpoint))


def pipo(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PIPO, *arguments], input=stdin, capture_output=True, text=True, timeout=240)


def session_processes() -> set[int]:
    """Processes of sessions that this test run started."""
    marker = f"PIPO_TEST_RUN={os.environ['PIPO_TEST_RUN']}".encode()
    found = set()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            environ = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if marker in environ and any(one.startswith(b"PIPO_SESSION=") for one in environ):
            found.add(int(entry.parent.name))
    return found


def assert_nothing_left() -> None:
    deadline = time.monotonic() + 10
    while session_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not session_processes()


def documented(indent: str) -> set[str]:
    """The keys that --help lists at this indentation."""
    lines = re.findall(rf"^{indent}(\w+(?:, \w+)*)(?::? )", JSON_KEYS, re.MULTILINE)
    return {key for line in lines for key in line.split(", ")}


@pytest.mark.alone  # --background takes only the processor time that nobody else wants
def test_json_streams_more_than_the_budget_holds(store: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a second, longer one"}\n{"prompt_token_ids": [5, 6, 7]}\n')
    done = pipo(
        "run", store, "-p", "first", "--prompts", str(tmp_path / "prompts.jsonl"), "--max-tokens", "6", "--ignore-eos",
        "--logprobs", "2", "--json", "--explain", "--background", "--trace", str(tmp_path / "trace.json"), *BUDGET,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [result["prompt"] for result in document["results"]] == ["first", "a second, longer one", None]
    for result in document["results"]:
        assert result["num_prompt_tokens"] == len(result["prompt_token_ids"])
        assert result["num_generated_tokens"] == len(result["token_ids"]) == len(result["logprobs"]) == 6
        assert result["finish_reason"] == "length"
        assert result["ttft_s"] > 0
        assert result["tokens_per_s"] > 0
    assert document["weight_memory_bytes"] <= 400 << 10 < document["model_bytes"]
    assert document["bytes_streamed"] > document["model_bytes"]
    assert document["sweeps"] >= 6
    assert 0 < document["peak_memory_bytes"] <= document["memory_budget_bytes"] == 2 << 30
    assert {stage["stage"] for stage in document["stages"]} >= {"NvmeLoader", "ComputeWorker"}
    # Both ways: every key is documented where it is, and what is documented is there (--n above 1 adds "samples").
    assert documented("  ") == document.keys()
    for result in document["results"]:
        assert documented("    ") - {"samples"} == result.keys()
    assert "limit" in document["explanation"]
    assert document["explanation"].endswith(".")
    assert json.loads((tmp_path / "trace.json").read_text())
    assert_nothing_left()


def test_text_streams_and_the_conversation_goes_on(store: str) -> None:
    done = pipo("chat", store, "--max-tokens", "5", "--temperature", "0", *BUDGET, stdin="hello\nand again\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    assert "pipo: error" not in done.stderr
    assert_nothing_left()


def test_a_prompt_that_is_too_long_is_one_line(store: str) -> None:
    done = pipo("run", store, "-p", "x" * 600, *BUDGET)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pipo: error: ")
    assert "512" in last
    assert "Traceback" not in done.stderr
    assert_nothing_left()


class Terminal:
    """The command with a terminal of its own, whose Ctrl-C goes to all processes in it."""

    def __init__(self, *arguments: str) -> None:
        self._primary, secondary = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, *PIPO[1:], *arguments],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
        )
        os.close(secondary)
        os.set_blocking(self._primary, False)
        self._seen = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._primary)

    def type(self, keys: bytes) -> None:
        os.write(self._primary, keys)

    def wait_for(self, wanted: bytes, timeout_s: float = 120) -> None:
        """Read up to and with `wanted`."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self._seen:
            assert time.monotonic() < deadline, f"{wanted!r} did not come; there was {self._seen[-2000:]!r}"
            assert self.process.poll() is None, f"it ended with {self._seen[-2000:]!r}"
            self._read()
        self._seen = self._seen.partition(wanted)[2]

    def end(self, timeout_s: float = 30) -> tuple[int, bytes]:
        """Exit status, and what was written that nobody waited for."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end; there was {self._seen[-2000:]!r}"
            self._read()
        self._read()
        return self.process.returncode, self._seen

    def _read(self) -> None:
        try:
            self._seen += os.read(self._primary, 65536)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # EIO: nobody has the terminal open any more
            time.sleep(0.02)


_IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_ctrl_c_in_a_chat_stops_the_answer_and_then_leaves(store: str) -> None:
    with Terminal("chat", store, "--max-tokens", "450", "--ignore-eos", *BUDGET) as terminal:
        terminal.wait_for(b"> ")
        terminal.type(b"hello\n")
        terminal.wait_for(b"hello\r\n")
        terminal.wait_for(NOISE)
        terminal.type(b"\x03")
        terminal.wait_for(b"(stopped)", 20)
        terminal.wait_for(b"> ", 20)
        terminal.type(b"/reset\n")
        terminal.wait_for(b"forgotten", 20)
        terminal.type(b"\x03")
        status, rest = terminal.end()
        assert status == 0
        assert b"Traceback" not in rest
    assert_nothing_left()


def test_a_terminal_gets_a_progress_bar(chat_checkpoint: Path, tmp_path: Path) -> None:
    with Terminal("pack", str(chat_checkpoint), str(tmp_path / "store")) as terminal:
        status, seen = terminal.end(120)
    assert status == 0
    bar = re.search(rb"packing[^\r\n]*\xe2\x94\x81[^\r\n]*[KM]iB", seen)
    assert bar is not None, seen[-2000:]
    assert seen.rstrip().endswith(b"748.0 KiB"), "the last line is the result, and the bar is gone"
    assert b"\x1b[2K" in seen


@pytest.mark.parametrize("moment", ["start", "answer"])
def test_ctrl_c_in_a_run_leaves_nothing(store: str, moment: str) -> None:
    with Terminal("run", store, "-p", "hello", "--max-tokens", "450", "--ignore-eos", *BUDGET) as terminal:
        if moment == "start":
            terminal.wait_for(b"starting Ray")
            time.sleep(0.5)  # while it does
        else:
            terminal.wait_for(NOISE)
        terminal.type(b"\x03")
        status, rest = terminal.end()
        assert status == 130
        assert b"Traceback" not in rest
    assert_nothing_left()
