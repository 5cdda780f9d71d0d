"""The command line: which command, and how each one ends."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from pipo_ray import __version__
from pipo_ray.cli import chat, pack, quality, run, verify
from pipo_ray.cli.terminal import (
    OutputClosed,
    discard_stderr,
    discard_stdout,
    open_what_is_closed,
    unwritable,
)
from pipo_ray.errors import InputError, PipoError

_STATUS_INTERRUPTED = 128 + signal.SIGINT
_STATUS_TERMINATED = 128 + signal.SIGTERM
_STATUS_PIPE_CLOSED = 128 + signal.SIGPIPE


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, in the form of every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a parsed namespace has the command's function as `command`."""
    parser = _Parser(
        prog="pipo",
        description="Run a large language model on a machine it does not fit in.",
        epilog="Exit status: 0 done; 1 something failed; 2 something is wrong with what was given or with the machine; "
        "130 Ctrl-C. PIPO_DEBUG=1 shows where an error came from. PIPO_CACHE is the folder for packed models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pipo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (run, chat, pack, verify, quality):
        module.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name (None: the process's own). Returns the exit status."""
    open_what_is_closed()
    with _sigterm_unwinds():
        try:
            return _run(arguments)
        except SystemExit as ended:  # argparse's --help and --version, or SIGTERM
            return ended.code if isinstance(ended.code, int) else 0
        except KeyboardInterrupt:
            return _STATUS_INTERRUPTED
        except OutputClosed:
            discard_stdout()
            discard_stderr()
            return _STATUS_PIPE_CLOSED


def _run(arguments: Sequence[str] | None) -> int:
    try:
        parsed = build_parser().parse_args(arguments)
        status: int = parsed.command(parsed)
        _flush()
        return status
    except PipoError as error:
        return _fail(str(error), error.exit_status)
    except OutputClosed:
        raise
    except Exception as error:  # a bug, or something of the machine's that nobody thought of
        return _fail(f"{type(error).__name__}: {error} (PIPO_DEBUG=1 shows where it came from)", 1)


def _fail(message: str, status: int) -> int:
    if os.environ.get("PIPO_DEBUG", "") not in ("", "0"):
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print(f"pipo: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise OutputClosed from error
    except OSError as error:
        raise unwritable(error) from error


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM leaves through every `with`, as Ctrl-C does."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(_STATUS_TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread: the program that calls us has its own idea of it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
