"""`pipo chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipo_ray.cli.options import (
    add_model_options,
    add_sampling_options,
    engine_arguments,
    find_folder,
    open_llm,
    sampling_params,
)
from pipo_ray.cli.prompts import require_unicode
from pipo_ray.cli.terminal import Output, say
from pipo_ray.errors import InputError

if TYPE_CHECKING:
    from pipo_ray.llm import LLM
    from pipo_ray.params import SamplingParams

Message = dict[str, str]

_COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


def add_command(commands: Any) -> None:
    """Declare `pipo chat`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="have a conversation",
        description="A conversation with the checkpoint's chat template. " + _COMMANDS + ".",
        allow_abbrev=False,
    )
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_sampling_options(parser, temperature=0.7, max_tokens=1024)
    parser.set_defaults(command=chat)


def chat(options: argparse.Namespace) -> int:
    """Do it. Returns the exit status."""
    params = sampling_params(options)
    arguments = engine_arguments(options) | {"max_kv_sequences": 1}
    folder = find_folder(options.model)
    require_chat_template(folder, options.model)
    output = Output()
    with contextlib.ExitStack() as stack:
        with output.reserved():
            llm = stack.enter_context(open_llm(str(folder), arguments))
        Conversation(llm, params, options.system, output).hold()
    return 0


def require_chat_template(folder: Path, model: str) -> None:
    """Raise InputError if `model`, whose store is in `folder`, has no chat template."""
    if (folder / "chat_template.jinja").is_file() or not (folder / "config.json").is_file():
        return  # what else is wrong with a folder is said by whoever opens it
    for name in ("tokenizer_config.json", "chat_template.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template"):
                return
    # These two know the conversation's form without a template.
    if any((folder / name).is_file() for name in ("tekken.json", "params.json")):
        return
    raise InputError(f"{model} has no chat template: it is no chat model; use `pipo run`, or choose a chat model")


class Conversation:
    """Lines in, answers out, and all of them remembered."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, output: Output) -> None:
        self._llm, self._params, self._system = llm, params, system
        self._output = output
        self._on_terminal = sys.stdin.isatty()
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system message."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def hold(self) -> None:
        """Until the end of the input, /exit, or Ctrl-C where nothing is being answered."""
        if self._on_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its line editing and history)
            say(_COMMANDS)
        with contextlib.suppress(KeyboardInterrupt):  # it may come between two lines
            self._hold()

    def _hold(self) -> None:
        while (line := self._read()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit":
                    return
                case "/reset":
                    self.reset()
                    say("the conversation is forgotten")
                case "/help":
                    say(_COMMANDS)
                case _:
                    self._turn(line)

    def _read(self) -> str | None:
        try:
            return input("> ") if self._on_terminal else input()
        except (EOFError, KeyboardInterrupt):
            if self._on_terminal:
                say("")
            return None
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not UTF-8 ({error.reason} at byte {error.start}); give UTF-8") from error

    def _turn(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        try:
            require_unicode(line, "the line")
            answer = self._answer()
        except InputError as error:
            # Too long by now, most likely; the conversation before it still holds.
            self.messages.pop()
            if not self._on_terminal:
                raise
            say(f"pipo: error: {error} (/reset forgets the conversation)")
            return
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()

    def _answer(self) -> str:
        """Stream the answer; Ctrl-C ends it, and what there is of it counts."""
        text = ""
        try:
            # Closing the stream aborts the request, wherever it is.
            stream = self._llm.stream_chat(self.messages, self._params)
            with self._output.reserved(), contextlib.closing(stream):  # type: ignore[type-var]
                for output in stream:
                    grown = output.outputs[0].text
                    # Many models begin with a space or a line break; for the conversation it stays.
                    self._output.write(grown[len(text) :] if text.strip() else grown.lstrip())
                    text = grown
        except KeyboardInterrupt:
            say(" (stopped)")
        self._output.write("\n")
        return text
