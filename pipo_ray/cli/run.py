"""`pipo run`: complete prompts, streaming the text."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
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
from pipo_ray.cli.prompts import Prompt, collect_prompts, most_tokens
from pipo_ray.cli.result import JSON_KEYS, to_json
from pipo_ray.cli.table import print_table
from pipo_ray.cli.terminal import Output, say, stderr_console
from pipo_ray.errors import InputError
from pipo_ray.outputs import RequestOutput
from pipo_ray.report.explain import explain, measured

if TYPE_CHECKING:
    from pipo_ray.llm import LLM
    from pipo_ray.params import SamplingParams

_HEADER_CHARACTERS = 60


def add_command(commands: Any) -> None:
    """Declare `pipo run`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="generate text",
        description="Complete prompts. The text goes to stdout as it comes, a table to stderr when it is done. "
        "Several prompts are one batch.",
        epilog=JSON_KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    group = parser.add_argument_group("prompts", "any number of each")
    group.add_argument("-p", "--prompt", metavar="TEXT", action="append", default=[], help="a prompt")
    group.add_argument("--prompt-ids", metavar="IDS", action="append", default=[], help="a prompt as token ids: 1,2,3")
    group.add_argument(
        "--prompts", metavar="FILE", action="append", default=[],
        help='one prompt per line, or JSON Lines with {"prompt": ...} or {"prompt_token_ids": [...]}; - is stdin',
    )  # fmt: skip
    add_sampling_options(parser, temperature=0.0, max_tokens=128)
    parser.add_argument("--n", metavar="N", type=int, default=1, help="samples per prompt")
    parser.add_argument("--logprobs", metavar="N", type=int, help="log probabilities of so many tokens (with --json)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; its keys are listed below")
    parser.add_argument("--explain", action="store_true", help="say what limits this run, and what would help most")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Do it. Returns the exit status; everything that can be checked is checked before anything is started."""
    params = sampling_params(options, n=options.n, logprobs=options.logprobs)
    arguments = engine_arguments(options)
    prompts = collect_prompts(options.prompt, options.prompt_ids, options.prompts)
    arguments |= {"max_kv_tokens": most_tokens(prompts, params), "max_kv_sequences": len(prompts) * params.n}
    folder = find_folder(options.model)
    _require_tokenizer(folder, options.model, prompts)
    output = Output()
    check = partial(_check_prompts, prompts=prompts, params=params)
    with output.reserved(), open_llm(str(folder), arguments, check) as llm:
        if options.json:
            outputs = llm.generate(prompts, params)
        elif len(prompts) == 1 and params.n == 1:
            outputs = [_stream(llm, prompts[0], params, output)]
        else:
            outputs = _stream_batch(llm, prompts, params, output)
        report = llm.report()
    if options.explain:
        generated = sum(one.metrics.num_generated_tokens for one in outputs)
        report["explanation"] = " ".join(explain(measured(report, generated)))
    if options.json:
        output.write(to_json(options.model, outputs, report) + "\n")
    else:
        print_table(stderr_console(), outputs, report)
        if (line := context_line(outputs, params.max_tokens, llm.max_model_len)) is not None:
            say(line)
        if options.explain:
            say(report["explanation"])
    return 0


def _check_prompts(llm: LLM, prompts: list[Prompt], params: SamplingParams) -> None:
    llm.check_prompts(prompts, params)


def _require_tokenizer(folder: Path, model: str, prompts: list[Prompt]) -> None:
    """Raise InputError for a prompt that is text where there is nothing to turn it into tokens."""
    from pipo_ray.model.tokenizer import TOKENIZER_FILES

    if not any(isinstance(prompt, str) for prompt in prompts) or not (folder / "config.json").is_file():
        return
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{model} has no tokenizer: give prompts as token ids, with --prompt-ids or --prompts")


def context_line(outputs: Sequence[RequestOutput], max_tokens: int | None, max_model_len: int) -> str | None:
    """Which answers have fewer than `max_tokens` tokens because prompt and answer fill the context; None if none do."""
    lengths = [
        len(sample.token_ids)
        for output in outputs
        for sample in output.outputs
        if sample.finish_reason == "length" and len(output.prompt_token_ids) + len(sample.token_ids) >= max_model_len
    ]
    cut = [length for length in lengths if max_tokens is not None and length < max_tokens]
    if not cut:
        return None
    which = "the answer ends" if len(cut) == 1 else f"{len(cut)} answers end"
    return (
        f"{which} before --max-tokens {max_tokens}: prompt and answer together fill the context of {max_model_len} "
        "tokens"
    )


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams, out: Output) -> RequestOutput:
    """Print the text as it grows."""
    last: RequestOutput | None = None
    printed = ""
    try:
        with contextlib.closing(llm.stream([prompt], params)) as stream:  # type: ignore[type-var]
            for last in stream:
                text = last.outputs[0].text
                out.write(text[len(printed) :])
                printed = text
    finally:
        if printed and not printed.endswith("\n"):
            out.write("\n")
    assert last is not None
    if not printed:
        # A checkpoint without a tokenizer has ids only; and an answer may be nothing but an end of sequence.
        out.write(" ".join(map(str, last.outputs[0].token_ids)) + "\n")
    return last


def _stream_batch(llm: LLM, prompts: list[Prompt], params: SamplingParams, out: Output) -> list[RequestOutput]:
    """Print each prompt's answer when it is finished; returns them in the order of the prompts."""
    numbers = _Numbers(prompts)
    newest: dict[str, RequestOutput] = {}
    done: dict[int, RequestOutput] = {}
    with _Counter(len(prompts)) as counter, contextlib.closing(llm.stream(prompts, params)) as stream:  # type: ignore[type-var]
        for output in stream:
            newest[output.request_id] = output
            if output.finished:
                number = numbers.take(output)
                done[number] = output
                counter.clear()
                _print_answer(number, len(prompts), output, out)
            counter.show(len(done), sum(one.metrics.num_generated_tokens for one in newest.values()))
    return [done[number] for number in sorted(done)]


class _Numbers:
    """Which prompt an output belongs to. Equal prompts are told apart by nothing, and need not be."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self._waiting = list(enumerate(prompts))

    def take(self, output: RequestOutput) -> int:
        wanted: Prompt = output.prompt if output.prompt is not None else list(output.prompt_token_ids)
        index = next((i for i, (_, prompt) in enumerate(self._waiting) if prompt == wanted), 0)
        return self._waiting.pop(index)[0]


class _Counter:
    """A line on stderr that counts, on a terminal only."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._on_terminal = sys.stderr.isatty()
        self._shown = False

    def __enter__(self) -> _Counter:
        self.show(0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, done: int, tokens: int) -> None:
        if self._on_terminal:
            self.clear()
            print(f"{done} of {self._total} prompts, {tokens} tokens", end="", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


def _print_answer(number: int, total: int, output: RequestOutput, out: Output) -> None:
    prompt = output.prompt if output.prompt is not None else " ".join(map(str, output.prompt_token_ids))
    shown = " ".join(prompt.split())
    shown = shown if len(shown) <= _HEADER_CHARACTERS else shown[: _HEADER_CHARACTERS - 3] + "..."
    for sample in output.outputs:
        which = f", sample {sample.index + 1}" if len(output.outputs) > 1 else ""
        text = sample.text or " ".join(map(str, sample.token_ids))
        out.write(f"== {number + 1} of {total}{which}: {shown}\n{text}" + ("" if text.endswith("\n") else "\n"))
