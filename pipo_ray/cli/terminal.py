"""What the commands write: text to stdout, everything about it to stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from pipo_ray.errors import PipoError
from pipo_ray.session.memory import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Progress = Callable[[str, int, int], None]

# A model may write escape sequences, and a terminal obeys them (title, clipboard, what is on the screen).
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}

_DOING = {
    "download": "downloading", "inspect": "looking at the model", "pack": "packing", "verify": "verifying",
    "sensitivity": "measuring which weights need their bits, once",
    "calibrate": "calibrating on a text",
    "measure": "measuring the drive, once, a few seconds",
}  # fmt: skip
_STARTING = "starting Ray and the four actors, about ten seconds"
_LINE_INTERVAL_S = 5.0


class OutputClosed(Exception):
    """Nobody reads our stdout any more (`pipo run ... | head`), or our stderr (`2>&1 | head`)."""


class Output:
    """Our stdout. What other code prints meanwhile goes to stderr: see `reserved`."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        self._on_terminal = self._stream.isatty()
        with contextlib.suppress(AttributeError, ValueError):
            # An old locale shall not end a run in its middle.
            self._stream.reconfigure(errors="replace")  # type: ignore[union-attr]

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Ray and libraries print to sys.stdout; what is on ours must be the answer alone."""
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def write(self, text: str) -> None:
        """Write at once. Raises OutputClosed."""
        try:
            self._stream.write(text.translate(_CONTROLS) if self._on_terminal else text)
            self._stream.flush()
        except BrokenPipeError as error:
            raise OutputClosed from error
        except OSError as error:
            raise unwritable(error) from error


def unwritable(error: OSError) -> PipoError:
    """The disk is full, most likely."""
    discard_stdout()
    return PipoError(f"stdout cannot be written: {error.strerror}; free some disk space, or choose another place")


def discard_stdout() -> None:
    """What is still buffered must not fail again when the interpreter ends and flushes it."""
    _discard(sys.__stdout__, 1)


def discard_stderr() -> None:
    """The same for stderr."""
    _discard(sys.__stderr__, 2)


def _discard(stream: TextIO | None, number: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number if stream is None else stream.fileno())


def open_what_is_closed() -> None:
    """Stdin, stdout and stderr lead nowhere if they were closed by whoever started us (`pipo run ... >&-`).

    Otherwise Python has None in their place, and the next file that somebody opens takes their number: a library that
    prints would write into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def stderr_console() -> Console:
    """A rich console on stderr that takes text as it is. Printing raises OutputClosed."""
    from rich.console import Console

    class StderrConsole(Console):
        def on_broken_pipe(self) -> None:
            raise OutputClosed

    return StderrConsole(stderr=True, markup=False, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A line on stderr. Raises OutputClosed."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError as error:
        raise OutputClosed from error


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr that goes when it is done; plain lines where stderr is not a terminal.

    Yields a function of (phase, done, total) in bytes; a total of 0 is unknown.
    """
    if sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _Lines().report


class _Lines:
    """A line when a phase begins, one every few seconds, and one when it ends."""

    def __init__(self) -> None:
        self._phase = ""
        self._last_s = 0.0
        self._whole = False

    def report(self, phase: str, done: int, total: int) -> None:
        if phase == "start":
            say(_STARTING)
            return
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._whole = phase, False
        elif self._whole or not total or (now - self._last_s < _LINE_INTERVAL_S and done < total):
            return
        self._last_s, self._whole = now, bool(total) and done >= total
        share = f": {format_size(done)} of {format_size(total)}, {100 * done // total} %" if total else ""
        say(f"{_DOING.get(phase, phase)}{share}")


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """Shown from the first report of a phase to its last; Ray's start, which follows, has no bar."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr_console(),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def report(phase: str, done: int, total: int) -> None:
        if phase == "start":
            bar.stop()
            say(_STARTING)
            return
        for other in [one for one in tasks if one != phase]:
            bar.remove_task(tasks.pop(other))
        if phase not in tasks:
            tasks[phase] = bar.add_task(_DOING.get(phase, phase), total=None)
            bar.start()
        bar.update(tasks[phase], completed=done, total=total or None)
        if done >= total > 0:
            bar.stop()

    try:
        yield report
    finally:
        bar.stop()


@contextlib.contextmanager
def counting_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Like `progress_bar` for things that are counted. Yields a function of how many are done."""
    if not sys.stderr.isatty():
        last_s = time.monotonic()

        def line(done: int) -> None:
            nonlocal last_s
            if done >= total or time.monotonic() - last_s >= _LINE_INTERVAL_S:
                last_s = time.monotonic()
                say(f"{what}: {done} of {total}, {100 * done // max(1, total)} %")

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
