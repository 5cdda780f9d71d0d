"""A runner in a process and a memory control group of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cgroup import Group


class PeerError(Exception):
    """A peer ended or did not answer. Its text is the reason."""


class PeerProcess:
    """`command` plus the options as JSON, in a fresh group of `limit` bytes, on so many cores. A context manager.

    `answer_s` is how long the peer may take to start, or to answer a request, before it is ended. What it prints goes
    to `log`. Raises PeerError when it is gone, with the reason that the kernel or the log gives.
    """

    def __init__(
        self, command: Sequence[str], options: dict[str, Any], *, limit: int, cores: int, log: Path, answer_s: float,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.group = Group(limit)
        self._log, self._answer_s = log, answer_s
        allowed = sorted(os.sched_getaffinity(0))[:cores]

        def enter() -> None:
            self.group.enter()
            os.sched_setaffinity(0, allowed)

        with open(log, "w") as errors:
            self._process = subprocess.Popen(
                [*command, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, preexec_fn=enter, env=os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
            )  # fmt: skip

    def start(self) -> dict[str, Any]:
        """Wait until it is ready: `ready_s`, `versions` and `notes`."""
        return self._read()

    def ask(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Generate: `seconds` and `token_ids`, a list for each prompt. See `protocol.py`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        return self._read()

    def usage(self) -> dict[str, int]:
        """The group's highest use in bytes, how often it met its limit, and how many processes the kernel killed."""
        return {
            "max_usage_in_bytes": self.group.number("max_usage_in_bytes"),
            "failcnt": self.group.number("failcnt"),
            "oom_kill": self.group.table("oom_control")["oom_kill"],
        }

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._answer_s, give_up)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()  # or the program would not end before the timer does
        if not line:
            raise PeerError(self._reason(late.is_set()))
        return json.loads(line)  # type: ignore[no-any-return]

    def _reason(self, late: bool) -> str:
        status = self._process.wait()
        kills = self.usage()["oom_kill"]
        if kills:
            return f"killed by the kernel: out of the group's memory (oom_kill {kills})"
        if late:
            return f"no answer within {self._answer_s:.0f} s"
        return f"ended with status {status}: {_last_words(self._log)}"

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.group.__exit__()


def run_alone(command: Sequence[str], *arguments: str, log: Path) -> None:
    """Run something that only prepares, outside of any group. Raises PeerError with its last line."""
    with open(log, "w") as output:
        done = subprocess.run(
            [*command, *arguments], stdout=output, stderr=subprocess.STDOUT, check=False, stdin=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    if done.returncode:
        raise PeerError(f"{Path(command[-1]).name} ended with status {done.returncode}: {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-2:])[-300:]
